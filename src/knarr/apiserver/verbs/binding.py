"""Binding a pod to a node.

Source: pkg/registry/core/pod/storage/storage.go BindingREST.
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.api import decode as decoding
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.apiserver.call import Call
from knarr.apiserver.store import ResourceStore
from knarr.apiserver.verbs.create import check_namespace, read_body


async def bind(call: Call) -> None:
    """Answer POST pods/NAME/binding, and POST bindings."""
    body = read_body(call)
    call.write_options("CreateOptions")
    content_type = call.request.headers.get("content-type", "")
    binding, warnings = decoding.decode(("v1", "Binding"), body, content_type, call.field_validation or "Warn")
    call.warnings += warnings
    call.log_object = binding
    metadata = binding.setdefault("metadata", {})
    check_namespace(call, metadata)
    name = call.info.name or metadata.get("name") or ""
    if metadata.get("name") and call.info.name and metadata["name"] != call.info.name:
        raise errors.bad_request("name in URL does not match name in Binding object")
    found = _validate(binding)
    if found:
        # Upstream returns these errors bare: an internal error without a reason.
        raise StatusError(500, "", "; ".join(str(error) for error in found))
    admission = call.server.admission_for("CREATE", call.endpoint.resource, "binding")
    if admission is not None:
        from knarr.apiserver.verbs.create import admission_request

        request = admission_request(call, "CREATE", binding, None, "binding" if call.info.subresource else "")
        request.kind = ("", "v1", "Binding")
        await admission.run(request)
    pods = call.server.registry.stores["", "pods"]
    await _assign(call, pods, name, binding)
    call.answer_status({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})


def _validate(binding: Object) -> list[errors.FieldError]:
    target = binding.get("target") or {}
    found = []
    if target.get("kind") not in (None, "", "Node"):
        found.append(errors.not_supported("target.kind", target["kind"], ["Node", "<empty>"]))
    if not target.get("name"):
        found.append(errors.required("target.name"))
    return found


async def _assign(call: Call, pods: ResourceStore, name: str, binding: Object) -> None:
    node = binding["target"]["name"]
    given = binding["metadata"]

    def change(pod: Object) -> Object:
        metadata, spec = pod["metadata"], pod["spec"]
        if given.get("uid") and given["uid"] != metadata["uid"]:
            raise errors.conflict("pods", name, (
                f"StorageError: invalid object, Code: 4, Key: /registry/pods/{call.namespace}/{name}, ResourceVersion: 0, "
                f"AdditionalErrorMsg: Precondition failed: UID in precondition: {given['uid']}, UID in object meta: {metadata['uid']}"))
        if metadata.get("deletionTimestamp"):
            raise errors.conflict("pods/binding", name, f"pod {name} is being deleted, cannot be assigned to a host")
        if spec.get("nodeName"):
            raise errors.conflict("pods/binding", name, f'pod {name} is already assigned to node "{spec["nodeName"]}"')
        if spec.get("schedulingGates"):
            raise errors.conflict("pods/binding", name, f"pod {name} has non-empty .spec.schedulingGates")
        metadata = dict(metadata)
        for key in ("annotations", "labels"):
            if given.get(key):
                metadata[key] = {**(metadata.get(key) or {}), **given[key]}
        return {**pod, "metadata": metadata, "spec": {**spec, "nodeName": node}, "status": _scheduled(pod)}

    if call.dry_run:
        current = pods.get_nowait(call.namespace, name)
        if current is None:
            raise errors.not_found("pods", name)
        change(current)
        return
    await pods.change(call.namespace, name, change)


def _scheduled(pod: Object) -> Object:
    """The status of a pod that has a node now."""
    status = pod.get("status") or {}
    condition: Object = {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": clock.now_rfc3339()}
    generation = pod["metadata"].get("generation") or 0
    others = [c for c in status.get("conditions") or [] if c.get("type") != "PodScheduled"]
    before = next((c for c in status.get("conditions") or [] if c.get("type") == "PodScheduled"), None)
    if before is not None and before.get("observedGeneration"):
        condition["observedGeneration"] = generation
    return {**status, "conditions": [*others, condition]}
