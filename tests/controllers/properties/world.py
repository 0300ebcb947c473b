"""One API server, all controllers and hollow nodes in one loop of virtual time, for many examples one after another.

Every example plays in a namespace of its own. A `Ledger` sees each change of its pods in the order of their commits and
hands it to the laws of the workload, with the pods as they were before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import NAMESPACES, PODS, REPLICA_SETS, SERVICE_ACCOUNTS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers import podutil
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.testing.apiserver import running_apiserver
from tests import virtualtime
from tests.controllers.hollow import HollowNode
from tests.controllers.sizes import GRACE_SECONDS, Sizes

NODES = ("hollow-a", "hollow-b", "hollow-c")
LABELS = {"app": "x"}
# Also what is off by default is to keep the laws.
GATES = {"MaxUnavailableStatefulSet": True}
# Watches bring a commit this much later at most, in virtual time.
SEEN_SECONDS = 0.1


@dataclass
class Change:
    """One commit of a pod: kind is "ADDED", "DELETING" (first seen with a deletion timestamp), "MODIFIED" or "DELETED"."""

    kind: str
    pod: Object
    pods: dict[str, Object]
    """All pods after the commit, by name; one that was just deleted is not among them."""


Law = Callable[[Change], str | None]


@dataclass
class Ledger:
    """What the laws know of one example."""

    client: Client
    namespace: str
    resource: Resource
    law: Law
    pods: dict[str, Object] = field(default_factory=dict)
    specs: list[tuple[float, Object]] = field(default_factory=list)
    by_user: set[str] = field(default_factory=set)
    """uids of pods that the user has deleted or failed."""
    taken: dict[str, float] = field(default_factory=dict)
    """When the user last deleted or failed a pod of a name."""
    sizes: Sizes = field(default_factory=Sizes)
    size_law: Callable[[int], str | None] = lambda grown: None
    """Judges the sum of all sets' sizes when it changes, by so many."""
    broken: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def took(self, pod: Object) -> None:
        """The user is about to delete or fail a pod."""
        self.by_user.add(pod["metadata"]["uid"])
        self.taken[pod["metadata"]["name"]] = clock.now()

    def just_taken(self) -> set[str]:
        """Names of pods that the user took so lately that a controller may not have seen it when it decided."""
        return {name for name, at in self.taken.items() if clock.now() - at < SEEN_SECONDS}

    def window(self) -> list[Object]:
        """The specifications that controllers may still act upon, newest last."""
        limit = clock.now() - GRACE_SECONDS
        past = [spec for at, spec in self.specs if at < limit][-1:]
        return past + [spec for at, spec in self.specs if at >= limit]

    def saw(self, kind: str, pod: Object) -> None:
        name, before = pod["metadata"]["name"], self.pods.get(pod["metadata"]["name"])
        if kind == "DELETED":
            self.pods.pop(name, None)
        else:
            self.pods[name] = pod
            if podutil.is_deleting(pod) and before is not None and not podutil.is_deleting(before):
                kind = "DELETING"
        self.log.append(f"{clock.now() % 10000:.2f} {kind} {name} {pod['metadata'].get('labels')} {podutil.phase(pod)} ready={podutil.is_ready(pod)}")
        self._judge(self.law(Change(kind, pod, self.pods)))

    def _judge(self, fault: str | None) -> None:
        if fault:
            self.broken.append(fault)

    def judge_later(self, law: Callable[[], str | None], seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, lambda: self._judge(law()))

    def saw_set(self, kind: str, item: Object) -> None:
        grown = self.sizes.saw(kind, item)
        if grown:
            self.log.append(f"{clock.now() % 10000:.2f} SIZE {item['metadata']['name']} {item['spec']['replicas']}")
            self._judge(self.size_law(grown))

    async def follow(self, resource: Resource, saw: Callable[[str, Object], None], synced: asyncio.Event) -> None:
        version = (await self.client.list(resource, self.namespace))["metadata"]["resourceVersion"]
        synced.set()
        while True:
            async for kind, item in self.client.watch(resource, self.namespace, resource_version=version, allow_bookmarks=False):
                version = item["metadata"]["resourceVersion"]
                saw(kind, item)


class Example:
    """A workload named "w" in a namespace, and what a user does to it."""

    def __init__(self, client: Client, namespace: str, resource: Resource) -> None:
        self.client = client
        self.namespace = namespace
        self.resource = resource
        self.ledger = Ledger(client, namespace, resource, lambda change: None)

    async def create(self, spec: Object) -> None:
        created = await self.client.create(self.resource, {"metadata": {"name": "w"}, "spec": spec}, self.namespace)
        self.note(created)

    def note(self, workload: Object) -> None:
        self.ledger.specs.append((clock.now(), workload["spec"]))
        self.ledger.log.append(f"{clock.now() % 10000:.2f} SPEC {workload['spec']}")

    async def patch(self, spec: Object) -> None:
        """Change the specification; what validation refuses does not happen."""
        with contextlib.suppress(StatusError):
            self.note(await self.client.patch(self.resource, "w", self.namespace, {"spec": spec}))

    async def workload(self) -> Object:
        return await self.client.get(self.resource, "w", self.namespace)

    def _chosen(self, number: int) -> Object | None:
        pods = [pod for _, pod in sorted(self.ledger.pods.items()) if podutil.is_active(pod)]
        return pods[number % len(pods)] if pods else None

    async def delete_pod(self, number: int) -> None:
        pod = self._chosen(number)
        if pod is not None:
            self.ledger.took(pod)
            await self.client.delete(PODS, pod["metadata"]["name"], self.namespace, uid=pod["metadata"]["uid"])

    async def fail_pod(self, number: int) -> None:
        """As an eviction by its node: the pod has failed, and nobody restarts it."""
        pod = self._chosen(number)
        if pod is not None and pod["spec"].get("nodeName"):
            self.ledger.took(pod)
            status = {"phase": "Failed", "reason": "Evicted", "conditions": [{"type": "Ready", "status": "False"}]}
            await self.client.patch(PODS, pod["metadata"]["name"], self.namespace, {"status": status}, type="strategic", subresource="status")

    async def list(self, resource: Resource) -> list[Object]:
        found: list[Object] = (await self.client.list(resource, self.namespace))["items"]
        return found


class World:
    """Runs examples; use as a context manager."""

    def __enter__(self) -> World:
        self._runner = asyncio.Runner(loop_factory=virtualtime.VirtualTimeLoop)
        self._numbers = itertools.count()
        self._runner.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()
        clock.follow_system()

    async def _start(self) -> None:
        clock.follow_loop()
        self._stack = contextlib.AsyncExitStack()
        server = await self._stack.enter_async_context(running_apiserver(feature_gates=GATES))
        tasks = await self._stack.enter_async_context(Tasks())
        manager = ControllerManager(server.client, ControllersConfig(feature_gates=GATES))
        tasks.spawn(manager.run(), "controllers")
        await manager.wait_ready()
        await self._stack.enter_async_context(HollowNode(server.client, names=NODES))
        self.client = server.client

    def run(self, resource: Resource, play: Callable[[Example], Awaitable[None]]) -> None:
        """Play one example in a namespace of its own; AssertionError when a law was broken."""
        self._runner.run(self._run(resource, play))

    async def _run(self, resource: Resource, play: Callable[[Example], Awaitable[Any]]) -> None:
        namespace = f"p{next(self._numbers)}"
        await self.client.create(NAMESPACES, {"metadata": {"name": namespace}})
        while not await self._has_account(namespace):
            await asyncio.sleep(0.1)
        example = Example(self.client, namespace, resource)
        ledger = example.ledger
        async with Tasks() as tasks:
            for followed, saw in ((PODS, ledger.saw), (REPLICA_SETS, ledger.saw_set)):
                synced = asyncio.Event()
                tasks.spawn(ledger.follow(followed, saw, synced), f"ledger-{followed.plural}")
                await synced.wait()
            try:
                await play(example)
                assert not example.ledger.broken, example.ledger.broken[:3]
            except AssertionError as error:
                error.add_note("\n".join(example.ledger.log[-80:]))
                raise
            finally:
                with contextlib.suppress(StatusError):
                    await self.client.delete(resource, "w", namespace, propagation_policy="Background")
        await self.client.delete(NAMESPACES, namespace)
        while await self._exists(namespace):
            await asyncio.sleep(1)

    async def _has_account(self, namespace: str) -> bool:
        try:
            await self.client.get(SERVICE_ACCOUNTS, "default", namespace)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
            return False
        return True

    async def _exists(self, namespace: str) -> bool:
        try:
            await self.client.get(NAMESPACES, namespace)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
            return False
        return True
