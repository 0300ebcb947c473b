"""Search paths walked in the DNS server, and domains that have servers of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from knarr.api.resources import NAMESPACES, PODS, SERVICES
from knarr.network.dns import DNSServer
from knarr.network.dns.autopath import read_search
from knarr.network.policy.engine import trim_pod

from .fed import FedInformers
from .test_dns import ZONE, Asker, Upstream
from .world import service

pytestmark = pytest.mark.timeout(30)


def pod(namespace: str, address: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "namespace": namespace}, "spec": spec, "status": {"phase": "Running", "podIPs": [{"ip": address}]}}


@pytest.fixture
async def dns(tmp_path: Path) -> AsyncIterator[Asker]:
    upstream = Upstream()
    transport, _protocol = await asyncio.get_running_loop().create_datagram_endpoint(lambda: upstream, local_addr=("127.0.0.1", 0))
    informers = FedInformers()
    server = DNSServer(
        informers, listen=["127.0.0.1"], port=0, upstreams=["127.0.0.1"], upstream_port=transport.get_extra_info("sockname")[1], metrics_port=0,
        autopath=informers.get(PODS),
    )  # fmt: skip
    (tmp_path / "resolv.conf").write_text("search corp.test\n")
    assert server._autopath is not None
    server._autopath._resolv_conf = tmp_path / "resolv.conf"
    await server.start()
    informers.put(NAMESPACES, *({"metadata": {"name": name}} for name in ("default", "other")))
    informers.put(SERVICES, service("web", "10.96.7.7", [("http", "TCP", 80)]))
    yield Asker(informers, server, upstream)
    await server.close()
    transport.close()


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_pods_search_ends_with_its_first_question(dns: Asker, tcp: bool) -> None:
    dns.informers.put(PODS, pod("default", "127.0.0.1"))
    answer = await dns.ask(f"example.com.default.svc.{ZONE}", tcp=tcp)
    assert [str(record.rdata) for record in answer.rr] == ["example.com.", "93.184.216.34"]
    assert [str(record.rname) for record in answer.rr] == [f"example.com.default.svc.{ZONE}.", "example.com."]
    # The host's own search domain comes before the name alone, as in the pod's file.
    assert dns.upstream.asked == ["example.com.corp.test.", "example.com."]
    answer = await dns.ask(f"web.default.default.svc.{ZONE}", tcp=tcp)
    assert [str(record.rdata) for record in answer.rr] == [f"web.default.svc.{ZONE}.", "10.96.7.7"]
    assert await dns.values(f"web.default.svc.{ZONE}", tcp=tcp) == ["10.96.7.7"]
    nowhere = await dns.ask(f"nowhere.test.default.svc.{ZONE}", tcp=tcp)
    assert (nowhere.header.rcode, nowhere.rr) == (3, [])
    told = str(dns.server._tell("/metrics"))
    assert "coredns_autopath_success_total 2" in told
    # What was asked within the server is nobody's question.
    assert 'zone=".",type="A"} 4' in told
    assert 'rcode="NOERROR"} 3' in told
    assert 'rcode="NXDOMAIN"} 1' in told


async def test_a_pods_own_search_domains_are_tried_before_the_name_alone(dns: Asker) -> None:
    dns.informers.put(PODS, trim_pod(pod("default", "127.0.0.1", dnsConfig={"searches": ["Own.test.", "corp.test"]})))
    assert (await dns.ask(f"example.com.default.svc.{ZONE}")).header.rcode == 0
    assert dns.upstream.asked == ["example.com.corp.test.", "example.com.own.test.", "example.com."]
    dns.informers.put(PODS, trim_pod(pod("default", "127.0.0.1", dnsPolicy="None", dnsConfig={"searches": [f"default.svc.{ZONE}"]})))
    assert (await dns.ask(f"example.com.default.svc.{ZONE}")).header.rcode == 3


async def test_others_get_plain_answers_whatever_was_asked_before(dns: Asker) -> None:
    name = f"example.com.default.svc.{ZONE}"
    for wrong in (pod("other", "127.0.0.1"), pod("default", "127.0.0.1", hostNetwork=True), pod("default", "10.9.9.9")):
        dns.informers.put(PODS, wrong)
        assert (await dns.ask(name)).header.rcode == 3
        dns.informers.drop(PODS, wrong["metadata"]["namespace"], "p")
    dns.informers.put(PODS, pod("default", "127.0.0.1"))
    assert (await dns.ask(name)).header.rcode == 0
    dns.informers.drop(PODS, "default", "p")
    assert (await dns.ask(name)).header.rcode == 3
    assert (await dns.ask(name, "TXT")).header.rcode == 3


def test_the_last_line_of_search_domains_counts(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert read_search(path) == []
    path.write_text("domain one.test\nsearch Two.test. three.test\nnameserver 192.0.2.1\n")
    assert read_search(path) == ["two.test", "three.test"]


async def test_a_stub_domain_has_servers_of_its_own() -> None:
    general, own = Upstream(), Upstream()
    loop = asyncio.get_running_loop()
    first, _protocol = await loop.create_datagram_endpoint(lambda: general, local_addr=("127.0.0.1", 0))
    port = first.get_extra_info("sockname")[1]
    second, _protocol = await loop.create_datagram_endpoint(lambda: own, local_addr=("127.0.0.2", port))
    informers = FedInformers()
    server = DNSServer(
        informers, listen=["127.0.0.1"], port=0, upstreams=["127.0.0.1"], upstream_port=port, metrics_port=0, stub_domains={"Corp.Test.": ["127.0.0.2"]}
    )  # fmt: skip
    await server.start()
    try:
        asker = Asker(informers, server, general)
        for name in ("a.corp.test", "corp.test", "xcorp.test", "example.com"):
            await asker.ask(name)
        assert own.asked == ["a.corp.test.", "corp.test."]
        assert general.asked == ["xcorp.test.", "example.com."]
    finally:
        await server.close()
        first.close()
        second.close()
