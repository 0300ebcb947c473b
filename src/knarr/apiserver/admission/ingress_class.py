"""DefaultIngressClass: an ingress that names no class gets the default one.

Source: kubernetes plugin/pkg/admission/network/defaultingressclass.
"""

from __future__ import annotations

from knarr.api import meta
from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, Plugin, is_resource
from knarr.apiserver.admission.storage import newest_default
from knarr.apiserver.attributes import AdmissionRequest, Store


class DefaultIngressClass(Plugin):
    name = "DefaultIngressClass"

    def __init__(self, ingress_classes: Store) -> None:
        self._classes = ingress_classes

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "networking.k8s.io", "ingresses") and not subresource and operation == CREATE

    def admit(self, request: AdmissionRequest) -> None:
        ingress = request.object
        if ingress is None or "kubernetes.io/ingress.class" in meta.annotations(ingress):
            return
        spec = ingress.setdefault("spec", {})
        if spec.get("ingressClassName") is None:
            default = newest_default(self._classes.list_nowait(), ("ingressclass.kubernetes.io/is-default-class",))
            if default is not None:
                spec["ingressClassName"] = meta.name(default)
