"""`knarr why pvc/NAME`: what keeps a claim from its volume."""

from __future__ import annotations

from knarr.api import meta
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS, STORAGE_CLASSES
from knarr.api.selectors import from_label_selector
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster.why.facts import event_steps, find
from knarr.controllers.quota import claim_class
from knarr.controllers.volume import match
from knarr.network.why import Step

_NO_PROVISIONER = "kubernetes.io/no-provisioner"
_REASONS = ("ExternalProvisioning", "WaitForFirstConsumer", "WaitForPodScheduled", "Provisioning", "FailedBinding")
_MOST_VOLUMES = 5


async def why(client: Client, namespace: str, name: str) -> list[Step]:
    """What the binder, the provisioner and the scheduler have said of a claim. Raises StatusError."""
    claim = await find(client, PERSISTENT_VOLUME_CLAIMS, name, namespace)
    if claim is None:
        return [Step(False, f"claim {namespace}/{name} does not exist")]
    pods = [pod for pod in (await client.list(PODS, namespace)).get("items") or [] if name in _claims(pod)]
    steps = _deletion(claim, pods)
    phase, volume = (claim.get("status") or {}).get("phase"), claim["spec"].get("volumeName")
    if phase == "Bound":
        return [*steps, Step(True, f"claim {namespace}/{name} is bound to volume {volume}")]
    steps.append(Step(False, f"claim {namespace}/{name} is {phase or 'not looked at yet by the binder'}"))
    volumes = (await client.list(PERSISTENT_VOLUMES)).get("items") or []
    steps += _named(claim, volumes) if volume else [*await _by_class(client, claim, pods), *_static(claim, volumes)]
    return steps + await event_steps(client, claim, reasons=_REASONS)


def _claims(pod: Object) -> set[str]:
    volumes = pod["spec"].get("volumes") or ()
    own = {f"{pod['metadata']['name']}-{item['name']}" for item in volumes if "ephemeral" in item}
    return own | {(item.get("persistentVolumeClaim") or {}).get("claimName", "") for item in volumes}


def _deletion(claim: Object, pods: list[Object]) -> list[Step]:
    if "deletionTimestamp" not in claim["metadata"]:
        return []
    kept = ", ".join(claim["metadata"].get("finalizers") or ())
    users = ", ".join(pod["metadata"]["name"] for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"))
    return [Step(False, f"the claim is being deleted and kept by {kept}" + (f": pod {users} uses it" if users else ""))]


def _named(claim: Object, volumes: list[Object]) -> list[Step]:
    """The claim names its volume."""
    name = claim["spec"]["volumeName"]
    volume = next((item for item in volumes if item["metadata"]["name"] == name), None)
    if volume is None:
        return [Step(False, f"volume {name}, which the claim names, does not exist")]
    if volume["spec"].get("claimRef") is not None and not match.is_bound_to(volume, claim):
        ref = volume["spec"]["claimRef"]
        return [Step(False, f"volume {name}, which the claim names, belongs to claim {ref.get('namespace')}/{ref.get('name')}")]
    reason = match.mismatch(volume, claim)
    return [Step(False, f"volume {name}, which the claim names, does not fit: {reason}")] if reason else []


async def _by_class(client: Client, claim: Object, pods: list[Object]) -> list[Step]:
    """What its StorageClass makes of the claim."""
    classes = (await client.list(STORAGE_CLASSES)).get("items") or []
    wanted = claim_class(claim)
    if not match.has_class(claim):
        chosen = match.default_class(classes)
        if chosen is None:
            return [Step(False, "the claim names no StorageClass, and none of the cluster is marked as the default")]
        return [Step(None, f"the claim names no StorageClass yet; the default is {chosen['metadata']['name']}")]
    if not wanted:
        return [Step(None, "the claim wants no StorageClass: only a volume made by hand can be bound")]
    found = next((item for item in classes if item["metadata"]["name"] == wanted), None)
    if found is None:
        offered = ", ".join(sorted(item["metadata"]["name"] for item in classes)) or "none"
        return [Step(False, f"StorageClass {wanted} does not exist; there is {offered}")]
    steps = []
    if found.get("volumeBindingMode") == "WaitForFirstConsumer":
        steps += _consumer(claim, pods, wanted)
    if found.get("provisioner") == _NO_PROVISIONER:
        steps.append(Step(None, f"StorageClass {wanted} provisions nothing: only a volume made by hand can be bound"))
    elif match.PROVISIONER in meta.annotations(claim):
        steps.append(Step(None, f"provisioner {found['provisioner']} is asked to make the volume"))
    return steps


def _consumer(claim: Object, pods: list[Object], wanted: str) -> list[Step]:
    node = meta.annotations(claim).get(match.SELECTED_NODE)
    if node:
        return [Step(True, f"the scheduler has chosen node {node} for its first pod")]
    if not pods:
        return [Step(False, f"StorageClass {wanted} waits for the first pod that uses the claim, and none does")]
    names = ", ".join(pod["metadata"]["name"] for pod in pods)
    return [Step(False, f"StorageClass {wanted} waits until a pod that uses the claim is scheduled: see knarr why pod/{pods[0]['metadata']['name']} ({names})")]


def _static(claim: Object, volumes: list[Object]) -> list[Step]:
    """Volumes of the claim's class that are there already, and why each is not taken."""
    selector = claim["spec"].get("selector")
    compiled = from_label_selector(selector) if selector is not None else None
    steps = []
    for volume in volumes:
        if match.volume_class(volume) != claim_class(claim):
            continue
        ref, phase = volume["spec"].get("claimRef"), (volume.get("status") or {}).get("phase")
        reason = match.mismatch(volume, claim)
        if ref is not None and not match.is_bound_to(volume, claim):
            reason = f"it belongs to claim {ref.get('namespace')}/{ref.get('name')} ({phase})"
        elif not reason and compiled is not None and not compiled.matches(meta.labels(volume)):
            reason = "the claim's selector does not match its labels"
        elif not reason and phase != "Available":
            reason = f"it is {phase}"
        if reason:
            steps.append(Step(None, f"volume {volume['metadata']['name']} is not taken: {reason}"))
    return steps[:_MOST_VOLUMES]
