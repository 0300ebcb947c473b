"""The engine that follows the API: the moment a pod starts, and what it says about policies it cannot enforce."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.resources import NAMESPACES, NETWORK_POLICIES, PODS
from knarr.network.policy import PolicyEngine

from .fed import FedInformers
from .test_service_proxy import Recorder
from .world import World

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


def pod_object(name: str, ip: str = "", **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "default", "name": name, "labels": labels},
        "spec": {"nodeName": "here", "containers": []},
        "status": {"phase": "Running" if ip else "Pending", "podIP": ip, "podIPs": [{"ip": ip}] if ip else []},
    }


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "default", "name": name}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"], **spec}}


@pytest.fixture
async def engine():
    async with World() as world, Tasks() as tasks:
        informers = FedInformers()
        isolate = world.network.direct.isolate
        made = PolicyEngine(None, informers, node_name="here", table="knt-policy", netns=world.node.path, on_isolate=isolate)  # type: ignore[arg-type]
        made._recorder = Recorder()  # type: ignore[assignment]
        made.world, made.informers = world, informers  # type: ignore[attr-defined]
        informers.put(NAMESPACES, {"metadata": {"name": "default"}})
        task = tasks.spawn(made.run(), "policy")
        await made.wait_synced()
        yield made
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.cleanup()


async def test_a_new_pod_is_isolated_before_the_api_knows_its_address(engine):
    engine.informers.put(NETWORK_POLICIES, policy("deny"))
    engine.informers.put(PODS, pod_object("fresh"))
    client = await engine.world.pod("client")
    engine.world.network.on_attach = engine.admit
    fresh = await engine.world.pod("fresh")
    fresh.serve("fresh", 80)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(lambda: client.ask(fresh.ip, 80, seconds=0.3))
    # News of the pod without its address must not undo it.
    engine.informers.put(PODS, pod_object("fresh", step="two"))
    await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(lambda: client.ask(fresh.ip, 80, seconds=0.3))
    engine.informers.put(PODS, pod_object("fresh", fresh.ip))
    engine.informers.drop(NETWORK_POLICIES, "default", "deny")
    await asyncio.sleep(0.1)
    assert (await asyncio.to_thread(client.ask, fresh.ip, 80))[0] == "fresh"


async def test_a_pod_that_no_policy_selects_is_not_held_up(engine):
    engine.informers.put(PODS, pod_object("free"))
    started = asyncio.get_running_loop().time()
    await engine.admit("default", "free", ["10.77.0.200"])
    await engine.admit("default", "unknown", ["10.77.0.201"])
    assert asyncio.get_running_loop().time() - started < 0.1


async def test_a_rule_that_cannot_be_enforced_allows_nothing_and_is_told(engine):
    bad = {"from": [{"ipBlock": {"cidr": "nonsense"}}]}
    engine.informers.put(NETWORK_POLICIES, policy("odd", ingress=[bad]))
    assert engine._recorder.events == [("odd", "'nonsense' does not appear to be an IPv4 or IPv6 network")]
    assert engine.state.policies["default/odd"].ingress == ()
