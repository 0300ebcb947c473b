"""The scale subresource: one number of a workload, read and written as autoscaling/v1 Scale.

Source: pkg/registry/apps/deployment/storage, core/replicationcontroller/storage, apiextensions customresource etcd.go.
"""

from __future__ import annotations

import orjson

from knarr.api import decode as decoding
from knarr.api import errors
from knarr.api.apply import FieldManager, apply_body, manager_for, scale_from_parent, scale_to_parent
from knarr.api.meta import deep_copy
from knarr.api.patch import APPLY_PATCH, apply_patch, patch_type
from knarr.api.resources import DEPLOYMENTS
from knarr.api.selectors import LabelSelector, from_label_selector, from_map
from knarr.api.types import Object
from knarr.apiserver.call import Call
from knarr.apiserver.managed import field_manager
from knarr.apiserver.verbs.create import read_body
from knarr.apiserver.verbs.update import MODIFIED, UpdateMode, change_object

SCALE = ("autoscaling/v1", "Scale")


def selector_text(obj: Object) -> str:
    """Return the selector of a workload as text, terms in order of keys."""
    selector = (obj.get("spec") or {}).get("selector")
    if selector is None:
        return ""
    compiled: LabelSelector
    if "matchLabels" in selector or "matchExpressions" in selector or not selector:
        compiled = from_label_selector(selector)
    else:
        compiled = from_map(selector)
    return str(compiled)


def scale_of(call: Call, obj: Object) -> Object:
    """Return the Scale of a workload."""
    scaler = call.endpoint.schema.scale if call.endpoint.schema is not None else None
    metadata = obj["metadata"]
    out: Object = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": {}}
    for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp"):
        if key in metadata:
            out["metadata"][key] = metadata[key]
    if scaler is not None:
        try:
            replicas, current, selector = scaler.read(obj)
        except errors.StatusError:
            # Writing a first number is fine, reading an absent one is not.
            if call.info.verb == "get":
                raise
            replicas, current, selector = 0, 0, ""
    else:
        replicas = (obj.get("spec") or {}).get("replicas") or 0
        current = (obj.get("status") or {}).get("replicas") or 0
        selector = selector_text(obj)
    out["spec"] = {"replicas": replicas} if replicas else {}
    out["status"] = {"replicas": current}
    if selector:
        out["status"]["selector"] = selector
    return out


async def handle(call: Call) -> None:
    """Answer GET, PUT and PATCH of a scale."""
    store = call.endpoint.live_store
    cached = store.find(call.namespace, call.info.name)
    if cached is None:
        raise errors.not_found(call.endpoint.resource, call.info.name)
    await call.endpoint.prepare([cached])
    if call.info.verb == "get":
        obj = orjson.loads(call.endpoint.json.single(cached))
        _respond(call, scale_of(call, obj))
        return
    call.form()
    body = read_body(call)
    content_type = call.request.headers.get("content-type", "")
    if call.info.verb == "update":
        call.write_options("UpdateOptions")
        given, warnings = decoding.decode(SCALE, body, content_type, call.field_validation or "Warn")
        call.warnings += warnings
    else:
        call.write_options("PatchOptions")
        given = {}

    manager = field_manager(call.endpoint, "scale") if call.endpoint.schema is None else manager_for(DEPLOYMENTS, "scale")
    path = call.endpoint.schema.scale.replicas_path if call.endpoint.schema is not None else ("spec", "replicas")

    async def change(old: Object | None, attempt: int) -> Object:
        assert old is not None
        entries = old["metadata"].get("managedFields")
        before = scale_of(call, old)
        before["metadata"]["managedFields"] = scale_from_parent(entries, path)
        wanted = _wanted(call, before, given, body, content_type, manager)
        new = _scaled(call, old, wanted)
        owners = scale_to_parent(entries, wanted["metadata"].get("managedFields"), call.endpoint.resource.api_version, path)
        if owners:
            new["metadata"]["managedFields"] = owners
        return new

    mode = UpdateMode(call.endpoint.strategy.prepare_update, "scale", unconditional=True, tracks=False)
    result, _ = await change_object(call, mode, change)
    if not isinstance(result, dict):
        await call.endpoint.prepare([result])
    obj = result if isinstance(result, dict) else orjson.loads(call.endpoint.json.single(result))
    _respond(call, scale_of(call, obj))


def _wanted(call: Call, before: Object, given: Object, body: bytes, content_type: str, manager: FieldManager) -> Object:
    """Return the Scale that the request wants, with its managed fields."""
    if call.info.verb != "patch":
        wanted: Object = deep_copy(given)
        manager.update(before, wanted, call.manager)
        return wanted
    if patch_type(content_type) == APPLY_PATCH:
        if not call.field_manager:
            raise errors.invalid("PatchOptions.meta.k8s.io", "", [errors.required("fieldManager", "is required for apply patch")])
        wanted, warnings = apply_body(
            manager, before, body, call.field_manager, force=bool(call.boolean("force")), field_validation=call.field_validation or "Warn",
        )
        call.warnings += warnings
        return wanted
    wanted, warnings = apply_patch(SCALE, before, body, content_type, call.field_validation or "Warn")
    call.warnings += warnings
    manager.update(before, wanted, call.manager)
    return wanted


def _scaled(call: Call, old: Object, wanted: Object) -> Object:
    metadata = wanted.get("metadata") or {}
    resource = call.endpoint.resource
    name = metadata.get("name")
    if not name or name != call.info.name:
        raise errors.bad_request(f"the name of the object ({name or ''}) does not match the name on the URL ({call.info.name})")
    if metadata.get("namespace") and metadata["namespace"] != call.namespace:
        raise errors.bad_request("the namespace of the provided object does not match the namespace sent on the request")
    version = metadata.get("resourceVersion")
    if version and version != old["metadata"]["resourceVersion"]:
        raise errors.conflict(resource, call.info.name, MODIFIED)
    if metadata.get("uid") and metadata["uid"] != old["metadata"]["uid"]:
        raise errors.conflict(resource, call.info.name, (
            f"Precondition failed: UID in precondition: {metadata['uid']}, UID in object meta: {old['metadata']['uid']}"))
    replicas = (wanted.get("spec") or {}).get("replicas") or 0
    if replicas < 0:
        if resource.custom:
            path = "." + ".".join(call.endpoint.schema.scale.replicas_path)
            raise errors.invalid(resource, call.info.name, [errors.invalid_value(path, replicas, "should be a non-negative integer")])
        raise errors.invalid("Scale.autoscaling", call.info.name, [
            errors.invalid_value("spec.replicas", replicas, "must be greater than or equal to 0")])
    if call.endpoint.schema is not None and call.endpoint.schema.scale is not None:
        call.endpoint.schema.scale.write(old, replicas)
    else:
        old.setdefault("spec", {})["replicas"] = replicas
    return old


def _respond(call: Call, scale: Object) -> None:
    from knarr.apiserver.verbs.subresources import respond_plain

    respond_plain(call, 200, scale)
