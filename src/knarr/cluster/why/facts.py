"""What all answers share: objects that may be missing, events of an object, the state of its pods."""

from __future__ import annotations

from collections.abc import Iterable

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import EVENTS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers import podutil
from knarr.network.why import Step

_MOST_PODS = 5
_MOST_EVENTS = 3


async def find(client: Client, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
    """Read an object; None when there is none."""
    try:
        return await client.get(resource, name, namespace)
    except StatusError as error:
        if errors.is_not_found(error):
            return None
        raise


async def owned(client: Client, resource: Resource, owner: Object) -> list[Object]:
    """The objects of the owner's namespace that it controls."""
    found = (await client.list(resource, owner["metadata"]["namespace"])).get("items") or []
    return [item for item in found if (meta.controller_of(item) or {}).get("uid") == owner["metadata"]["uid"]]


def _seen_at(event: Object) -> str:
    return str(event.get("lastTimestamp") or (event.get("series") or {}).get("lastObservedTime") or event.get("eventTime") or "")


async def event_steps(client: Client, obj: Object, *, kinds: Iterable[str] = ("Warning",), reasons: Iterable[str] = ()) -> list[Step]:
    """Remarks: the latest events about an object, one for each reason, newest first.

    Args:
      kinds: types of events that count whatever their reason.
      reasons: reasons that count whatever their type.
    """
    metadata = obj["metadata"]
    selector = f"involvedObject.uid={metadata['uid']}"
    found = (await client.list(EVENTS, metadata.get("namespace") or "default", field_selector=selector)).get("items") or []
    latest: dict[str, Object] = {}
    for event in sorted(found, key=_seen_at):
        if event.get("type") in kinds or event.get("reason") in reasons:
            latest[event.get("reason") or ""] = event
    newest = sorted(latest.values(), key=_seen_at, reverse=True)[:_MOST_EVENTS]
    steps = []
    for event in newest:
        by = event.get("reportingComponent") or (event.get("source") or {}).get("component") or "a component"
        steps.append(Step(None, f"{by} said at {_seen_at(event)}: {event.get('reason')}: {event.get('message')}"))
    return steps


def condition(obj: Object, type: str) -> Object | None:
    return meta.get_condition((obj.get("status") or {}).get("conditions"), type)


def pod_state(pod: Object, min_ready_seconds: int = 0) -> str:
    """What keeps a pod from being available, by its scheduler's and kubelet's words; "" when nothing does."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    if podutil.is_deleting(pod):
        kept = pod["metadata"].get("finalizers") or ()
        return f"{name} is being deleted since {pod['metadata']['deletionTimestamp']}" + (f", kept by {', '.join(kept)}" if kept else "")
    if podutil.is_finished(pod):
        text = ": ".join(part for part in (status.get("reason"), status.get("message")) if part)
        return f"{name} has {status['phase'].lower()}" + (f": {text}" if text else _exit_codes(status))
    scheduled = condition(pod, "PodScheduled")
    if not pod["spec"].get("nodeName"):
        said = f": {scheduled['message']}" if scheduled is not None and scheduled.get("message") else ""
        return f"{name} has no node{said} (see: knarr why pod/{name})"
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting:
            said = f": {waiting['message']}" if waiting.get("message") else ""
            return f"{name}: container {container['name']} waits, {waiting.get('reason')}{said}"
    if not podutil.is_ready(pod):
        ready = condition(pod, "Ready") or {}
        return f"{name} runs and is not ready: {ready.get('message') or ready.get('reason') or 'its kubelet has not said why'}"
    if min_ready_seconds and not podutil.is_available(pod, min_ready_seconds, clock.now()):
        return f"{name} is ready, but not for {min_ready_seconds} s yet (minReadySeconds)"
    return ""


def _exit_codes(status: Object) -> str:
    codes = [
        f"{item['name']} exited with {ended.get('exitCode')}"
        for item in status.get("containerStatuses") or ()
        if (ended := (item.get("state") or {}).get("terminated"))
    ]
    return f": {', '.join(codes)}" if codes else ""


async def pod_steps(client: Client, pods: Iterable[Object], min_ready_seconds: int = 0) -> list[Step]:
    """One refusal for each pod that is not available, and the last words about the first of them."""
    waiting = [(pod, text) for pod in pods if (text := pod_state(pod, min_ready_seconds))]
    steps = [Step(False, f"pod {text}") for _, text in waiting[:_MOST_PODS]]
    if len(waiting) > _MOST_PODS:
        steps.append(Step(None, f"{len(waiting) - _MOST_PODS} more pods are not available"))
    if waiting:
        steps += await event_steps(client, waiting[0][0])
    return steps
