"""Replays recorded scenarios of a real cluster's scheduler and gives the states that were seen.

A scenario is a list of objects, timed actions and an end condition; what is compared are the
distinct states of each pod. Times between actions are shortened by PACE: nothing compared here
depends on them.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from knarr.api.errors import StatusError
from knarr.api.resources import EVENTS
from knarr.api.scheme import SCHEME, Resource
from knarr.client.informer import Informers
from knarr.client.rest import Client

PACE = 0.4
LIMIT_SECONDS = 25.0
RECORDED = Path(__file__).parent / "recorded" / "scenarios.jsonl"
_PATH_PART = re.compile(r"([^.\[]+)|\[([^\]=]+)=?([^\]]*)\]")


def load() -> dict[str, dict[str, Any]]:
    return {s["scenario"]: s for s in map(json.loads, RECORDED.read_text().splitlines())}


def dig(obj: Any, path: str) -> Any:
    """Follow a dotted path; [k=v] picks a list item, [0] an index."""
    for name, key, value in _PATH_PART.findall(path):
        if obj is None:
            return None
        if name:
            obj = obj.get(name) if isinstance(obj, dict) else None
        elif value:
            obj = next((item for item in obj if str(item.get(key)) == value), None)
        else:
            obj = obj[int(key)] if len(obj) > int(key) else None
    return obj


def resource_of(obj: dict[str, Any]) -> Resource:
    found = SCHEME.for_kind(obj["apiVersion"], obj["kind"])
    assert found is not None, obj["kind"]
    return found


def by_plural(plural: str) -> Resource:
    return next(r for r in SCHEME.resources() if r.plural == plural and r.version == "v1")


def pod_state(pod: dict[str, Any], deleted: bool) -> tuple[Any, ...]:
    """What of a pod is compared."""
    status = pod.get("status") or {}
    conditions = sorted([c["type"], c["status"], c.get("reason") or ""] for c in status.get("conditions") or ())
    return (
        deleted,
        "deletionTimestamp" in pod["metadata"],
        pod["spec"].get("nodeName"),
        status.get("nominatedNodeName") or "",
        json.dumps(conditions),
    )


def recorded_state(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (
        entry.get("event") == "DELETED",
        entry["deleting"],
        entry.get("nodeName"),
        entry.get("nominatedNodeName") or "",
        json.dumps(sorted(entry["conditions"])),
    )


def distinct(states: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    result: list[tuple[Any, ...]] = []
    for state in states:
        if not result or result[-1] != state:
            result.append(state)
    return result


class World:
    """The cluster as watched during all replays."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.informers = Informers(client)
        self._wakers: set[Callable[[], None]] = set()
        self.pods: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
        self.events: dict[str, set[tuple[str, ...]]] = {}
        self._stores: dict[str, Any] = {}

    async def start(self) -> None:
        for plural in ("pods", "nodes", "persistentvolumes", "persistentvolumeclaims", "serviceaccounts"):
            informer = self._stores[plural] = self.informers.get(by_plural(plural))
            informer.add_handler(self._wake, lambda _, new: self._wake(new), self._wake)
        self._stores["pods"].add_handler(self._pod, lambda _, new: self._pod(new), lambda pod: self._pod(pod, True))
        events = self._stores["events"] = self.informers.get(EVENTS)
        events.add_handler(self._event, lambda _, new: self._event(new))
        await self.informers.start()
        await self.informers.wait_synced()

    def _pod(self, pod: dict[str, Any], deleted: bool = False) -> None:
        metadata = pod["metadata"]
        self.pods.setdefault(metadata["namespace"], {}).setdefault(metadata["name"], []).append(pod_state(pod, deleted))

    def _event(self, event: dict[str, Any]) -> None:
        involved = event["involvedObject"]
        source = (event.get("source") or {}).get("component") or event.get("reportingComponent") or ""
        entry = (event["type"], event["reason"], involved["kind"], source)
        self.events.setdefault(event["metadata"]["namespace"], set()).add(entry)
        self._wake(event)

    def _wake(self, _: Any) -> None:
        for waker in list(self._wakers):
            waker()

    def find(self, namespace: str, reference: str) -> dict[str, Any] | None:
        plural, _, name = reference.partition("/")
        found: dict[str, Any] | None = self._stores[plural].get(namespace, name) or self._stores[plural].get(None, name)
        return found

    def holds(self, namespace: str, condition: Any) -> bool:
        if condition is None:
            return True
        if isinstance(condition, list):
            return all(self.holds(namespace, c) for c in condition)
        if "any" in condition:
            return any(self.holds(namespace, c) for c in condition["any"])
        if "seconds" in condition:
            return True
        if "event" in condition:
            return any(e[1] == condition["event"] for e in self.events.get(namespace, ()))
        if "count" in condition:
            found = self._stores[condition["count"]].list(namespace)
            where = condition.get("where") or {}
            number = sum(all(dig(o, path) == value for path, value in where.items()) for o in found)
            return number == condition["is"] if "is" in condition else number >= condition["gte"]
        obj = self.find(namespace, condition["object"])
        if condition.get("gone"):
            return obj is None
        value = dig(obj, condition["path"])
        if "is" in condition:
            return bool(value == condition["is"])
        if "in" in condition:
            return value in condition["in"]
        if "gte" in condition:
            return value is not None and value >= condition["gte"]
        return (value is not None) == condition["present"]

    async def wait(self, namespace: str, condition: Any) -> None:
        """Wait until a condition holds, then for its seconds."""
        event = asyncio.Event()
        self._wakers.add(event.set)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                while not self.holds(namespace, condition):
                    event.clear()
                    await event.wait()
        finally:
            self._wakers.discard(event.set)
        parts = condition if isinstance(condition, list) else [condition]
        await asyncio.sleep(sum(c["seconds"] for c in parts if c and "seconds" in c) * PACE)

    async def close(self) -> None:
        await self.informers.close()


class Replay:
    """One scenario in its own namespace."""

    def __init__(self, world: World, scenario: dict[str, Any]) -> None:
        self.world = world
        self.client = world.client
        self.scenario = scenario
        self.namespace = f"rec-{scenario['scenario']}"
        self._made: list[tuple[Resource, str, str | None]] = []

    def _fill(self, obj: Any) -> Any:
        return json.loads(json.dumps(obj).replace("$NS", self.namespace))

    async def _create(self, body: dict[str, Any]) -> None:
        body = self._fill(copy.deepcopy(body))
        resource = resource_of(body)
        namespace = self.namespace if resource.namespaced else None
        made = await self.client.create(resource, body, namespace)
        self._made.append((resource, made["metadata"]["name"], namespace))
        if resource.plural == "nodes" and body.get("status"):
            await self.client.patch(resource, body["metadata"]["name"], None, {"status": body["status"]}, subresource="status")
            await self._ready(body["metadata"]["name"])

    async def _ready(self, name: str) -> None:
        """Take away the mark that admission puts on new nodes, in place of the node lifecycle controller."""
        nodes = by_plural("nodes")
        spec = (await self.client.get(nodes, name)).get("spec") or {}
        taints = [t for t in spec.get("taints") or () if t["key"] != "node.kubernetes.io/not-ready"]
        await self.client.patch(nodes, name, None, {"spec": {"taints": taints}})

    async def _act(self, action: dict[str, Any]) -> None:
        verb = action["verb"]
        if verb == "create" and "subresource" not in action:
            await self._create(action["body"])
            return
        if verb == "create":
            resource = by_plural("pods")
            body = self._fill(action["body"])
            await self.client.create(resource, body, self.namespace, name=action["name"], subresource=action["subresource"])
            return
        plural, _, name = action["object"].partition("/")
        resource = by_plural(plural)
        namespace = self.namespace if resource.namespaced else None
        if verb == "delete":
            await self.client.delete(resource, name, namespace, grace_period_seconds=action.get("grace"))
        elif verb == "patch":
            kind = action.get("type") or "strategic"
            body, part = self._fill(action["body"]), action.get("subresource") or ""
            await self.client.patch(resource, name, namespace, body, type=kind, subresource=part)
            if plural == "nodes" and part == "status":
                await self._ready(name)
        else:
            raise AssertionError(f"action {verb} is not known here")

    async def run(self) -> None:
        """Play the scenario to its end; afterwards the world has its states."""
        await self.client.create(by_plural("namespaces"), {"metadata": {"name": self.namespace}})
        self._made.append((by_plural("namespaces"), self.namespace, None))
        await self.world.wait(self.namespace, {"object": "serviceaccounts/default", "path": "metadata.name", "present": True})
        for obj in self.scenario["objects"]:
            await self._create(obj)
        for action in self.scenario["actions"]:
            await self.world.wait(self.namespace, action["after"])
            try:
                await self._act(action["do"])
            except StatusError as error:
                if error.code not in (404, 409):
                    raise
        await self.world.wait(self.namespace, self.scenario["until"])
        await asyncio.sleep(1.5 * PACE)

    async def clean(self) -> None:
        for resource, name, namespace in reversed(self._made):
            try:
                await self.client.delete(resource, name, namespace, grace_period_seconds=0)
            except StatusError as error:
                if error.code != 404:
                    raise

    def seen(self) -> dict[str, list[tuple[Any, ...]]]:
        return {name: distinct(states) for name, states in self.world.pods.get(self.namespace, {}).items()}

    def recorded(self) -> dict[str, list[tuple[Any, ...]]]:
        result: dict[str, list[tuple[Any, ...]]] = {}
        for entry in self.scenario["timeline"]:
            plural, _, name = entry["object"].partition("/")
            if plural == "pods":
                result.setdefault(name, []).append(recorded_state(entry))
        return {name: distinct(states) for name, states in result.items()}
