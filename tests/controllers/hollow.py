"""A hollow node and a simple scheduler, so that controllers have pods that run and end.

Commands of containers are interpreted (tests.controllers.shell); images that only pause are imitated.
Statuses are written as a kubelet writes them. All timers are the event loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.aiokits.tasks import Tasks
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import LEASES, NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS, STORAGE_CLASSES
from knarr.api.types import Object
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.controllers import taints
from knarr.controllers.nodeaffinity import matches_required
from tests.controllers.shell import Shell

NODE = "hollow"
_ADDRESSES = itertools.count(10)
_NOTICED_SECONDS = 0.3
# A pod whose containers have ended is told to be over once they are cleared away; until then it runs, without being ready.
_CLEARED_SECONDS = 1.3
_APART_SECONDS = 0.005


def ready_conditions() -> list[Object]:
    now = clock.now_rfc3339()
    kinds = [("MemoryPressure", "False"), ("DiskPressure", "False"), ("PIDPressure", "False"), ("Ready", "True")]
    return [
        {"type": kind, "status": status, "reason": "Hollow", "lastHeartbeatTime": now, "lastTransitionTime": now} for kind, status in kinds
    ]


@dataclass
class _Container:
    name: str
    shell: Shell | None = None
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    restarts: int = 0
    ready: bool = False
    started_at: str = ""
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class HollowNode:
    """Registers its nodes, one by default, binds pods to fitting nodes, runs those bound to its own."""

    def __init__(self, client: Client, start_seconds: float = 0.7, names: Sequence[str] = (NODE,)) -> None:
        self.client = client
        self._informers = Informers(client)
        self._pods = self._informers.get(PODS)
        self._nodes = self._informers.get(NODES)
        self._claims = self._informers.get(PERSISTENT_VOLUME_CLAIMS)
        self._tasks = Tasks()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._deleted: dict[str, asyncio.Event] = {}
        self._deadlines: dict[str, asyncio.Event] = {}
        self._files: dict[str, set[str]] = {}
        self._start_seconds = start_seconds
        self._names = names
        self._bound: Counter[str] = Counter()
        self.starts: dict[tuple[str, str], float] = {}
        """Seconds that pods need to start, by namespace and name; the others need `start_seconds`."""
        self._started = 0
        self._pending: dict[str, Object] = {}

    async def __aenter__(self) -> HollowNode:
        for name in self._names:
            labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
            await self.client.create(NODES, {"metadata": {"name": name, "labels": labels}})
            status = {"conditions": ready_conditions(), "allocatable": {"cpu": "64", "memory": "64Gi", "pods": "1000"}}
            await self.client.patch(NODES, name, None, {"status": status}, type="strategic", subresource="status")
        self._pods.add_handler(self._changed, lambda old, new: self._changed(new), self._gone)
        self._nodes.add_handler(lambda _: self._retry(), lambda old, new: self._retry())
        self._claims.add_handler(lambda _: self._retry(), lambda old, new: self._retry())
        await self._informers.start()
        await self._informers.wait_synced()
        for name in self._names:
            self.beat(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()
        await self._informers.close()

    async def _beat(self, name: str, every: float = 5.0) -> None:
        lease = {"metadata": {"name": name, "namespace": "kube-node-lease"}, "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}}
        with contextlib.suppress(StatusError):
            await self.client.create(LEASES, lease)
        while True:
            await asyncio.sleep(every)
            with contextlib.suppress(StatusError):
                await self.client.patch(LEASES, name, "kube-node-lease", {"spec": {"renewTime": clock.now_micro()}})

    def beat(self, name: str) -> None:
        """Renew the lease of a bare node, too."""
        self._tasks.spawn(self._beat(name), f"heartbeat-{name}")

    # Scheduling

    def _changed(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if "deletionTimestamp" in pod["metadata"] and uid in self._deleted:
            self._deleted[uid].set()
        deadline = pod["spec"].get("activeDeadlineSeconds")
        if deadline is not None and uid in self._deadlines:
            asyncio.get_running_loop().call_later(deadline, self._deadlines[uid].set)
        node = pod["spec"].get("nodeName")
        if not node:
            if "deletionTimestamp" not in pod["metadata"] and not pod["spec"].get("schedulingGates"):
                self._pending[uid] = pod
                self._tasks.spawn(self._bind(pod), "bind")
        elif node in self._names and uid not in self._running and pod["status"].get("phase") not in ("Succeeded", "Failed"):
            self._deleted[uid] = asyncio.Event()
            self._deadlines[uid] = asyncio.Event()
            if deadline is not None:
                asyncio.get_running_loop().call_later(deadline, self._deadlines[uid].set)
            if "deletionTimestamp" in pod["metadata"]:
                self._deleted[uid].set()
            self._running[uid] = self._tasks.spawn(self._run(pod), f"pod-{pod['metadata']['name']}")
        elif node in self._names and uid not in self._running and "deletionTimestamp" in pod["metadata"]:
            # Over already, with nobody running it: what is left is to let it go.
            self._running[uid] = self._tasks.spawn(self._remove(pod), "remove")

    def _gone(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        self._pending.pop(uid, None)
        if uid in self._deleted:
            self._deleted[uid].set()
        task = self._running.pop(uid, None)
        if task is not None:
            asyncio.get_running_loop().call_later(1.0, task.cancel)

    def _retry(self) -> None:
        for pod in list(self._pending.values()):
            self._tasks.spawn(self._bind(pod), "bind")

    def _fits(self, pod: Object, node: Object) -> bool:
        tolerations = pod["spec"].get("tolerations") or []
        present = taints.of_node(node)
        return matches_required(pod["spec"], node) and taints.untolerated(present, tolerations, ("NoSchedule", "NoExecute")) is None

    def _claims_bound(self, pod: Object) -> bool:
        for volume in pod["spec"].get("volumes") or ():
            name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if name is not None:
                claim = self._claims.get(pod["metadata"]["namespace"], name)
                if claim is None or (claim.get("status") or {}).get("phase") != "Bound":
                    return False
        return True

    async def _choose_volumes(self, pod: Object) -> None:
        """Bind volumes to claims that wait for their first consumer."""
        for volume in pod["spec"].get("volumes") or ():
            name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            claim = self._claims.get(pod["metadata"]["namespace"], name) if name else None
            class_name = claim["spec"].get("storageClassName") if claim is not None else None
            if claim is None or not class_name or claim["spec"].get("volumeName"):
                continue
            try:
                found = await self.client.get(STORAGE_CLASSES, class_name)
            except StatusError:
                continue
            if found.get("volumeBindingMode") != "WaitForFirstConsumer":
                continue
            for candidate in (await self.client.list(PERSISTENT_VOLUMES))["items"]:
                if candidate["spec"].get("storageClassName") == class_name and not candidate["spec"].get("claimRef"):
                    meta.set_annotation(candidate, "pv.kubernetes.io/bound-by-controller", "yes")
                    candidate["spec"]["claimRef"] = meta.object_reference(claim)
                    # The binder may be at it; then it is for the next try.
                    with contextlib.suppress(StatusError):
                        await self.client.update(PERSISTENT_VOLUMES, candidate)
                    break

    async def _bind(self, pod: Object) -> None:
        fitting = [node["metadata"]["name"] for node in self._nodes if self._fits(pod, node)]
        nodes = sorted(fitting, key=lambda name: (name not in self._names, self._bound[name]))
        if not nodes:
            return
        if not self._claims_bound(pod):
            await self._choose_volumes(pod)
            return
        if self._pending.pop(pod["metadata"]["uid"], None) is None:
            return
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        binding = {"metadata": {"name": name}, "target": {"kind": "Node", "name": nodes[0]}}
        self._bound[nodes[0]] += 1
        with contextlib.suppress(StatusError):
            await self.client.create(PODS, binding, namespace, subresource="binding", name=name)

    # Running

    async def _write(self, pod: Object, status: Object) -> None:
        patch = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}
        try:
            await self.client.patch(
                PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], patch, type="strategic", subresource="status"
            )
        except StatusError as error:
            another = errors.is_invalid(error) and "metadata.uid" in error.message  # the next pod of this name
            if not another and not errors.is_not_found(error) and not errors.is_conflict(error):
                raise

    def _status(self, pod: Object, containers: list[_Container], phase: str, address: str) -> Object:
        ready = phase == "Running" and all(item.ready for item in containers)
        done = phase in ("Succeeded", "Failed")
        reason = {} if ready else {"reason": "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"}
        if phase == "Failed":
            reason = {"reason": "PodFailed"}
        now = clock.now_rfc3339()
        old = {item["type"]: item for item in (pod.get("status") or {}).get("conditions") or ()}
        conditions = []
        wanted = [("Initialized", True, {}), ("Ready", ready, reason), ("ContainersReady", ready, reason)]
        for type, value, extra in [("PodReadyToStartContainers", bool(address) and not done, {}), *wanted]:
            status = "True" if value else "False"
            known = old.get(type, {})
            stamp = known.get("lastTransitionTime", now) if known.get("status") == status else now
            conditions.append({"type": type, "status": status, "lastTransitionTime": stamp, "reason": None, **extra})
        result: Object = {
            "phase": phase,
            "conditions": conditions,
            "startTime": (pod.get("status") or {}).get("startTime") or now,
            "hostIP": "192.0.2.1",
            "containerStatuses": [
                {
                    "name": item.name,
                    "image": "hollow",
                    "imageID": "hollow",
                    "ready": item.ready and not done,
                    "started": "running" in item.state,
                    "restartCount": item.restarts,
                    "state": item.state,
                }
                for item in containers
            ],
        }
        if address:
            result.update(podIP=address, podIPs=[{"ip": address}])
        pod["status"] = {**(pod.get("status") or {}), **result}
        return result

    async def _run(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        pod = meta.deep_copy(pod)
        try:
            await self._live(pod, self._deleted[uid])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _remove(self, pod: Object) -> None:
        try:
            name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
            await self.client.delete(PODS, name, namespace, grace_period_seconds=0, uid=pod["metadata"]["uid"])
        except StatusError as error:
            if not errors.is_not_found(error) and not errors.is_conflict(error):
                raise

    async def _live(self, pod: Object, deleted: asyncio.Event) -> None:
        containers = [_Container(item["name"]) for item in pod["spec"]["containers"]]
        await self._write(pod, self._status(pod, containers, "Pending", ""))
        # No two pods of a node start in the same moment.
        self._started += 1
        start_seconds = self._start_seconds + self._started % 64 * _APART_SECONDS
        await asyncio.sleep(self.starts.get((pod["metadata"]["namespace"], pod["metadata"]["name"]), start_seconds))
        if any(item["image"].startswith("rec.invalid") for item in pod["spec"]["containers"]):
            for container in containers:
                container.state = {"waiting": {"reason": "ErrImagePull"}}
            await self._write(pod, self._status(pod, containers, "Pending", f"10.244.1.{next(_ADDRESSES) % 250}"))
            await deleted.wait()
            await self._remove(pod)
            return
        count = next(_ADDRESSES)
        address = f"10.244.{count // 250}.{count % 250}"
        changed = asyncio.Event()
        async with Tasks() as tasks:
            for spec, container in zip(pod["spec"]["containers"], containers, strict=True):
                tasks.spawn(self._container(pod, spec, container, changed), f"container-{container.name}")
            stopping = tasks.spawn(self._stop(pod, containers, deleted), "stop")
            late = self._deadlines[pod["metadata"]["uid"]]
            tasks.spawn(self._stop(pod, containers, late), "deadline")
            while True:
                await changed.wait()
                changed.clear()
                phase = self._phase(pod, containers, deleted.is_set() or late.is_set())
                if phase in ("Succeeded", "Failed") and not deleted.is_set() and not late.is_set():
                    await self._write(pod, {**self._status(pod, containers, phase, address), "phase": "Running"})
                    await asyncio.sleep(_CLEARED_SECONDS)
                status = self._status(pod, containers, phase, address)
                if late.is_set():
                    status.update(reason="DeadlineExceeded", message="Pod was active on the node longer than the specified deadline")
                await self._write(pod, status)
                if phase in ("Succeeded", "Failed"):
                    break
            await deleted.wait()
            await asyncio.wait([stopping])
        await self._remove(pod)

    async def _stop(self, pod: Object, containers: list[_Container], deleted: asyncio.Event) -> None:
        await deleted.wait()
        for container in containers:
            container.stop.set()
            if container.shell is not None:
                container.shell.terminate()

    @staticmethod
    def _phase(pod: Object, containers: list[_Container], stopping: bool) -> str:
        ended = [item.state["terminated"]["exitCode"] for item in containers if "terminated" in item.state]
        if len(ended) < len(containers):
            return "Running"
        policy = pod["spec"].get("restartPolicy", "Always")
        if not stopping and (policy == "Always" or (policy == "OnFailure" and any(ended))):
            return "Running"
        return "Failed" if any(ended) else "Succeeded"

    def _env(self, pod: Object, spec: Object) -> dict[str, str]:
        env = {}
        for item in spec.get("env") or ():
            path = ((item.get("valueFrom") or {}).get("fieldRef") or {}).get("fieldPath", "")
            if path.startswith("metadata.labels['"):
                env[item["name"]] = meta.labels(pod).get(path[17:-2], "")
            elif "value" in item:
                env[item["name"]] = item["value"]
        return env

    def _shell(self, pod: Object, spec: Object) -> Shell:
        files = self._files.setdefault(pod["metadata"]["uid"], set())
        return Shell(files, self._env(pod, spec), pod["spec"].get("hostname") or pod["metadata"]["name"])

    async def _container(self, pod: Object, spec: Object, container: _Container, changed: asyncio.Event) -> None:
        backoff = 10.0
        while True:
            container.started_at = clock.now_rfc3339()
            container.state = {"running": {"startedAt": container.started_at}}
            command = spec.get("command")
            container.ready = "readinessProbe" not in spec
            async with Tasks() as probes:
                if command:
                    container.shell = self._shell(pod, spec)
                if "readinessProbe" in spec:
                    probes.spawn(self._probe(pod, spec, container, changed), "probe")
                changed.set()
                code = await self._wait(container, spec)
            container.ready = False
            container.state = {
                "terminated": {
                    "exitCode": code,
                    "reason": "Error" if code else "Completed",
                    "startedAt": container.started_at,
                    "finishedAt": clock.now_rfc3339(),
                }
            }
            changed.set()
            policy = pod["spec"].get("restartPolicy", "Always")
            if container.stop.is_set() or policy == "Never" or (policy == "OnFailure" and code == 0):
                return
            if container.restarts:
                await asyncio.sleep(backoff)
                backoff *= 2
            container.restarts += 1

    async def _wait(self, container: _Container, spec: Object) -> int:
        if container.shell is not None:
            code = await container.shell.run(spec["command"])
            # A kubelet sees a container run before it sees its end.
            await asyncio.sleep(_NOTICED_SECONDS)
            return code
        await container.stop.wait()
        for word in spec.get("args") or ():
            if word.startswith("--delay-shutdown="):
                await asyncio.sleep(float(word.partition("=")[2]))
                return 0
        return 2

    async def _probe(self, pod: Object, spec: Object, container: _Container, changed: asyncio.Event) -> None:
        while True:
            ready = await self._shell(pod, spec).run(spec["readinessProbe"]["exec"]["command"]) == 0
            if ready != container.ready:
                container.ready = ready
                changed.set()
            await asyncio.sleep(0.5)

    async def run_in(self, pod: Object, command: list[str]) -> int:
        """Run a command as exec does."""
        return await self._shell(pod, pod["spec"]["containers"][0]).run(command)
