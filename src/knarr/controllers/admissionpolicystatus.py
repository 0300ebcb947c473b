"""ValidatingAdmissionPolicy status: the policy was looked at, with what its expressions get wrong about types.

Source: pkg/controller/validatingadmissionpolicystatus/controller.go.
"""

from __future__ import annotations

from knarr.api.resources import VALIDATING_ADMISSION_POLICIES
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context
from knarr.controllers.expressiontypes import TypeChecker


class ValidatingAdmissionPolicyStatusController:
    """Keeps status.observedGeneration and status.typeChecking."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._checker = TypeChecker(ctx.client)
        self._policies = ctx.informer(VALIDATING_ADMISSION_POLICIES)
        self.controller = Controller("validatingadmissionpolicy-status-controller", self._reconcile, workers=5)
        self._policies.add_handler(self._changed, lambda old, new: self._changed(new))

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, policy: Object) -> None:
        generation = policy["metadata"].get("generation") or 0
        if (policy.get("status") or {}).get("observedGeneration", 0) < generation:
            self.controller.queue.add(policy["metadata"]["name"])

    async def _reconcile(self, name: str) -> None:
        policy = self._policies.get(None, name)
        if policy is None:
            return
        generation = policy["metadata"].get("generation") or 0
        if (policy.get("status") or {}).get("observedGeneration", 0) >= generation:
            return
        warnings = await self._checker.warnings(policy)
        status: Object = {"observedGeneration": generation, "typeChecking": {"expressionWarnings": warnings} if warnings else {}}
        body = {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": name},
            "status": status,
        }
        await self._client.patch(
            VALIDATING_ADMISSION_POLICIES,
            name,
            None,
            body,
            type="apply",
            subresource="status",
            field_manager="validatingadmissionpolicy-status-controller",
            force=True,
        )
