"""ResourceClaims of pods: made from templates, reserved, released when nobody uses them.

Source: pkg/controller/resourceclaim/controller.go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import PODS, RESOURCE_CLAIM_TEMPLATES, RESOURCE_CLAIMS
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key

_FINALIZER = "resource.kubernetes.io/delete-protection"
_POD_CLAIM = "resource.kubernetes.io/pod-claim-name"
_MOST_CONSUMERS = 256
_DELETED_PODS = 500
# Leaves space for the random end of a name of 63 characters.
_BASE_CHARACTERS = 57


class _ClaimError(Exception):
    """A claim of a pod cannot be made; the message is for the pod's event."""


def _is_done(pod: Object) -> bool:
    """Whether certainly no container of the pod runs, or ever will."""
    return podutil.is_finished(pod) or (podutil.is_deleting(pod) and not pod["spec"].get("nodeName"))


def claim_name(pod: Object, entry: Object) -> tuple[str | None, bool]:
    """(name of the claim behind an entry of the pod, whether it has to be the pod's own); "" when no claim is needed, None when not known yet."""
    if entry.get("resourceClaimName"):
        return str(entry["resourceClaimName"]), False
    for status in (pod.get("status") or {}).get("resourceClaimStatuses") or ():
        if status["name"] == entry["name"]:
            return str(status.get("resourceClaimName") or ""), True
    return None, True


def claims_of(pod: Object) -> Iterator[str]:
    """Index function: the keys of the claims that a pod uses, as far as they are known."""
    for entry in pod["spec"].get("resourceClaims") or ():
        name, _ = claim_name(pod, entry)
        if name:
            yield f"{pod['metadata']['namespace']}/{name}"


def _owner_uid(claim: Object) -> list[str]:
    owner = meta.controller_of(claim)
    return [owner["uid"]] if owner is not None and owner["kind"] == "Pod" and owner["apiVersion"] == "v1" else []


def is_of(pod: Object, claim: Object) -> bool:
    """Whether a claim was made for this pod."""
    return _owner_uid(claim) == [pod["metadata"]["uid"]]


def _generate_name(pod: str, claim: str) -> str:
    whole = f"{pod}-{claim}-"
    if len(whole) <= _BASE_CHARACTERS:
        return whole
    return f"{pod[: len(pod) * _BASE_CHARACTERS // len(whole)]}-{claim[: len(claim) * _BASE_CHARACTERS // len(whole)]}"


class ResourceClaimController:
    """Keys are "pod:namespace/name" and "claim:namespace/name"."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._pods = ctx.pods
        self._claims = ctx.informer(RESOURCE_CLAIMS)
        self._templates = ctx.informer(RESOURCE_CLAIM_TEMPLATES)
        self._recorder = ctx.recorder("resource_claim")
        # Made or not, the cache may not show it yet: by pod's uid and entry.
        self._made: dict[tuple[str, str], str] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self._pods.add_index("resourceclaims", claims_of)
        self._claims.add_index("owningpod", _owner_uid)
        self.controller = Controller("resourceclaim-controller", self._reconcile, workers=10)
        self._pods.add_handler(self._pod_changed, lambda old, new: self._pod_changed(new), self._pod_deleted)
        self._claims.add_handler(self._claim_changed, lambda old, new: self._claim_changed(new), self._claim_changed)
        self._templates.add_handler(self._template_added)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _pod_changed(self, pod: Object) -> None:
        if not pod["spec"].get("resourceClaims"):
            return
        if _is_done(pod):
            self._release(pod)
        elif not podutil.is_deleting(pod):
            self.controller.queue.add("pod:" + object_key(pod))

    def _pod_deleted(self, pod: Object) -> None:
        if not pod["spec"].get("resourceClaims"):
            return
        uid = pod["metadata"]["uid"]
        self._deleted[uid] = None
        if len(self._deleted) > _DELETED_PODS:
            self._deleted.popitem(last=False)
        for key in [key for key in self._made if key[0] == uid]:
            del self._made[key]
        self._release(pod)

    def _release(self, pod: Object) -> None:
        for key in claims_of(pod):
            self.controller.queue.add("claim:" + key)
        for claim in self._claims.by_index("owningpod", pod["metadata"]["uid"]):
            self.controller.queue.add("claim:" + object_key(claim))

    def _claim_changed(self, claim: Object) -> None:
        key = object_key(claim)
        self.controller.queue.add("claim:" + key)
        # Pods may wait for it to be allocated, or need it made again.
        for pod in self._pods.by_index("resourceclaims", key):
            self._pod_changed(pod)

    def _template_added(self, template: Object) -> None:
        name = template["metadata"]["name"]
        for pod in self._pods.list(template["metadata"]["namespace"]):
            if any(entry.get("resourceClaimTemplateName") == name for entry in pod["spec"].get("resourceClaims") or ()):
                self._pod_changed(pod)

    # Pods

    async def _reconcile(self, key: str) -> None:
        kind, _, name = key.partition(":")
        if kind == "pod":
            await self._sync_pod(name)
        else:
            await self._sync_claim(name)

    async def _sync_pod(self, key: str) -> None:
        pod = self._pods.get_key(key)
        if pod is None or podutil.is_deleting(pod) or podutil.is_finished(pod):
            return
        made: dict[str, str] = {}
        for entry in pod["spec"].get("resourceClaims") or ():
            try:
                name = await self._ensure(pod, entry)
            except (_ClaimError, StatusError) as error:
                self._recorder.event(pod, "Warning", "FailedResourceClaimCreation", f"PodResourceClaim {entry['name']}: {error}")
                raise
            if name:
                made[entry["name"]] = name
        if made:
            await self._write_names(pod, made)
        if pod["spec"].get("nodeName"):
            # Not the scheduler's pod, so nobody else reserves for it.
            await self._reserve(pod)

    async def _write_names(self, pod: Object, made: dict[str, str]) -> None:
        statuses = [{"name": name, "resourceClaimName": claim} for name, claim in made.items()]
        meta_ = pod["metadata"]
        patch = {"metadata": {"uid": meta_["uid"]}, "status": {"resourceClaimStatuses": statuses}}
        await self._client.patch(PODS, meta_["name"], meta_["namespace"], patch, type="strategic", subresource="status")

    async def _ensure(self, pod: Object, entry: Object) -> str:
        """Make the claim of one entry if it is missing; gives its name when the pod does not know it yet."""
        namespace = pod["metadata"]["namespace"]
        name, own = claim_name(pod, entry)
        if name == "":
            return ""
        if name is not None:
            claim = self._claims.get(namespace, name)
            if claim is not None and (not own or is_of(pod, claim)):
                return ""
        template_name = entry.get("resourceClaimTemplateName")
        if not template_name:
            return ""
        for claim in self._claims.by_index("owningpod", pod["metadata"]["uid"]):
            if meta.annotations(claim).get(_POD_CLAIM) == entry["name"]:
                return str(claim["metadata"]["name"])
        made = self._made.get((pod["metadata"]["uid"], entry["name"]))
        if made is not None and made != name:
            return made
        template = self._templates.get(namespace, template_name)
        if template is None:
            raise _ClaimError(
                f'resource claim template "{template_name}": resourceclaimtemplate.resource.k8s.io "{template_name}" not found'
            )
        created = await self._client.create(RESOURCE_CLAIMS, _from_template(pod, entry, template))
        self._made[pod["metadata"]["uid"], entry["name"]] = created["metadata"]["name"]
        return str(created["metadata"]["name"])

    async def _reserve(self, pod: Object) -> None:
        reference = {"resource": "pods", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        for key in claims_of(pod):
            claim = self._claims.get_key(key)
            status = (claim.get("status") or {}) if claim is not None else {}
            reserved = status.get("reservedFor") or []
            taken = any(item["uid"] == reference["uid"] for item in reserved)
            if claim is not None and status.get("allocation") and not taken and len(reserved) < _MOST_CONSUMERS:
                changed = {**claim, "status": {**status, "reservedFor": [*reserved, reference]}}
                await self._client.update(RESOURCE_CLAIMS, changed, subresource="status")

    # Claims

    async def _sync_claim(self, key: str) -> None:
        claim = self._claims.get_key(key)
        if claim is None:
            return
        status = claim.get("status") or {}
        reserved = status.get("reservedFor") or []
        valid = [item for item in reserved if await self._still_uses(claim["metadata"]["namespace"], item)]
        protected = _FINALIZER in (claim["metadata"].get("finalizers") or ())
        if len(valid) < len(reserved):
            status = {**status, "reservedFor": valid}
            if not valid and protected:
                # The last consumer has gone: the next one may want another node.
                status.pop("allocation", None)
            claim = await self._client.update(RESOURCE_CLAIMS, {**claim, "status": status}, subresource="status")
            if not (claim.get("status") or {}).get("allocation"):
                await self._unprotect(claim)
        elif protected and podutil.is_deleting(claim) and not valid:
            if status.get("allocation"):
                status = {name: value for name, value in status.items() if name != "allocation"}
                claim = await self._client.update(RESOURCE_CLAIMS, {**claim, "status": status}, subresource="status")
            await self._unprotect(claim)
        if not valid:
            await self._delete_unused(claim)

    async def _still_uses(self, namespace: str, consumer: Object) -> bool:
        if consumer.get("apiGroup") or consumer["resource"] != "pods":
            raise _ClaimError(f"unsupported ReservedFor entry: {consumer}")
        if consumer["uid"] in self._deleted:
            return False
        pod = self._pods.get(namespace, consumer["name"])
        if pod is not None:
            return bool(pod["metadata"]["uid"] == consumer["uid"]) and not _is_done(pod)
        try:
            pod = await self._client.get(PODS, consumer["name"], namespace)
        except StatusError as error:
            if errors.is_not_found(error):
                return False
            raise
        return bool(pod["metadata"]["uid"] == consumer["uid"])

    async def _unprotect(self, claim: Object) -> None:
        finalizers = claim["metadata"].get("finalizers") or []
        if _FINALIZER in finalizers:
            kept = [item for item in finalizers if item != _FINALIZER]
            await self._client.update(RESOURCE_CLAIMS, {**claim, "metadata": {**claim["metadata"], "finalizers": kept}})

    async def _delete_unused(self, claim: Object) -> None:
        owner = meta.controller_of(claim)
        if owner is None or not _owner_uid(claim):
            return
        namespace, name = claim["metadata"]["namespace"], claim["metadata"]["name"]
        pod = self._pods.get(namespace, owner["name"])
        # A pod that is not in the cache may come yet; the garbage collector knows better.
        if pod is not None and (pod["metadata"]["uid"] != owner["uid"] or _is_done(pod)):
            try:
                await self._client.delete(RESOURCE_CLAIMS, name, namespace, uid=claim["metadata"]["uid"])
            except StatusError as error:
                if not errors.is_not_found(error):
                    raise


def _from_template(pod: Object, entry: Object, template: Object) -> Object:
    wanted = template["spec"]
    wanted_meta = wanted.get("metadata") or {}
    claim_meta: Object = {
        "generateName": _generate_name(pod["metadata"]["name"], entry["name"]),
        "namespace": pod["metadata"]["namespace"],
        "annotations": {**(wanted_meta.get("annotations") or {}), _POD_CLAIM: entry["name"]},
        "ownerReferences": [{**meta.new_controller_ref(pod, "v1", "Pod"), "blockOwnerDeletion": True}],
    }
    if wanted_meta.get("labels"):
        claim_meta["labels"] = dict(wanted_meta["labels"])
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": claim_meta, "spec": meta.deep_copy(wanted["spec"])}
