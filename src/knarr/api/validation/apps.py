"""Workloads: Deployment, ReplicaSet, StatefulSet, DaemonSet, ReplicationController, ControllerRevision.

Source: pkg/apis/apps/validation, pkg/apis/core/validation ValidateReplicationController.
"""

from __future__ import annotations

from typing import Any

from knarr.api import selectors
from knarr.api.errors import field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.claims import validate_claim_spec
from knarr.api.validation.metadata import Errors, Object, add, immutable, nonnegative, validate_label_selector
from knarr.api.validation.pod import validate_pod_template
from knarr.api.validation.strings import NEGATIVE, dns_label, percent

NOT_MATCHING = "`selector` does not match template `labels`"


def matches(selector: Object | None, labels: dict[str, str] | None) -> bool | None:
    """Whether labels match a LabelSelector; None when the selector itself cannot be read, True when it is empty."""
    try:
        compiled = selectors.from_label_selector(selector)
    except ValueError:
        return None
    return bool(compiled.matches(labels or {}))


def _selector(spec: Object, kind: str, path: str, errors: Errors) -> None:
    selector = spec.get("selector")
    if selector is None:
        errors.append(required(f"{path}.selector"))
        return
    validate_label_selector(selector, f"{path}.selector", errors)
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        errors.append(invalid_value(f"{path}.selector", selector, f"empty selector is invalid for {kind}"))


def _template(spec: Object, what: str, path: str, errors: Errors, *, unreadable: str = "invalid label selector") -> None:
    """The template of a workload whose pods always restart, and whether the selector fits it."""
    template, own = spec.get("template") or {}, f"{path}.template"
    selector = spec.get("selector")
    fits = matches(selector, (template.get("metadata") or {}).get("labels")) if selector is not None else False
    if fits is None:
        errors.append(invalid_value(f"{path}.selector", selector, unreadable))
        return
    if not fits and (selector is None or selector.get("matchLabels") or selector.get("matchExpressions")):
        errors.append(invalid_value(f"{own}.metadata.labels", (template.get("metadata") or {}).get("labels"), NOT_MATCHING))
    validate_pod_template(template, own, errors)
    _always_restarts(template, what, own, errors)


def _always_restarts(template: Object, what: str, path: str, errors: Errors) -> None:
    pod = template.get("spec") or {}
    if pod.get("restartPolicy") != "Always":
        errors.append(not_supported(f"{path}.spec.restartPolicy", pod.get("restartPolicy") or "", ["Always"]))
    if pod.get("activeDeadlineSeconds") is not None:
        message = f"activeDeadlineSeconds in {what} is not Supported"
        errors.append(field_forbidden(f"{path}.spec.activeDeadlineSeconds", message))


def int_or_percent(value: Any, path: str, errors: Errors) -> None:
    if isinstance(value, int):
        if value < 0:
            errors.append(invalid_value(path, value, NEGATIVE))
    else:
        add(errors, path, value, percent(value))


def amount_of(value: Any) -> int:
    """The number of an int-or-percent; of a percentage the digits; 0 for anything else."""
    if isinstance(value, int):
        return value
    text = str(value or "").removesuffix("%")
    return int(text) if text.isdigit() else 0


def at_most_all(value: Any, path: str, errors: Errors) -> None:
    if isinstance(value, str) and not percent(value) and int(value[:-1]) > 100:
        errors.append(invalid_value(path, value, "must not be greater than 100%"))


def _strategy(strategy: Object, path: str, errors: Errors) -> None:
    kind, rolling = strategy.get("type") or "", strategy.get("rollingUpdate")
    own = f"{path}.rollingUpdate"
    if kind == "Recreate":
        if rolling is not None:
            errors.append(field_forbidden(own, "may not be specified when strategy `type` is 'Recreate'"))
    elif kind == "RollingUpdate":
        if rolling is None:
            errors.append(required(own, "this should be defaulted and never be nil"))
            return
        unavailable, surge = rolling.get("maxUnavailable", 0), rolling.get("maxSurge", 0)
        int_or_percent(unavailable, f"{own}.maxUnavailable", errors)
        int_or_percent(surge, f"{own}.maxSurge", errors)
        if not amount_of(unavailable) and not amount_of(surge):
            errors.append(invalid_value(f"{own}.maxUnavailable", unavailable, "may not be 0 when `maxSurge` is 0"))
        at_most_all(unavailable, f"{own}.maxUnavailable", errors)
    else:
        errors.append(not_supported(path, strategy, ["Recreate", "RollingUpdate"]))


def create_deployment(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    nonnegative(errors, "spec.replicas", spec.get("replicas"))
    _selector(spec, "deployment", "spec", errors)
    _template(spec, "ReplicaSet", "spec", errors)
    _strategy(spec.get("strategy") or {}, "spec.strategy", errors)
    ready = spec.get("minReadySeconds") or 0
    nonnegative(errors, "spec.minReadySeconds", ready)
    nonnegative(errors, "spec.revisionHistoryLimit", spec.get("revisionHistoryLimit"))
    deadline = spec.get("progressDeadlineSeconds")
    if deadline is not None:
        nonnegative(errors, "spec.progressDeadlineSeconds", deadline)
        if deadline <= ready:
            errors.append(invalid_value("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds"))


def _counts(status: Object, keys: tuple[str, ...], limited: tuple[str, ...], errors: Errors, *, prefix: str = "") -> None:
    for key in keys:
        nonnegative(errors, f"status.{key}", status.get(key))
    replicas = status.get("replicas") or 0
    for key in limited:
        if (status.get(key) or 0) > replicas:
            errors.append(invalid_value(f"status.{key}", status.get(key) or 0, "cannot be greater than status.replicas"))
    if (status.get("availableReplicas") or 0) > (status.get("readyReplicas") or 0):
        message = f"cannot be greater than {prefix}readyReplicas"
        errors.append(invalid_value("status.availableReplicas", status["availableReplicas"], message))


def _collisions(new: Object, old: Object, errors: Errors) -> None:
    before, after = (old.get("status") or {}).get("collisionCount"), (new.get("status") or {}).get("collisionCount")
    if before is not None and (after is None or after < before):
        errors.append(invalid_value("status.collisionCount", after or 0, "cannot be decremented"))


def update_deployment(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        keys = ("observedGeneration", "replicas", "updatedReplicas", "readyReplicas", "availableReplicas", "unavailableReplicas")
        limited = ("updatedReplicas", "readyReplicas", "availableReplicas")
        _counts(new.get("status") or {}, (*keys, "terminatingReplicas", "collisionCount"), limited, errors)
        _collisions(new, old, errors)
        return
    create_deployment(new, errors)
    immutable(errors, "spec.selector", (new.get("spec") or {}).get("selector"), (old.get("spec") or {}).get("selector"))


def create_replica_set(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    nonnegative(errors, "spec.replicas", spec.get("replicas"))
    nonnegative(errors, "spec.minReadySeconds", spec.get("minReadySeconds"))
    _selector(spec, "deployment", "spec", errors)
    _template(spec, "ReplicaSet", "spec", errors)


def update_replica_set(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        keys = ("replicas", "fullyLabeledReplicas", "readyReplicas", "availableReplicas", "observedGeneration", "terminatingReplicas")
        limited = ("fullyLabeledReplicas", "readyReplicas", "availableReplicas")
        _counts(new.get("status") or {}, keys, limited, errors)
        return
    create_replica_set(new, errors)
    immutable(errors, "spec.selector", (new.get("spec") or {}).get("selector"), (old.get("spec") or {}).get("selector"))


def create_replication_controller(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    nonnegative(errors, "spec.minReadySeconds", spec.get("minReadySeconds"))
    selector = spec.get("selector") or {}
    if not selector:
        errors.append(required("spec.selector"))
    if spec.get("replicas") is None:
        errors.append(required("spec.replicas"))
    else:
        nonnegative(errors, "spec.replicas", spec["replicas"])
    template = spec.get("template")
    if template is None:
        errors.append(required("spec.template"))
        return
    labels = (template.get("metadata") or {}).get("labels") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        errors.append(invalid_value("spec.template.metadata.labels", labels, NOT_MATCHING))
    validate_pod_template(template, "spec.template", errors)
    _always_restarts(template, "ReplicationController", "spec.template", errors)


def update_replication_controller(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        keys = ("replicas", "fullyLabeledReplicas", "readyReplicas", "availableReplicas", "observedGeneration")
        _counts(new.get("status") or {}, keys, ("fullyLabeledReplicas", "readyReplicas", "availableReplicas"), errors)
        return
    create_replication_controller(new, errors)


def _set_strategy(strategy: Object, path: str, errors: Errors) -> None:
    kind, rolling = strategy.get("type") or "", strategy.get("rollingUpdate")
    if not kind:
        errors.append(required(path))
    elif kind == "OnDelete":
        if rolling is not None:
            errors.append(invalid_value(f"{path}.rollingUpdate", rolling, "only allowed for updateStrategy 'RollingUpdate'"))
    elif kind == "RollingUpdate":
        if rolling is not None:
            nonnegative(errors, f"{path}.rollingUpdate.partition", rolling.get("partition"))
            unavailable = rolling.get("maxUnavailable")
            if unavailable is not None:
                own = f"{path}.rollingUpdate.maxUnavailable"
                int_or_percent(unavailable, own, errors)
                if not amount_of(unavailable):
                    errors.append(invalid_value(own, unavailable, "cannot be 0"))
                at_most_all(unavailable, own, errors)
    else:
        errors.append(invalid_value(path, strategy, "must be 'RollingUpdate' or 'OnDelete'"))


def _stateful_set_spec(spec: Object, errors: Errors, *, is_update: bool, skip_template: bool = False) -> None:
    policy = spec.get("podManagementPolicy") or ""
    if not policy:
        errors.append(required("spec.podManagementPolicy"))
    elif policy not in ("OrderedReady", "Parallel"):
        errors.append(invalid_value("spec.podManagementPolicy", policy, "must be 'OrderedReady' or 'Parallel'"))
    _set_strategy(spec.get("updateStrategy") or {}, "spec.updateStrategy", errors)
    retention = spec.get("persistentVolumeClaimRetentionPolicy")
    if retention is not None:
        for key in ("whenDeleted", "whenScaled"):
            if retention.get(key) not in ("Retain", "Delete"):
                path = f"spec.persistentVolumeClaimRetentionPolicy.{key}"
                errors.append(not_supported(path, retention.get(key) or "", ["Retain", "Delete"]))
    claims = spec.get("volumeClaimTemplates") or []
    if not is_update:
        for index, claim in enumerate(claims):
            validate_claim_spec(claim.get("spec") or {}, f"spec.volumeClaimTemplates[{index}].spec", errors)
    nonnegative(errors, "spec.replicas", spec.get("replicas"))
    nonnegative(errors, "spec.minReadySeconds", spec.get("minReadySeconds"))
    if spec.get("ordinals") is not None:
        nonnegative(errors, "spec.ordinals.start", spec["ordinals"].get("start"))
    if not is_update and spec.get("serviceName"):
        add(errors, "spec.serviceName", spec["serviceName"], dns_label(spec["serviceName"]))
    _selector(spec, "statefulset", "spec", errors)
    _set_template(spec, claims, errors, skip_template=skip_template)


def _set_template(spec: Object, claims: list[Object], errors: Errors, *, skip_template: bool) -> None:
    template, selector = spec.get("template") or {}, spec.get("selector")
    labels = (template.get("metadata") or {}).get("labels")
    fits = matches(selector, labels) if selector is not None else False
    if fits is None:
        errors.append(invalid_value("spec.selector", selector, ""))
        return
    if not fits and (selector is None or selector.get("matchLabels") or selector.get("matchExpressions")):
        errors.append(invalid_value("spec.template.metadata.labels", labels, NOT_MATCHING))
    pod = {key: value for key, value in (template.get("spec") or {}).items() if key not in ("subdomain", "hostname")}
    if claims:
        made = [
            {"name": c["metadata"].get("name") or "", "persistentVolumeClaim": {"claimName": c["metadata"].get("name") or ""}}
            for c in claims
        ]
        names = {m["name"] for m in made}
        pod["volumes"] = made + [v for v in pod.get("volumes") or () if v.get("name") not in names]
    if not skip_template:
        validate_pod_template({**template, "spec": pod}, "spec.template", errors)
    _always_restarts(template, "StatefulSet", "spec.template", errors)


def create_stateful_set(obj: Object, errors: Errors) -> None:
    _stateful_set_spec(obj.get("spec") or {}, errors, is_update=False)


_SET_MUTABLE = frozenset(
    {
        "replicas",
        "template",
        "updateStrategy",
        "minReadySeconds",
        "ordinals",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
    }
)


def update_stateful_set(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        keys = (
            "replicas",
            "readyReplicas",
            "currentReplicas",
            "updatedReplicas",
            "availableReplicas",
            "observedGeneration",
            "collisionCount",
        )
        limited = ("readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas")
        _counts(new.get("status") or {}, keys, limited, errors, prefix="status.")
        _collisions(new, old, errors)
        return
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    earlier: Errors = []
    _stateful_set_spec(before, earlier, is_update=True)
    _stateful_set_spec(spec, errors, is_update=True, skip_template=bool(earlier))
    if any(spec.get(key) != before.get(key) for key in (spec.keys() | before.keys()) - _SET_MUTABLE):
        message = (
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', "
            "'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
        )
        errors.append(field_forbidden("spec", message))


def _daemon_strategy(strategy: Object, path: str, errors: Errors) -> None:
    kind, own = strategy.get("type") or "", f"{path}.rollingUpdate"
    if kind == "OnDelete":
        return
    if kind != "RollingUpdate":
        errors.append(not_supported(path, strategy, ["RollingUpdate", "OnDelete"]))
        return
    rolling = strategy.get("rollingUpdate")
    if rolling is None:
        errors.append(required(own))
        return
    unavailable, surge = rolling.get("maxUnavailable", 0), rolling.get("maxSurge", 0)
    for key, value in (("maxUnavailable", unavailable), ("maxSurge", surge)):
        int_or_percent(value, f"{own}.{key}", errors)
    for key, value in (("maxUnavailable", unavailable), ("maxSurge", surge)):
        at_most_all(value, f"{own}.{key}", errors)
    if amount_of(unavailable) and amount_of(surge):
        errors.append(invalid_value(f"{own}.maxSurge", surge, "may not be set when maxUnavailable is non-zero"))
    elif not amount_of(unavailable) and not amount_of(surge):
        errors.append(required(f"{own}.maxUnavailable", "cannot be 0 when maxSurge is 0"))


def create_daemon_set(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    template, selector = spec.get("template") or {}, spec.get("selector")
    validate_label_selector(selector, "spec.selector", errors)
    labels = (template.get("metadata") or {}).get("labels")
    if selector is None or matches(selector, labels) is False:
        errors.append(invalid_value("spec.template.metadata.labels", labels, NOT_MATCHING))
    if selector is not None and not selector.get("matchLabels") and not selector.get("matchExpressions"):
        errors.append(invalid_value("spec.selector", selector, "empty selector is invalid for daemonset"))
    validate_pod_template(template, "spec.template", errors)
    pod = template.get("spec") or {}
    if pod.get("restartPolicy") != "Always":
        errors.append(not_supported("spec.template.spec.restartPolicy", pod.get("restartPolicy") or "", ["Always"]))
    if pod.get("activeDeadlineSeconds") is not None:
        message = "activeDeadlineSeconds in DaemonSet is not Supported"
        errors.append(field_forbidden("spec.template.spec.activeDeadlineSeconds", message))
    nonnegative(errors, "spec.minReadySeconds", spec.get("minReadySeconds"))
    _daemon_strategy(spec.get("updateStrategy") or {}, "spec.updateStrategy", errors)
    nonnegative(errors, "spec.revisionHistoryLimit", spec.get("revisionHistoryLimit"))


_DAEMON_COUNTS = (
    "currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady", "observedGeneration",
    "updatedNumberScheduled", "numberAvailable", "numberUnavailable", "collisionCount",
)  # fmt: skip


def update_daemon_set(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        for key in _DAEMON_COUNTS:
            nonnegative(errors, f"status.{key}", (new.get("status") or {}).get(key))
        _collisions(new, old, errors)
        return
    immutable(errors, "spec.selector", (new.get("spec") or {}).get("selector"), (old.get("spec") or {}).get("selector"))
    create_daemon_set(new, errors)


def create_controller_revision(obj: Object, errors: Errors) -> None:
    nonnegative(errors, "revision", obj.get("revision"))
    data = obj.get("data")
    if data is None:
        errors.append(required("data", "data is mandatory"))
    elif not isinstance(data, dict):
        errors.append(required("data", "data must be a valid JSON object"))


def update_controller_revision(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    nonnegative(errors, "revision", new.get("revision"))
    immutable(errors, "data", new.get("data"), old.get("data"))
