"""PodDisruptionBudgets. Source: pkg/apis/policy/validation."""

from __future__ import annotations

from knarr.api.errors import invalid_value, not_supported
from knarr.api.validation.apps import at_most_all, int_or_percent
from knarr.api.validation.metadata import Errors, Object, nonnegative, validate_conditions, validate_label_selector


def create_budget(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    if spec.get("minAvailable") is not None and spec.get("maxUnavailable") is not None:
        errors.append(invalid_value("spec", spec, "minAvailable and maxUnavailable cannot be both set"))
    for key in ("minAvailable", "maxUnavailable"):
        if spec.get(key) is not None:
            int_or_percent(spec[key], f"spec.{key}", errors)
            at_most_all(spec[key], f"spec.{key}", errors)
    validate_label_selector(spec.get("selector"), "spec.selector", errors)
    policy = spec.get("unhealthyPodEvictionPolicy")
    if policy is not None and policy not in ("IfHealthyBudget", "AlwaysAllow"):
        errors.append(not_supported("spec.unhealthyPodEvictionPolicy", policy, ["AlwaysAllow", "IfHealthyBudget"]))


def update_budget(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource != "status":
        create_budget(new, errors)
        return
    status = new.get("status") or {}
    validate_conditions(status.get("conditions"), "status.conditions", errors)
    for key in ("disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"):
        nonnegative(errors, f"status.{key}", status.get(key))
