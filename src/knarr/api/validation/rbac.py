"""Roles and bindings. Source: pkg/apis/rbac/validation."""

from __future__ import annotations

from knarr.api.errors import invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add, validate_label_selector
from knarr.api.validation.strings import Messages, dns_subdomain, path_segment

GROUP = "rbac.authorization.k8s.io"


def rbac_name(value: str) -> Messages:
    return path_segment(value)


def _rules(obj: Object, errors: Errors, *, namespaced: bool) -> None:
    for index, rule in enumerate(obj.get("rules") or ()):
        path, urls = f"rules[{index}]", rule.get("nonResourceURLs") or []
        if not rule.get("verbs"):
            errors.append(required(f"{path}.verbs", "verbs must contain at least one value"))
        if urls:
            if namespaced:
                errors.append(invalid_value(f"{path}.nonResourceURLs", urls, "namespaced rules cannot apply to non-resource URLs"))
            if rule.get("apiGroups") or rule.get("resources") or rule.get("resourceNames"):
                message = "rules cannot apply to both regular resources and non-resource URLs"
                errors.append(invalid_value(f"{path}.nonResourceURLs", urls, message))
            continue
        if not rule.get("apiGroups"):
            errors.append(required(f"{path}.apiGroups", "resource rules must supply at least one api group"))
        if not rule.get("resources"):
            errors.append(required(f"{path}.resources", "resource rules must supply at least one resource"))


def create_role(obj: Object, errors: Errors) -> None:
    _rules(obj, errors, namespaced=True)


def create_cluster_role(obj: Object, errors: Errors) -> None:
    _rules(obj, errors, namespaced=False)
    aggregation = obj.get("aggregationRule")
    if aggregation is not None:
        path, selectors = "aggregationRule.clusterRoleSelectors", aggregation.get("clusterRoleSelectors") or []
        if not selectors:
            errors.append(required(path, "at least one clusterRoleSelector required if aggregationRule is non-nil"))
        for index, selector in enumerate(selectors):
            before = len(errors)
            validate_label_selector(selector, f"{path}[{index}]", errors)
            if len(errors) > before:
                errors.append(invalid_value(f"{path}[{index}]", None, "invalid label selector."))


def _binding(obj: Object, errors: Errors, *, namespaced: bool) -> None:
    reference = obj.get("roleRef") or {}
    group, kind, name = reference.get("apiGroup") or "", reference.get("kind") or "", reference.get("name") or ""
    if group != GROUP:
        errors.append(not_supported("roleRef.apiGroup", group, [GROUP]))
    kinds = ["Role", "ClusterRole"] if namespaced else ["ClusterRole"]
    if kind not in kinds:
        errors.append(not_supported("roleRef.kind", kind, kinds))
    if not name:
        errors.append(required("roleRef.name"))
    else:
        add(errors, "roleRef.name", name, rbac_name(name))
    for index, subject in enumerate(obj.get("subjects") or ()):
        _subject(subject, f"subjects[{index}]", errors, namespaced=namespaced)


def _subject(subject: Object, path: str, errors: Errors, *, namespaced: bool) -> None:
    name, kind, group = subject.get("name") or "", subject.get("kind") or "", subject.get("apiGroup") or ""
    if not name:
        errors.append(required(f"{path}.name"))
    if kind == "ServiceAccount":
        if name:
            add(errors, f"{path}.name", name, dns_subdomain(name))
        if group:
            errors.append(not_supported(f"{path}.apiGroup", group, [""]))
        if not namespaced and not subject.get("namespace"):
            errors.append(required(f"{path}.namespace"))
    elif kind in ("User", "Group"):
        if group != GROUP:
            errors.append(not_supported(f"{path}.apiGroup", group, [GROUP]))
    else:
        errors.append(not_supported(f"{path}.kind", kind, ["ServiceAccount", "User", "Group"]))


def create_role_binding(obj: Object, errors: Errors) -> None:
    _binding(obj, errors, namespaced=True)


def create_cluster_role_binding(obj: Object, errors: Errors) -> None:
    _binding(obj, errors, namespaced=False)


def _same_role(new: Object, old: Object, errors: Errors) -> None:
    if (new.get("roleRef") or {}) != (old.get("roleRef") or {}):
        errors.append(invalid_value("roleRef", new.get("roleRef") or {}, "cannot change roleRef"))


def update_role_binding(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_role_binding(new, errors)
    _same_role(new, old, errors)


def update_cluster_role_binding(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_cluster_role_binding(new, errors)
    _same_role(new, old, errors)
