"""Which volume fits which claim; pure functions.

Source: component-helpers storage/volume (pv_helpers.go), pkg/controller/volume/persistentvolume/index.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from knarr.api import meta, quantity
from knarr.api.selectors import from_label_selector
from knarr.api.types import Object
from knarr.controllers.quota import claim_class

BOUND_BY_CONTROLLER = "pv.kubernetes.io/bound-by-controller"
BIND_COMPLETED = "pv.kubernetes.io/bind-completed"
PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
SELECTED_NODE = "volume.kubernetes.io/selected-node"
PROVISIONER = "volume.kubernetes.io/storage-provisioner"
OLD_PROVISIONER = "volume.beta.kubernetes.io/storage-provisioner"
OLD_CLASS = "volume.beta.kubernetes.io/storage-class"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
OLD_DEFAULT_CLASS = "storageclass.beta.kubernetes.io/is-default-class"


def volume_class(volume: Object) -> str:
    old = meta.annotations(volume).get(OLD_CLASS)
    return str(old if old is not None else volume["spec"].get("storageClassName") or "")


def is_bound_to(volume: Object, claim: Object) -> bool:
    """Whether the volume is meant for exactly this claim (bound, or pre-bound by name)."""
    ref = volume["spec"].get("claimRef")
    claim_meta = claim["metadata"]
    if ref is None or (ref.get("name"), ref.get("namespace")) != (claim_meta["name"], claim_meta["namespace"]):
        return False
    return not ref.get("uid") or bool(ref["uid"] == claim_meta["uid"])


def _storage(listed: Object | None) -> str:
    return str((listed or {}).get("storage") or "0")


def requested(claim: Object) -> str:
    return _storage((claim["spec"].get("resources") or {}).get("requests"))


def capacity(volume: Object) -> str:
    return _storage(volume["spec"].get("capacity"))


def mode(obj: Object) -> str:
    return str(obj["spec"].get("volumeMode") or "Filesystem")


def _attributes(obj: Object) -> str:
    return str(obj["spec"].get("volumeAttributesClassName") or "")


def mismatch(volume: Object, claim: Object) -> str:
    """Why a volume that the claim names cannot be bound to it; "" when it can."""
    if quantity.compare(capacity(volume), requested(claim)) < 0:
        return "requested PV is too small"
    if claim_class(claim) != volume_class(volume):
        return "storageClassName does not match"
    if _attributes(claim) != _attributes(volume):
        return "volumeAttributesClassName does not match"
    if mode(claim) != mode(volume):
        return "incompatible volumeMode"
    if not set(claim["spec"].get("accessModes") or ()) <= set(volume["spec"].get("accessModes") or ()):
        return "incompatible accessMode"
    return ""


def best_match(claim: Object, volumes: Iterable[Object], delayed: bool) -> Object | None:
    """Give the volume to bind: one meant for the claim, else the smallest of the fewest access modes that fits.

    Args:
      delayed: the scheduler chooses; only volumes already meant for the claim count.
    """
    modes = set(claim["spec"].get("accessModes") or ())
    selector = claim["spec"].get("selector")
    compiled = from_label_selector(selector) if selector is not None else None
    fitting: list[Object] = []
    for volume in volumes:
        spec = volume["spec"]
        if not modes <= set(spec.get("accessModes") or ()) or "deletionTimestamp" in volume["metadata"]:
            continue
        if spec.get("claimRef") is not None and not is_bound_to(volume, claim):
            continue
        if quantity.compare(capacity(volume), requested(claim)) < 0 or mode(volume) != mode(claim):
            continue
        if _attributes(volume) != _attributes(claim):
            continue
        if is_bound_to(volume, claim):
            return volume
        if delayed or (volume.get("status") or {}).get("phase") != "Available" or volume_class(volume) != claim_class(claim):
            continue
        if compiled is None or compiled.matches(meta.labels(volume)):
            fitting.append(volume)
    # More access modes than asked for are spared for claims that need them.
    return min(fitting, key=lambda item: (len(item["spec"].get("accessModes") or ()), quantity.parse(capacity(item))), default=None)


def default_class(classes: Iterable[Object]) -> Object | None:
    """Give the default StorageClass: the newest of those marked so, then by name."""
    marked = [
        item
        for item in classes
        if meta.annotations(item).get(DEFAULT_CLASS) == "true" or meta.annotations(item).get(OLD_DEFAULT_CLASS) == "true"
    ]
    marked.sort(key=lambda item: item["metadata"]["name"])
    return max(marked, key=lambda item: item["metadata"].get("creationTimestamp", ""), default=None)


def has_class(claim: Object) -> bool:
    """Whether the claim says anything about its class, were it that it wants none."""
    return OLD_CLASS in meta.annotations(claim) or claim["spec"].get("storageClassName") is not None
