"""Plays recorded scenarios of the real controllers against ours and compares what can be seen.

Compared, per object other than pods: the states that lasted, in their order, and the last one; and
the events of controllers. States that were only passed through depend on how quick kubelets are.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.tasks import Tasks
from knarr.api.errors import StatusError
from knarr.api.resources import NAMESPACES, PODS, SERVICE_ACCOUNTS
from knarr.api.scheme import SCHEME, Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from tests.controllers.hollow import HollowNode

_RECORDED = Path(__file__).with_name("recorded.jsonl.gz")
_LASTED_SECONDS = 1.5
# Node taints of the recorded controllers come at the ticks of a monitor and through a rate limit.
_LASTED_NODE_SECONDS = 6.0
_OTHER_COMPONENTS = ("kubelet", "default-scheduler")
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")
# How many writes it took is a matter of speed.
_UNCOUNTED = ("replicasets", "endpointslices")
_UNORDERED = ("ports", "endpoints", "subsets", "spec.taints")
_UNSEEN = ("t", "object", "meta", "event")

# What the recording lacks, by scenario: starts of the differences to pass over.
EXCUSED: dict[str, tuple[str, ...]] = {
    # The real controller tells of every pod that it deletes (DeleteStatefulPod; recorded in sts-scale-down-up, where it does the
    # same). Events go through a rate limit, and this one came when the recording was over.
    "sts-pvc-templates": ("event too much: ('Normal', 'SuccessfulDelete', 'StatefulSet'",),
}
# The real controller looks at a new autoscaler when a period has passed, ours at once: so ours are made a period later.
_LATER_SECONDS = {"HorizontalPodAutoscaler": ControllersConfig().hpa_sync_seconds}


def scenarios() -> list[Object]:
    """Load all recorded scenarios."""
    with gzip.open(_RECORDED, "rt") as file:
        return [json.loads(line) for line in file]


def _resource(plural: str) -> Resource:
    chosen = [res for res in SCHEME.resources() if res.plural == plural and res.group != "events.k8s.io"]
    return max(chosen, key=lambda res: (res.version == "v2", res.version == "v1"))


def look_up(obj: Any, path: str) -> Any:
    """Follow a dotted path with [k=v] and [0] steps; None when it leads nowhere."""
    for part in re.findall(r"\[[^\]]+\]|[^.\[\]]+", path):
        if obj is None:
            return None
        if part.startswith("["):
            inner = part[1:-1]
            if "=" in inner:
                key, _, value = inner.partition("=")
                obj = next((item for item in obj if str(item.get(key)) == value), None)
            else:
                obj = obj[int(inner)] if int(inner) < len(obj) else None
        else:
            obj = obj.get(part) if isinstance(obj, dict) else None
    return obj


class Replay:
    """One scenario being played in a namespace of its own."""

    def __init__(self, client: Client, node: HollowNode, scenario: Object) -> None:
        self.client = client
        self.node = node
        self.scenario = scenario
        self.namespace = f"rec-{scenario['scenario']}"[:63]
        self.objects: dict[str, Object] = {}
        self.states: dict[str, list[Object]] = {}
        self.events: dict[tuple[str, ...], int] = {}
        self.log: list[tuple[float, str, Object]] = []
        self._names: dict[str, str] = {self.namespace: "$NS"}
        self._counts: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._started = 0.0
        self._last_action = 0.0
        self._cluster_scoped: set[str] = set()
        self._seen_deleted: set[str] = set()

    # Watching

    async def _follow(self, plural: str, synced: asyncio.Event) -> None:
        resource = _resource(plural)
        namespace = self.namespace if resource.namespaced else None
        listed = await self.client.list(resource, namespace)
        for obj in listed.get("items") or ():
            self._saw(plural, "ADDED", obj)
        synced.set()
        version = listed["metadata"]["resourceVersion"]
        while True:
            async for kind, obj in self.client.watch(resource, namespace, resource_version=version, allow_bookmarks=False):
                version = obj["metadata"]["resourceVersion"]
                self._saw(plural, kind, obj)

    def _is_mine(self, plural: str, obj: Object) -> bool:
        name = obj["metadata"]["name"]
        if plural == "namespaces":
            return bool(name == self.namespace)
        return "namespace" in obj["metadata"] or f"{plural}/{name}" in self._cluster_scoped

    def _saw(self, plural: str, kind: str, obj: Object) -> None:
        if not self._is_mine(plural, obj):
            return
        name = f"{plural}/{self._named(plural, obj)}"
        if kind == "DELETED":
            self.objects.pop(name, None)
            self._seen_deleted.add(name)
        else:
            self.objects[name] = obj
        if plural == "events":
            self._saw_event(obj)
        else:
            state = self._state(plural, obj)
            self.log.append((clock.now() - self._started, name, state))
            states = self.states.setdefault(name, [])
            if kind == "DELETED":
                states.append({"event": "DELETED"})
            elif not states or states[-1] != state:
                states.append(state)
        self._changed.set()

    def _saw_event(self, event: Object) -> None:
        component = (event.get("source") or {}).get("component") or event.get("reportingComponent") or ""
        if component in _OTHER_COMPONENTS:
            return
        key = (event["type"], event["reason"], event["involvedObject"]["kind"], component)
        self.events[key] = max(self.events.get(key, 0), event.get("count") or 1)

    # Names and values

    def _named(self, plural: str, obj: Object) -> str:
        name = obj["metadata"]["name"]
        if name in self._names:
            return self._names[name]
        owner = next((ref for ref in obj["metadata"].get("ownerReferences") or () if ref.get("controller")), None)
        suffix = {"replicasets": "rs", "pods": "pod", "jobs": "job", "controllerrevisions": "rev", "endpointslices": "slice"}.get(plural)
        made = owner is not None and suffix is not None and not (plural == "pods" and owner["kind"] == "StatefulSet")
        if made and owner is not None:
            base = f"{self._names.get(owner['name'], owner['name'])}-{suffix}"
            self._counts[base] = self._counts.get(base, 0) + 1
            self._names[name] = f"{base}{self._counts[base]}"
        return self._names.get(name, name)

    def _normal(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: self._normal(item, name) for name, item in value.items() if name not in ("uid", "resourceVersion", "message")}
        if isinstance(value, list):
            if key == "conditions" and value and isinstance(value[0], dict) and "type" in value[0]:
                return [[item["type"], item["status"], item.get("reason", "")] for item in value]
            return [self._normal(item, key) for item in value]
        if isinstance(value, str):
            if value in self._names:
                return self._names[value]
            if _TIME.match(value) or key == "nodeName":
                return "*"
        return value

    def _state(self, plural: str, obj: Object) -> Object:
        state: Object = {"deleting": "deletionTimestamp" in obj["metadata"]}
        state["generation"] = obj["metadata"].get("generation")
        if plural == "configmaps" or plural == "secrets":
            state["dataKeys"] = sorted(obj.get("data") or {})
            state["type"] = obj.get("type")
        for name in ("replicas", "paused", "suspend", "parallelism", "completions", "minReplicas", "maxReplicas", "claimRef", "volumeName"):
            state[f"spec.{name}"] = self._normal((obj.get("spec") or {}).get(name), name)
        if plural == "nodes":
            state["spec.taints"] = self._normal(obj["spec"].get("taints"))
            state["spec.unschedulable"] = obj["spec"].get("unschedulable")
            conditions = self._normal((obj.get("status") or {}).get("conditions"), "conditions")
            state["status"] = {"conditions": conditions} if conditions else {}
            return state
        for name in ("revision", "addressType", "ports", "endpoints", "subsets"):
            state[name] = self._normal(obj.get(name), name)
        status = self._normal(obj.get("status") or {})
        state["status"] = status
        return state

    def _pace_pods(self) -> None:
        """Let the scenario's own pods start when they did: what is made for the first of two depends on which one that is."""
        named = {f"pods/{body['metadata']['name']}" for body in self.scenario["objects"] if body["kind"] == "Pod"}
        for entry in reversed(self.scenario["timeline"]):
            if entry["object"] in named and entry.get("phase") == "Running":
                self.node.starts[self.namespace, entry["object"].partition("/")[2]] = entry["t"]

    # Conditions and actions

    def _holds(self, condition: Any) -> bool:
        if condition is None:
            return True
        if isinstance(condition, list):
            return all(self._holds(item) for item in condition)
        if "any" in condition:
            return any(self._holds(item) for item in condition["any"])
        if "seconds" in condition:
            left = self._last_action + condition["seconds"] - clock.now()
            if left > 0:
                asyncio.get_running_loop().call_later(left + 0.01, self._changed.set)
            return left <= 0
        if "event" in condition:
            return any(key[1] == condition["event"] for key in self.events)
        if "count" in condition:
            found = [obj for name, obj in self.objects.items() if name.startswith(condition["count"] + "/")]
            for path, wanted in (condition.get("where") or {}).items():
                found = [obj for obj in found if look_up(obj, path) == wanted]
            return len(found) >= condition["gte"] if "gte" in condition else len(found) == condition["is"]
        name = condition["object"].replace("$NS", self.namespace)
        name = name if name in self.objects else condition["object"]
        obj = self.objects.get(name)
        if condition.get("gone"):
            return obj is None and (name in self._seen_deleted or name.split("/")[0] != "namespaces")
        if obj is None:
            return False
        if "path" not in condition:
            return True
        value = look_up(obj, condition["path"])
        if "present" in condition:
            return (value is not None) == bool(condition["present"])
        if "in" in condition:
            return value in condition["in"]
        if "gte" in condition:
            return (value or 0) >= condition["gte"]
        return value == condition["is"] or (condition["is"] in (0, False) and not value)

    async def _until(self, condition: Any, limit: float) -> None:
        deadline = clock.now() + limit
        while not self._holds(condition):
            self._changed.clear()
            if clock.now() > deadline:
                raise TimeoutError(f"{condition} did not come; states: { {k: v[-1:] for k, v in self.states.items()} }")
            try:
                async with asyncio.timeout(max(0.05, deadline - clock.now())):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _filled(self, value: Any) -> Any:
        return json.loads(json.dumps(value).replace("$NS", self.namespace).replace("$NODE", "hollow"))

    def _real(self, name: str) -> tuple[Resource, str]:
        plural, _, shown = name.partition("/")
        known = self.objects.get(name)
        shown = shown.replace("$NS", self.namespace)
        return _resource(plural), known["metadata"]["name"] if known is not None else shown

    async def _create(self, body: Object) -> None:
        body = self._filled(body)
        resource = SCHEME.for_kind(body["apiVersion"], body["kind"])
        assert resource is not None
        if not resource.namespaced:
            self._cluster_scoped.add(f"{resource.plural}/{body['metadata']['name']}")
        status = body.get("status")
        created = await self.client.create(resource, body, self.namespace if resource.namespaced else None)
        if resource.plural == "nodes":
            if status:
                await self.client.patch(
                    resource, created["metadata"]["name"], None, {"status": status}, type="strategic", subresource="status"
                )
            if "no-heartbeat" not in (body["metadata"].get("labels") or {}):
                self.node.beat(created["metadata"]["name"])

    async def _act(self, action: Object) -> None:
        verb = action["verb"]
        if verb == "create" and "subresource" not in action:
            await self._create(action["body"])
            return
        resource, name = self._real(action["object"])
        namespace = self.namespace if resource.namespaced else None
        if verb == "delete":
            grace, policy = action.get("grace"), action.get("propagation")
            await self.client.delete(resource, name, namespace, grace_period_seconds=grace, propagation_policy=policy)
        elif verb == "patch":
            patch = self._filled(action.get("patch", action.get("body")))
            kind, subresource = action.get("type", "strategic"), action.get("subresource", "")
            await self.client.patch(resource, name, namespace, patch, type=kind, subresource=subresource)
        elif verb == "evict":
            body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": self.namespace}}
            await self.client.create(PODS, body, self.namespace, subresource="eviction", name=name)
        elif verb == "exec":
            await self.node.run_in(self.objects[action["object"]], action["command"])
        else:
            raise AssertionError(f"unknown action {action}")

    async def play(self) -> None:
        """Play the scenario to its end; raises TimeoutError when a condition does not come."""
        scenario = self.scenario
        await self.client.create(NAMESPACES, {"metadata": {"name": self.namespace}})
        plurals = {entry["object"].split("/")[0] for entry in scenario["timeline"]} | {"pods", "events"}
        async with Tasks() as tasks:
            for _ in range(1500):
                try:
                    await self.client.get(SERVICE_ACCOUNTS, "default", self.namespace)
                    break
                except StatusError:
                    await asyncio.sleep(0.02)
            self._started = self._last_action = clock.now()
            for body in scenario["objects"]:
                if SCHEME.for_kind(body["apiVersion"], body["kind"]).namespaced is False:  # type: ignore[union-attr]
                    plural = SCHEME.for_kind(body["apiVersion"], body["kind"]).plural  # type: ignore[union-attr]
                    self._cluster_scoped.add(f"{plural}/{self._filled(body)['metadata']['name']}")
            synced = [asyncio.Event() for _ in plurals]
            for plural, event in zip(sorted(plurals), synced, strict=True):
                tasks.spawn(self._follow(plural, event), f"follow-{plural}")
            for event in synced:
                await event.wait()
            self._started = self._last_action = clock.now()
            self._pace_pods()
            for body in scenario["objects"]:
                await asyncio.sleep(_LATER_SECONDS.get(body["kind"], 0.0))
                await self._create(body)
            limit = max([entry["t"] for entry in scenario["timeline"]] or [0]) + (130 if "cronjob" in self.namespace else 30)
            self.codes: list[int] = []
            for action in scenario["actions"]:
                await self._until(action["after"], limit)
                try:
                    await self._act(action["do"])
                    self.codes.append(200)
                except StatusError as error:
                    self.codes.append(error.code)
                self._last_action = clock.now()
            await self._until(scenario["until"], limit)
            rest = self._started + max([entry["t"] for entry in scenario["timeline"]] or [0]) - clock.now()
            await asyncio.sleep(max(rest, 0) + 1.5)

    # Comparing

    def outcome(self) -> list[str]:
        """What is not as recorded, but for what the recording is known to lack."""
        excused = EXCUSED.get(self.scenario["scenario"], ())
        found = []
        for names in self._namings():
            lines = [line for line in self.differences(names) if not line.startswith(excused)]
            if not lines:
                return []
            found = found or lines
        return found

    def _namings(self) -> Iterator[dict[str, str]]:
        """Our names as they are, and then changed about among volumes that are alike: which of them a claim gets is chance.

        The real binder's index gives volumes of one access mode in the order of a map.
        """
        alike: dict[str, list[str]] = {}
        for body in self.scenario["objects"]:
            if body["kind"] == "PersistentVolume":
                spec = {**body["spec"], "hostPath": None}
                alike.setdefault(json.dumps([spec, body["metadata"].get("labels")], sort_keys=True), []).append(body["metadata"]["name"])
        orders = [[dict(zip(names, order, strict=True)) for order in itertools.permutations(names)] for names in alike.values()]
        for chosen in itertools.product(*orders):
            yield {old: new for names in chosen for old, new in names.items()}

    def expected(self) -> dict[str, list[Object]]:
        """The states of each object that have to be seen, in order."""
        by_object: dict[str, list[Object]] = {}
        for entry in self.scenario["timeline"]:
            by_object.setdefault(entry["object"], []).append(entry)
        result = {}
        end = max([entry["t"] for entry in self.scenario["timeline"]] or [0]) + 1.5
        for name, entries in by_object.items():
            if name.startswith("pods/"):
                continue
            kept = []
            for position, entry in enumerate(entries):
                following = entries[position + 1]["t"] if position + 1 < len(entries) else end
                last = position + 1 == len(entries)
                lasted = _LASTED_NODE_SECONDS if name.startswith("nodes/") else _LASTED_SECONDS
                if last or following - entry["t"] >= lasted:
                    kept.append(entry)
            result[name] = kept
        return result

    def differences(self, names: Mapping[str, str]) -> list[str]:
        """What is not as recorded, in words, when some of our objects are called by other names."""
        found = []
        states = {_renamed(name, names): _renamed(seen, names) for name, seen in self.states.items()}
        for name, wanted in self.expected().items():
            ours = states.get(name.replace("$NS", self.namespace), states.get(name, []))
            position = 0
            for entry in wanted:
                match = next((i for i in range(position, len(ours)) if _agree(name, entry, ours[i])), None)
                if match is None:
                    shown = {key: value for key, value in entry.items() if key not in _UNSEEN}
                    rest = [{key: state.get(key) for key in shown} for state in ours[-4:]]
                    found.append(f"{name} at {entry['t']}: {entry.get('event', shown)} not seen; we had {rest or ours[-1:]}")
                    break
                position = match
        found += self._event_differences()
        results = self.scenario.get("results") or []
        wanted_codes = [item.get("code", 200) for item in results[: len(self.codes)]]
        for index, (wanted_code, code) in enumerate(zip(wanted_codes, self.codes, strict=False)):
            if (wanted_code < 400) != (code < 400) or (code >= 400 and code != wanted_code):
                found.append(f"action {index} answered {code}, recorded {wanted_code}")
        return found

    def _event_differences(self) -> Iterable[str]:
        recorded = {tuple(event[:4]) for event in self.scenario["events"] if event[3] not in _OTHER_COMPONENTS}
        ours = set(self.events)
        for event in sorted(recorded - ours):
            yield f"event not seen: {event}"
        for event in sorted(ours - recorded):
            yield f"event too much: {event}"


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The value with the names in it changed, also those of "plural/name"."""
    if not names:
        return value
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if isinstance(value, str):
        plural, slash, name = value.rpartition("/")
        return plural + slash + names.get(name, name)
    return value


def _agree(name: str, entry: Object, state: Object) -> bool:
    if entry.get("event") == "DELETED":
        return state.get("event") == "DELETED"
    if state.get("event") == "DELETED":
        return False
    for key, value in entry.items():
        if key in _UNSEEN or (key == "generation" and name.startswith(_UNCOUNTED)):
            continue
        mine = state.get(key)
        if key == "status" and isinstance(value, dict):
            mine = {name: item for name, item in (mine or {}).items() if name != "observedGeneration"}
            value = {name: item for name, item in value.items() if name != "observedGeneration"}
        if not _equal(value, mine, ordered=key not in _UNORDERED):
            return False
    return True


def _equal(wanted: Any, mine: Any, ordered: bool) -> bool:
    """Whether a value is as recorded, where "*" stands for anything."""
    if wanted == "*":
        return mine is not None
    if isinstance(wanted, dict) and isinstance(mine, dict):
        return wanted.keys() == mine.keys() and all(_equal(item, mine[name], ordered) for name, item in wanted.items())
    if not isinstance(wanted, list) or not isinstance(mine, list):
        return bool(wanted == mine or (not wanted and not mine))
    left = list(mine)
    for item in wanted:
        candidates = left[:1] if ordered else left
        index = next((i for i, other in enumerate(candidates) if _equal(item, other, ordered)), None)
        if index is None:
            return False
        del left[index]
    return not left
