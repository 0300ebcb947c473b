"""The place of the RBAC escalation checks in the chain: after everything that may change a role or binding.

Upstream makes them part of the registry, so this plugin cannot be switched off.
"""

from __future__ import annotations

from collections.abc import Awaitable

from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin
from knarr.apiserver.attributes import AdmissionRequest
from knarr.apiserver.auth.escalation import RBAC_GROUP, Escalation


class RBACEscalation(Plugin):
    name = "RBACEscalation"

    def __init__(self, escalation: Escalation) -> None:
        self._escalation = escalation

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return resource.group == RBAC_GROUP and not subresource and operation in (CREATE, UPDATE)

    def admit(self, request: AdmissionRequest) -> Awaitable[None]:
        return self._escalation.check(request)
