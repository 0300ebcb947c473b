"""Node selectors, tolerations and pod affinity terms, compiled once per pod shape.

Pure functions over label maps. The vectorised evaluation over all nodes is in `nodes.py`
(label columns); what is here decides for one object.

Source: component-helpers nodeaffinity, core/v1 Toleration.ToleratesTaint, framework.AffinityTerm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Labels = Mapping[str, str]
Taint = tuple[str, str, str]
"""(key, value, effect)."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One expression of a node selector; `field` means metadata.name instead of a label."""

    key: str
    operator: str
    values: tuple[str, ...]
    field: bool = False

    def matches(self, labels: Labels, name: str) -> bool:
        value = (name if self.key == "metadata.name" else None) if self.field else labels.get(self.key)
        if self.operator == "In":
            return value is not None and value in self.values
        if self.operator == "NotIn":
            return value is None or value not in self.values
        if self.operator == "Exists":
            return value is not None
        if self.operator == "DoesNotExist":
            return value is None
        if self.operator in ("Gt", "Lt"):
            return value is not None and compare_integers(value, self.operator, self.values)
        return False


def compare_integers(value: str, operator: str, bounds: Sequence[str]) -> bool:
    """Evaluate Gt and Lt; texts that are no integers never match."""
    try:
        return int(value) > int(bounds[0]) if operator == "Gt" else int(value) < int(bounds[0])
    except (ValueError, IndexError):
        return False


@dataclass(frozen=True, slots=True)
class NodeTerm:
    """Requirements that must all hold. One without any matches no node."""

    requirements: tuple[Requirement, ...]

    def matches(self, labels: Labels, name: str) -> bool:
        return bool(self.requirements) and all(r.matches(labels, name) for r in self.requirements)


def node_term(term: Mapping[str, Any]) -> NodeTerm:
    def read(items: Sequence[Mapping[str, Any]] | None, field: bool) -> list[Requirement]:
        return [Requirement(e["key"], e["operator"], tuple(e.get("values") or ()), field) for e in items or ()]

    return NodeTerm((*read(term.get("matchExpressions"), False), *read(term.get("matchFields"), True)))


@dataclass(frozen=True, slots=True)
class NodeSelector:
    """spec.nodeSelector (all labels equal) and required node affinity (any term) together."""

    equal: tuple[tuple[str, str], ...]
    terms: tuple[NodeTerm, ...] | None

    def matches(self, labels: Labels, name: str) -> bool:
        if any(labels.get(key) != value for key, value in self.equal):
            return False
        return self.terms is None or any(term.matches(labels, name) for term in self.terms)

    def node_names(self) -> frozenset[str] | None:
        """Give the only nodes that can match by name; None when names do not narrow the choice."""
        if not self.terms:
            return None
        union: set[str] = set()
        for term in self.terms:
            wanted = [set(r.values) for r in term.requirements if r.field and r.key == "metadata.name" and r.operator == "In"]
            if not wanted:
                return None
            union |= set.intersection(*wanted)
        return frozenset(union)


def required_node_selector(spec: Mapping[str, Any]) -> NodeSelector | None:
    """Compile what a pod requires of its node's labels and name; None when it requires nothing."""
    equal = tuple((spec.get("nodeSelector") or {}).items())
    affinity = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if not equal and affinity is None:
        return None
    return NodeSelector(equal, None if affinity is None else tuple(node_term(t) for t in affinity.get("nodeSelectorTerms") or ()))


def preferred_node_terms(node_affinity: Mapping[str, Any] | None) -> tuple[tuple[int, NodeTerm], ...]:
    """Give (weight, term) pairs; weight zero and empty terms count for nothing and are left out."""
    items = (node_affinity or {}).get("preferredDuringSchedulingIgnoredDuringExecution") or ()
    pairs = [(int(item.get("weight", 0)), node_term(item.get("preference") or {})) for item in items]
    return tuple((weight, term) for weight, term in pairs if weight and term.requirements)


@dataclass(frozen=True, slots=True)
class Toleration:
    key: str
    operator: str
    value: str
    effect: str

    def tolerates(self, taint: Taint) -> bool:
        if self.effect and self.effect != taint[2]:
            return False
        if self.key and self.key != taint[0]:
            return False
        if self.operator in ("", "Equal"):
            return self.value == taint[1]
        return self.operator == "Exists"


def tolerations(spec: Mapping[str, Any]) -> tuple[Toleration, ...]:
    return tuple(
        Toleration(t.get("key") or "", t.get("operator") or "", t.get("value") or "", t.get("effect") or "")
        for t in spec.get("tolerations") or ()
    )


def taints(node: Mapping[str, Any]) -> tuple[Taint, ...]:
    return tuple((t.get("key") or "", t.get("value") or "", t.get("effect") or "") for t in (node.get("spec") or {}).get("taints") or ())


def untolerated(node_taints: Sequence[Taint], tolerated_by: Sequence[Toleration]) -> Taint | None:
    """Find the first taint that keeps the pod off the node (NoSchedule or NoExecute)."""
    for taint in node_taints:
        if taint[2] != "PreferNoSchedule" and not any(t.tolerates(taint) for t in tolerated_by):
            return taint
    return None


@dataclass(frozen=True, slots=True)
class PodTerm:
    """One pod affinity term as a key: equal terms of different pods are the same object to count by.

    `selector_key` is a canonical form of the label selector (None matches nothing),
    `namespace_selector_key` is None when absent. `weight` is 0 for required terms.
    """

    topology_key: str
    namespaces: frozenset[str]
    selector: Selector
    namespace_selector: Selector | None
    weight: int = 0

    def matches(self, namespace: str, labels: Labels, namespace_labels: Labels) -> bool:
        if namespace not in self.namespaces and not (
            self.namespace_selector is not None and self.namespace_selector.matches(namespace_labels)
        ):
            return False
        return self.selector.matches(labels)


@dataclass(frozen=True, slots=True)
class Selector:
    """A label selector that is a value: equal content is equal and hashes alike.

    Made only by `selector`; `extra` are labels merged in from matchLabelKeys.
    """

    requirements: tuple[tuple[str, str, tuple[str, ...]], ...]
    nothing: bool = False

    @property
    def is_empty(self) -> bool:
        """Matches everything."""
        return not self.requirements and not self.nothing

    def matches(self, labels: Labels) -> bool:
        if self.nothing:
            return False
        for key, operator, values in self.requirements:
            value = labels.get(key)
            if operator == "In":
                if value is None or value not in values:
                    return False
            elif operator == "NotIn":
                if value is not None and value in values:
                    return False
            elif operator == "Exists":
                if value is None:
                    return False
            elif value is not None:
                return False
        return True


NOTHING = Selector((), nothing=True)


def selector(label_selector: Mapping[str, Any] | None, *, extra: Labels | None = None) -> Selector:
    """Compile a LabelSelector; None matches nothing, an empty one everything."""
    if label_selector is None:
        return NOTHING
    items = [(key, "In", (value,)) for key, value in (label_selector.get("matchLabels") or {}).items()]
    for e in label_selector.get("matchExpressions") or ():
        items.append((e["key"], e["operator"], tuple(sorted(e.get("values") or ()))))
    if extra:
        items.extend((key, "In", (value,)) for key, value in extra.items())
    return Selector(tuple(sorted(set(items))))


def set_selector(labels: Labels) -> Selector:
    """Compile a map-shaped selector (Services, ReplicationControllers)."""
    return Selector(tuple(sorted((key, "In", (value,)) for key, value in labels.items())))


def merge(parts: Sequence[Selector]) -> Selector:
    """Give the selector that matches what all parts match."""
    if any(p.nothing for p in parts):
        return NOTHING
    return Selector(tuple(sorted({r for p in parts for r in p.requirements})))


def pod_terms(items: Sequence[Mapping[str, Any]] | None, namespace: str, *, weighted: bool = False) -> tuple[PodTerm, ...]:
    """Compile the terms of one affinity list of a pod in `namespace`."""
    result = []
    for item in items or ():
        term = (item.get("podAffinityTerm") or {}) if weighted else item
        namespaces = frozenset(term.get("namespaces") or ())
        ns_selector = term.get("namespaceSelector")
        if not namespaces and ns_selector is None:
            namespaces = frozenset((namespace,))
        result.append(
            PodTerm(
                term.get("topologyKey") or "",
                namespaces,
                selector(term.get("labelSelector")),
                None if ns_selector is None else selector(ns_selector),
                int(item.get("weight", 0)) if weighted else 0,
            )
        )
    return tuple(result)
