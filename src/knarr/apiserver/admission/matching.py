"""Which requests a webhook or an admission policy is for: rules, selectors, and what is exempt from both.

Source: apiserver pkg/admission/plugin/webhook/predicates, admission/plugin/policy/matching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import orjson

from knarr.api import meta
from knarr.api.errors import not_found
from knarr.api.scheme import Resource
from knarr.api.selectors import LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, DELETE, UPDATE
from knarr.apiserver.attributes import AdmissionRequest, Store

_EXEMPT = frozenset({
    "validatingwebhookconfigurations", "mutatingwebhookconfigurations", "validatingadmissionpolicies", "validatingadmissionpolicybindings",
    "mutatingadmissionpolicies", "mutatingadmissionpolicybindings",
})  # fmt: skip
GROUP = "admissionregistration.k8s.io"


class Equivalent(NamedTuple):
    """Another version of the same resource and how to bring an object into it."""

    resource: Resource
    convert: Callable[[Object], Object]


EquivalentsOf = Callable[[Resource], Sequence[Equivalent]]


def is_exempt(resource: Resource) -> bool:
    """The configuration of admission itself passes, or nobody could ever mend a broken one."""
    return resource.group == GROUP and resource.plural in _EXEMPT


def _has(values: Iterable[str], value: str) -> bool:
    values = tuple(values)
    return "*" in values or value in values


def _resource_in(resources: Iterable[str], plural: str, subresource: str) -> bool:
    for text in resources:
        name, _, sub = text.partition("/")
        if (name in ("*", plural)) and (sub in ("*", subresource)):
            return True
    return False


def rule_matches(rule: Object, operation: str, resource: Resource, subresource: str) -> bool:
    """Match one rule (operations, apiGroups, apiVersions, resources, scope) on the request as it came."""
    scope = rule.get("scope") or "*"
    # A Namespace is cluster-scoped for this purpose, though requests on it carry its name as their namespace.
    namespaced = resource.namespaced
    if scope == "Namespaced" and not namespaced:
        return False
    if scope == "Cluster" and namespaced:
        return False
    return (
        _has(rule.get("operations") or (), operation)
        and _has(rule.get("apiGroups") or (), resource.group)
        and _has(rule.get("apiVersions") or (), resource.version)
        and _resource_in(rule.get("resources") or (), resource.plural, subresource)
    )


@lru_cache(maxsize=4096)
def _selector(encoded: bytes) -> LabelSelector:
    return from_label_selector(orjson.loads(encoded))


def selector_of(selector: Object | None) -> LabelSelector | None:
    """Compile a label selector object; None when it selects everything."""
    if not selector or not (selector.get("matchLabels") or selector.get("matchExpressions")):
        return None
    return _selector(orjson.dumps(selector))


class NamespaceMatcher:
    """namespaceSelector and objectSelector."""

    def __init__(self, namespaces: Store) -> None:
        self._namespaces = namespaces

    def labels(self, request: AdmissionRequest) -> dict[str, str]:
        """Labels of the request's namespace; of the Namespace itself as it will be. Raises 404 when there is none."""
        if request.resource.plural == "namespaces" and not request.resource.group:
            if request.operation in (CREATE, UPDATE) and not request.subresource and request.object is not None:
                return dict(meta.labels(request.object))
        namespace = self._namespaces.get_nowait("", request.namespace)
        if namespace is None:
            raise not_found("namespaces", request.namespace)
        return dict(meta.labels(namespace))

    def namespace_matches(self, selector: Object | None, request: AdmissionRequest) -> bool:
        compiled = selector_of(selector)
        is_namespace = request.resource.plural == "namespaces" and not request.resource.group
        if compiled is None or (not request.namespace and not is_namespace) or (not request.resource.namespaced and not is_namespace):
            # Cluster-scoped objects match every namespace selector.
            return True
        return compiled.matches(self.labels(request))

    @staticmethod
    def object_matches(selector: Object | None, request: AdmissionRequest) -> bool:
        compiled = selector_of(selector)
        if compiled is None:
            return True
        for obj in (request.object, request.old_object):
            if obj is not None and "metadata" in obj and compiled.matches(meta.labels(obj)):
                return True
        return False


class Match(NamedTuple):
    """The form in which a hook or policy sees the request: the version asked for by its rule, and how to get there (None: as it is)."""

    resource: Resource
    convert: Callable[[Object], Object] | None


def match_rules(rules: Iterable[Object], policy: str, request: AdmissionRequest, equivalents: EquivalentsOf) -> Match | None:
    """Find the first rule that matches; under Equivalent also in other versions of the resource."""
    rules = tuple(rules)
    for rule in rules:
        if rule_matches(rule, request.operation, request.resource, request.subresource):
            return Match(request.resource, None)
    if policy == "Exact":
        return None
    others = equivalents(request.resource)
    for rule in rules:
        for other in others:
            if rule_matches(rule, request.operation, other.resource, request.subresource):
                return Match(other.resource, other.convert)
    return None


def may_match(rules: Iterable[Object], operation: str, resource: Resource, subresource: str) -> bool:
    """Whether some rule could match a resource in any version: the cheap first look."""
    return any(
        _has(rule.get("operations") or (), operation) and _resource_in(rule.get("resources") or (), resource.plural, subresource)
        and _has(rule.get("apiGroups") or (), resource.group)
        for rule in rules
    )  # fmt: skip


__all__ = [
    "CREATE", "DELETE", "UPDATE", "Equivalent", "EquivalentsOf", "Match", "NamespaceMatcher", "is_exempt", "match_rules", "may_match",
    "rule_matches", "selector_of",
]  # fmt: skip
