"""Subresources: status and scale for every kind that has them, and those of single kinds; and resources that only answer.

Source: pkg/registry/*/storage/storage.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from knarr.api import decode as decoding
from knarr.api import errors, table
from knarr.api.apply import manager_for
from knarr.api.types import Object
from knarr.apiserver.attributes import ResourceKey, ReviewRequest
from knarr.apiserver.call import Call
from knarr.apiserver.registry.core import CertificateSigningRequest, Namespace
from knarr.apiserver.registry.pods import Pod
from knarr.apiserver.verbs import binding, eviction, patch, read, scale, update
from knarr.apiserver.verbs.create import read_body
from knarr.apiserver.verbs.update import UpdateMode

Special = Callable[[Call], Awaitable[None]]

CREATES: dict[tuple[str, str, str], Special] = {
    ("", "pods", "binding"): binding.bind,
    ("", "pods", "eviction"): eviction.evict,
}


async def handle(call: Call) -> None:
    """Answer a request to a subresource."""
    info = call.info
    resource = call.endpoint.resource
    known = resource.subresources.get(info.subresource)
    if known is None:
        if resource.custom:
            raise errors.not_found(resource, info.name)
        raise errors.route_not_found()
    verb = info.verb
    if verb not in known.verbs:
        if resource.custom:
            raise errors.method_not_supported(resource, verb)
        raise errors.method_not_allowed()
    if info.subresource == "scale":
        await scale.handle(call)
        return
    if verb == "create":
        special = CREATES.get((resource.group, resource.plural, info.subresource))
        if special is not None:
            await special(call)
        else:
            await review(call)
        return
    if verb == "get":
        read.get(call)
        return
    mode = _mode(call)
    if verb == "update":
        await update.update(call, mode)
    elif verb == "patch":
        await patch.patch(call, mode)
    else:
        raise errors.method_not_allowed()


def _mode(call: Call) -> UpdateMode:
    """How an update through this subresource differs from a plain one."""
    name = call.info.subresource
    strategy = call.endpoint.strategy
    if name == "status":
        return update.mode_of(call, "status")
    unconditional = strategy.unconditional_update
    if isinstance(strategy, Namespace) and name == "finalize":
        return UpdateMode(strategy.prepare_finalize, "finalize", unconditional=unconditional)
    if isinstance(strategy, CertificateSigningRequest) and name == "approval":
        return UpdateMode(strategy.prepare_approval, "approval", unconditional=unconditional)
    if isinstance(strategy, Pod) and name == "ephemeralcontainers":
        return UpdateMode(strategy.prepare_ephemeral, name, unconditional=unconditional)
    if isinstance(strategy, Pod) and name == "resize":
        return UpdateMode(strategy.prepare_resize, name, unconditional=unconditional)
    raise errors.route_not_found()


async def review(call: Call) -> None:
    """Answer a create that stores nothing: access reviews, token requests, bindings."""
    call.form()
    info = call.info
    resource = call.endpoint.resource
    if (not info.subresource and "create" not in resource.verbs) or info.verb != "create":
        raise errors.method_not_allowed()
    if info.resource == "bindings" and not info.group:
        await binding.bind(call)
        return
    assert call.server.auth is not None
    handler = call.server.auth.reviews.get(ResourceKey(info.group, info.resource, info.subresource))
    if handler is None:
        raise errors.method_not_supported(resource, "create")
    body = read_body(call)
    call.write_options("CreateOptions")
    sub = resource.subresources.get(info.subresource)
    kind = (sub.api_version, sub.kind) if sub is not None else (resource.api_version, resource.kind)
    obj, warnings = decoding.decode(kind, body, call.request.headers.get("content-type", ""), call.field_validation or "Warn")
    call.warnings += warnings
    call.log_object = obj
    manager_for(resource, info.subresource).update(None, obj, call.manager)
    answer: Object = await handler(ReviewRequest(call.user, info.namespace, info.name, obj, call.dry_run))
    respond_plain(call, 201, answer)


def respond_plain(call: Call, status: int, obj: Object) -> None:
    """Answer with an object of a kind other than the endpoint's, in JSON, YAML or protobuf."""
    form, yaml, pretty = call.form()
    if form.name == "table":
        group = obj["apiVersion"].rpartition("/")[0]
        metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]} if "resourceVersion" in (obj.get("metadata") or {}) else {}
        include = call.parameter("includeObject") or "Metadata"
        obj = table.table((group, obj["kind"]), [obj], metadata, include_object=include)
    if form.name == "protobuf":
        from knarr.apiserver.protoforms import encode_envelope

        call.answer_bytes(status, encode_envelope(obj), form.content_type)
        return
    call.answer_bytes(status, call.endpoint.json.body_of(obj), "application/json", yaml, pretty)
