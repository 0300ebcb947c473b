"""Identity, storage and retention of the pods of a StatefulSet, as pure functions.

Source: pkg/controller/statefulset/stateful_set_utils.go.
"""

from __future__ import annotations

import re

import orjson

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.resources import STATEFUL_SETS
from knarr.api.types import Object
from knarr.controllers import history, podutil
from knarr.controllers.hashing import revision_hash
from knarr.controllers.podutil import scaled_value

POD_NAME = "statefulset.kubernetes.io/pod-name"
POD_INDEX = "apps.kubernetes.io/pod-index"
REVISION = "controller-revision-hash"
HASH = "controller.kubernetes.io/hash"

_NAME = re.compile(r"(.*)-([0-9]+)$")


def parent_and_ordinal(name: str) -> tuple[str, int]:
    """("web", 3) of "web-3"; ("", -1) of what has no ordinal."""
    match = _NAME.match(name)
    if match is None or int(match[2]) >= 2**31:
        return "", -1
    return match[1], int(match[2])


def ordinal(pod: Object) -> int:
    return parent_and_ordinal(pod["metadata"]["name"])[1]


def is_member(set_: Object, pod: Object) -> bool:
    return parent_and_ordinal(pod["metadata"]["name"])[0] == str(set_["metadata"]["name"])


def start(set_: Object) -> int:
    return int((set_["spec"].get("ordinals") or {}).get("start") or 0)


def replicas(set_: Object) -> int:
    value = set_["spec"].get("replicas")
    return 1 if value is None else int(value)


def in_range(set_: Object, pod: Object) -> bool:
    first = start(set_)
    return first <= ordinal(pod) < first + replicas(set_)


def is_parallel(set_: Object) -> bool:
    return bool(set_["spec"].get("podManagementPolicy") == "Parallel")


def min_ready(set_: Object) -> int:
    return int(set_["spec"].get("minReadySeconds") or 0)


def partition(set_: Object) -> int:
    rolling = (set_["spec"].get("updateStrategy") or {}).get("rollingUpdate") or {}
    return int(rolling.get("partition") or 0)


def max_unavailable(set_: Object) -> int:
    rolling = (set_["spec"].get("updateStrategy") or {}).get("rollingUpdate") or {}
    if rolling.get("maxUnavailable") is None:
        return 1
    return max(1, scaled_value(rolling["maxUnavailable"], replicas(set_), False))


def strategy(set_: Object) -> str:
    return str((set_["spec"].get("updateStrategy") or {}).get("type") or "RollingUpdate")


def revision_of(pod: Object) -> str:
    return str(meta.labels(pod).get(REVISION, ""))


def is_created(pod: Object) -> bool:
    return podutil.phase(pod) != ""


def is_unavailable(set_: Object, pod: Object) -> bool:
    return not podutil.is_available(pod, min_ready(set_), clock.now()) or podutil.is_deleting(pod)


def claim_name(set_: Object, template: Object, number: int) -> str:
    return f"{template['metadata']['name']}-{set_['metadata']['name']}-{number}"


def claims(set_: Object, number: int) -> dict[str, Object]:
    """The claims of one pod, by volume name."""
    result: dict[str, Object] = {}
    selector_labels = (set_["spec"].get("selector") or {}).get("matchLabels") or {}
    for template in set_["spec"].get("volumeClaimTemplates") or ():
        claim = meta.deep_copy(template)
        claim_meta = claim["metadata"]
        labels = {**(claim_meta.get("labels") or {}), **selector_labels}
        claim["metadata"] = {
            key: value for key, value in claim_meta.items() if key in ("annotations", "finalizers", "ownerReferences")
        }
        claim["metadata"].update(name=claim_name(set_, template, number), namespace=set_["metadata"]["namespace"], labels=labels)
        claim.pop("status", None)
        claim.setdefault("apiVersion", "v1")
        claim.setdefault("kind", "PersistentVolumeClaim")
        result[template["metadata"]["name"]] = claim
    return result


def identity_matches(set_: Object, pod: Object) -> bool:
    parent, number = parent_and_ordinal(pod["metadata"]["name"])
    return number >= 0 and parent == set_["metadata"]["name"] and meta.labels(pod).get(POD_NAME) == pod["metadata"]["name"]


def storage_matches(set_: Object, pod: Object) -> bool:
    number = ordinal(pod)
    if number < 0:
        return False
    volumes = {item["name"]: item for item in pod["spec"].get("volumes") or ()}
    for template in set_["spec"].get("volumeClaimTemplates") or ():
        source = volumes.get(template["metadata"]["name"], {}).get("persistentVolumeClaim") or {}
        if source.get("claimName") != claim_name(set_, template, number):
            return False
    return True


def with_storage(set_: Object, spec: Object, number: int) -> None:
    """Put the claims of a pod into its volumes, in place."""
    wanted = claims(set_, number)
    volumes = [{"name": name, "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} for name, claim in wanted.items()]
    volumes += [item for item in spec.get("volumes") or () if item["name"] not in wanted]
    if volumes:
        spec["volumes"] = volumes


def new_pod(set_: Object, template: Object, revision: str, number: int) -> Object:
    """Make the pod of one ordinal from a template."""
    reference = meta.new_controller_ref(set_, "apps/v1", "StatefulSet")
    pod = podutil.pod_from_template(template, set_, reference)
    name = f"{set_['metadata']['name']}-{number}"
    pod_meta = pod["metadata"]
    pod_meta.pop("generateName", None)
    pod_meta["name"] = name
    pod_meta["namespace"] = set_["metadata"]["namespace"]
    pod_meta["labels"] = {**(pod_meta.get("labels") or {}), POD_NAME: name, POD_INDEX: str(number), REVISION: revision}
    pod["spec"]["hostname"] = name
    if set_["spec"].get("serviceName"):
        pod["spec"]["subdomain"] = set_["spec"]["serviceName"]
    with_storage(set_, pod["spec"], number)
    return pod


def new_revision(set_: Object, number: int, collisions: int) -> Object:
    """Make the revision of a set's present template."""
    data = orjson.dumps(history.template_data(set_["spec"]["template"]), option=orjson.OPT_SORT_KEYS)
    return history.new_revision(set_, STATEFUL_SETS, number, HASH, revision_hash(data, collisions))


def is_old_revision(set_: Object, number: int) -> bool:
    """Whether a pod of this ordinal, made now, still gets the current revision rather than the update's."""
    if strategy(set_) != "RollingUpdate":
        return False
    rolling = (set_["spec"].get("updateStrategy") or {}).get("rollingUpdate")
    if rolling is None:
        return number < start(set_) + int((set_.get("status") or {}).get("currentReplicas") or 0)
    return number < start(set_) + int(rolling.get("partition") or 0)


# Retention of claims


def retention(set_: Object) -> tuple[str, str]:
    """(when deleted, when scaled), each "Retain" or "Delete"."""
    policy = set_["spec"].get("persistentVolumeClaimRetentionPolicy") or {}
    return policy.get("whenDeleted") or "Retain", policy.get("whenScaled") or "Retain"


def _is_ref(reference: Object, obj: Object, api_version: str, kind: str) -> bool:
    return (reference["apiVersion"], reference["kind"], reference["name"]) == (api_version, kind, obj["metadata"]["name"])


def _refs_set(reference: Object, set_: Object) -> bool:
    return _is_ref(reference, set_, "apps/v1", "StatefulSet")


def _refs_pod(reference: Object, pod: Object) -> bool:
    return _is_ref(reference, pod, "v1", "Pod")


def _owns(claim: Object, owner: Object) -> bool:
    uid = owner["metadata"].get("uid")
    return any(reference["uid"] == uid for reference in meta.owner_references(claim))


def has_stale_pod_ref(claim: Object, pod: Object) -> bool:
    """Whether the claim is owned by an earlier pod of the same name: it will go with that pod."""
    return any(_refs_pod(ref, pod) and ref["uid"] != pod["metadata"].get("uid") for ref in meta.owner_references(claim))


def has_unexpected_controller(claim: Object, set_: Object, pod: Object) -> bool:
    if retention(set_) == ("Retain", "Retain"):
        return False
    for reference in meta.owner_references(claim):
        if _refs_set(reference, set_):
            if reference["uid"] != set_["metadata"]["uid"]:
                return True
        elif _refs_pod(reference, pod):
            if reference["uid"] != pod["metadata"].get("uid"):
                return True
        elif reference.get("controller"):
            return True
    return False


def _wanted_owners(set_: Object, pod: Object) -> tuple[bool, bool]:
    """(owned by the set, owned by the pod) as the policy wants it."""
    when_deleted, when_scaled = retention(set_)
    scaled_down = not in_range(set_, pod)
    by_pod = when_scaled == "Delete" and scaled_down
    by_set = when_deleted == "Delete" and not by_pod
    return by_set, by_pod


def claim_is_right(claim: Object, set_: Object, pod: Object) -> bool:
    """Whether the owners of a claim agree with the retention policy (or cannot be made to)."""
    stale_set = any(_refs_set(ref, set_) and ref["uid"] != set_["metadata"]["uid"] for ref in meta.owner_references(claim))
    if stale_set or has_stale_pod_ref(claim, pod):
        return True
    if has_unexpected_controller(claim, set_, pod):
        return not (_owns(claim, set_) or _owns(claim, pod))
    uids = (set_["metadata"]["uid"], pod["metadata"].get("uid"))
    if any(ref["uid"] in uids and not ref.get("controller") for ref in meta.owner_references(claim)):
        return False
    return (_owns(claim, set_), _owns(claim, pod)) == _wanted_owners(set_, pod)


def claim_owners(claim: Object, set_: Object, pod: Object) -> list[Object]:
    """The owner references that a claim should have."""
    kept = [ref for ref in meta.owner_references(claim) if not _refs_set(ref, set_) and not _refs_pod(ref, pod)]
    if has_unexpected_controller(claim, set_, pod):
        return kept
    by_set, by_pod = _wanted_owners(set_, pod)
    if by_set:
        kept.append(meta.new_controller_ref(set_, "apps/v1", "StatefulSet"))
    if by_pod:
        kept.append(meta.new_controller_ref(pod, "v1", "Pod"))
    return kept
