"""What pods are to controllers: active, ready, available; which go first; how to make and delete them.

Source: pkg/controller/controller_utils.go, pkg/api/v1/pod/util.go.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import PODS
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.rest import Client

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"


def phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase") or "")


def is_finished(pod: Object) -> bool:
    """Succeeded or Failed: its containers never run again."""
    return phase(pod) in ("Succeeded", "Failed")


def is_deleting(obj: Object) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def is_active(pod: Object) -> bool:
    """Neither finished nor being deleted."""
    return not is_finished(pod) and "deletionTimestamp" not in pod["metadata"]


def condition(obj: Object, type: str) -> Object | None:
    """Give the condition of a type from the status, or None."""
    for item in (obj.get("status") or {}).get("conditions") or ():
        if item.get("type") == type:
            return item  # type: ignore[no-any-return]
    return None


def is_ready(pod: Object) -> bool:
    item = condition(pod, "Ready")
    return item is not None and item.get("status") == "True"


def ready_since(pod: Object) -> float | None:
    """Epoch seconds since when the pod is ready; None when it is not."""
    item = condition(pod, "Ready")
    if item is None or item.get("status") != "True":
        return None
    stamp = item.get("lastTransitionTime")
    return clock.parse_rfc3339(stamp) if stamp else 0.0


def is_available(pod: Object, min_ready_seconds: int, now: float) -> bool:
    """Ready for at least so long."""
    since = ready_since(pod)
    if since is None:
        return False
    return min_ready_seconds == 0 or (since > 0 and since + min_ready_seconds <= now)


def next_availability_seconds(pods: Iterable[Object], min_ready_seconds: int, now: float) -> float | None:
    """Seconds until the next ready pod becomes available; None when none is about to."""
    if min_ready_seconds == 0:
        return None
    delays = []
    for pod in pods:
        since = ready_since(pod)
        if since and since + min_ready_seconds > now:
            delays.append(since + min_ready_seconds - now)
    return min(delays) if delays else None


def created_at(obj: Object) -> float:
    stamp = obj["metadata"].get("creationTimestamp")
    return clock.parse_rfc3339(stamp) if stamp else 0.0


def _restarts(pod: Object) -> int:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return max((item.get("restartCount", 0) for item in statuses), default=0)


def _deletion_cost(pod: Object) -> int:
    text = (pod["metadata"].get("annotations") or {}).get(DELETION_COST, "0")
    # Only what Go's ParseInt takes counts; anything else is as if it was not there.
    digits = text[1:] if text[:1] in "+-" else text
    if not digits.isdigit() or (len(digits) > 1 and digits[0] == "0") or text[:1] == "+":
        return 0
    value = int(text)
    return value if -(2**31) <= value < 2**31 else 0


def _log_age(stamp: float, now: float) -> int:
    age = now - stamp
    return -1 if age <= 0 else int(math.log2(age * 1e9)) if age > 0 else -1


_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


def sort_for_deletion(pods: Sequence[Object], related: Sequence[Object]) -> list[Object]:
    """Order pods so that those to be deleted first come first.

    Args:
      related: pods whose place counts: of two pods the one with more related neighbours goes first.
    """
    per_node: dict[str, int] = {}
    for pod in related:
        if is_active(pod):
            node = pod["spec"].get("nodeName", "")
            per_node[node] = per_node.get(node, 0) + 1
    now = clock.now()

    def compare(left: Object, right: Object) -> int:
        return _compare_for_deletion(left, right, per_node, now)

    return sorted(pods, key=functools.cmp_to_key(compare))


def _compare_for_deletion(left: Object, right: Object, per_node: dict[str, int], now: float) -> int:
    left_node, right_node = left["spec"].get("nodeName", ""), right["spec"].get("nodeName", "")
    if bool(left_node) != bool(right_node):
        return -1 if not left_node else 1
    by_phase = _PHASES.get(phase(left), 0) - _PHASES.get(phase(right), 0)
    if by_phase:
        return by_phase
    left_ready, right_ready = is_ready(left), is_ready(right)
    if left_ready != right_ready:
        return -1 if not left_ready else 1
    by_cost = _deletion_cost(left) - _deletion_cost(right)
    if by_cost:
        return by_cost
    by_rank = per_node.get(right_node, 0) - per_node.get(left_node, 0)
    if by_rank:
        return by_rank
    if left_ready and right_ready:
        by_ready = _compare_age(ready_since(left) or 0.0, ready_since(right) or 0.0, left, right, now)
        if by_ready:
            return by_ready
    by_restarts = _restarts(right) - _restarts(left)
    if by_restarts:
        return by_restarts
    return _compare_age(created_at(left), created_at(right), left, right, now)


def _compare_age(left_stamp: float, right_stamp: float, left: Object, right: Object, now: float) -> int:
    # Ages count in powers of two, so that not always the youngest of one batch dies.
    if left_stamp == right_stamp:
        return 0
    if not left_stamp or not right_stamp:
        return -1 if not left_stamp else 1
    left_age, right_age = _log_age(left_stamp, now), _log_age(right_stamp, now)
    if left_age == right_age:
        return -1 if left["metadata"].get("uid", "") < right["metadata"].get("uid", "") else 1
    return left_age - right_age


def pod_from_template(template: Object, owner: Object, reference: Object | None) -> Object:
    """Make the pod of a template for an owner, with generateName."""
    tmeta = template.get("metadata") or {}
    pod_meta: Object = {"generateName": owner["metadata"]["name"] + "-"}
    for name in ("labels", "annotations"):
        if tmeta.get(name):
            pod_meta[name] = dict(tmeta[name])
    if tmeta.get("finalizers"):
        pod_meta["finalizers"] = list(tmeta["finalizers"])
    if reference is not None:
        pod_meta["ownerReferences"] = [reference]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": pod_meta, "spec": meta.deep_copy(template.get("spec") or {})}


class PodControl:
    """Creates, deletes and patches pods of an owner, with upstream's events."""

    __slots__ = ("client", "recorder")

    def __init__(self, client: Client, recorder: EventRecorder) -> None:
        self.client = client
        self.recorder = recorder

    async def create(self, pod: Object, namespace: str, owner: Object) -> Object:
        """Create a pod; a failure is recorded and raised."""
        if not pod["metadata"].get("labels"):
            raise ValueError("unable to create pods, no labels")
        try:
            created = await self.client.create(PODS, pod, namespace)
        except StatusError as error:
            if not errors.is_namespace_terminating(error):
                self.recorder.event(owner, "Warning", "FailedCreate", f"Error creating: {error.message}")
            raise
        self.recorder.event(owner, "Normal", "SuccessfulCreate", f"Created pod: {created['metadata']['name']}")
        return created

    async def delete(self, name: str, namespace: str, owner: Object) -> None:
        """Delete a pod; NotFound is raised without an event, other failures with one."""
        try:
            await self.client.delete(PODS, name, namespace)
        except StatusError as error:
            if not errors.is_not_found(error):
                self.recorder.event(owner, "Warning", "FailedDelete", f"Error deleting: {error.message}")
            raise
        self.recorder.event(owner, "Normal", "SuccessfulDelete", f"Deleted pod: {name}")


async def slow_start(count: int, act: Callable[[int], Awaitable[None]], initial: int = 1) -> tuple[int, Exception | None]:
    """Act `count` times in batches of 1, 2, 4…; the first batch with a failure is the last.

    Args:
      act: called with the index of the action.

    Returns:
      (successes, first error or None).
    """
    done = successes = 0
    size = min(count, initial)
    while size > 0:
        results = await asyncio.gather(*[act(done + index) for index in range(size)], return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        successes += size - len(failures)
        for failure in failures:
            if not isinstance(failure, Exception):
                raise failure
            return successes, failure
        done += size
        size = min(2 * size, count - done)
    return successes, None


async def gather_all(actions: Iterable[Awaitable[Any]]) -> None:
    """Wait for all actions; raise the first failure after all of them ended."""
    for result in await asyncio.gather(*actions, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def scaled_value(value: int | str | None, total: int, round_up: bool) -> int:
    """Resolve an IntOrString, a percentage being of `total`."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    if value.endswith("%"):
        part = int(value[:-1]) * total / 100
        return math.ceil(part) if round_up else math.floor(part)
    return int(value)
