"""The DNS server over the wire, asked through dnslib."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import dnslib
import pytest

from knarr.api.resources import ENDPOINT_SLICES, NAMESPACES, SERVICES
from knarr.network.dns import DNSServer, wire
from knarr.network.dns.forward import HostResolvers, Resolver
from knarr.network.dns.publish import dns_slice

from .fed import FedInformers
from .world import endpoint_slice, ready, service

pytestmark = pytest.mark.timeout(30)
ZONE = "cluster.local"


class Upstream(asyncio.DatagramProtocol):
    """A resolver that knows example.com; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = True
        self.truncate = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def reply(self, data: bytes, *, tcp: bool) -> bytes:
        request = dnslib.DNSRecord.parse(data)
        answer = request.reply()
        name = str(request.q.qname)
        if self.truncate and not tcp:
            answer.header.tc = 1
            return answer.pack()
        if name == "example.com." and request.q.qtype == 1:
            answer.add_answer(dnslib.RR(name, 1, rdata=dnslib.A("93.184.216.34"), ttl=60))
        elif name != "example.com.":
            answer.header.rcode = 3
            answer.add_auth(dnslib.RR("com.", 6, rdata=dnslib.SOA("a.", "b.", (1, 2, 3, 4, 30)), ttl=30))
        return answer.pack()

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.asked.append(str(dnslib.DNSRecord.parse(data).q.qname))
        if self.answer:
            self.transport.sendto(self.reply(data, tcp=False), address)


class Asker:
    def __init__(self, informers: FedInformers, server: DNSServer, upstream: Upstream) -> None:
        self.informers, self.server, self.upstream = informers, server, upstream

    async def ask(self, name: str, kind: str = "A", *, tcp: bool = False, edns: int = 0) -> dnslib.DNSRecord:
        request = dnslib.DNSRecord.question(name, kind)
        if edns:
            request.add_ar(dnslib.EDNS0(udp_len=edns))
        data = await asyncio.to_thread(self._exchange, request.pack(), tcp)
        answer = dnslib.DNSRecord.parse(data)
        assert answer.header.id == request.header.id
        assert answer.q == request.q
        return answer

    def _exchange(self, data: bytes, tcp: bool) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect(("127.0.0.1", self.server.port))
            if not tcp:
                sock.send(data)
                return sock.recv(65535)
            sock.sendall(struct.pack(">H", len(data)) + data)
            file = sock.makefile("rb")
            return file.read(struct.unpack(">H", file.read(2))[0])

    async def values(self, name: str, kind: str = "A", **options: Any) -> list[str]:
        return sorted(str(record.rdata) for record in (await self.ask(name, kind, **options)).rr)


@pytest.fixture
async def dns():
    loop = asyncio.get_running_loop()
    upstream = Upstream()

    async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0])
        answer = upstream.reply(data, tcp=True)
        writer.write(struct.pack(">H", len(answer)) + answer)
        await writer.drain()
        writer.close()

    tcp_server = await asyncio.start_server(tcp, "127.0.0.1", 0)
    port = tcp_server.sockets[0].getsockname()[1]
    transport, _protocol = await loop.create_datagram_endpoint(lambda: upstream, local_addr=("127.0.0.1", port))
    informers = FedInformers()
    server = DNSServer(informers, listen=["127.0.0.1"], port=0, upstreams=["127.0.0.1"], upstream_port=port, metrics_port=0)
    await server.start()
    informers.put(NAMESPACES, *({"metadata": {"name": name}} for name in ("default", "kube-system")))
    yield Asker(informers, server, upstream)
    await server.close()
    transport.close()
    tcp_server.close()


def headless(name: str, **spec: Any) -> dict[str, Any]:
    return service(name, "None", [("http", "TCP", 80)], **spec)


async def test_a_cluster_ip_service_has_address_srv_and_ptr(dns):
    dns.informers.put(SERVICES, service("web", "10.96.7.7", [("http", "TCP", 80), ("dns", "UDP", 53)]))
    assert await dns.values(f"web.default.svc.{ZONE}") == ["10.96.7.7"]
    assert await dns.values(f"WeB.default.svc.{ZONE}") == ["10.96.7.7"]
    assert await dns.values(f"_http._tcp.web.default.svc.{ZONE}", "SRV") == [f"0 100 80 web.default.svc.{ZONE}."]
    assert await dns.values(f"_dns._udp.web.default.svc.{ZONE}", "SRV") == [f"0 100 53 web.default.svc.{ZONE}."]
    assert await dns.values("7.7.96.10.in-addr.arpa", "PTR") == [f"web.default.svc.{ZONE}."]
    answer = await dns.ask(f"_http._tcp.web.default.svc.{ZONE}", "SRV")
    assert [str(record.rdata) for record in answer.ar] == ["10.96.7.7"]
    assert answer.header.aa == 1
    assert answer.header.ra == 1


async def test_a_headless_service_has_its_ready_endpoints_and_their_host_names(dns):
    dns.informers.put(SERVICES, headless("db"))
    endpoints = [ready("10.244.0.5", hostname="db-0"), ready("10.244.0.6"), {"addresses": ["10.244.0.7"], "conditions": {"ready": False}}]
    dns.informers.put(ENDPOINT_SLICES, endpoint_slice("db", [("http", "TCP", 8080)], endpoints))
    assert await dns.values(f"db.default.svc.{ZONE}") == ["10.244.0.5", "10.244.0.6"]
    assert await dns.values(f"db-0.db.default.svc.{ZONE}") == ["10.244.0.5"]
    assert await dns.values(f"10-244-0-6.db.default.svc.{ZONE}") == ["10.244.0.6"]
    targets = [f"0 50 8080 10-244-0-6.db.default.svc.{ZONE}.", f"0 50 8080 db-0.db.default.svc.{ZONE}."]
    assert await dns.values(f"_http._tcp.db.default.svc.{ZONE}", "SRV") == targets
    assert await dns.values("5.0.244.10.in-addr.arpa", "PTR") == [f"db-0.db.default.svc.{ZONE}."]
    dns.informers.put(SERVICES, headless("db", publishNotReadyAddresses=True))
    assert len(await dns.values(f"db.default.svc.{ZONE}")) == 3


async def test_an_endpoint_of_two_slices_has_its_address_once_and_all_its_ports(dns):
    dns.informers.put(SERVICES, headless("db"))
    both = [ready("10.244.0.5", hostname="db-0"), ready("fd00::5", hostname="db-0")]
    slices = endpoint_slice("db", [("http", "TCP", 80)], both[:1]), endpoint_slice("db", [("raft", "UDP", 81)], both)
    slices[1]["metadata"]["name"] += "-second"
    dns.informers.put(ENDPOINT_SLICES, *slices)
    name = f"db-0.db.default.svc.{ZONE}"
    assert await dns.values(name) == ["10.244.0.5"]
    assert await dns.values(name, "AAAA") == ["fd00::5"]
    assert await dns.values(name, "SRV") == [f"0 50 80 {name}.", f"0 50 81 {name}."]
    assert sorted(str(record.rdata) for record in (await dns.ask(name, "SRV")).ar) == ["10.244.0.5", "fd00::5"]


async def test_the_zones_name_server_is_the_dns_service(dns):
    assert await dns.values(ZONE, "NS") == [f"ns.dns.{ZONE}."]
    dns.informers.put(
        SERVICES, service("kube-dns", "10.96.0.10", [("dns", "UDP", 53)]) | {"metadata": {"name": "kube-dns", "namespace": "kube-system"}}
    )
    answer = await dns.ask(ZONE, "NS")
    assert [str(record.rdata) for record in answer.rr + answer.ar] == [f"kube-dns.kube-system.svc.{ZONE}.", "10.96.0.10"]
    assert await dns.values(f"ns.dns.{ZONE}") == ["10.96.0.10"]


async def test_answers_follow_changes_at_once_and_begin_with_another_address_each_time(dns):
    dns.informers.put(SERVICES, headless("db"))
    dns.informers.put(ENDPOINT_SLICES, endpoint_slice("db", [("http", "TCP", 80)], [ready(f"10.244.0.{n}") for n in range(2, 6)]))
    first = {str((await dns.ask(f"db.default.svc.{ZONE}")).rr[0].rdata) for _ in range(8)}
    assert len(first) == 4
    dns.informers.put(ENDPOINT_SLICES, endpoint_slice("db", [("http", "TCP", 80)], [ready("10.244.0.9")]))
    assert await dns.values(f"db.default.svc.{ZONE}") == ["10.244.0.9"]
    dns.informers.drop(SERVICES, "default", "db")
    assert (await dns.ask(f"db.default.svc.{ZONE}")).header.rcode == 3


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("nothing.default.svc", "A", 3),
        ("web.default.svc", "AAAA", 0),
        ("default.svc", "A", 0),
        ("nowhere.svc", "A", 3),
        ("svc", "A", 0),
        ("", "A", 0),
        ("_tcp.web.default.svc", "SRV", 0),
        ("_no._tcp.web.default.svc", "SRV", 3),
        ("a.b.web.default.svc", "A", 3),
        ("1-2-3-4.nowhere.pod", "A", 3),
        ("x-y.default.pod", "A", 3),
        ("other", "A", 3),
    ],
)
async def test_names_without_records_are_told_apart_from_names_that_do_not_exist(dns, name, kind, code):
    dns.informers.put(SERVICES, service("web", "10.96.7.7", [("http", "TCP", 80)]))
    answer = await dns.ask(f"{name}.{ZONE}".lstrip("."), kind)
    assert answer.header.rcode == code
    assert not answer.rr
    assert [str(record.rname) for record in answer.auth] == [f"{ZONE}."]
    assert answer.auth[0].rtype == 6


async def test_pod_names_spell_their_address(dns):
    assert await dns.values(f"10-244-0-9.default.pod.{ZONE}") == ["10.244.0.9"]
    assert await dns.values(f"fd00--9.default.pod.{ZONE}", "AAAA") == ["fd00::9"]


async def test_an_external_name_is_a_cname_and_is_followed_for_addresses(dns):
    dns.informers.put(SERVICES, service("ext", "", [], type="ExternalName", externalName="example.com"))
    assert await dns.values(f"ext.default.svc.{ZONE}", "CNAME") == ["example.com."]
    assert await dns.values(f"ext.default.svc.{ZONE}") == ["93.184.216.34", "example.com."]
    dns.informers.put(
        SERVICES, service("web", "10.96.7.7", []), service("in", "", [], type="ExternalName", externalName=f"web.default.svc.{ZONE}")
    )
    assert await dns.values(f"in.default.svc.{ZONE}") == ["10.96.7.7", f"web.default.svc.{ZONE}."]


async def test_other_names_are_forwarded_once_and_kept(dns):
    answers = await asyncio.gather(*(dns.values("example.com") for _ in range(5)))
    assert answers == [["93.184.216.34"]] * 5
    assert await dns.values("eXample.com") == ["93.184.216.34"]
    assert (await dns.ask("no.such.name")).header.rcode == 3
    assert (await dns.ask("no.such.name")).header.rcode == 3
    assert dns.upstream.asked == ["example.com.", "no.such.name."]


async def test_a_truncated_upstream_answer_is_asked_again_over_tcp(dns):
    dns.upstream.truncate = True
    assert await dns.values("example.com") == ["93.184.216.34"]


async def test_an_upstream_that_is_silent_gives_servfail(dns, monkeypatch):
    monkeypatch.setattr("knarr.network.dns.forward._TRY_SECONDS", 0.1)
    dns.upstream.answer = False
    assert (await dns.ask("example.com")).header.rcode == 2


async def test_a_large_answer_is_truncated_over_udp_and_whole_over_tcp(dns):
    dns.informers.put(SERVICES, headless("big"))
    dns.informers.put(ENDPOINT_SLICES, endpoint_slice("big", [("http", "TCP", 80)], [ready(f"10.244.1.{n}") for n in range(1, 201)]))
    name = f"big.default.svc.{ZONE}"
    cut = await dns.ask(name)
    assert (cut.header.tc, len(cut.rr)) == (1, 0)
    assert (await dns.ask(name, edns=4096)).header.tc == 1
    assert len((await dns.ask(name, tcp=True)).rr) == 200
    assert len((await dns.ask(f"_http._tcp.{name}", "SRV", tcp=True)).rr) == 200


async def test_garbage_is_refused_and_does_not_stop_the_server(dns):
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for size in range(40):
                sock.sendto(bytes(range(size)), ("127.0.0.1", dns.server.port))
                sock.sendto(b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\xff" * size, ("127.0.0.1", dns.server.port))

    await asyncio.to_thread(send)
    assert await dns.values("example.com") == ["93.184.216.34"]


async def test_a_taken_port_makes_the_server_listen_on_another():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder, socket.create_server(("127.0.0.1", 0)) as free:
        holder.bind(("127.0.0.1", 0))
        taken, other = holder.getsockname()[1], free.getsockname()[1]
        free.close()
        server = DNSServer(FedInformers(), listen=["127.0.0.1"], port=taken, fallback_port=other, upstreams=[], metrics_port=0)
        await server.start()
        assert server.port == other
        await server.close()


async def test_a_question_right_after_the_start_waits_for_the_cluster_to_be_known(monkeypatch):
    class Slow(FedInformers):
        async def start(self) -> None:
            return

    informers = Slow()
    server = DNSServer(informers, listen=["127.0.0.1"], port=0, upstreams=[], metrics_port=0)
    await server.start()
    asker = Asker(informers, server, Upstream())
    asked = asyncio.ensure_future(asker.values(f"web.default.svc.{ZONE}"))
    await asyncio.sleep(0.1)
    assert not asked.done()
    informers.put(SERVICES, service("web", "10.96.7.7", []))
    await FedInformers.start(informers)
    assert await asked == ["10.96.7.7"]
    await server.close()


async def test_without_the_api_a_cluster_name_fails_rather_than_not_exist(monkeypatch):
    monkeypatch.setattr("knarr.network.dns.server._READY_SECONDS", 0.1)

    class Never(FedInformers):
        async def start(self) -> None:
            return

    server = DNSServer(Never(), listen=["127.0.0.1"], port=0, upstreams=[], metrics_port=0)
    await server.start()
    answer = await Asker(server._informers, server, Upstream()).ask(f"web.default.svc.{ZONE}")
    assert answer.header.rcode == 2
    await server.close()


def test_a_stub_resolver_on_the_loopback_is_replaced_by_its_own_upstreams(tmp_path):
    plain, systemd = tmp_path / "resolv.conf", tmp_path / "systemd.conf"
    plain.write_text("nameserver 127.0.0.53\noptions edns0\n")
    systemd.write_text("nameserver 192.0.2.53\nnameserver 10.244.0.1\n")
    resolvers = HostResolvers(["10.244.0.1"], [plain, systemd])
    assert resolvers.current() == [("192.0.2.53", 53)]
    plain.write_text("nameserver 192.0.2.99\n")
    assert resolvers.current() == [("192.0.2.99", 53)]


def test_a_node_in_a_namespace_has_the_machine_ask_what_the_machine_alone_reaches(tmp_path):
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 127.0.0.1\nnameserver ::1\nnameserver 0.0.0.0\nnameserver fe80::1%eth0\n")
    machine = Resolver("10.244.0.1", 10053)
    resolvers = HostResolvers(["10.244.1.1"], [path], machine=lambda: [machine])
    assert resolvers.current() == [machine]
    # The machine itself asks the router it is told of, and its zone is kept.
    assert HostResolvers([], [path]).current() == [("fe80::1%eth0", 53)]
    path.write_text("nameserver 127.0.0.1\nnameserver 192.0.2.9\n")
    assert resolvers.current() == [("192.0.2.9", 53)]


async def test_the_machines_own_server_is_found_by_its_endpoints_and_asks_for_others(dns, tmp_path):
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 127.0.0.1\n")
    informers = FedInformers()
    server = DNSServer(informers, listen=["127.0.0.1"], port=0, metrics_port=0, machine_nodes=["first"])
    server.forwarder._resolvers.__self__._paths = [path]
    await server.start()
    asker = Asker(informers, server, dns.upstream)
    assert (await asker.ask("example.com")).header.rcode == 2
    informers.put(ENDPOINT_SLICES, dns_slice(None, "other", ["127.0.0.3"]), dns_slice(None, "first", ["127.0.0.1"], dns.server.port))
    assert await asker.values("example.com") == ["93.184.216.34"]
    assert dns.upstream.asked == ["example.com."]
    await server.close()


def test_a_query_of_ours_is_read_by_others_and_their_answer_by_us():
    data = wire.build_query(7, "web.default.svc.cluster.local", wire.A)
    parsed = dnslib.DNSRecord.parse(data)
    assert (parsed.header.id, str(parsed.q.qname)) == (7, "web.default.svc.cluster.local.")
    answer = parsed.reply()
    answer.add_answer(dnslib.RR("web.default.svc.cluster.local", 5, rdata=dnslib.CNAME("x.y"), ttl=5))
    answer.add_answer(dnslib.RR("x.y", 1, rdata=dnslib.A("10.1.2.3"), ttl=5), dnslib.RR("x.y", 28, rdata=dnslib.AAAA("fd00::1"), ttl=5))
    assert wire.read_addresses(bytes(answer.pack())) == ["10.1.2.3", "fd00::1"]
