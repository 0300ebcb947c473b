"""RBAC rules as pure functions: does a rule allow, do rules cover other rules, how are rules shown.

Rules are plain dicts in wire form (apiGroups, resources, resourceNames, verbs, nonResourceURLs).
Source: kubernetes pkg/apis/rbac/v1/evaluation_helpers.go, component-helpers auth/rbac/validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from knarr.api.errors import go_quote
from knarr.apiserver.attributes import Attributes

Rule = dict[str, Any]


def resource_matches(rule: Rule, resource: str, subresource: str) -> bool:
    """Does a rule name this resource; `*/sub` names a subresource of everything."""
    combined = f"{resource}/{subresource}" if subresource else resource
    resources = rule.get("resources") or ()
    return "*" in resources or combined in resources or bool(subresource and f"*/{subresource}" in resources)


def path_matches(pattern: str, path: str) -> bool:
    return pattern in ("*", path) or (pattern.endswith("*") and path.startswith(pattern.rstrip("*")))


def rule_matches_verb(rule: Rule, verb: str) -> bool:
    verbs = rule.get("verbs") or ()
    return verb in verbs or "*" in verbs


def rule_allows(rule: Rule, attributes: Attributes) -> bool:
    if not rule_matches_verb(rule, attributes.verb):
        return False
    if not attributes.is_resource:
        return any(path_matches(pattern, attributes.path) for pattern in rule.get("nonResourceURLs") or ())
    groups = rule.get("apiGroups") or ()
    if attributes.group not in groups and "*" not in groups:
        return False
    if not resource_matches(rule, attributes.resource, attributes.subresource):
        return False
    names = rule.get("resourceNames")
    return not names or attributes.name in names


def _breakdown(rule: Rule) -> Iterable[Rule]:
    verbs = rule.get("verbs") or ()
    for group in rule.get("apiGroups") or ():
        for resource in rule.get("resources") or ():
            for verb in verbs:
                base: Rule = {"apiGroups": [group], "resources": [resource], "verbs": [verb]}
                names = rule.get("resourceNames")
                if names:
                    yield from ({**base, "resourceNames": [name]} for name in names)
                else:
                    yield base
    for url in rule.get("nonResourceURLs") or ():
        yield from ({"nonResourceURLs": [url], "verbs": [verb]} for verb in verbs)


def _resource_covered(owned: Sequence[str], wanted: str) -> bool:
    return "*" in owned or wanted in owned or ("/" in wanted and "*/" + wanted.split("/", 1)[1] in owned)


def _covers(owner: Rule, atom: Rule) -> bool:
    if not rule_matches_verb(owner, atom["verbs"][0]):
        return False
    if "nonResourceURLs" in atom:
        path = atom["nonResourceURLs"][0]
        patterns = owner.get("nonResourceURLs") or ()
        return any(pattern == path or (pattern.endswith("*") and path.startswith(pattern.rstrip("*"))) for pattern in patterns)
    groups = owner.get("apiGroups") or ()
    if "*" not in groups and atom["apiGroups"][0] not in groups:
        return False
    if not _resource_covered(owner.get("resources") or (), atom["resources"][0]):
        return False
    owned_names = owner.get("resourceNames")
    return not owned_names or ("resourceNames" in atom and atom["resourceNames"][0] in owned_names)


def uncovered(owned: Sequence[Rule], wanted: Iterable[Rule]) -> list[Rule]:
    """Split the wanted rules into atoms and return those that no owned rule covers."""
    return [atom for rule in wanted for atom in _breakdown(rule) if not any(_covers(owner, atom) for owner in owned)]


def compact(atoms: Sequence[Rule]) -> list[Rule]:
    """Join atoms of one group and resource that differ only in their verb."""
    joined: dict[tuple[str, str, str | None], Rule] = {}
    out: list[Rule] = []
    for atom in atoms:
        if "nonResourceURLs" in atom:
            out.append(atom)
            continue
        names = atom.get("resourceNames")
        key = (atom["apiGroups"][0], atom["resources"][0], names[0] if names else None)
        known = joined.get(key)
        if known is None:
            joined[key] = known = {**atom, "verbs": list(atom["verbs"])}
            out.append(known)
        else:
            known["verbs"].extend(verb for verb in atom["verbs"] if verb not in known["verbs"])
    return out


def go_list(values: Iterable[str]) -> str:
    """A string slice as Go's %q prints it."""
    return "[" + " ".join(go_quote(value) for value in values) + "]"


def describe(rule: Rule) -> str:
    """The short form used in escalation errors: {APIGroups:[""], Resources:["pods"], Verbs:["get"]}."""
    parts = (
        ("APIGroups", "apiGroups"), ("Resources", "resources"), ("NonResourceURLs", "nonResourceURLs"),
        ("ResourceNames", "resourceNames"), ("Verbs", "verbs"),
    )  # fmt: skip
    return "{" + ", ".join(f"{label}:{go_list(rule[field])}" for label, field in parts if rule.get(field)) + "}"
