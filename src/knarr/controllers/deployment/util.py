"""Arithmetic and bookkeeping of rollouts, pure functions over Deployments and ReplicaSets.

Source: pkg/controller/deployment/util/deployment_util.go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.types import Object
from knarr.controllers.podutil import created_at, scaled_value

REVISION = "deployment.kubernetes.io/revision"
REVISION_HISTORY = "deployment.kubernetes.io/revision-history"
DESIRED_REPLICAS = "deployment.kubernetes.io/desired-replicas"
MAX_REPLICAS = "deployment.kubernetes.io/max-replicas"
ROLLBACK_TO = "deprecated.deployment.rollback.to"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
HASH_LABEL = "pod-template-hash"

NOT_COPIED = {LAST_APPLIED, REVISION, REVISION_HISTORY, DESIRED_REPLICAS, MAX_REPLICAS, ROLLBACK_TO}
_NO_LIMIT = 2**31 - 1
_HISTORY_CHARACTERS = 2000


def replicas(obj: Object) -> int:
    """The wanted replicas of a Deployment or ReplicaSet."""
    value = obj["spec"].get("replicas")
    return 1 if value is None else int(value)


def actual(rs: Object, field: str = "replicas") -> int:
    """A count in a ReplicaSet's status."""
    return int((rs.get("status") or {}).get(field) or 0)


def total(sets: Iterable[Object | None]) -> int:
    return sum(replicas(rs) for rs in sets if rs is not None)


def total_actual(sets: Iterable[Object | None], field: str = "replicas") -> int:
    return sum(actual(rs, field) for rs in sets if rs is not None)


def active(sets: Iterable[Object | None]) -> list[Object]:
    """The sets that want replicas."""
    return [rs for rs in sets if rs is not None and replicas(rs) > 0]


def is_rolling(deployment: Object) -> bool:
    return bool((deployment["spec"].get("strategy") or {}).get("type") == "RollingUpdate")


def fenceposts(deployment: Object) -> tuple[int, int]:
    """(surge, unavailable) in pods; both zero is made (0, 1), or nothing could ever move."""
    rolling = (deployment["spec"].get("strategy") or {}).get("rollingUpdate") or {}
    desired = replicas(deployment)
    surge = scaled_value(rolling.get("maxSurge"), desired, True)
    unavailable = scaled_value(rolling.get("maxUnavailable"), desired, False)
    return (0, 1) if surge == 0 and unavailable == 0 else (surge, unavailable)


def max_surge(deployment: Object) -> int:
    return fenceposts(deployment)[0] if is_rolling(deployment) else 0


def max_unavailable(deployment: Object) -> int:
    if not is_rolling(deployment) or replicas(deployment) == 0:
        return 0
    return min(fenceposts(deployment)[1], replicas(deployment))


def template_equal(left: Object, right: Object) -> bool:
    """Whether two pod templates are the same but for the hash label; empty and absent are equal."""
    return _normal_template(left) == _normal_template(right)


def _normal_template(template: Object) -> Object:
    tmeta = dict(template.get("metadata") or {})
    labels = {name: value for name, value in (tmeta.get("labels") or {}).items() if name != HASH_LABEL}
    tmeta["labels"] = labels
    normal = _semantic({"metadata": tmeta, "spec": template.get("spec")})
    assert isinstance(normal, dict)
    return normal


def _semantic(value: object) -> object:
    # As upstream's semantic equality: nil, empty lists and empty maps are one. A struct pointer that is
    # empty (emptyDir: {}) is not, but then its sibling keys differ too.
    if isinstance(value, dict):
        pairs = ((name, _semantic(item)) for name, item in value.items())
        return {name: item for name, item in pairs if item not in (None, [], "") and (item != {} or name in _POINTERS)}
    if isinstance(value, list):
        return [_semantic(item) for item in value]
    return value


_POINTERS = {"emptyDir", "securityContext", "podAffinity", "nodeAffinity", "podAntiAffinity", "affinity"}


def by_creation(sets: Iterable[Object]) -> list[Object]:
    """Oldest first, then by name."""
    return sorted(sets, key=lambda rs: (created_at(rs), rs["metadata"]["name"]))


def revision(obj: Object) -> int | None:
    """The revision in the annotation; 0 without one, None when it is no number."""
    text = meta.annotations(obj).get(REVISION)
    if text is None:
        return 0
    try:
        return int(text)
    except ValueError:
        return None


def max_revision(sets: Iterable[Object]) -> int:
    return max((revision(rs) or 0 for rs in sets), default=0)


def last_revision(sets: Iterable[Object]) -> int:
    """The revision before the newest; 0 when there is none."""
    known = sorted(number for rs in sets if (number := revision(rs)) is not None)
    return known[-2] if len(known) > 1 else 0


def find_new(deployment: Object, sets: Sequence[Object]) -> Object | None:
    """The oldest set with the Deployment's template."""
    wanted = _normal_template(deployment["spec"]["template"])
    for rs in by_creation(sets):
        if _normal_template(rs["spec"].get("template") or {}) == wanted:
            return rs
    return None


def sync_annotations(deployment: Object, rs: Object, new_revision: int, exists: bool) -> bool:
    """Bring the annotations of the new set up to date, in place; says whether something changed."""
    annotations = dict(meta.annotations(rs))
    before = dict(annotations)
    for name, value in meta.annotations(deployment).items():
        if name not in NOT_COPIED:
            annotations[name] = value
    old_text = annotations.get(REVISION)
    try:
        old_revision = int(old_text) if old_text else 0
    except ValueError:
        rs["metadata"]["annotations"] = annotations
        return False
    if old_revision < new_revision:
        annotations[REVISION] = str(new_revision)
        if old_text is not None:
            _append_history(annotations, old_text)
    if not exists:
        annotations[DESIRED_REPLICAS] = str(replicas(deployment))
        annotations[MAX_REPLICAS] = str(replicas(deployment) + max_surge(deployment))
    if annotations:
        rs["metadata"]["annotations"] = annotations
    return annotations != before


def _append_history(annotations: dict[str, str], old_revision: str) -> None:
    known = [part for part in annotations.get(REVISION_HISTORY, "").split(",") if part]
    known.append(old_revision)
    while len(known) > 1 and len(",".join(known)) > _HISTORY_CHARACTERS:
        known.pop(0)
    annotations[REVISION_HISTORY] = ",".join(known)


def replicas_annotations(deployment: Object) -> dict[str, str]:
    return {DESIRED_REPLICAS: str(replicas(deployment)), MAX_REPLICAS: str(replicas(deployment) + max_surge(deployment))}


def annotation_number(rs: Object, name: str) -> int | None:
    text = meta.annotations(rs).get(name, "")
    return int(text) if text.isdigit() and int(text) <= _NO_LIMIT else None


def proportion(rs: Object, deployment: Object, to_add: int, added: int) -> int:
    """How many replicas this set gets (or loses) of a change spread over several sets."""
    if replicas(rs) == 0 or to_add in (0, added):
        return 0
    fraction = _fraction(rs, deployment)
    allowed = to_add - added
    return min(fraction, allowed) if to_add > 0 else max(fraction, allowed)


def _fraction(rs: Object, deployment: Object) -> int:
    if replicas(deployment) == 0:
        return -replicas(rs)
    now_most = replicas(deployment) + max_surge(deployment)
    before_most = annotation_number(rs, MAX_REPLICAS) or int((deployment.get("status") or {}).get("replicas") or 0)
    if before_most == 0:
        return 0
    size = replicas(rs) * now_most / before_most
    return math.floor(size + 0.5) - replicas(rs)


def new_set_replicas(deployment: Object, sets: Iterable[Object | None], new: Object) -> int:
    """How far the new set may grow now."""
    wanted = replicas(deployment)
    if not is_rolling(deployment):
        return wanted
    rolling = (deployment["spec"]["strategy"].get("rollingUpdate")) or {}
    most = wanted + scaled_value(rolling.get("maxSurge"), wanted, True)
    current = total(sets)
    if current >= most:
        return replicas(new)
    return replicas(new) + min(most - current, wanted - replicas(new))


def is_saturated(deployment: Object, rs: Object | None) -> bool:
    if rs is None:
        return False
    wanted = replicas(deployment)
    return replicas(rs) == wanted and annotation_number(rs, DESIRED_REPLICAS) == wanted and actual(rs, "availableReplicas") == wanted


def active_or_latest(new: Object | None, old: Sequence[Object]) -> Object | None:
    """The only set that wants replicas; without any the newest; None when several do."""
    if new is None and not old:
        return None
    running = active([*old, new])
    if not running:
        return new if new is not None else by_creation(old)[-1]
    return running[0] if len(running) == 1 else None


# Status


def get_condition(status: Object, type: str) -> Object | None:
    return meta.get_condition(status.get("conditions"), type)


def new_condition(type: str, status: str, reason: str, message: str) -> Object:
    now = clock.now_rfc3339()
    return {"type": type, "status": status, "lastUpdateTime": now, "lastTransitionTime": now, "reason": reason, "message": message}


def set_condition(status: Object, condition: Object) -> None:
    """Replace a condition unless status and reason stay; it moves to the end of the list."""
    current = get_condition(status, condition["type"])
    if current is not None and current["status"] == condition["status"]:
        if current.get("reason") == condition["reason"]:
            return
        condition["lastTransitionTime"] = current.get("lastTransitionTime")
    remove_condition(status, condition["type"])
    status["conditions"] = [*(status.get("conditions") or ()), condition]


def remove_condition(status: Object, type: str) -> None:
    kept = [item for item in status.get("conditions") or () if item.get("type") != type]
    if kept:
        status["conditions"] = kept
    else:
        status.pop("conditions", None)


def has_deadline(deployment: Object) -> bool:
    return deployment["spec"].get("progressDeadlineSeconds") not in (None, _NO_LIMIT)


def history_limit(deployment: Object) -> int | None:
    limit = deployment["spec"].get("revisionHistoryLimit")
    return None if limit is None or limit == _NO_LIMIT else int(limit)


def is_complete(deployment: Object, status: Object) -> bool:
    wanted = replicas(deployment)
    counts = (status.get("updatedReplicas") or 0, status.get("replicas") or 0, status.get("availableReplicas") or 0)
    return counts == (wanted, wanted, wanted) and (status.get("observedGeneration") or 0) >= (deployment["metadata"].get("generation") or 0)


def is_progressing(deployment: Object, status: Object) -> bool:
    old = deployment.get("status") or {}

    def grew(field: str) -> bool:
        return (status.get(field) or 0) > (old.get(field) or 0)

    old_left = (old.get("replicas") or 0) - (old.get("updatedReplicas") or 0)
    new_left = (status.get("replicas") or 0) - (status.get("updatedReplicas") or 0)
    return grew("updatedReplicas") or new_left < old_left or grew("readyReplicas") or grew("availableReplicas")


def is_timed_out(deployment: Object, status: Object) -> bool:
    condition = get_condition(status, "Progressing")
    if not has_deadline(deployment) or condition is None or condition.get("reason") == "NewReplicaSetAvailable":
        return False
    if condition.get("reason") == "ProgressDeadlineExceeded":
        return True
    updated = clock.parse_rfc3339(condition["lastUpdateTime"]) if condition.get("lastUpdateTime") else 0.0
    return updated + float(deployment["spec"]["progressDeadlineSeconds"]) < clock.now()
