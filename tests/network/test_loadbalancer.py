"""Addresses for LoadBalancer Services, and published ports, against a real API server."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.resources import SERVICES
from knarr.client.informer import Informers
from knarr.network import publishing
from knarr.network.loadbalancer import FINALIZER, LoadBalancerController, ingress_addresses

pytestmark = pytest.mark.timeout(60)


def balancer(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"type": "LoadBalancer", "ports": [{"name": "http", "port": 80}], **spec}}  # fmt: skip


async def addresses(client: Any, name: str, count: int = 1) -> list[str]:
    """The Service's addresses once there are `count`."""
    async with asyncio.timeout(5):
        while True:
            found = ingress_addresses(await client.get(SERVICES, name, "default"))
            if len(found) == count:
                return found
            await asyncio.sleep(0.02)


@pytest.fixture
async def client(apiserver):
    informers = Informers(apiserver.client)
    async with Tasks() as tasks:
        controller = LoadBalancerController(apiserver.client, informers, pool=["203.0.113.0/29"])
        tasks.spawn(controller.run(), "load balancer")
        yield apiserver.client
    await informers.close()


async def test_a_service_gets_an_address_keeps_it_and_gives_it_back(client):
    await client.create(SERVICES, balancer("one"), "default")
    first = await addresses(client, "one")
    assert first == ["203.0.113.1"]
    await client.patch(SERVICES, "one", "default", {"spec": {"ports": [{"name": "http", "port": 81}]}}, type="merge")
    await client.create(SERVICES, balancer("two"), "default")
    assert await addresses(client, "two") == ["203.0.113.2"]
    assert await addresses(client, "one") == first
    await client.patch(SERVICES, "one", "default", {"spec": {"type": "ClusterIP"}}, type="merge")
    await addresses(client, "one", 0)
    await client.create(SERVICES, balancer("three", loadBalancerIP="203.0.113.1"), "default")
    assert await addresses(client, "three") == ["203.0.113.1"]


async def test_the_finalizer_holds_a_service_until_its_address_is_given_back(client):
    async def finalizers() -> list[str]:
        return (await client.get(SERVICES, "one", "default"))["metadata"].get("finalizers") or []

    made = balancer("one")
    made["metadata"]["finalizers"] = ["example.com/other"]
    await client.create(SERVICES, made, "default")
    await addresses(client, "one")
    assert await finalizers() == ["example.com/other", FINALIZER]
    await client.patch(SERVICES, "one", "default", {"spec": {"type": "ClusterIP"}}, type="merge")
    async with asyncio.timeout(5):
        while await finalizers() != ["example.com/other"]:
            await asyncio.sleep(0.02)
    await client.patch(SERVICES, "one", "default", {"spec": {"type": "LoadBalancer"}, "metadata": {"finalizers": []}}, type="merge")
    await addresses(client, "one")
    assert await finalizers() == [FINALIZER]
    await client.delete(SERVICES, "one", "default")
    async with asyncio.timeout(5):
        while (await client.list(SERVICES, "default", field_selector="metadata.name=one"))["items"]:
            await asyncio.sleep(0.02)


async def test_a_foreign_class_is_left_alone_and_a_full_pool_serves_the_next_when_one_goes(client):
    await client.create(SERVICES, balancer("foreign", loadBalancerClass="example.com/other"), "default")
    for number in range(6):
        await client.create(SERVICES, balancer(f"s{number}"), "default")
    for number in range(6):
        await addresses(client, f"s{number}")
    await client.create(SERVICES, balancer("late"), "default")
    await asyncio.sleep(0.2)
    assert ingress_addresses(await client.get(SERVICES, "late", "default")) == []
    freed = (await addresses(client, "s3"))[0]
    await client.delete(SERVICES, "s3", "default")
    assert await addresses(client, "late") == [freed]
    assert ingress_addresses(await client.get(SERVICES, "foreign", "default")) == []


async def test_a_port_is_published_and_a_busy_one_names_its_holder(client):
    await client.create(SERVICES, balancer("web"), "default")
    await client.create(SERVICES, balancer("other"), "default")
    await publishing.publish(client, "default", "web", host_port=18080, port="http")
    services = (await client.list(SERVICES))["items"]
    assert [(item.host_port, item.service) for item in publishing.published(services)] == [(18080, "web")]
    with pytest.raises(publishing.PortBusy, match="service default/web"):
        await publishing.publish(client, "default", "other", host_port=18080, port="80")
    with pytest.raises(ValueError, match="no port https"):
        await publishing.publish(client, "default", "web", host_port=18081, port="https")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(publishing.PortBusy, match=r"process .* \(pid \d+\)"):
            await publishing.publish(client, "default", "web", host_port=sock.getsockname()[1], port="80")
    await client.create(SERVICES, balancer("names", ports=[{"name": "dns", "port": 53, "protocol": "UDP"}]), "default")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        number = sock.getsockname()[1]
        with pytest.raises(publishing.PortBusy, match=r"process .* \(pid \d+\)"):
            await publishing.publish(client, "default", "names", host_port=number, port="dns")
    await publishing.publish(client, "default", "names", host_port=number, port="dns")
    assert await publishing.withdraw(client, "default", "web", host_port=18080)
    assert not await publishing.withdraw(client, "default", "web", host_port=18080)
