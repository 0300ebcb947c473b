"""Plugins about volumes: DefaultStorageClass, StorageObjectInUseProtection, PersistentVolumeClaimResize.

Source: kubernetes plugin/pkg/admission/storage.
"""

from __future__ import annotations

from knarr.api import meta, quantity
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store

_CLASS_ANNOTATION = "volume.beta.kubernetes.io/storage-class"
_DEFAULT_ANNOTATIONS = ("storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class")


def newest_default(classes: list[Object], annotations: tuple[str, ...]) -> Object | None:
    """Of the classes marked as default the newest, of equally old ones the first by name."""
    marked = [one for one in classes if any(meta.annotations(one).get(annotation) == "true" for annotation in annotations)]
    marked.sort(key=meta.name)
    return max(marked, key=meta.creation_timestamp, default=None)


class DefaultStorageClass(Plugin):
    name = "DefaultStorageClass"

    def __init__(self, storage_classes: Store) -> None:
        self._classes = storage_classes

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "persistentvolumeclaims") and not subresource and operation == CREATE

    def admit(self, request: AdmissionRequest) -> None:
        claim = request.object
        if claim is None or _CLASS_ANNOTATION in meta.annotations(claim) or claim["spec"].get("storageClassName") is not None:
            return
        default = newest_default(self._classes.list_nowait(), _DEFAULT_ANNOTATIONS)
        if default is not None:
            claim["spec"]["storageClassName"] = meta.name(default)


_PROTECTION = {
    ("", "persistentvolumes"): "kubernetes.io/pv-protection",
    ("", "persistentvolumeclaims"): "kubernetes.io/pvc-protection",
    ("storage.k8s.io", "volumeattributesclasses"): "kubernetes.io/vac-protection",
}


class StorageObjectInUseProtection(Plugin):
    name = "StorageObjectInUseProtection"

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return (resource.group, resource.plural) in _PROTECTION and not subresource and operation == CREATE

    def admit(self, request: AdmissionRequest) -> None:
        if request.object is not None:
            meta.add_finalizer(request.object, _PROTECTION[(request.resource.group, request.resource.plural)])


class PersistentVolumeClaimResize(Plugin):
    name = "PersistentVolumeClaimResize"

    def __init__(self, storage_classes: Store) -> None:
        self._classes = storage_classes

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "persistentvolumeclaims") and not subresource and operation == UPDATE

    def validate(self, request: AdmissionRequest) -> None:
        new, old = request.object, request.old_object
        if new is None or old is None:
            return
        sizes = [((claim["spec"].get("resources") or {}).get("requests") or {}).get("storage", "0") for claim in (new, old)]
        if quantity.compare(sizes[0], sizes[1]) <= 0:
            return
        if (old.get("status") or {}).get("phase") != "Bound":
            raise refuse(request, "Only bound persistent volume claims can be expanded")
        names = [meta.annotations(claim).get(_CLASS_ANNOTATION) or claim["spec"].get("storageClassName") or "" for claim in (new, old)]
        found = self._classes.get_nowait("", names[0]) if names[0] and names[0] == names[1] else None
        if found is None or not found.get("allowVolumeExpansion"):
            raise refuse(request, "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize")
