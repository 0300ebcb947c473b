"""Expressions in webhook configurations and policies must compile when they are written.

Called by the strategies of these resources, as part of validation; it stands here because the expressions' variables are
admission's. What was stored with an expression may keep it. That one is there is judged with
the other fields.

Source: kubernetes pkg/apis/admissionregistration/validation.
"""

from __future__ import annotations

from collections.abc import Iterator

from knarr.api import cel
from knarr.api.errors import FieldError, invalid_value
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.expressions import CONDITION_VARIABLES, Programs
from knarr.apiserver.admission.policy_programs import Policy

_WEBHOOKS = ("validatingwebhookconfigurations", "mutatingwebhookconfigurations")
_CONDITIONS = Programs(CONDITION_VARIABLES, cel.BOOL)


def expression_errors(resource: Resource, obj: Object, old: Object | None) -> list[FieldError]:
    """Return what is wrong with the expressions that old does not have."""
    if resource.plural in _WEBHOOKS:
        stored = {source for _, source in _conditions(old)} if old is not None else set()
        return [error for source, error in _webhook_errors(obj) if source not in stored]
    if resource.plural != "validatingadmissionpolicies":
        return []
    stored = {expression.source for expression in Policy(old).expressions()} if old is not None else set()
    return [error for source, error in _policy_errors(obj) if source not in stored]


def _conditions(obj: Object) -> Iterator[tuple[str, str]]:
    for index, hook in enumerate(obj.get("webhooks") or ()):
        for position, condition in enumerate(hook.get("matchConditions") or ()):
            yield f"webhooks[{index}].matchConditions[{position}].expression", condition.get("expression") or ""


def _message(error: cel.CompileError) -> str:
    return error.reason if isinstance(error, cel.ResultTypeError) else f"compilation failed: {error}"


def _webhook_errors(obj: Object) -> Iterator[tuple[str, FieldError]]:
    for path, source in _conditions(obj):
        if not source.strip():
            continue
        try:
            _CONDITIONS.get(source)
        except cel.CompileError as error:
            yield source, invalid_value(path, source, _message(error))


def _policy_errors(obj: Object) -> Iterator[tuple[str, FieldError]]:
    for expression in Policy(obj).expressions():
        if expression.source.strip() and expression.error is not None:
            yield expression.source, invalid_value(expression.path, expression.source, _message(expression.error))
