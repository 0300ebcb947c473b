"""Affinity, tolerations, taints, topology spread constraints, node selectors.

Source: pkg/apis/core/validation validateAffinity, ValidateTolerations, validateTopologySpreadConstraints, ValidateNodeSelector.
"""

from __future__ import annotations

from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add, validate_label_selector
from knarr.api.validation.strings import dns_label, dns_subdomain, label_key_errors, label_value_errors

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def _requirement(item: Object, path: str, errors: Errors, *, any_value: bool) -> None:
    operator, values = item.get("operator") or "", item.get("values") or ()
    if operator in ("In", "NotIn"):
        if not values:
            errors.append(required(f"{path}.values", "must be specified when `operator` is 'In' or 'NotIn'"))
    elif operator in ("Exists", "DoesNotExist"):
        if values:
            errors.append(field_forbidden(f"{path}.values", "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"))
    elif operator in ("Gt", "Lt"):
        if len(values) != 1:
            errors.append(required(f"{path}.values", "must be specified single value when `operator` is 'Lt' or 'Gt'"))
    else:
        errors.append(invalid_value(f"{path}.operator", operator, "not a valid selector operator"))
    key = item.get("key") or ""
    add(errors, f"{path}.key", key, label_key_errors(key))
    if not any_value:
        for index, value in enumerate(values):
            add(errors, f"{path}.values[{index}]", value, label_value_errors(value))


def _field_requirement(item: Object, path: str, errors: Errors) -> None:
    operator, values, key = item.get("operator") or "", item.get("values") or (), item.get("key") or ""
    if operator in ("In", "NotIn"):
        if len(values) != 1:
            message = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector"
            errors.append(required(f"{path}.values", message))
    else:
        errors.append(invalid_value(f"{path}.operator", operator, "not a valid selector operator"))
    if key != "metadata.name":
        errors.append(invalid_value(f"{path}.key", key, "not a valid field selector key"))
    else:
        for index, value in enumerate(values):
            add(errors, f"{path}.values[{index}]", value, dns_subdomain(value))


def validate_node_selector_term(term: Object, path: str, errors: Errors, *, any_value: bool = False) -> None:
    for index, item in enumerate(term.get("matchExpressions") or ()):
        _requirement(item, f"{path}.matchExpressions[{index}]", errors, any_value=any_value)
    for index, item in enumerate(term.get("matchFields") or ()):
        _field_requirement(item, f"{path}.matchFields[{index}]", errors)


def validate_node_selector(selector: Object, path: str, errors: Errors, *, any_value: bool = False) -> None:
    terms = selector.get("nodeSelectorTerms") or ()
    if not terms:
        errors.append(required(f"{path}.nodeSelectorTerms", "must have at least one node selector term"))
    for index, term in enumerate(terms):
        validate_node_selector_term(term, f"{path}.nodeSelectorTerms[{index}]", errors, any_value=any_value)


def _label_keys(keys: list[str], selector: Object | None, path: str, errors: Errors) -> None:
    if not keys:
        return
    if selector is None:
        errors.append(field_forbidden(path, "must not be specified when labelSelector is not set"))
        return
    for index, key in enumerate(keys):
        add(errors, f"{path}[{index}]", key, label_key_errors(key))


def _match_keys(term: Object, path: str, errors: Errors) -> None:
    wanted, unwanted, selector = term.get("matchLabelKeys") or [], term.get("mismatchLabelKeys") or [], term.get("labelSelector")
    _label_keys(wanted, selector, f"{path}.matchLabelKeys", errors)
    _label_keys(unwanted, selector, f"{path}.mismatchLabelKeys", errors)
    if selector is not None and wanted:
        positions = {key: index for index, key in enumerate(wanted)}
        seen = set(selector.get("matchLabels") or {})
        for expression in selector.get("matchExpressions") or ():
            key = expression.get("key") or ""
            if key in positions and key in seen:
                errors.append(invalid_value(f"{path}[{positions[key]}]", key, "exists in both matchLabelKeys and labelSelector"))
            seen.add(key)
    for index, key in enumerate(wanted):
        if key in unwanted:
            errors.append(invalid_value(f"{path}.matchLabelKeys[{index}]", key, "exists in both matchLabelKeys and mismatchLabelKeys"))


def _pod_term(term: Object, path: str, errors: Errors) -> None:
    validate_label_selector(term.get("labelSelector"), f"{path}.labelSelector", errors)
    validate_label_selector(term.get("namespaceSelector"), f"{path}.namespaceSelector", errors)
    for name in term.get("namespaces") or ():
        add(errors, f"{path}.namespace", name, dns_label(name))
    _match_keys(term, path, errors)
    key = term.get("topologyKey") or ""
    if not key:
        errors.append(required(f"{path}.topologyKey", "can not be empty"))
    add(errors, f"{path}.topologyKey", key, label_key_errors(key))


_REQUIRED, _PREFERRED = "requiredDuringSchedulingIgnoredDuringExecution", "preferredDuringSchedulingIgnoredDuringExecution"


def _weight(item: Object, path: str, errors: Errors) -> None:
    weight = item.get("weight") or 0
    if not 0 < weight <= 100:
        errors.append(invalid_value(f"{path}.weight", weight, "must be in the range 1-100"))


def _pod_affinity(affinity: Object, path: str, errors: Errors) -> None:
    for index, term in enumerate(affinity.get(_REQUIRED) or ()):
        _pod_term(term, f"{path}.{_REQUIRED}[{index}]", errors)
    for index, item in enumerate(affinity.get(_PREFERRED) or ()):
        own = f"{path}.{_PREFERRED}[{index}]"
        _weight(item, own, errors)
        _pod_term(item.get("podAffinityTerm") or {}, f"{own}.podAffinityTerm", errors)


def validate_affinity(affinity: Object, path: str, errors: Errors) -> None:
    """spec.affinity."""
    node = affinity.get("nodeAffinity")
    if node is not None:
        own = f"{path}.nodeAffinity"
        if node.get(_REQUIRED) is not None:
            validate_node_selector(node[_REQUIRED], f"{own}.{_REQUIRED}", errors)
        for index, item in enumerate(node.get(_PREFERRED) or ()):
            _weight(item, f"{own}.{_PREFERRED}[{index}]", errors)
            validate_node_selector_term(item.get("preference") or {}, f"{own}.{_PREFERRED}[{index}].preference", errors, any_value=True)
    for key in ("podAffinity", "podAntiAffinity"):
        if affinity.get(key) is not None:
            _pod_affinity(affinity[key], f"{path}.{key}", errors)


def validate_effect(effect: str, path: str, errors: Errors) -> None:
    if effect not in EFFECTS:
        errors.append(not_supported(path, effect, EFFECTS))


def validate_tolerations(tolerations: list[Object], path: str, errors: Errors) -> None:
    for index, toleration in enumerate(tolerations):
        own = f"{path}[{index}]"
        key, operator = toleration.get("key") or "", toleration.get("operator") or ""
        value, effect = toleration.get("value") or "", toleration.get("effect") or ""
        if key:
            found = label_key_errors(key)
            if found:
                add(errors, f"{own}.key", key, found)
        elif operator != "Exists":
            message = 'operator must be Exists when `key` is empty, which means "match all values and all keys"'
            errors.append(invalid_value(f"{own}.operator", operator, message))
        if toleration.get("tolerationSeconds") is not None and effect != "NoExecute":
            errors.append(invalid_value(f"{own}.effect", effect, "effect must be 'NoExecute' when `tolerationSeconds` is set"))
        if operator in ("Equal", ""):
            found = label_value_errors(value)
            if found:
                errors.append(invalid_value(f"{own}.operator", value, ";".join(found)))
        elif operator == "Exists":
            if value:
                errors.append(invalid_value(f"{own}.operator", value, "value must be empty when `operator` is 'Exists'"))
        else:
            errors.append(not_supported(f"{own}.operator", operator, ["Equal", "Exists"]))
        if effect:
            validate_effect(effect, f"{own}.effect", errors)


def validate_spread_constraints(constraints: list[Object], path: str, errors: Errors) -> None:
    for index, constraint in enumerate(constraints):
        own = f"{path}[{index}]"
        skew, key, action = constraint.get("maxSkew") or 0, constraint.get("topologyKey") or "", constraint.get("whenUnsatisfiable") or ""
        if skew <= 0:
            errors.append(invalid_value(f"{own}.maxSkew", skew, "must be greater than zero"))
        if not key:
            errors.append(required(f"{own}.topologyKey", "can not be empty"))
        if action not in ("DoNotSchedule", "ScheduleAnyway"):
            errors.append(not_supported(f"{own}.whenUnsatisfiable", action, ["DoNotSchedule", "ScheduleAnyway"]))
        for other in constraints[index + 1 :]:
            if (other.get("topologyKey") or "") == key and (other.get("whenUnsatisfiable") or "") == action:
                errors.append(duplicate(f"{own}.{{topologyKey, whenUnsatisfiable}}", f"{{{key}, {action}}}"))
                break
        domains = constraint.get("minDomains")
        if domains is not None:
            if domains <= 0:
                errors.append(invalid_value(f"{own}.minDomains", domains, "must be greater than zero"))
            if action != "DoNotSchedule":
                message = f"can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}"
                errors.append(invalid_value(f"{own}.minDomains", domains, message))
        for name in ("nodeAffinityPolicy", "nodeTaintsPolicy"):
            policy = constraint.get(name)
            if policy is not None and policy not in ("Honor", "Ignore"):
                errors.append(not_supported(f"{own}.{name}", policy, ["Honor", "Ignore"]))
        selector = constraint.get("labelSelector")
        if constraint.get("matchLabelKeys"):
            _match_keys({"matchLabelKeys": constraint["matchLabelKeys"], "labelSelector": selector}, own, errors)
        validate_label_selector(selector, f"{own}.labelSelector", errors)
