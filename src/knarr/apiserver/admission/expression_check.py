"""Expressions in webhook configurations and policies must compile when they are written.

Upstream has this in validation; it stands here because the expressions' variables are admission's. What was stored with an
expression may keep it.

Source: kubernetes pkg/apis/admissionregistration/validation.
"""

from __future__ import annotations

from collections.abc import Iterator

from knarr.api import cel, errors
from knarr.api.errors import FieldError, invalid_value, required
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.expressions import CONDITION_VARIABLES, Programs
from knarr.apiserver.admission.matching import GROUP
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, object_name
from knarr.apiserver.admission.policy_programs import Policy
from knarr.apiserver.attributes import AdmissionRequest

_WEBHOOKS = ("validatingwebhookconfigurations", "mutatingwebhookconfigurations")


class ExpressionCheck(Plugin):
    name = "ExpressionCheck"

    def __init__(self) -> None:
        self._conditions = Programs(CONDITION_VARIABLES, cel.BOOL)

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return resource.group == GROUP and resource.plural in (*_WEBHOOKS, "validatingadmissionpolicies") and not subresource and operation in (CREATE, UPDATE)

    def validate(self, request: AdmissionRequest) -> None:
        obj = request.object
        if obj is None:
            return
        webhooks = request.resource.plural in _WEBHOOKS
        problems = self._webhook_problems if webhooks else _policy_problems
        stored = {source for _, source, _ in self._sources(request.old_object, webhooks)} if request.old_object is not None else set()
        found = [error for source, error in problems(obj) if source not in stored]
        if found:
            raise errors.invalid(request.resource, object_name(request), found)

    @staticmethod
    def _sources(obj: Object | None, webhooks: bool) -> Iterator[tuple[str, str, bool]]:
        if obj is None:
            return
        if webhooks:
            for index, hook in enumerate(obj.get("webhooks") or ()):
                for position, condition in enumerate(hook.get("matchConditions") or ()):
                    yield f"webhooks[{index}].matchConditions[{position}].expression", condition.get("expression") or "", True
        else:
            for expression in Policy(obj).expressions():
                yield expression.path, expression.source, expression.error is None

    def _webhook_problems(self, obj: Object) -> Iterator[tuple[str, FieldError]]:
        for path, source, _ in self._sources(obj, webhooks=True):
            if not source.strip():
                yield source, required(path)
                continue
            try:
                self._conditions.get(source)
            except cel.CompileError as error:
                yield source, invalid_value(path, source, f"compilation failed: {error}")


def _policy_problems(obj: Object) -> Iterator[tuple[str, FieldError]]:
    for expression in Policy(obj).expressions():
        if not expression.source.strip():
            yield expression.source, required(expression.path, f"{expression.path.rpartition('.')[2]} is not specified")
        elif expression.error is not None:
            yield expression.source, invalid_value(expression.path, expression.source, f"compilation failed: {expression.error}")
