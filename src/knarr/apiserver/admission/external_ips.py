"""DenyServiceExternalIPs: no Service takes addresses of its own choice, with which it could draw others' traffic.

Source: kubernetes plugin/pkg/admission/network/denyserviceexternalips.
"""

from __future__ import annotations

from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest


class DenyServiceExternalIPs(Plugin):
    name = "DenyServiceExternalIPs"
    by_default = False

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "services") and not subresource and operation in (CREATE, UPDATE)

    def validate(self, request: AdmissionRequest) -> None:
        wanted = ((request.object or {}).get("spec") or {}).get("externalIPs") or ()
        had = ((request.old_object or {}).get("spec") or {}).get("externalIPs") or ()
        if not set(wanted) <= set(had):
            raise refuse(request, "Use of external IPs is denied by admission control")
