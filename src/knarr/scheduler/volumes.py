"""Claims and volumes: which are bound, which volume suits a claim, and what a chosen node makes of them.

Holds the assumed state: volumes and claims as they will be once the binding that is under way is
written. Callers: the volume plugins. Objects come from `Objects` and are never mutated.

Source: plugins/volumebinding/binder.go, component-helpers storage/volume.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knarr.api import quantity
from knarr.scheduler.objects import Object, Objects
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.terms import NodeSelector, node_term, selector

BIND_COMPLETED = "pv.kubernetes.io/bind-completed"
BOUND_BY_CONTROLLER = "pv.kubernetes.io/bound-by-controller"
SELECTED_NODE = "volume.kubernetes.io/selected-node"
BETA_CLASS = "volume.beta.kubernetes.io/storage-class"
NO_PROVISIONER = "kubernetes.io/no-provisioner"


class ClaimProblem(Exception):
    """A claim of the pod keeps it from being scheduled anywhere; the text is the reason."""


def class_of(obj: Object) -> str:
    """Give the storage class name of a claim or a volume."""
    annotations = obj["metadata"].get("annotations") or {}
    if BETA_CLASS in annotations:
        return str(annotations[BETA_CLASS])
    return str(obj["spec"].get("storageClassName") or "")


def is_fully_bound(claim: Object) -> bool:
    return bool(claim["spec"].get("volumeName")) and BIND_COMPLETED in (claim["metadata"].get("annotations") or {})


def volume_selector(volume: Object) -> NodeSelector | None:
    """Compile the node affinity of a volume; None: any node."""
    required = ((volume["spec"].get("nodeAffinity") or {}).get("required")) or None
    if required is None:
        return None
    return NodeSelector((), tuple(node_term(t) for t in required.get("nodeSelectorTerms") or ()))


def volume_reaches(volume: Object, node: Object) -> bool:
    wanted = volume_selector(volume)
    return wanted is None or wanted.matches(node["metadata"].get("labels") or {}, node["metadata"]["name"])


def is_bound_to(volume: Object, claim: Object) -> bool:
    reference = volume["spec"].get("claimRef")
    if not reference:
        return False
    metadata = claim["metadata"]
    if reference.get("name") != metadata["name"] or reference.get("namespace") != metadata.get("namespace"):
        return False
    return not reference.get("uid") or reference["uid"] == metadata["uid"]


def requested_bytes(claim: Object) -> int:
    text = ((claim["spec"].get("resources") or {}).get("requests") or {}).get("storage")
    return quantity.value(text) if text is not None else 0


def capacity_bytes(volume: Object) -> int:
    text = (volume["spec"].get("capacity") or {}).get("storage")
    return quantity.value(text) if text is not None else 0


def matches_topology(terms: Sequence[Mapping[str, Any]] | None, labels: Mapping[str, str]) -> bool:
    """StorageClass.allowedTopologies: any term, all of its expressions."""
    if not terms:
        return True
    return any(all(labels.get(e["key"]) in (e.get("values") or ()) for e in term.get("matchLabelExpressions") or ()) for term in terms)


@dataclass(slots=True)
class PodClaims:
    """The claims of a pod by what is to be done about them."""

    bound: list[Object] = field(default_factory=list)
    delayed: list[Object] = field(default_factory=list)
    immediate: list[Object] = field(default_factory=list)


@dataclass(slots=True)
class NodeVolumes:
    """What binding the pod to one node means: (volume, claim) pairs to bind, claims to provision."""

    bindings: list[tuple[Object, Object]] = field(default_factory=list)
    provisions: list[Object] = field(default_factory=list)


class Volumes:
    """Claims and volumes with the assumed ones on top."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._assumed: dict[tuple[str, str, str], Object] = {}

    def _get(self, kind: str, name: str, namespace: str = "") -> Object | None:
        real = self.objects.get(kind, name, namespace)
        assumed = self._assumed.get((kind, namespace, name))
        if assumed is None:
            return real
        if real is None or _version(real) > _version(assumed):
            # The store has caught up with (or overtaken) what we assumed.
            del self._assumed[kind, namespace, name]
            return real
        return assumed

    def claim(self, namespace: str, name: str) -> Object | None:
        return self._get("PersistentVolumeClaim", name, namespace)

    def volume(self, name: str) -> Object | None:
        return self._get("PersistentVolume", name)

    def volumes_of_class(self, name: str) -> list[Object]:
        result = []
        for listed in self.objects.list("PersistentVolume"):
            volume = self.volume(listed["metadata"]["name"])
            if volume is not None and class_of(volume) == name:
                result.append(volume)
        return result

    def assume(self, kind: str, obj: Object) -> None:
        self._assumed[kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]] = obj

    def restore(self, kind: str, obj: Object) -> None:
        self._assumed.pop((kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]), None)

    def pod_claims(self, pod: PodInfo) -> list[Object]:
        """Give the claims of a pod.

        Raises:
          ClaimProblem: one is missing, lost, being deleted or another pod's.
        """
        result = []
        for name, is_ephemeral in pod.claims:
            claim = self.claim(pod.namespace, name)
            if claim is None:
                if is_ephemeral:
                    raise ClaimProblem(f'waiting for ephemeral volume controller to create the persistentvolumeclaim "{name}"')
                raise ClaimProblem(f'persistentvolumeclaim "{name}" not found')
            if (claim.get("status") or {}).get("phase") == "Lost":
                raise ClaimProblem(
                    f'persistentvolumeclaim "{name}" bound to non-existent persistentvolume "{claim["spec"].get("volumeName", "")}"'
                )
            if "deletionTimestamp" in claim["metadata"]:
                raise ClaimProblem(f'persistentvolumeclaim "{name}" is being deleted')
            if is_ephemeral and not _owned_by(claim, pod):
                raise ClaimProblem(f"PVC {pod.namespace}/{name} was not created for pod {pod.key} (pod is not owner)")
            result.append(claim)
        return result

    def sort_claims(self, claims: Sequence[Object]) -> PodClaims:
        """Tell bound, delayed and immediate claims apart.

        Raises:
          ClaimProblem: a claim's storage class does not exist.
        """
        result = PodClaims()
        for claim in claims:
            if is_fully_bound(claim):
                result.bound.append(claim)
            elif not claim["spec"].get("volumeName") and self._is_delayed(claim):
                result.delayed.append(claim)
            else:
                result.immediate.append(claim)
        return result

    def _is_delayed(self, claim: Object) -> bool:
        name = class_of(claim)
        if not name:
            return False
        storage_class = self.objects.get("StorageClass", name)
        if storage_class is None:
            return False
        return bool(storage_class.get("volumeBindingMode") == "WaitForFirstConsumer")

    def find_volume(self, claim: Object, volumes: Sequence[Object], node: Object, taken: set[str]) -> Object | None:
        """Give the smallest free volume that suits a claim on a node, or the one bound to it beforehand."""
        spec = claim["spec"]
        wanted_bytes, wanted_class = requested_bytes(claim), class_of(claim)
        label_selector = selector(spec["selector"]) if spec.get("selector") else None
        best: Object | None = None
        for volume in volumes:
            own = volume["spec"]
            if volume["metadata"]["name"] in taken or (own.get("claimRef") and not is_bound_to(volume, claim)):
                continue
            if capacity_bytes(volume) < wanted_bytes or "deletionTimestamp" in volume["metadata"]:
                continue
            if (own.get("volumeMode") or "Filesystem") != (spec.get("volumeMode") or "Filesystem"):
                continue
            if (own.get("volumeAttributesClassName") or "") != (spec.get("volumeAttributesClassName") or ""):
                continue
            reaches = volume_reaches(volume, node)
            if is_bound_to(volume, claim):
                return volume if reaches else None
            if (volume.get("status") or {}).get("phase") != "Available" or class_of(volume) != wanted_class or not reaches:
                continue
            if label_selector is not None and not label_selector.matches(volume["metadata"].get("labels") or {}):
                continue
            if not set(spec.get("accessModes") or ()) <= set(own.get("accessModes") or ()):
                continue
            if best is None or capacity_bytes(volume) < capacity_bytes(best):
                best = volume
        return best

    def place(self, claims: Sequence[Object], node: Object, by_class: dict[str, list[Object]]) -> tuple[NodeVolumes, str]:
        """Work out what the delayed claims need on one node.

        Returns:
          (what to do, "") or (_, what is lacking: "conflict" or "space").
        """
        result = NodeVolumes()
        name = node["metadata"]["name"]
        provision: list[Object] = []
        taken: set[str] = set()
        for claim in sorted(claims, key=requested_bytes):
            selected = (claim["metadata"].get("annotations") or {}).get(SELECTED_NODE)
            if selected is not None:
                if selected != name:
                    return result, "conflict"
                provision.append(claim)
                continue
            volume = self.find_volume(claim, by_class.get(class_of(claim), ()), node, taken)
            if volume is None:
                provision.append(claim)
            else:
                taken.add(volume["metadata"]["name"])
                result.bindings.append((volume, claim))
        for claim in provision:
            lacking = self._cannot_provision(claim, node)
            if lacking:
                return result, lacking
        result.provisions = provision
        return result, ""

    def _cannot_provision(self, claim: Object, node: Object) -> str:
        storage_class = self.objects.get("StorageClass", class_of(claim))
        if storage_class is None or (storage_class.get("provisioner") or NO_PROVISIONER) == NO_PROVISIONER:
            return "conflict"
        if not matches_topology(storage_class.get("allowedTopologies"), node["metadata"].get("labels") or {}):
            return "conflict"
        return "" if self._has_capacity(storage_class, claim, node) else "space"

    def _has_capacity(self, storage_class: Object, claim: Object, node: Object) -> bool:
        driver = self.objects.get("CSIDriver", storage_class["provisioner"])
        if driver is None or not (driver.get("spec") or {}).get("storageCapacity"):
            return True
        size = requested_bytes(claim)
        labels = node["metadata"].get("labels") or {}
        for capacity in self.objects.list("CSIStorageCapacity"):
            if capacity.get("storageClassName") != storage_class["metadata"]["name"] or capacity.get("nodeTopology") is None:
                continue
            limit = capacity.get("maximumVolumeSize", capacity.get("capacity"))
            if limit is not None and quantity.value(limit) >= size and selector(capacity["nodeTopology"]).matches(labels):
                return True
        return False

    def assume_placement(self, chosen: NodeVolumes, node_name: str) -> NodeVolumes:
        """Mark volumes and claims as they will be; gives the objects to write."""
        result = NodeVolumes()
        for volume, claim in chosen.bindings:
            bound = volume if is_bound_to(volume, claim) and volume["spec"]["claimRef"].get("uid") else bind_to(volume, claim)
            if bound is not volume:
                self.assume("PersistentVolume", bound)
            result.bindings.append((bound, claim))
        for claim in chosen.provisions:
            fresh = copy.deepcopy(claim)
            fresh["metadata"].setdefault("annotations", {})[SELECTED_NODE] = node_name
            self.assume("PersistentVolumeClaim", fresh)
            result.provisions.append(fresh)
        return result

    def revert(self, chosen: NodeVolumes) -> None:
        for volume, _ in chosen.bindings:
            self.restore("PersistentVolume", volume)
        for claim in chosen.provisions:
            self.restore("PersistentVolumeClaim", claim)


def bind_to(volume: Object, claim: Object) -> Object:
    """Give the volume with a reference to the claim."""
    fresh = copy.deepcopy(volume)
    metadata = claim["metadata"]
    had_reference = bool(volume["spec"].get("claimRef"))
    fresh["spec"]["claimRef"] = {
        "kind": "PersistentVolumeClaim",
        "apiVersion": "v1",
        "namespace": metadata.get("namespace", ""),
        "name": metadata["name"],
        "uid": metadata["uid"],
        "resourceVersion": metadata.get("resourceVersion", ""),
    }
    if not had_reference:
        fresh["metadata"].setdefault("annotations", {})[BOUND_BY_CONTROLLER] = "yes"
    return fresh


def _owned_by(claim: Object, pod: PodInfo) -> bool:
    return any(o.get("controller") and o.get("uid") == pod.uid for o in claim["metadata"].get("ownerReferences") or ())


def _version(obj: Object) -> int:
    text = obj["metadata"].get("resourceVersion") or "0"
    return int(text) if text.isdigit() else 0
