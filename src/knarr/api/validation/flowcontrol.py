"""FlowSchemas and PriorityLevelConfigurations.

Source: pkg/apis/flowcontrol/validation/validation.go, apiserver pkg/apis/flowcontrol/bootstrap/default.go.
"""

from __future__ import annotations

import math
from typing import Any

from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors
from knarr.api.validation.strings import dns_label, dns_subdomain

Object = dict[str, Any]
_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "proxy", "update", "watch")
_SUBJECTS = {"Group": "group", "ServiceAccount": "serviceAccount", "User": "user"}
_MAX_PRECEDENCE = 10000
_MAX_QUEUES = 10_000_000
_MAX_HASH_BITS = 60
_EVERYTHING = [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "clusterScope": True, "namespaces": ["*"]}]
_EVERY_PATH = [{"verbs": ["*"], "nonResourceURLs": ["*"]}]


def _mandatory_schema(name: str, precedence: int, groups: tuple[str, ...], distinguisher: str) -> Object:
    subjects = [{"kind": "Group", "group": {"name": group}} for group in groups]
    return {
        "matchingPrecedence": precedence,
        "priorityLevelConfiguration": {"name": name},
        **({"distinguisherMethod": {"type": distinguisher}} if distinguisher else {}),
        "rules": [{"subjects": subjects, "resourceRules": _EVERYTHING, "nonResourceRules": _EVERY_PATH}],
    }


_MANDATORY_SCHEMAS = {
    "exempt": _mandatory_schema("exempt", 1, ("system:masters",), ""),
    "catch-all": _mandatory_schema("catch-all", _MAX_PRECEDENCE, ("system:unauthenticated", "system:authenticated"), "ByUser"),
}
_CATCH_ALL = {"type": "Limited", "limited": {"nominalConcurrencyShares": 5, "lendablePercent": 0, "limitResponse": {"type": "Reject"}}}


def create_flow_schema(obj: Object, errors: Errors) -> None:
    spec, name = obj.get("spec") or {}, (obj.get("metadata") or {}).get("name") or ""
    precedence = spec.get("matchingPrecedence") or 0
    if precedence <= 0:
        errors.append(invalid_value("spec.matchingPrecedence", precedence, "must be a positive value"))
    if precedence > _MAX_PRECEDENCE:
        errors.append(invalid_value("spec.matchingPrecedence", precedence, f"must not be greater than {_MAX_PRECEDENCE}"))
    if precedence == 1 and name != "exempt":
        detail = "only the schema named 'exempt' may have matchingPrecedence 1"
        errors.append(invalid_value("spec.matchingPrecedence", precedence, detail))
    method = spec.get("distinguisherMethod")
    if method is not None and method.get("type") not in ("ByNamespace", "ByUser"):
        errors.append(not_supported("spec.distinguisherMethod.type", method, ("ByNamespace", "ByUser")))
    level = (spec.get("priorityLevelConfiguration") or {}).get("name") or ""
    if not level:
        errors.append(required("spec.priorityLevelConfiguration.name", "must reference a priority level"))
    else:
        errors += [invalid_value("spec.priorityLevelConfiguration.name", level, message) for message in dns_subdomain(level)]
    for index, rule in enumerate(spec.get("rules") or ()):
        _rule(rule, f"spec.rules[{index}]", errors)
    fixed = _MANDATORY_SCHEMAS.get(name)
    if fixed is not None and _lean(spec) != _lean(fixed):
        errors.append(invalid_value("spec", spec, f"spec of '{name}' must equal the fixed value"))
    _conditions(obj, errors)


def update_flow_schema(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource:
        _conditions(new, errors)
    else:
        create_flow_schema(new, errors)


def create_priority_level(obj: Object, errors: Errors) -> None:
    spec, name = obj.get("spec") or {}, (obj.get("metadata") or {}).get("name") or ""
    kind, limited, exempt = spec.get("type") or "", spec.get("limited"), spec.get("exempt")
    if (name == "exempt") != (kind == "Exempt"):
        errors.append(invalid_value("spec.type", kind, "must be 'Exempt' if and only if `name` is 'exempt'"))
    if kind == "Exempt":
        if limited is not None:
            errors.append(field_forbidden("spec.limited", "must be nil if the type is not Limited"))
        if exempt is not None:
            _shares(exempt, "spec.exempt", errors)
    elif kind == "Limited":
        if exempt is not None:
            errors.append(field_forbidden("spec.exempt", "must be nil if the type is Limited"))
        if limited is None:
            errors.append(required("spec.limited", "must not be empty when type is Limited"))
        else:
            _limited(limited, errors)
    else:
        errors.append(not_supported("spec.type", kind, ("Exempt", "Limited")))
    if name == "exempt" and _lean({**spec, "exempt": None}) != {"type": "Exempt"}:
        detail = "spec of 'exempt' except the 'spec.exempt' field must equal the fixed value"
        errors.append(invalid_value("spec", spec, detail))
    if name == "catch-all" and _lean(spec) != _lean(_CATCH_ALL):
        errors.append(invalid_value("spec", spec, "spec of 'catch-all' must equal the fixed value"))
    _conditions(obj, errors)


def update_priority_level(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource:
        _conditions(new, errors)
    else:
        create_priority_level(new, errors)


def _lean(value: Any) -> Any:
    """The value without members that say nothing, so that what is left out equals what is empty."""
    if isinstance(value, dict):
        members = {key: _lean(member) for key, member in value.items()}
        return {key: member for key, member in members.items() if member not in (None, "", [], {})}
    return [_lean(item) for item in value] if isinstance(value, list) else value


def _conditions(obj: Object, errors: Errors) -> None:
    seen: set[str] = set()
    for index, condition in enumerate((obj.get("status") or {}).get("conditions") or ()):
        path, kind = f"status.conditions[{index}].type", condition.get("type") or ""
        if kind in seen:
            errors.append(duplicate(path, kind))
        seen.add(kind)
        if not kind:
            errors.append(required(path))


def _rule(rule: Object, path: str, errors: Errors) -> None:
    subjects, resources, urls = (rule.get(key) or [] for key in ("subjects", "resourceRules", "nonResourceRules"))
    for index, subject in enumerate(subjects):
        _subject(subject, f"{path}.subjects[{index}]", errors)
    if not subjects:
        errors.append(required(f"{path}.subjects", "subjects must contain at least one value"))
    if not resources and not urls:
        errors.append(required(path, "at least one of resourceRules and nonResourceRules has to be non-empty"))
    for index, resource in enumerate(resources):
        _resource_rule(resource, f"{path}.resourceRules[{index}]", errors)
    for index, url in enumerate(urls):
        own, paths = f"{path}.nonResourceRules[{index}]", url.get("nonResourceURLs") or []
        _verbs(url, own, errors)
        if not paths:
            errors.append(required(f"{own}.nonResourceURLs", "nonResourceURLs must contain at least one value"))
        elif "*" in paths:
            _alone(paths, f"{own}.nonResourceURLs", "non-resource URLs", errors)
        else:
            for position, text in enumerate(paths):
                _url_path(text, f"{own}.nonResourceURLs[{position}]", errors)


def _subject(subject: Object, path: str, errors: Errors) -> None:
    kind = subject.get("kind") or ""
    member = _SUBJECTS.get(kind)
    if member is None:
        errors.append(not_supported(f"{path}.kind", kind, _SUBJECTS))
        return
    named, own = subject.get(member), f"{path}.{member}"
    if named is None:
        errors.append(required(own, f"{member} is required when subject kind is '{kind}'"))
    else:
        name = named.get("name") or ""
        if not name:
            errors.append(required(f"{own}.name"))
        if member == "serviceAccount":
            if name and name != "*":
                errors += [invalid_value(f"{own}.name", name, message) for message in dns_subdomain(name)]
            namespace = named.get("namespace") or ""
            if not namespace:
                errors.append(required(f"{own}.namespace", "must specify namespace for service account"))
            else:
                errors += [invalid_value(f"{own}.namespace", namespace, message) for message in dns_label(namespace)]
    for other_kind, other in _SUBJECTS.items():
        if other != member and subject.get(other) is not None:
            errors.append(field_forbidden(f"{path}.{other}", f"{other} is forbidden when subject kind is not '{other_kind}'"))


def _alone(values: list[str], path: str, what: str, errors: Errors) -> None:
    if len(values) > 1 and "*" in values:
        errors.append(invalid_value(path, values, f"if '*' is present, must not specify other {what}"))


def _verbs(rule: Object, path: str, errors: Errors) -> None:
    verbs, own = rule.get("verbs") or [], f"{path}.verbs"
    if not verbs:
        errors.append(required(own, "verbs must contain at least one value"))
    elif "*" in verbs:
        _alone(verbs, own, "verbs", errors)
    elif not set(verbs) <= set(_VERBS):
        errors.append(not_supported(own, verbs, _VERBS))


def _resource_rule(rule: Object, path: str, errors: Errors) -> None:
    _verbs(rule, path, errors)
    for key, one, many in (("apiGroups", "api group", "api groups"), ("resources", "resource", "resources")):
        values = rule.get(key) or []
        if not values:
            errors.append(required(f"{path}.{key}", f"resource rules must supply at least one {one}"))
        _alone(values, f"{path}.{key}", many, errors)
    namespaces = rule.get("namespaces") or []
    own = f"{path}.namespaces"
    if not namespaces and not rule.get("clusterScope"):
        errors.append(required(own, "resource rules that are not cluster scoped must supply at least one namespace"))
    elif "*" in namespaces:
        _alone(namespaces, own, "namespaces", errors)
    else:
        for index, namespace in enumerate(namespaces):
            for message in dns_label(namespace):
                detail = f"each member of this list must be '*' or a DNS-1123 label; {message}"
                errors.append(invalid_value(f"{own}[{index}]", namespace, detail))


def _url_path(text: str, path: str, errors: Errors) -> None:
    problem = ""
    if not text:
        problem = "must not be empty"
    elif text == "/":
        return
    elif not text.startswith("/"):
        problem = "must start with slash"
    elif " " in text:
        problem = "must not contain white-space"
    elif "//" in text:
        problem = "must not contain double slash"
    elif text.count("*") > 1 or (text.count("*") == 1 and not text.endswith("/*")):
        problem = "wildcard can only do suffix matching"
    if problem:
        errors.append(invalid_value(path, text, problem))


def _shares(level: Object, path: str, errors: Errors) -> None:
    shares, percent = level.get("nominalConcurrencyShares"), level.get("lendablePercent")
    if shares is not None and shares < 0:
        errors.append(invalid_value(f"{path}.nominalConcurrencyShares", shares, "must be a non-negative integer"))
    if percent is not None and not 0 <= percent <= 100:
        errors.append(invalid_value(f"{path}.lendablePercent", percent, "must be between 0 and 100, inclusive"))


def _limited(limited: Object, errors: Errors) -> None:
    path = "spec.limited"
    _shares(limited, path, errors)
    borrowing = limited.get("borrowingLimitPercent")
    if borrowing is not None and borrowing < 0:
        errors.append(invalid_value(f"{path}.borrowingLimitPercent", borrowing, "if specified, must be a non-negative integer"))
    response = limited.get("limitResponse") or {}
    kind, queuing, own = response.get("type") or "", response.get("queuing"), f"{path}.limitResponse"
    if kind == "Reject":
        if queuing is not None:
            errors.append(field_forbidden(f"{own}.queuing", "must be nil if limited.limitResponse.type is not Limited"))
    elif kind == "Queue":
        if queuing is None:
            errors.append(required(f"{own}.queuing", "must not be empty if limited.limitResponse.type is Limited"))
        else:
            _queuing(queuing, f"{own}.queuing", errors)
    else:
        errors.append(not_supported(f"{own}.type", kind, ("Queue", "Reject")))


def _queuing(queuing: Object, path: str, errors: Errors) -> None:
    length, queues, hand = (queuing.get(key) or 0 for key in ("queueLengthLimit", "queues", "handSize"))
    if length <= 0:
        errors.append(invalid_value(f"{path}.queueLengthLimit", length, "must be positive"))
    if queues <= 0:
        errors.append(invalid_value(f"{path}.queues", queues, "must be positive"))
    elif queues > _MAX_QUEUES:
        errors.append(invalid_value(f"{path}.queues", queues, f"must not be greater than {_MAX_QUEUES}"))
    if hand <= 0:
        errors.append(invalid_value(f"{path}.handSize", hand, "must be positive"))
    elif hand > queues:
        errors.append(invalid_value(f"{path}.handSize", hand, f"should not be greater than queues ({queues})"))
    elif math.ceil(sum(math.log2(queues - i) for i in range(hand))) > _MAX_HASH_BITS:
        detail = f"required entropy bits of deckSize {queues} and handSize {hand} should not be greater than {_MAX_HASH_BITS}"
        errors.append(invalid_value(f"{path}.handSize", hand, detail))
