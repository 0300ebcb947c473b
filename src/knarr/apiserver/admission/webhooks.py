"""MutatingAdmissionWebhook and ValidatingAdmissionWebhook.

Mutating webhooks run one after another, by configuration name and then in listed order, each seeing what the one before
made; after a change those that ask for it are run once more, with the built-in plugins before them. Validating webhooks
run at the same time.

Source: apiserver pkg/admission/plugin/webhook/{mutating,validating,generic}.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import orjson

from knarr.aiokits.log import get_logger
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.patch import json_patch
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.conditions import ConditionError, Conditions
from knarr.apiserver.admission.matching import EquivalentsOf, Match, NamespaceMatcher, is_exempt, match_rules, may_match
from knarr.apiserver.admission.measures import ADMIT, VALIDATE, Measures
from knarr.apiserver.admission.plugin import Plugin, object_name
from knarr.apiserver.admission.webhook_client import Answer, CallFailed, WebhookClient, review_answer
from knarr.apiserver.attributes import AdmissionRequest, Store
from knarr.apiserver.store import new_uid
from knarr.apiserver.tracing import CLIENT, inside

log = get_logger(__name__)

Complete = Callable[[AdmissionRequest, Object], None]
DEFAULT_TIMEOUT_SECONDS = 10


class Hook(NamedTuple):
    """One webhook of one configuration."""

    configuration: str
    place: int
    spec: Object

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.configuration, self.spec.get("name", ""), self.place)


class _Webhooks(Plugin):
    """What both kinds share: the hooks as the store has them now, choosing, and asking."""

    mutating = False

    def __init__(
        self, configurations: Store, namespaces: NamespaceMatcher, client: WebhookClient, conditions: Conditions, equivalents: EquivalentsOf,
    ) -> None:  # fmt: skip
        self._configurations = configurations
        self._namespaces = namespaces
        self._client = client
        self._conditions = conditions
        self._equivalents = equivalents
        self._hooks: tuple[int, list[Hook]] = (-1, [])
        self._concerned: dict[tuple[str, Resource, str], bool] = {}
        self.measures = Measures()
        """Replaced by the chain's."""

    @property
    def _type(self) -> str:
        return ADMIT if self.mutating else VALIDATE

    def hooks(self) -> list[Hook]:
        generation = self._configurations.generation
        if self._hooks[0] != generation:
            found = [
                Hook(meta.name(configuration), index, spec)
                for configuration in sorted(self._configurations.list_nowait(), key=meta.name)
                for index, spec in enumerate(configuration.get("webhooks") or ())
            ]
            self._hooks = (generation, found)
            self._concerned.clear()
        return self._hooks[1]

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return not is_exempt(resource)

    def sources(self) -> tuple[Store, ...]:
        return (self._configurations,)

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        hooks = self.hooks()
        if not hooks:
            return False
        key = (operation, resource, subresource)
        known = self._concerned.get(key)
        if known is None:
            known = self._concerned[key] = any(may_match(hook.spec.get("rules") or (), *key) for hook in hooks)
        return known

    async def _match(self, hook: Hook, request: AdmissionRequest) -> Match | None:
        """Return how the hook wants to see the request, None when it does not want to.

        Raises:
          StatusError: its conditions cannot be evaluated, and it fails closed.
        """
        spec = hook.spec
        found = match_rules(spec.get("rules") or (), spec.get("matchPolicy") or "Equivalent", request, self._equivalents)
        if found is None:
            return None
        if not self._namespaces.namespace_matches(spec.get("namespaceSelector"), request):
            return None
        if not self._namespaces.object_matches(spec.get("objectSelector"), request):
            return None
        conditions = spec.get("matchConditions")
        if conditions:
            try:
                if not await self._conditions.match(conditions, request, found, ignore_errors=spec.get("failurePolicy") == "Ignore"):
                    return None
            except ConditionError as error:
                raise errors.forbidden(request.resource, request.name, str(error)) from error
        return found

    async def _ask(self, hook: Hook, match: Match, request: AdmissionRequest) -> Answer:
        """Ask one webhook, and count what came of it. Raises StatusError, CallFailed."""
        name, operation = hook.spec.get("name", ""), request.operation
        begin = time.perf_counter()
        try:
            answer = await self._call(hook, match, request)
        except CallFailed:
            closed = hook.spec.get("failurePolicy") != "Ignore"
            self.measures.called(name, self._type, operation, time.perf_counter() - begin, 0, rejected=closed)
            if closed:
                self.measures.webhook_rejections.add(name, self._type, operation, "calling_webhook_error", "0")
            else:
                self.measures.webhook_fail_open.add(name, self._type)
            raise
        except StatusError as error:
            self.measures.called(name, self._type, operation, time.perf_counter() - begin, error.code, rejected=True)
            self.measures.webhook_rejections.add(name, self._type, operation, "no_error", str(min(error.code, 600)))
            raise
        self.measures.called(name, self._type, operation, time.perf_counter() - begin, 200, rejected=False)
        return answer

    async def _call(self, hook: Hook, match: Match, request: AdmissionRequest) -> Answer:
        spec = hook.spec
        if request.dry_run and spec.get("sideEffects") not in ("None", "NoneOnDryRun"):
            raise errors.bad_request(f'admission webhook "{spec.get("name")}" does not support dry run')
        version = next((one for one in spec.get("admissionReviewVersions") or () if one in ("v1", "v1beta1")), None)
        if version is None:
            raise CallFailed("could not create admission objects: webhook does not accept known AdmissionReview versions (v1, v1beta1)")
        uid = new_uid()
        body = orjson.dumps(review_request(uid, version, match, request))
        timeout = spec.get("timeoutSeconds") or DEFAULT_TIMEOUT_SECONDS
        told = {
            "configuration": hook.configuration, "webhook": spec.get("name", ""), "resource": request.resource.plural, "subresource": request.subresource,
            "operation": request.operation, "UID": uid,
        }  # fmt: skip
        try:
            with inside(f"Call {'mutating' if self.mutating else 'validating'} webhook", told, CLIENT):
                answered = await self._client.post(spec.get("clientConfig") or {}, body, timeout_seconds=timeout)
        except CallFailed as error:
            raise CallFailed(f"failed to call webhook: {error}") from error
        return self._judged(spec, request, uid, version, answered)

    def _judged(self, spec: Object, request: AdmissionRequest, uid: str, version: str, answered: bytes) -> Answer:
        """Read an answer. Raises StatusError for a refusal, CallFailed."""
        answer = review_answer(uid, version, answered, mutating=self.mutating)
        for key, value in answer.audit_annotations.items():
            request.audit_annotations[f"{spec.get('name')}/{key}"] = value
        request.warnings += answer.warnings
        if not answer.allowed:
            raise _denied(spec.get("name", ""), answer.result)
        return answer

    def _failed(self, hook: Hook, error: CallFailed) -> None:
        """Apply the failure policy to a call that went wrong."""
        name = hook.spec.get("name", "")
        if hook.spec.get("failurePolicy") == "Ignore":
            log.warning("webhook call failed, going on without it", webhook=name, error=str(error))
            return
        raise errors.internal(f'failed calling webhook "{name}": {error}') from error

    async def close(self) -> None:
        await self._client.close()


class ValidatingWebhooks(_Webhooks):
    name = "ValidatingAdmissionWebhook"

    def validate(self, request: AdmissionRequest) -> Awaitable[None] | None:
        return self._dispatch(request)

    async def _dispatch(self, request: AdmissionRequest) -> None:
        chosen = [(hook, match) for hook in self.hooks() if (match := await self._match(hook, request)) is not None]
        if not chosen:
            return
        if len(chosen) == 1:
            await self._one(chosen[0][0], chosen[0][1], request)
            return
        outcomes = await asyncio.gather(*(self._one(hook, match, request) for hook, match in chosen), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _one(self, hook: Hook, match: Match, request: AdmissionRequest) -> None:
        try:
            await self._ask(hook, match, request)
        except CallFailed as error:
            self._failed(hook, error)
            request.audit_annotations["failed-open.validating.webhook.admission.k8s.io/round_0_index_" + str(hook.place)] = hook.spec.get("name", "")


class MutatingWebhooks(_Webhooks):
    name = "MutatingAdmissionWebhook"
    mutating = True

    def __init__(
        self, configurations: Store, namespaces: NamespaceMatcher, client: WebhookClient, conditions: Conditions, equivalents: EquivalentsOf,
        complete: Complete,
    ) -> None:  # fmt: skip
        super().__init__(configurations, namespaces, client, conditions, equivalents)
        self._complete = complete
        self.again: Callable[[AdmissionRequest], Awaitable[None]] | None = None
        """Runs the plugins before this one once more; set by the chain."""

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        return self._dispatch(request)

    async def _dispatch(self, request: AdmissionRequest) -> None:
        changed = False
        # Hooks that want to be asked again, and whether the object has changed since they were.
        stale: dict[tuple[str, str, int], bool] = {}
        for hook in self.hooks():
            match = await self._match(hook, request)
            if match is None:
                continue
            if await self._one(hook, match, request, 0):
                changed = True
                stale = dict.fromkeys(stale, True)
            if hook.spec.get("reinvocationPolicy") == "IfNeeded":
                stale[hook.key] = False
        if not changed:
            return
        before = meta.deep_copy(request.object)
        if self.again is not None:
            await self.again(request)
        if request.object != before:
            stale = dict.fromkeys(stale, True)
        for hook in self.hooks():
            if stale.get(hook.key) and (match := await self._match(hook, request)) is not None:
                if await self._one(hook, match, request, 1):
                    stale = {key: True if key != hook.key else value for key, value in stale.items()}

    async def _one(self, hook: Hook, match: Match, request: AdmissionRequest, round_: int) -> bool:
        """Ask one hook; returns whether it changed the object."""
        place = f"round_{round_}_index_{hook.place}"
        changed = False
        try:
            answer = await self._ask(hook, match, request)
            if answer.patch:
                changed = self._patch(hook, match, request, answer.patch)
        except CallFailed as error:
            self._failed(hook, error)
            request.audit_annotations[f"failed-open.mutation.webhook.admission.k8s.io/{place}"] = hook.spec.get("name", "")
        noted = {"configuration": hook.configuration, "webhook": hook.spec.get("name", ""), "mutated": changed}
        request.audit_annotations[f"mutation.webhook.admission.k8s.io/{place}"] = orjson.dumps(noted).decode()
        return changed

    def _patch(self, hook: Hook, match: Match, request: AdmissionRequest, patch: bytes) -> bool:
        try:
            operations = orjson.loads(patch)
        except orjson.JSONDecodeError as error:
            raise CallFailed(f"received undecodable patch in webhook response: {error}") from error
        if not operations:
            return False
        if request.object is None:
            raise errors.internal(
                f'admission webhook "{hook.spec.get("name")}" attempted to modify the object, which is not supported for this operation'
            )
        before = request.object
        shown = match.convert(meta.deep_copy(before)) if match.convert is not None else before
        try:
            patched = json_patch.apply(meta.deep_copy(shown), operations)
        except json_patch.JSONPatchError as error:
            raise errors.internal(str(error)) from error
        if match.convert is not None:
            back = next((one for one in self._equivalents(match.resource) if one.resource == request.resource), None)
            if back is not None:
                patched = back.convert(patched)
        self._complete(request, patched)
        request.object = patched
        return bool(patched != before)


def _denied(name: str, result: Object | None) -> StatusError:
    """The refusal of a webhook as the error that the client gets."""
    result = dict(result or {})
    denied = f'admission webhook "{name}" denied the request'
    code = result.get("code") or 0
    code = code if isinstance(code, int) and code >= 400 else 400
    reason = str(result.get("reason") or "")
    explained = result.get("message") or reason
    message = f"{denied}: {explained}" if explained else f"{denied} without explanation"
    details = result.get("details")
    return StatusError(code, reason, message, details if isinstance(details, dict) else None)


def _gvk(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _gvr(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "resource": resource.plural}


def review_request(uid: str, version: str, match: Match, request: AdmissionRequest) -> Object:
    """Build the AdmissionReview that a hook is sent."""
    resource = request.resource
    own_kind = {"group": request.kind[0], "version": request.kind[1], "kind": request.kind[2]}
    seen_kind = own_kind if match.convert is None else _gvk(match.resource)

    def shown(obj: Object | None) -> Object | None:
        if obj is None:
            return None
        seen = match.convert(meta.deep_copy(obj)) if match.convert is not None else obj
        # A kind and a version stand in the object even where the store left them out.
        return {"kind": seen_kind["kind"], "apiVersion": _api_version(seen_kind), **{k: v for k, v in seen.items() if k not in ("kind", "apiVersion")}}

    asked: Object = {
        "uid": uid, "kind": seen_kind, "resource": _gvr(match.resource),
        **({"subResource": request.subresource} if request.subresource else {}),
        "requestKind": own_kind, "requestResource": _gvr(resource),
        **({"requestSubResource": request.subresource} if request.subresource else {}),
        **({"name": name} if (name := _review_name(request)) else {}),
        **({"namespace": request.namespace} if request.namespace else {}),
        "operation": request.operation, "userInfo": request.user.to_object(),
        "object": shown(request.object), "oldObject": shown(request.old_object), "dryRun": request.dry_run, "options": request.options,
    }  # fmt: skip
    return {"kind": "AdmissionReview", "apiVersion": f"admission.k8s.io/{version}", "request": asked}


def _review_name(request: AdmissionRequest) -> str:
    name = request.name or object_name(request)
    return "" if name == "Unknown" or (not request.name and not ((request.object or {}).get("metadata") or {}).get("name")) else name


def _api_version(kind: Object) -> str:
    return f"{kind['group']}/{kind['version']}" if kind["group"] else str(kind["version"])
