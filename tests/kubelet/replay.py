"""Plays recorded pod scenarios against a real node and compares: states in order, last state, events, logs.

A recording was made by a kubelet that looked once a second; ours may show more states in between, and may skip those that lasted
less than a second. Times, addresses and ids are not compared. Some scenarios were recorded twice with small differences: agreement
with one of the two is enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knarr.api import errors
from knarr.api.resources import CONFIG_MAPS, EVENTS, JOBS, NAMESPACES, PODS, SECRETS, SERVICE_ACCOUNTS, SERVICES
from knarr.api.types import Object
from tests.kubelet.conftest import Bench

RECORDED = Path(__file__).parent / "recorded" / "pods.jsonl"
SECOND_RUN = RECORDED.with_name("second-run.jsonl")
_RESOURCES = {"Pod": PODS, "ConfigMap": CONFIG_MAPS, "Secret": SECRETS, "Service": SERVICES, "Job": JOBS}
_OPTIONAL_EVENTS = {
    # Whether the kubelet looks at the pod once more between the failed pull and the deletion is chance.
    "delete-during-image-backoff": "BackOff",
}
_SHORT_SECONDS = 1.3
_START_SECONDS = 20.0
_AFTERMATH_SECONDS = 1.6


def scenarios() -> Iterator[Object]:
    with RECORDED.open() as file:
        for line in file:
            yield json.loads(line)


def second_run() -> dict[str, Object]:
    """Scenario to its second recording, where that one differed."""
    with SECOND_RUN.open() as file:
        return {scenario["scenario"]: scenario for scenario in map(json.loads, file)}


def length(scenario: Object) -> float:
    """Seconds that the scenario took, as far as its waiting is part of it."""
    waits = [action["after"].get("seconds", 0) for action in scenario.get("actions") or [] if isinstance(action.get("after"), dict)]
    last = scenario["timeline"][-1]["t"] if scenario["timeline"] else 0.0
    return float(max(last, sum(waits)))


def _path(obj: Any, path: str) -> Any:
    """Follow a dotted path with [k=v] and [0]; None when it leads nowhere."""
    token = ""
    parts: list[str] = []
    depth = 0
    for ch in path:
        depth += (ch == "[") - (ch == "]")
        if ch == "." and depth == 0:
            parts.append(token)
            token = ""
        else:
            token += ch
    parts.append(token)
    for part in parts:
        name, _, rest = part.partition("[")
        if name:
            obj = obj.get(name) if isinstance(obj, dict) else None
        while rest:
            inner, _, rest = rest.partition("]")
            rest = rest.removeprefix("[")
            if not isinstance(obj, list):
                return None
            key, sign, value = inner.partition("=")
            obj = next((o for o in obj if str(o.get(key)) == value), None) if sign else (obj[int(inner)] if int(inner) < len(obj) else None)
    return obj


def _container(status: Object) -> Object:
    out: Object = {"name": status["name"]}
    state = status.get("state") or {}
    kind = next(iter(state), "waiting")
    out["state"] = kind
    body = state.get(kind) or {}
    if body.get("reason"):
        out["reason"] = body["reason"]
    if "exitCode" in body:
        out["exitCode"] = body["exitCode"]
    out.update(ready=status.get("ready", False), started=status.get("started"), restartCount=status.get("restartCount", 0))
    last = (status.get("lastState") or {}).get("terminated")
    if last:
        out["last"] = {"reason": last.get("reason"), "exitCode": last["exitCode"]}
    return out


def state_of(pod: Object) -> Object:
    """A pod in the recording's form, less what differs by nature."""
    status, meta = pod.get("status") or {}, pod["metadata"]
    out: Object = {
        "phase": status.get("phase", ""),
        "reason": status.get("reason", ""),
        "conditions": [[c["type"], c["status"], c.get("reason", "")] for c in status.get("conditions") or []],
        "qosClass": status.get("qosClass"),
        "deleting": bool(meta.get("deletionTimestamp")),
        "hostIP": bool(status.get("hostIP")),
        "podIP": bool(status.get("podIP")),
    }
    for name, field in (("init", "initContainerStatuses"), ("main", "containerStatuses"), ("ephemeral", "ephemeralContainerStatuses")):
        if status.get(field):
            out[name] = [_container(s) for s in status[field]]
    return out


def recorded_state(entry: Object) -> Object:
    """A recorded state reduced to what `state_of` gives."""
    out = {k: entry.get(k) for k in ("phase", "reason", "conditions", "qosClass", "deleting")}
    out["hostIP"], out["podIP"] = bool(entry.get("hostIP")), bool(entry.get("podIP"))
    for name in ("init", "main", "ephemeral"):
        if entry.get(name):
            keep = ("name", "state", "reason", "exitCode", "ready", "started", "restartCount", "last")
            out[name] = [{k: c[k] for k in keep if k in c} for c in entry[name]]
            for c in out[name]:
                c.setdefault("started", None)
                if "last" in c:
                    c["last"] = {k: c["last"].get(k) for k in ("reason", "exitCode")}
    return out


class Play:
    """One scenario under way."""

    def __init__(self, bench: Bench, scenario: Object, number: int, *, scheduled: bool = True) -> None:
        self.bench, self.scenario, self.scheduled = bench, scenario, scheduled
        self.other = second_run().get(scenario["scenario"])
        self.namespace = f"s{number}"
        self.objects: dict[str, Object | None] = {}
        self.states: dict[str, list[Object]] = {}
        self.events: dict[tuple[str, ...], int] = {}
        self.late: set[tuple[str, ...]] = set()
        """Events that tell of a time limit: on a machine busier than the recorded one there may be more of them."""
        self.results: list[Object] = []
        self._changed = asyncio.Event()
        self._since = 0.0

    async def run(self, seconds: float) -> None:
        client = self.bench.client
        await client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": self.namespace}}
        await client.create(SERVICE_ACCOUNTS, account, self.namespace)
        root = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": "x"}}
        await client.create(CONFIG_MAPS, root, self.namespace)
        watches = [asyncio.ensure_future(self._watch(r)) for r in (PODS, EVENTS, JOBS)]
        try:
            async with asyncio.timeout(seconds):
                for manifest in self.scenario["objects"]:
                    try:
                        await self._create(manifest)
                    except errors.StatusError as e:
                        name = f"{_RESOURCES[manifest['kind']].plural}/{manifest['metadata']['name']}"
                        self.results.append({"verb": "create", "object": name, "code": e.code, "reason": e.reason})
                self._since = asyncio.get_running_loop().time()
                for action in self.scenario.get("actions") or []:
                    await self._until(action.get("after"))
                    await self._do(action["do"])
                    self._since = asyncio.get_running_loop().time()
                await self._until(self.scenario["until"])
            await self._settle()
            for query in self.scenario.get("queries") or []:
                try:
                    self.results.append(await self._query(query))
                except errors.StatusError as e:
                    self.results.append({**query, "code": e.code, "reason": e.reason})
        finally:
            for watch in watches:
                watch.cancel()
            with contextlib.suppress(errors.StatusError):
                await client.delete_collection(PODS, self.namespace, grace_period_seconds=0)

    async def _settle(self) -> None:
        """Events and statuses are on their way when the last condition holds; on a busy machine for a while."""
        for _ in range(200):
            await asyncio.sleep(0.1)
            if not self.differences():
                break

    def _fill(self, manifest: Object) -> Object:
        text = json.dumps(manifest).replace("$NS", self.namespace).replace("$NODE", self.bench.node_name)
        return json.loads(text)

    async def _create(self, manifest: Object) -> None:
        manifest = self._fill(manifest)
        resource = _RESOURCES[manifest["kind"]]
        if manifest["kind"] == "Pod" and self.scheduled:
            manifest["spec"].setdefault("nodeName", self.bench.node_name)
        if manifest["kind"] == "Job":
            manifest["spec"]["template"]["spec"].setdefault("nodeName", self.bench.node_name)
        await self.bench.client.create(resource, manifest, self.namespace)

    async def _watch(self, resource: Any) -> None:
        async for kind, obj in self.bench.client.watch(resource, self.namespace, resource_version="0"):
            if kind not in ("ADDED", "MODIFIED", "DELETED"):
                continue
            name = f"{resource.plural}/{self._name(obj)}"
            if resource is JOBS:
                self.objects[name] = None if kind == "DELETED" else obj
            elif resource is PODS:
                state = state_of(obj)
                states = self.states.setdefault(name, [])
                if not states or states[-1] != state:
                    states.append(state)
                self.objects[name] = None if kind == "DELETED" else obj
            else:
                ref = obj["involvedObject"]
                source = (obj.get("source") or {}).get("component") or obj.get("reportingComponent") or ""
                field = ref.get("fieldPath", "").removeprefix("spec.")
                key = (obj["type"], obj["reason"], ref["kind"], source, field)
                self.events[key] = 1
                if "timed out" in obj.get("message", ""):
                    self.late.add(key)
            self._changed.set()

    def _name(self, obj: Object) -> str:
        """The name in the recording: a Job's pods are numbered."""
        owner = next((o for o in obj["metadata"].get("ownerReferences") or [] if o["kind"] == "Job"), None)
        return f"{owner['name']}-pod1" if owner else str(obj["metadata"]["name"])

    def _holds(self, condition: Any) -> bool:
        if condition is None:
            return True
        if isinstance(condition, list):
            return all(self._holds(c) for c in condition)
        if "any" in condition:
            return any(self._holds(c) for c in condition["any"])
        if "seconds" in condition:
            return asyncio.get_running_loop().time() - self._since >= condition["seconds"]
        if "event" in condition:
            return any(key[1] == condition["event"] for key in self.events)
        if "count" in condition:
            found = [o for n, o in self.objects.items() if o is not None and n.startswith(condition["count"])]
            found = [o for o in found if all(_path(o, k) == v for k, v in (condition.get("where") or {}).items())]
            return len(found) == condition["is"] if "is" in condition else len(found) >= condition["gte"]
        obj = self.objects.get(condition["object"])
        if condition.get("gone"):
            return condition["object"] in self.objects and obj is None
        value = _path(obj or {}, condition["path"])
        if "is" in condition:
            return bool(value == condition["is"])
        if "in" in condition:
            return value in condition["in"]
        if "gte" in condition:
            return value is not None and value >= condition["gte"]
        return (value is not None) == condition["present"]

    async def _until(self, condition: Any) -> None:
        while not self._holds(condition):
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._changed.wait()

    async def _do(self, action: Object) -> None:
        client, verb = self.bench.client, action["verb"]
        action = self._fill(action)
        name = action.get("object", "/").partition("/")[2]
        resource = next((r for r in _RESOURCES.values() if r.plural == action.get("object", "").partition("/")[0]), PODS)
        result: Object = dict(action)
        try:
            if verb == "create":
                if action.get("subresource"):
                    await client.create(resource, action["body"], self.namespace, subresource=action["subresource"], name=action["name"])
                else:
                    await self._create(action["body"])
            elif verb == "delete":
                await client.delete(resource, name, self.namespace, grace_period_seconds=action.get("grace"))
            elif verb == "patch":
                kind = action.get("type") or "strategic"
                await client.patch(resource, name, self.namespace, action["body"], type=kind, subresource=action.get("subresource", ""))
            elif verb == "evict":
                body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": self.namespace}}
                await client.create(PODS, body, self.namespace, subresource="eviction", name=name)
            else:
                result = await self._query(action)
            result.setdefault("code", 201 if verb in ("create", "evict") else 200)
        except errors.StatusError as e:
            result.update(code=e.code, reason=e.reason)
        self.results.append(result)

    async def _query(self, query: Object) -> Object:
        out = dict(query)
        name = query["object"].partition("/")[2]
        if query["verb"] == "logs":
            parameters = "&".join(f"{k}={v}" for k, v in query.get("query", {}).items())
            path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/log?{parameters}"
            response = await self.bench.client.request("GET", path)
            text = response.body.decode(errors="replace") if hasattr(response, "body") else str(response)
            out["lines"] = text.splitlines()
        elif query["verb"] == "exec":
            pod = await self.bench.client.get(PODS, name, self.namespace)
            kubelet = self.bench.kubelet
            assert kubelet is not None
            found = [c for c in await kubelet.runtime.list_containers({"io.kubernetes.pod.uid": pod["metadata"]["uid"]}) if c.metadata.name == query["container"]]
            if found:
                try:
                    done = await kubelet.runtime.exec_sync(found[0].id, query["command"])
                    out["rc"], out["stdout"] = done.exit_code, done.stdout.decode(errors="replace").splitlines()
                except Exception as e:
                    out["fault"] = str(e)
        elif query["verb"] == "get":
            pod = await self.bench.client.get(PODS, name, self.namespace)
            out["fields"] = {f: _path(pod, f) for f in query.get("fields") or []}
        return out

    def differences(self) -> list[str]:
        """What a reader of the recording would not have expected."""
        found = self._differences(self.scenario)
        return self._differences(self.other) and found if found and self.other else found

    def _differences(self, scenario: Object) -> list[str]:
        out = []
        by_object: dict[str, list[Object]] = {}
        for entry in scenario["timeline"]:
            if entry["object"].startswith("pods/"):
                by_object.setdefault(entry["object"], []).append(entry)
        for name, entries in by_object.items():
            wanted = []
            for index, entry in enumerate(entries):
                if entry.get("event") == "DELETED" or not entry.get("main"):
                    continue
                last = index == len(entries) - 1
                # The recording went on for a moment after its end: a state that came just then is chance.
                chance = index > 0 and entry["t"] - entries[index - 1]["t"] < _AFTERMATH_SECONDS and index >= 4
                lasted = (entries[index + 1]["t"] - entry["t"]) if not last else (0 if chance else 99)
                state = recorded_state(entry)
                # How long a pod waits for its volumes and its start is the node's own speed.
                short = _START_SECONDS if not last and _starting(state) else _SHORT_SECONDS
                wanted.append((state, lasted >= short, entry))
            out += _compare(name, wanted, self.states.get(name, []))
        return out + self._event_differences(scenario)

    def result_differences(self) -> list[str]:
        """Logs and fields that queries gave, against the recorded ones."""
        out = []
        for wanted, got in zip(self.scenario.get("results") or [], self.results, strict=False):
            for key in ("lines", "fields", "code"):
                if key in wanted and wanted["verb"] not in ("criLog", "exec") and wanted[key] != got.get(key, 200 if key == "code" else None):
                    out.append(f"{wanted['verb']} {wanted.get('query')}: recorded {wanted[key]!r}, now {got.get(key)!r}")
        return out

    def _event_differences(self, scenario: Object) -> list[str]:
        optional = _OPTIONAL_EVENTS.get(scenario["scenario"])
        wanted = {(e[0], e[1], e[2], e[3], e[5]) for e in scenario["events"] if e[3] == "kubelet" and e[2] == "Pod" and e[1] != optional}
        seen = {key for key in self.events if key[3] == "kubelet" and key[2] == "Pod" and key[1] != optional}
        out = [f"event missing: {key}" for key in sorted(wanted - seen)]
        return out + [f"event not expected: {key}" for key in sorted(seen - wanted - self.late)]


def _starting(state: Object) -> bool:
    """All containers are about to be made, for the first time."""
    reasons = {(c["state"], c.get("reason"), c["restartCount"]) for c in [*state.get("init", []), *state["main"]]}
    return reasons <= {("waiting", "ContainerCreating", 0), ("waiting", "PodInitializing", 0)}


def _compare(name: str, wanted: list[tuple[Object, bool, Object]], seen: list[Object]) -> list[str]:
    out, position = [], 0
    for state, must, entry in wanted:
        forms = [state]
        if state["phase"] == "Pending" and any(c["state"] == "terminated" for c in state["main"]):
            # The recorded kubelet missed the run between two looks; ours saw it.
            forms.append({**state, "phase": "Running"})
        if state["phase"] == "Running" and all(c["state"] == "terminated" for c in state["main"]):
            # All is over: one kubelet saw it run before and the other did not, or was still clearing up.
            forms += [{**state, "phase": phase} for phase in ("Pending", "Succeeded", "Failed")]
        found = next((i for i in range(position, len(seen)) if any(_same(f, seen[i]) for f in forms)), None)
        if found is not None:
            position = found
        elif must:
            near = min(seen[position:], key=lambda s: len(_diff(state, s)), default={})
            out.append(f"{name}: state at {entry['t']} not seen; nearest differs in {_diff(state, near)}")
    return out


def _same(recorded: Object, seen: Object) -> bool:
    """Equal, or equal but for a back-off that ours tells at once and the recorded kubelet at its next look ten seconds later."""
    if recorded == seen:
        return True
    for kind in ("init", "main"):
        for mine, theirs in zip(seen.get(kind, []), recorded.get(kind, []), strict=False):
            if mine == theirs or mine.get("reason") != "CrashLoopBackOff" or mine["restartCount"] != theirs["restartCount"]:
                continue
            ended = {"reason": theirs.get("reason"), "exitCode": theirs.get("exitCode")}
            if theirs["state"] == "terminated" and mine.get("last") == ended:
                seen = _replaced(seen, kind, mine, theirs)
            elif theirs.get("reason") == "PostStartHookError":
                seen = _replaced(seen, kind, mine, theirs)
    return recorded == seen


def _replaced(state: Object, kind: str, old: Object, new: Object) -> Object:
    return {**state, kind: [new if c is old else c for c in state[kind]]}


def _diff(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in _diff(a.get(k), b.get(k), f"{path}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _diff(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: recorded {a!r}, now {b!r}"]
