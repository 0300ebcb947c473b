"""AlwaysPullImages: every container's image is pulled anew, so that nobody uses a private image that others left on the node.

Source: kubernetes plugin/pkg/admission/alwayspullimages.
"""

from __future__ import annotations

from collections.abc import Iterator

from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest

_GROUPS = ("initContainers", "containers", "ephemeralContainers")


def _containers(pod: Object) -> Iterator[tuple[str, Object]]:
    spec = pod.get("spec") or {}
    for group in _GROUPS:
        for index, container in enumerate(spec.get(group) or ()):
            yield f"spec.{group}[{index}]", container


class AlwaysPullImages(Plugin):
    name = "AlwaysPullImages"
    by_default = False

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation in (CREATE, UPDATE)

    def _is_unconcerned(self, request: AdmissionRequest) -> bool:
        """An update that brings no image that the pod did not have."""
        if request.object is None:
            return True
        if request.old_object is None:
            return False
        before = {container.get("image") for _, container in _containers(request.old_object)}
        return all(container.get("image") in before for _, container in _containers(request.object))

    def admit(self, request: AdmissionRequest) -> None:
        if self._is_unconcerned(request):
            return
        assert request.object is not None
        for _, container in _containers(request.object):
            container["imagePullPolicy"] = "Always"
        for volume in (request.object.get("spec") or {}).get("volumes") or ():
            if volume.get("image"):
                volume["image"]["pullPolicy"] = "Always"

    def validate(self, request: AdmissionRequest) -> None:
        if self._is_unconcerned(request):
            return
        assert request.object is not None
        for path, container in _containers(request.object):
            policy = container.get("imagePullPolicy", "")
            if policy != "Always":
                raise refuse(request, f'{path}.imagePullPolicy: Unsupported value: "{policy}": supported values: "Always"')
