"""The proxy following its informers: bursts, UDP flows, health ports, refusals, repairs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
from ipaddress import ip_network
from typing import Any

import pytest

from knarr.aiokits.clock import now_rfc3339
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, NODES, SERVICES
from knarr.network import nftables
from knarr.network.machine import Machine
from knarr.network.netlink import NetlinkError
from knarr.network.proxy import ServiceProxy
from knarr.network.proxy import table as table_module
from knarr.runtime.cri import PortMapping

from .fed import FedInformers
from .world import World, endpoint_slice, free_ports, ready, refused, service

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]
HTTP, BACK = [("http", "TCP", 80)], [("http", "TCP", 8080)]
DNS = [("dns", "UDP", 53)]


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, obj: dict[str, Any], type: str, reason: str, message: str, **_more: Any) -> None:
        self.events.append((obj["metadata"]["name"], message))

    async def close(self) -> None:
        return


class Running:
    def __init__(self, world: World, machine: Machine | None = None) -> None:
        self.world = world
        self.informers = FedInformers()
        self.proxy = ServiceProxy(
            None,
            self.informers,
            node_name="here",
            table="knt",
            pod_cidrs=world.cluster_cidrs,
            netns=world.node.path,  # type: ignore[arg-type]
            machine=machine,
        )
        self.proxy._recorder = self.recorder = Recorder()  # type: ignore[assignment]

    async def settle(self) -> None:
        """Until everything marked so far is in the kernel."""
        async with asyncio.timeout(10):
            while not self.proxy.idle:
                await asyncio.sleep(0.005)

    async def put(self, resource: Any, *objects: Any) -> None:
        self.informers.put(resource, *objects)
        await self.settle()


@pytest.fixture
async def running():
    async with World() as world, Tasks() as tasks:
        made = Running(world)
        task = tasks.spawn(made.proxy.run(), "proxy")
        await made.proxy.wait_synced()
        yield made
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.proxy.cleanup()


async def test_services_come_change_and_go(running):
    world = running.world
    a, b, client = await world.pod("a"), await world.pod("b"), await world.pod("client")
    a.serve("a", 8080), b.serve("b", 8080)
    await running.put(SERVICES, service("web", "10.96.0.10", HTTP))
    with refused():
        await asyncio.to_thread(client.ask, "10.96.0.10", 80)
    await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(a.ip)]))
    assert (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0] == "a"
    await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(b.ip)]))
    assert (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0] == "b"
    running.informers.drop(SERVICES, "default", "web")
    await running.settle()
    assert running.proxy.rendered == {}
    assert running.proxy._table._owners == {}
    assert running.proxy._table._shared == {}


async def test_many_changes_at_once_are_few_commits(running):
    before = running.proxy.commits
    await running.put(SERVICES, *(service(f"s{n}", f"10.96.1.{n}", HTTP) for n in range(1, 200)))
    assert running.proxy.commits - before <= 3
    assert len(running.proxy.rendered) == 199


async def test_a_udp_client_that_keeps_its_port_moves_to_the_new_endpoint(running):
    world = running.world
    a, b, client = await world.pod("a"), await world.pod("b"), await world.pod("client")
    a.serve("a", 5353, udp=True), b.serve("b", 5353, udp=True)
    back = [("dns", "UDP", 5353)]
    await running.put(SERVICES, service("dns", "10.96.0.53", DNS, type="NodePort", node_ports={53: 30053}))
    ask = lambda address, port, own: asyncio.to_thread(lambda: client.ask(address, port, udp=True, source_port=own))
    # A flow from before the first endpoint must not stick to the refused address either.
    with pytest.raises(OSError):
        await ask("10.96.0.53", 53, 4001)
    await running.put(ENDPOINT_SLICES, endpoint_slice("dns", back, [ready(a.ip)]))
    for address, port, own in (("10.96.0.53", 53, 4001), (world.node.ip, 30053, 4002)):
        assert (await ask(address, port, own))[0] == "a"
    await running.put(ENDPOINT_SLICES, endpoint_slice("dns", back, [ready(b.ip)]))
    for address, port, own in (("10.96.0.53", 53, 4001), (world.node.ip, 30053, 4002)):
        assert (await ask(address, port, own))[0] == "b"
    running.informers.drop(SERVICES, "default", "dns")
    await running.settle()
    with pytest.raises(OSError):
        await asyncio.to_thread(lambda: client.ask("10.96.0.53", 53, udp=True, source_port=4001, seconds=0.3))


async def test_session_affinity_forgets_an_endpoint_that_is_gone(running):
    world = running.world
    pods = [await world.pod(f"p{n}") for n in range(2)]
    for number, pod in enumerate(pods):
        pod.serve(f"p{number}", 8080)
    client = await world.pod("client")
    await running.put(SERVICES, service("web", "10.96.0.10", HTTP, sessionAffinity="ClientIP"))
    await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(pod.ip) for pod in pods]))
    first = (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0]
    kept = pods[1 - int(first[1])]
    await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(kept.ip)]))
    assert (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0] != first


async def test_the_health_port_tells_whether_this_node_has_endpoints(running):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    status = {"loadBalancer": {"ingress": [{"ip": "172.31.0.9"}]}}
    await running.put(
        SERVICES,
        service("lb", "10.96.0.20", HTTP, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=port, status=status),
    )

    async def health() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        return answer

    assert (await health()).startswith("HTTP/1.1 503")
    await running.put(ENDPOINT_SLICES, endpoint_slice("lb", BACK, [ready("10.77.0.9"), ready("10.77.9.9", node="elsewhere")]))
    answer = await health()
    assert answer.startswith("HTTP/1.1 200")
    assert '"localEndpoints":1' in answer
    running.informers.drop(SERVICES, "default", "lb")
    await running.settle()
    with pytest.raises(OSError):
        await health()


@pytest.mark.parametrize(("machine", "led_to"), [("here", 1), ("control", 0)])
async def test_nodes_of_the_machine_that_come_and_go_change_what_its_own_node_leads_to_from_outside(machine, led_to):
    """Another machine's nodes change nothing here, and a health port tells of this node alone."""

    def node(name: str, *addresses: str, **spec: Any) -> dict[str, Any]:
        listed = [{"type": "Hostname", "address": name}, *({"type": "InternalIP", "address": address} for address in addresses)]
        return {"metadata": {"name": name}, "spec": spec, "status": {"addresses": listed}}

    (port,) = free_ports(1)
    async with World() as world, Tasks() as tasks:
        running = Running(world, Machine(machine, ip_network("192.168.79.0/24")))
        task = tasks.spawn(running.proxy.run(), "proxy")
        await running.proxy.wait_synced()

        def counts() -> tuple[int, int]:
            return len(running.proxy._table.elements("local4")), len(running.proxy._table.elements("port_local4"))

        await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready("10.77.1.9", node="n2"), ready("10.77.9.9", node="far")]))
        await running.put(NODES, node("far", "192.0.2.7"), node("here", "192.0.2.6"), node("n2"))
        svc = service(
            "web", "10.96.0.20", HTTP, type="LoadBalancer", node_ports={80: 30080}, externalTrafficPolicy="Local", healthCheckNodePort=port,
            status={"loadBalancer": {"ingress": [{"ip": "172.31.0.9"}]}},
        )  # fmt: skip
        await running.put(SERVICES, svc)
        assert counts() == (0, 0)
        await running.put(NODES, node("n2", "192.168.79.2"))
        assert counts() == (led_to, 0)
        assert (await fetch(port, "/"))[0] == 503
        assert running.proxy.rendered["default/web"].no_local == {"external"}
        commits = running.proxy.commits
        await running.put(NODES, node("n2", "192.168.79.2", unschedulable=True), node("odd", "no address"))
        assert running.proxy.commits == commits
        running.informers.drop(NODES, "", "n2")
        await running.settle()
        assert counts() == (0, 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await running.proxy.cleanup()


async def fetch(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _gap, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split(" ")[1]), body


async def test_the_proxy_tells_its_health_mode_and_metrics_as_kube_proxy_does():
    health, status = free_ports(2)
    async with World() as world, Tasks() as tasks:
        running = Running(world)
        proxy = running.proxy
        proxy._health_place, proxy._status_place = ("127.0.0.1", health), ("127.0.0.1", status)
        node = {"metadata": {"name": "here"}, "spec": {}}
        running.informers.put(NODES, node)
        task = tasks.spawn(proxy.run(), "proxy")
        await proxy.wait_synced()
        await running.put(SERVICES, service("web", "10.96.0.10", HTTP, internalTrafficPolicy="Local"))
        part = endpoint_slice("web", BACK, [ready("10.77.9.9", "elsewhere")])
        part["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": now_rfc3339()}
        await running.put(ENDPOINT_SLICES, part)
        code, body = await fetch(health, "/healthz")
        answer = json.loads(body)
        assert (code, answer["healthy"], answer["nodeEligible"], answer["status"]["IPv4"]["healthy"]) == (200, True, True, True)
        node = {**node, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}
        await running.put(NODES, node)
        assert (await fetch(health, "/healthz"))[0] == 503
        code, body = await fetch(health, "/livez")
        assert code == 200
        assert "nodeEligible" not in json.loads(body)
        proxy._health._waiting_since = 0.0
        assert (await fetch(health, "/livez"))[0] == 503
        assert await fetch(status, "/proxyMode") == (200, "nftables")
        metrics = (await fetch(status, "/metrics"))[1]
        for line in (
            'kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="internal"} 1.0',
            'kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"} 1.0',
            "kubeproxy_sync_proxy_rules_service_changes_total 1.0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0.0",
            'kubeproxy_proxy_healthz_total{code="503"} 1.0',
        ):
            assert line in metrics
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await proxy.cleanup()


async def test_a_service_that_is_labelled_headless_or_for_another_proxy_is_left_alone(running):
    for label in ("service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"):
        obj = service("web", "10.96.0.10", HTTP)
        await running.put(SERVICES, obj)
        assert running.proxy.rendered
        await running.put(SERVICES, {**obj, "metadata": {**obj["metadata"], "labels": {label: ""}}})
        assert not running.proxy.rendered


async def test_what_the_kernel_refuses_hits_one_service_with_an_event_and_is_tried_again(running, monkeypatch):
    original = nftables.ElementBatch.commit
    broken = True

    def commit(self: nftables.ElementBatch, netlink: Any) -> None:
        marker = nftables.packed_address("10.96.3.66")
        if broken and any(marker in body and "adding" in what for _kind, _flags, body, what in self._messages):
            raise NetlinkError(95, "adding to service4")
        original(self, netlink)

    monkeypatch.setattr(table_module.ElementBatch, "commit", commit)
    world = running.world
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("a", 8080)
    names = [f"s{n}" for n in range(1, 100)]
    running.informers.put(ENDPOINT_SLICES, *(endpoint_slice(name, BACK, [ready(a.ip)]) for name in names))
    await running.put(SERVICES, *(service(name, f"10.96.3.{number}", HTTP) for number, name in enumerate(names, 1)))
    await asyncio.sleep(0.2)
    assert [name for name, _message in running.recorder.events] == ["s66"]
    assert (await asyncio.to_thread(client.ask, "10.96.3.67", 80))[0] == "a"
    broken = False
    running.proxy._mark(["default/s66"])
    await running.settle()
    assert (await asyncio.to_thread(client.ask, "10.96.3.66", 80))[0] == "a"


async def test_an_expression_that_the_kernel_lacks_hits_only_services_that_need_it(running, monkeypatch):
    original = nftables.ElementBatch.commit

    def commit(self: nftables.ElementBatch, netlink: Any) -> None:
        if any(b"dynset\0" in body and b"affinity" in body for _kind, _flags, body, _what in self._messages):
            raise NetlinkError(2, "adding a rule to learn4-10800")
        original(self, netlink)

    monkeypatch.setattr(table_module.ElementBatch, "commit", commit)
    world = running.world
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("a", 8080)
    names = ["one", "sticky", "two"]
    running.informers.put(ENDPOINT_SLICES, *(endpoint_slice(name, BACK, [ready(a.ip)]) for name in names))
    more = {"sticky": {"sessionAffinity": "ClientIP"}}
    await running.put(SERVICES, *(service(name, f"10.96.4.{number}", HTTP, **more.get(name, {})) for number, name in enumerate(names, 1)))
    assert [name for name, _message in running.recorder.events] == ["sticky"]
    for address in ("10.96.4.1", "10.96.4.3"):
        assert (await asyncio.to_thread(client.ask, address, 80))[0] == "a"
    # Without affinity the kernel can do it.
    await running.put(SERVICES, service("sticky", "10.96.4.2", HTTP))
    assert (await asyncio.to_thread(client.ask, "10.96.4.2", 80))[0] == "a"


async def test_an_nft_program_that_fails_is_told_on_the_node_and_tried_again(tmp_path, monkeypatch):
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\necho 'syntax error, unexpected typeof' >&2\nexit 1\n")
    program.chmod(0o755)
    path = os.environ["PATH"]
    async with World() as world, Tasks() as tasks:
        running = Running(world)
        running.informers.put(NODES, {"metadata": {"name": "here"}})
        running.informers.put(SERVICES, service("web", "10.96.0.10", HTTP))
        monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
        task = tasks.spawn(running.proxy.run(), "proxy")
        async with asyncio.timeout(10):
            while not running.recorder.events:
                await asyncio.sleep(0.01)
        assert not running.proxy.synced
        assert running.recorder.events == [("here", "the service rules cannot be loaded: syntax error, unexpected typeof")]
        monkeypatch.setenv("PATH", path)
        async with asyncio.timeout(10):
            await running.proxy.wait_synced()
        with refused():
            await asyncio.to_thread(world.node.ask, "10.96.0.10", 80)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await running.proxy.cleanup()


async def test_services_that_change_while_their_proxy_is_away_are_right_when_it_is_back():
    """The proxy dies at a random moment of a churn, twenty times; what it left goes on, and what it finds is brought up to date."""
    generator = random.Random(5)
    async with World() as world:
        a, b, client = await world.pod("a"), await world.pod("b"), await world.pod("client")
        for pod, name in ((a, "a"), (b, "b")):
            pod.serve(name, 8080), pod.serve(name, 5353, udp=True)
        udp = [("dns", "UDP", 5353)]
        living: dict[str, int] = {}
        running, target = Running(world), a
        for turn in range(20):
            informers = running.informers
            informers.put(SERVICES, service("steady", "10.96.0.10", HTTP), service("dns", "10.96.0.53", DNS))
            informers.put(ENDPOINT_SLICES, endpoint_slice("steady", BACK, [ready(target.ip)]), endpoint_slice("dns", udp, [ready(target.ip)]))
            informers.put(SERVICES, *(service(name, f"10.96.7.{number}", HTTP) for name, number in living.items()))
            async with Tasks() as tasks:
                task = tasks.spawn(running.proxy.run(), "proxy")
                await running.proxy.wait_synced()
                name = (target is a and "a") or "b"
                assert (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0] == name
                assert (await asyncio.to_thread(lambda: client.ask("10.96.0.53", 53, udp=True, source_port=4500)))[0] == name
                for number in generator.sample(range(1, 250), 12):
                    if living.pop(f"s{number}", None) is not None:
                        informers.drop(SERVICES, "default", f"s{number}")
                    else:
                        living[f"s{number}"] = number
                        informers.put(SERVICES, service(f"s{number}", f"10.96.7.{number}", HTTP))
                    await asyncio.sleep(generator.random() * 0.003)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            # Its rules go on without it.
            assert (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0] == name
            await running.proxy.close()
            target = b if target is a else a
            running = Running(world)
            if turn % 3 == 0:
                for gone in generator.sample(sorted(living), len(living) // 2):
                    del living[gone]
        running.informers.put(SERVICES, *(service(name, f"10.96.7.{number}", HTTP) for name, number in living.items()))
        async with Tasks() as tasks:
            task = tasks.spawn(running.proxy.run(), "proxy")
            await running.proxy.wait_synced()
            refusing = running.proxy._table.elements("service4")
            assert {key[3] for key, _data in refusing} == set(living.values())
            assert running.proxy._table.elements("endpoint4") == []
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await running.proxy.cleanup()


async def test_everything_stands_again_at_once_after_somebody_flushed_the_ruleset(running):
    world = running.world
    pod = await world.pod("a", ports=[PortMapping("TCP", 8080, 7001)])
    pod.serve("a", 8080)
    await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(pod.ip)]))
    await running.put(SERVICES, service("web", "10.96.0.10", HTTP))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(nftables.run_script, "flush ruleset", world.node.path)
    for place, address, port in ((world.node, "10.96.0.10", 80), (world.client, world.node.ip, 7001)):
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await asyncio.to_thread(lambda: place.ask(address, port, seconds=0.5)))[0] == "a"  # noqa: B023
                    break
                except OSError:
                    await asyncio.sleep(0.02)


async def test_a_flushed_table_is_written_again_with_the_next_change(running):
    world = running.world
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("a", 8080)
    await running.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(a.ip)]))
    await running.put(SERVICES, service("web", "10.96.0.10", HTTP))
    await asyncio.to_thread(nftables.delete_table, "knt", world.node.path)
    await running.put(SERVICES, service("other", "10.96.0.11", HTTP))
    await asyncio.sleep(0.5)
    assert (await asyncio.to_thread(client.ask, "10.96.0.10", 80))[0] == "a"


async def test_hints_count_once_the_node_has_a_zone(running):
    running.informers.put(NODES, {"metadata": {"name": "here", "labels": {}}})
    hints = lambda zone: {"hints": {"forZones": [{"name": zone}]}}
    part = endpoint_slice("web", BACK, [ready("10.77.0.8", **hints("a")), ready("10.77.9.9", "there", **hints("b"))])
    running.informers.put(ENDPOINT_SLICES, part)
    await running.put(SERVICES, service("web", "10.96.0.10", HTTP))
    count = lambda: sum(1 for name, _key in running.proxy.rendered["default/web"].elements if name == "endpoint4")
    assert count() == 2
    await running.put(NODES, {"metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}}})
    assert count() == 1
