"""Controllers and scheduler die by SIGKILL at random moments of rollouts, scalings, deletions and Jobs: what is declared comes about.

On the way no Deployment's sets are told more pods than its surge allows, no set has more pods than it was told, and no index of a
Job runs twice; at the end nothing is left of what was deleted. The short form makes few changes; KNARR_COMPONENT_CHANGES=1000 (and KNARR_FAULT_SEED) makes that many.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bench.servers import TOKEN

from knarr.aiokits import clock
from knarr.aiokits.tasks import Tasks
from knarr.api import meta
from knarr.api.resources import DEPLOYMENTS, JOBS, PODS, REPLICA_SETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.controllers import podutil
from knarr.simulate.simulator import Simulator, SimulatorConfig
from knarr.simulate.workload import make_deployment
from tests.controllers.sizes import Sizes
from tests.faults.server import Server

CHANGES = int(os.environ.get("KNARR_COMPONENT_CHANGES") or 40)
SEED = int(os.environ.get("KNARR_FAULT_SEED") or 1)
USERS = 4
MOST_REPLICAS = 6
INDICES = 4
SETTLE_SECONDS = 120.0
IMPATIENT_SECONDS = 10.0
SEEN_SECONDS = 2.0
INDEX = "batch.kubernetes.io/job-completion-index"


class Killed:
    """A component's process, killed and started again."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self._server = server
        self._process: asyncio.subprocess.Process | None = None
        self.kills = 0

    async def start(self) -> None:
        with (self._server.folder / f"{self.name}.log").open("ab") as log:
            arguments = [self.name, f"https://127.0.0.1:{self._server.port}", str(self._server.folder)]
            command = [sys.executable, "-m", "tests.faults.component", *arguments]
            self._process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=log)

    async def wait_ready(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line == b"ready\n", (self._server.folder / f"{self.name}.log").read_text()[-3000:]

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def kill_at_random(self, enough: asyncio.Event, impatient: set[str]) -> None:
        """Die while it works, and every third time before it is ready; once at least, and then until it is enough.

        A machine that is so busy that nothing is done between two deaths gets a rest when a user has become impatient.
        """
        chance = random.Random(f"{SEED} {self.name}")
        while not (enough.is_set() and self.kills):
            if self.kills % 3 == 2:
                await asyncio.sleep(chance.uniform(0.0, 0.4))
            else:
                await self.wait_ready()
                await asyncio.sleep(chance.uniform(0.0, 1.5))
            while impatient:
                await asyncio.sleep(0.1)
            await self.kill()
            self.kills += 1
            await self.start()


@dataclass
class Ledger:
    """Every commit of a pod, judged as it comes. Bounds are what any declaration since the last settled state allows."""

    bounds: dict[str, int] = field(default_factory=dict)
    pods: dict[str, Object] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    done: dict[tuple[str, str], str] = field(default_factory=dict)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    impatient: set[str] = field(default_factory=set)

    def saw(self, kind: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if kind == "DELETED":
            self.pods.pop(uid, None)
        else:
            new = uid not in self.pods
            self.pods[uid] = pod
            if INDEX in meta.annotations(pod):
                self._job_pod(pod, new)
            elif new:
                self._set_pod(pod)

    def saw_set(self, kind: str, item: Object) -> None:
        app = meta.labels(item)["app"]
        sizes = self.sizes.setdefault(app, Sizes())
        if sizes.saw(kind, item) > 0 and sizes.total() > self.bounds[app]:
            self.faults.append(f"{app}: its sets are told {sizes.total()} pods, at most {self.bounds[app]} are allowed")

    def _set_pod(self, pod: Object) -> None:
        metadata, app, at = pod["metadata"], meta.labels(pod)["app"], clock.now()
        owner = metadata["ownerReferences"][0]
        same = [item for item in self.active(app) if item["metadata"]["ownerReferences"][0]["uid"] == owner["uid"]]

        def judge() -> None:
            told = self.sizes.setdefault(app, Sizes()).told(owner["name"], int(metadata["resourceVersion"]), at)
            if len(same) > told:
                self.faults.append(f"{len(same)} pods of {owner['name']}, it was told {told}")

        asyncio.get_running_loop().call_later(SEEN_SECONDS, judge)  # the set's own commit comes by another watch

    def _job_pod(self, pod: Object, new: bool) -> None:
        key, uid = (meta.labels(pod)["job-name"], meta.annotations(pod)[INDEX]), pod["metadata"]["uid"]
        if podutil.phase(pod) == "Succeeded":
            if self.done.setdefault(key, uid) != uid:
                self.faults.append(f"index {key} has succeeded twice")
        elif new and key in self.done:
            self.faults.append(f"index {key} runs again after it has succeeded")
        same = [item for item in self.pods.values() if podutil.is_active(item) and meta.annotations(item).get(INDEX) == key[1] and meta.labels(item)["job-name"] == key[0]]
        if new and len(same) > 1:
            self.faults.append(f"index {key} runs {len(same)} times at once")

    def active(self, app: str) -> list[Object]:
        return [pod for pod in self.pods.values() if meta.labels(pod).get("app") == app and podutil.is_active(pod)]

    async def follow(self, client: Client, resource: Resource, saw: Callable[[str, Object], None]) -> None:
        version = (await client.list(resource, "default"))["metadata"]["resourceVersion"]
        while True:
            async for kind, item in client.watch(resource, "default", resource_version=version, allow_bookmarks=False):
                version = item["metadata"]["resourceVersion"]
                saw(kind, item)


class User:
    """Changes its own Deployment or runs a Job, one change after another; some wait until what they declared is there."""

    def __init__(self, client: Client, ledger: Ledger, number: int) -> None:
        self._client = client
        self._ledger = ledger
        self._app = f"user-{number}"
        self._random = random.Random(SEED * 1000 + number)
        self._spec: Object | None = None
        self.jobs: list[str] = []

    async def change(self, number: int) -> None:
        kind = self._random.choice(["rollout", "rollout", "scale", "scale", "delete", "job"])
        if kind == "job":
            await self._run_job(f"{self._app}-job-{number}")
        elif self._spec is None:
            made = make_deployment(self._app, self._random.randint(1, MOST_REPLICAS))
            self._allow(made["spec"]["replicas"])
            self._spec = (await self._client.create(DEPLOYMENTS, made, "default"))["spec"]
        elif kind == "delete":
            await self._client.delete(DEPLOYMENTS, self._app, "default", propagation_policy=self._random.choice(["Foreground", "Background"]))
            self._spec = None
            await self._until(self._is_gone)
        else:
            patch: Object = {"template": {"metadata": {"annotations": {"change": str(number)}}}}
            if kind == "scale":
                patch = {"replicas": self._random.randint(0, MOST_REPLICAS)}
                self._allow(patch["replicas"])
            self._spec = (await self._client.patch(DEPLOYMENTS, self._app, "default", {"spec": patch}))["spec"]
        if self._random.random() < 0.3:
            await self.settle()
        else:
            await asyncio.sleep(self._random.random() * 0.5)

    def _allow(self, replicas: int) -> None:
        """maxSurge is 25 %, rounded up."""
        self._ledger.bounds[self._app] = max(self._ledger.bounds.get(self._app, 0), replicas + -(-replicas // 4))

    async def _run_job(self, name: str) -> None:
        made = make_deployment(name, 0)["spec"]["template"]
        spec = {"completions": INDICES, "parallelism": 2, "completionMode": "Indexed", "template": {"spec": {**made["spec"], "restartPolicy": "Never"}}}
        self.jobs.append(name)
        await self._client.create(JOBS, {"metadata": {"name": name}, "spec": spec}, "default")

    async def settle(self) -> None:
        """Until what is declared is there, and only that; then older declarations allow nothing any more."""
        if self._spec is not None:
            await self._until(self._is_there)
            self._ledger.bounds[self._app] = 0
            self._allow(self._spec["replicas"])

    async def _is_there(self) -> str:
        assert self._spec is not None
        found = await self._client.get(DEPLOYMENTS, self._app, "default")
        status, replicas = found.get("status") or {}, self._spec["replicas"]
        counts = [status.get(name, 0) for name in ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")]
        if status.get("observedGeneration") != found["metadata"]["generation"] or counts != [replicas] * 4:
            return f"{replicas} replicas are declared, status is {status}"
        pods = self._ledger.active(self._app)
        return "" if len(pods) == replicas else f"{replicas} replicas are declared, there are {len(pods)} pods"

    async def _is_gone(self) -> str:
        deployments = (await self._client.list(DEPLOYMENTS, "default", field_selector=f"metadata.name={self._app}"))["items"]
        sets = (await self._client.list(REPLICA_SETS, "default", label_selector=f"app={self._app}"))["items"]
        pods = [pod for pod in self._ledger.pods.values() if meta.labels(pod).get("app") == self._app]
        return f"{len(deployments)} Deployments, {len(sets)} ReplicaSets and {len(pods)} pods are left" if deployments or sets or pods else ""

    async def jobs_complete(self) -> None:
        async def complete() -> str:
            found = {item["metadata"]["name"]: item["status"] for item in (await self._client.list(JOBS, "default"))["items"]}
            short = [(name, found[name]) for name in self.jobs if meta.get_condition(found[name].get("conditions") or [], "Complete") is None]
            return f"{short[:2]} are not complete" if short else ""

        await self._until(complete)
        assert all((name, str(index)) in self._ledger.done for name in self.jobs for index in range(INDICES))

    async def _until(self, fault_of: Callable[[], Awaitable[str]]) -> None:
        start = time.monotonic()
        while fault := await fault_of():
            assert time.monotonic() < start + SETTLE_SECONDS, f"{self._app}: {fault}"
            if time.monotonic() > start + IMPATIENT_SECONDS:
                self._ledger.impatient.add(self._app)
            await asyncio.sleep(0.1)
        self._ledger.impatient.discard(self._app)


@pytest.mark.timeout(60 + 6 * CHANGES)
async def test_what_is_declared_comes_about_although_controllers_and_scheduler_are_killed(tmp_path: Path) -> None:
    server = Server(tmp_path)
    await server.start()
    components = [Killed("controllers", server), Killed("scheduler", server)]
    client = Client(ClientConfig(server=f"https://127.0.0.1:{server.port}", ca_data=(tmp_path / "ca.crt").read_bytes(), token=TOKEN))
    ledger = Ledger()
    try:
        for component in components:
            await component.start()
        async with Tasks() as tasks:
            simulator = Simulator(client, SimulatorConfig(4))
            tasks.spawn(simulator.run(), "simulator")
            await simulator.wait_nodes()
            for resource, saw in ((PODS, ledger.saw), (REPLICA_SETS, ledger.saw_set)):
                tasks.spawn_eternal(ledger.follow(client, resource, saw), f"ledger-{resource.plural}")
            users = [User(client, ledger, number) for number in range(USERS)]
            enough = asyncio.Event()
            killers = [tasks.spawn(component.kill_at_random(enough, ledger.impatient), f"killer-{component.name}") for component in components]

            async def play(user: User, changes: list[int]) -> None:
                for number in changes:
                    await user.change(number)

            await asyncio.gather(*(play(user, list(range(start, CHANGES, USERS))) for start, user in enumerate(users)))
            enough.set()
            await asyncio.gather(*killers)
            print({component.name: component.kills for component in components})
            for user in users:
                await user.settle()
                await user.jobs_complete()
            await asyncio.sleep(SEEN_SECONDS)
        assert not ledger.faults, ledger.faults[:5]
        owners = {item["metadata"]["uid"] for resource in (REPLICA_SETS, JOBS) for item in (await client.list(resource, "default"))["items"]}
        for pod in (await client.list(PODS, "default"))["items"]:
            controller = meta.controller_of(pod)
            assert controller is not None
            assert controller["uid"] in owners, "a pod whose owner is gone"
    finally:
        await client.close()
        for component in components:
            await component.kill()
        server.kill()
