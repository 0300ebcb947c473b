"""The cluster's DNS server: UDP and TCP, answers of the cluster domain from informers, the rest forwarded.

Role: cluster runs one per node, on the node's pod gateway address; the kube-dns Service leads pods there (`publish`).
Hot path: the raw question (all but its id) is looked up among answers given since the last change of the cluster; a hit
costs no parsing at all.
Invariants: cached answers are dropped with every change of a Service, EndpointSlice or Namespace, so none is staler
than the informers. Memory is bounded: the answer cache is emptied when full, TCP connections and questions in flight
are limited. Before the informers are synced a question for a cluster name waits a moment, then is SERVFAIL, never a
wrong NXDOMAIN.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, NAMESPACES, SERVICES
from knarr.api.types import Object
from knarr.client.informer import Informer, Informers
from knarr.network.dns.autopath import Autopath
from knarr.network.dns.forward import Forwarder, HostResolvers, Overloaded, Resolver, Unanswered
from knarr.network.dns.metrics import render
from knarr.network.dns.publish import servers_of
from knarr.network.dns.records import ClusterZone, Resolved, service_addresses, slice_addresses
from knarr.network.dns.wire import (
    AAAA,
    CNAME,
    FORMERR,
    IN,
    NXDOMAIN,
    OUR_UDP_BYTES,
    REFUSED,
    SERVFAIL,
    SRV,
    A,
    Query,
    Record,
    WireError,
    build_answer,
    encode_name,
    error_answer,
    lifetimes,
    parse_query,
    question_type,
    skip_name,
)
from knarr.network.objects import slice_service
from knarr.network.plainhttp import NOT_FOUND, Answer, PlainServer, plain, prometheus

log = get_logger(__name__)

_MAXIMUM_ANSWERS = 20_000
_MAXIMUM_CONNECTIONS = 1_000
_TCP_IDLE_SECONDS = 10
_BURST = 64
_SO_RCVBUFFORCE = 33
_WAITING_BYTES = 2 << 20
_CHAIN = 8
_READY_SECONDS = 3.0
"""Less than resolvers wait before they ask again, so that a restart costs an asker a moment and not an error."""
_BARE_OPT_BYTES = 11


_Address = tuple[str, int] | tuple[str, int, int, int]


def _hold_bursts(udp: socket.socket) -> None:
    """Let questions wait while the loop is busy with something else: a quarter of a second's worth at 20,000 a second."""
    try:
        udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _WAITING_BYTES)
    except PermissionError:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WAITING_BYTES)


class DNSServer:
    """See the module.

    Args:
      informers: Shared informers of the node process.
      listen: Addresses to serve, e.g. ["10.244.0.1"].
      cluster_domain: e.g. "cluster.local".
      upstreams: Servers for other names; None reads the host's resolv.conf and follows its changes.
      stub_domains: Domains with servers of their own.
      machine_nodes: For a node in a network namespace of its own: the nodes that are the machine, whose DNS servers reach resolvers
        on its loopback and are asked when there are no others.
      port, fallback_port: Where to listen; the second is taken when some server of the host holds the first (0 means: then fail).
      autopath: Informer of Pods, to walk through their search paths here; None leaves that to them.
      metrics_port: Serves /metrics on the same addresses; 0 does not.
    """

    def __init__(
        self,
        informers: Informers,
        *,
        listen: Sequence[str],
        port: int = 53,
        fallback_port: int = 10053,
        cluster_domain: str = "cluster.local",
        upstreams: Sequence[str] | None = None,
        upstream_port: int = 53,
        stub_domains: Mapping[str, Sequence[str]] | None = None,
        metrics_port: int = 9153,
        ready_port: int = 0,
        ttl_seconds: int = 5,
        avoid: Sequence[str] = (),
        machine_nodes: Collection[str] = (),
        autopath: Informer | None = None,
    ) -> None:
        self._informers = informers
        self._services = informers.get(SERVICES)
        self._slices = informers.get(ENDPOINT_SLICES)
        self._namespaces = informers.get(NAMESPACES)
        self._services.add_index("address", service_addresses)
        self._slices.add_index("address", slice_addresses)
        self._slices.add_index("service", slice_service)
        self.zone = ClusterZone(self._services, self._slices, self._namespaces, domain=cluster_domain, ttl_seconds=ttl_seconds)
        self._listen = list(listen)
        self._port, self._fallback_port = port, fallback_port
        machine = (lambda: servers_of(self._slices, machine_nodes)) if machine_nodes else None
        host = HostResolvers([*listen, *avoid], machine=machine)

        def resolvers(addresses: Sequence[str]) -> list[Resolver]:
            return [Resolver(address, upstream_port) for address in addresses]

        self.forwarder = Forwarder(
            (lambda: resolvers(upstreams)) if upstreams is not None else host.current,
            {domain: resolvers(servers) for domain, servers in (stub_domains or {}).items()},
        )
        self._autopath = Autopath(autopath, self.zone.domain) if autopath is not None else None
        self._metrics_port, self._ready_port = metrics_port, ready_port
        self._answers: dict[bytes, list[bytes]] = {}
        self._turn = 0
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._web = PlainServer(self._tell)
        self._tasks = Tasks()
        self._connections = 0
        self.counts: Counter[str] = Counter()
        self.hits: Counter[bytes] = Counter()

    @property
    def ready(self) -> bool:
        """Whether the cluster's names can be answered."""
        return self._services.synced and self._slices.synced and self._namespaces.synced

    @property
    def port(self) -> int:
        """The port in use (useful when 0 was asked for)."""
        return int(self._sockets[0].getsockname()[1]) if self._sockets else self._port

    async def start(self) -> None:
        """Listen, then follow the cluster. Raises OSError when an address or port cannot be had; nothing listens then."""
        for informer in (self._services, self._slices, self._namespaces):
            informer.add_handler(self._changed, self._updated, self._changed)
        try:
            await self._open_all()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not self._fallback_port or self._port in (0, self._fallback_port):
                raise
            log.warning("a server of this machine holds the DNS port, listening on another", port=self._port, instead=self._fallback_port)
            self._port = self._fallback_port
            await self._open_all()
        try:
            for port in filter(None, (self._metrics_port, self._ready_port)):
                for address in self._listen:
                    await self._web.listen(address, port)
        except OSError as error:
            # Names are worth more than numbers about them.
            log.warning("the DNS server's metrics cannot be served", port=self._metrics_port, error=str(error))
        await self._informers.start()

    async def _open_all(self) -> None:
        try:
            for address in self._listen:
                await self._open(address)
        except OSError:
            self._close_sockets()
            raise

    async def run(self) -> None:
        """Start, serve until cancelled, close."""
        await self.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await self.close()

    async def _open(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for attempt in range(10):
            udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                if family == socket.AF_INET6:
                    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                _hold_bursts(udp)
                udp.bind((address, self._port))
                self._servers.append(await asyncio.start_server(self._connection, address, udp.getsockname()[1], family=family))
            except OSError:
                udp.close()
                # A free UDP port chosen by the kernel may be taken for TCP.
                if self._port or attempt == 9:
                    raise
                continue
            self._sockets.append(udp)
            asyncio.get_running_loop().add_reader(udp.fileno(), self._readable, udp)
            return

    async def close(self) -> None:
        """Stop serving."""
        self._close_sockets()
        self._web.close()
        await self._tasks.close()
        await self.forwarder.close()

    def _close_sockets(self) -> None:
        loop = asyncio.get_running_loop()
        for udp in self._sockets:
            if udp.fileno() >= 0:
                loop.remove_reader(udp.fileno())
            udp.close()
        self._sockets = []
        for server in self._servers:
            server.close()
        self._servers = []

    def _changed(self, _obj: Object) -> None:
        if self._answers:
            self._gather_hits()
            self._answers = {}

    def _updated(self, old: Object, new: Object) -> None:
        # Leases and resource versions change all the time; only these parts make names.
        if any(old.get(part) != new.get(part) for part in ("spec", "endpoints", "ports")):
            self._changed(new)

    def _readable(self, udp: socket.socket) -> None:
        answers = self._answers
        for _ in range(_BURST):
            try:
                data, address = udp.recvfrom(4096)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.debug("receiving a question failed", error=str(error))
                return
            variants = answers.get(data[2:])
            if variants is not None:
                self._turn += 1
                # How often a kept question came tells its type and its answer's code, too.
                self.hits[data[2:]] += 1
                self._send(udp, data[:2] + variants[self._turn % len(variants)], address)
            else:
                self._question(udp, data, address)
                answers = self._answers

    @staticmethod
    def _send(udp: socket.socket, answer: bytes, address: _Address) -> None:
        try:
            udp.sendto(answer, address)
        except OSError as error:
            # A full buffer or a client gone: datagrams may be lost, the client asks again.
            log.debug("sending an answer failed", error=str(error))

    def _question(self, udp: socket.socket, data: bytes, address: _Address) -> None:
        try:
            query = parse_query(data)
        except WireError:
            refusal = error_answer(data, FORMERR)
            if refusal is not None:
                self._send(udp, self._counted(0, refusal), address)
            return
        limit = min(query.udp_bytes, OUR_UDP_BYTES)
        search = self._search(query, address[0])
        answer = None if search else self._immediate(query, data, limit)
        if answer is None and len(self._tasks) >= _MAXIMUM_CONNECTIONS:
            answer = build_answer(query, REFUSED, authoritative=False)
        if answer is not None:
            self._send(udp, self._counted(query.type, answer), address)
        else:
            self._tasks.spawn(self._answer_later(udp, query, data, limit, address, search), "dns: forwarded question")

    async def _answer_later(self, udp: socket.socket, query: Query, data: bytes, limit: int, address: _Address, search: list[str]) -> None:
        answer = await (self._searched(query, data, limit, search) if search else self._forwarded(query, data, limit))
        if udp.fileno() >= 0:
            self._send(udp, self._counted(query.type, answer), address)

    def _counted(self, kind: int, answer: bytes) -> bytes:
        """An answer that goes to a client, counted as one: what is asked within the server for it is not."""
        self.counts[f"type {kind}"] += 1
        self.counts[f"code {answer[3] & 0xF}"] += 1
        return answer

    def _search(self, query: Query, client: str) -> list[str]:
        """Names to try for a question that begins a search; empty for all others."""
        if self._autopath is None or query.type not in (A, AAAA) or not self.ready:
            return []
        names = self._autopath.names(query.name, client)
        return names if names and self.zone.resolve(query.name, query.type).code == NXDOMAIN else []

    async def _searched(self, query: Query, data: bytes, limit: int, names: list[str]) -> bytes:
        """The first of some names that exists, with a CNAME that leads to it; the plain answer when none does."""
        for name in names:
            question = struct.pack(">HHHHHH", query.id, 0x0100, 1, 0, 0, 0) + encode_name(name) + struct.pack(">HH", query.type, IN)
            try:
                asked = parse_query(question)
                answer = self._immediate(asked, question, 65535) or await self._forwarded(asked, question, 65535)
                if answer[3] & 0xF == 0:
                    records = _answer_records(answer, name)
                    self.counts["autopath"] += 1
                    ttl = min((record.ttl for record in records), default=self.zone.ttl)
                    return build_answer(query, 0, [Record(query.name, CNAME, ttl, encode_name(name)), *records], limit_bytes=limit)
            except WireError as error:
                log.debug("a name of a search path cannot be asked for", name=name, error=str(error))
        plain = self._immediate(query, data, limit)
        return plain if plain is not None else await self._forwarded(query, data, limit)

    def _immediate(self, query: Query, data: bytes, limit: int) -> bytes | None:
        """An answer that needs nobody else; None when resolvers have to be asked."""
        if query.klass != IN or query.flags & 0x7800:
            return build_answer(query, REFUSED, authoritative=False)
        name = query.name
        found: Resolved | None
        if self.zone.owns(name):
            if not self.ready:
                return None
            found = self.zone.resolve(name, query.type)
        elif name.endswith(".arpa"):
            found = self.zone.reverse(name, query.type)
        else:
            found = None
        if found is None:
            return self.forwarder.cached(query, data)
        for _ in range(_CHAIN):
            if not found.follow or not self.zone.owns(found.follow):
                break
            # An ExternalName that points at another Service: the answer holds the whole chain.
            further = self.zone.resolve(found.follow, query.type)
            found = Resolved(further.code, found.answers + further.answers, further.additionals, further.follow)
        if found.follow and query.type in (A, AAAA):
            return None
        return self._write(query, data, found, limit)

    def _write(self, query: Query, data: bytes, found: Resolved, limit: int) -> bytes:
        authorities = [self.zone.soa()] if found.negative else []
        answers = found.answers
        # Clients take the first address: each of these answers begins with another one.
        turns = min(len(answers), 8) if query.type in (A, AAAA, SRV) and len(answers) > 1 and answers[0].type != CNAME else 1
        variants = [
            build_answer(query, found.code, answers[turn:] + answers[:turn], authorities, found.additionals, limit_bytes=limit)
            for turn in range(turns)
        ]
        # EDNS options (cookies) differ with every question; such a question never comes again.
        everybodys = self._autopath is None or found.code != NXDOMAIN or not self._autopath.searchable(query.name)
        if everybodys and limit <= OUR_UDP_BYTES and len(data) <= 12 + len(query.question) + _BARE_OPT_BYTES:
            if len(self._answers) >= _MAXIMUM_ANSWERS:
                self._gather_hits()
                self._answers = {}
            self._answers[data[2:]] = [variant[2:] for variant in variants]
        self._turn += 1
        return variants[self._turn % turns]

    async def _forwarded(self, query: Query, data: bytes, limit: int) -> bytes:
        if self.zone.owns(query.name):
            if not self.ready and not await self._wait_ready():
                return build_answer(query, SERVFAIL, authoritative=False)
            known = self._immediate(query, data, limit)
            return known if known is not None else await self._external(query, limit)
        try:
            answer = await self.forwarder.ask(query, data)
        except Overloaded:
            return build_answer(query, REFUSED, authoritative=False)
        except Unanswered:
            return build_answer(query, SERVFAIL, authoritative=False)
        if len(answer) > limit:
            return build_answer(
                query, answer[3] & 0xF, [Record(query.name, query.type, 0, b"\0" * 65000)], authoritative=False, limit_bytes=limit
            )
        return answer

    async def _wait_ready(self) -> bool:
        """Hold a question that comes right after the start until the cluster is known; False when that takes too long."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                for informer in (self._services, self._slices, self._namespaces):
                    await informer.wait_synced()
        except TimeoutError:
            return False
        return True

    async def _external(self, query: Query, limit: int) -> bytes:
        """An ExternalName's address: our CNAMEs, then what resolvers say about the last of them."""
        found = self.zone.resolve(query.name, query.type)
        chain = list(found.answers)
        target = found.follow
        for _ in range(_CHAIN):
            if not self.zone.owns(target):
                break
            further = self.zone.resolve(target, query.type)
            chain += further.answers
            if not further.follow:
                break
            target = further.follow
        try:
            outside = struct.pack(">HHHHHH", query.id, 0x0100, 1, 0, 0, 0) + encode_name(target) + struct.pack(">HH", query.type, IN)
            answer = await self.forwarder.ask(parse_query(outside), outside)
            chain += _answer_records(answer, target)
        except (Unanswered, Overloaded, WireError) as error:
            log.debug("target of an external name was not resolved", name=query.name, target=target, error=str(error))
        return build_answer(query, 0, chain, limit_bytes=limit)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= _MAXIMUM_CONNECTIONS:
            writer.close()
            return
        self._connections += 1
        try:
            while True:
                async with asyncio.timeout(_TCP_IDLE_SECONDS):
                    length = struct.unpack(">H", await reader.readexactly(2))[0]
                    data = await reader.readexactly(length)
                answer = await self._answer_tcp(data, writer.get_extra_info("peername")[0])
                if answer is None:
                    return
                writer.write(struct.pack(">H", len(answer)) + answer)
                async with asyncio.timeout(_TCP_IDLE_SECONDS):
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self._connections -= 1
            writer.close()

    async def _answer_tcp(self, data: bytes, client: str) -> bytes | None:
        try:
            query = parse_query(data)
        except WireError:
            refusal = error_answer(data, FORMERR)
            return self._counted(0, refusal) if refusal is not None else None
        if search := self._search(query, client):
            answer: bytes | None = await self._searched(query, data, 65535, search)
        else:
            answer = self._immediate(query, data, 65535)
        return self._counted(query.type, answer if answer is not None else await self._forwarded(query, data, 65535))

    def _gather_hits(self) -> None:
        """Turn what was counted per kept question into the general counts; before those questions are forgotten, too."""
        hits, self.hits = self.hits, Counter()
        for question, count in hits.items():
            variants = self._answers.get(question)
            kind = question_type(question)
            self.counts["hits"] += count
            self.counts[f"type {kind}"] += count
            self.counts[f"code {variants[0][1] & 0xF if variants else 0}"] += count

    def _tell(self, path: str) -> Answer:
        if path == "/metrics":
            self._gather_hits()
            counts = dict(self.counts)
            counts["forward hits"] = self.forwarder.hits
            counts["forward misses"] = self.forwarder.misses
            counts["forward failures"] = self.forwarder.failures
            counts["answers cached"] = len(self._answers)
            return prometheus(render(counts).encode())
        if path == "/ready":
            return plain(200, "OK") if self.ready else plain(503, "kubernetes")
        return plain(200, "OK") if path in ("/health", "/healthz", "/livez") else NOT_FOUND


def _answer_records(message: bytes, owner: str) -> list[Record]:
    """The address and CNAME records of an upstream answer, their names written out."""
    lifetimes(message)
    questions, count = struct.unpack_from(">HH", message, 4)
    offset = 12
    for _ in range(questions):
        offset = skip_name(message, offset) + 4
    found = []
    for _ in range(count):
        name = _read_name(message, offset) or owner
        offset = skip_name(message, offset)
        kind, _klass, ttl, length = struct.unpack_from(">HHIH", message, offset)
        start = offset + 10
        if kind == CNAME:
            found.append(Record(name, CNAME, ttl, encode_name(_read_name(message, start))))
        elif kind in (A, AAAA):
            found.append(Record(name, kind, ttl, message[start : start + length]))
        offset = start + length
    return found


def _read_name(message: bytes, offset: int) -> str:
    labels: list[str] = []
    for _ in range(128):
        if offset >= len(message):
            raise WireError("name runs out of the message")
        length = message[offset]
        if length == 0:
            return ".".join(labels)
        if length >= 0xC0:
            offset = struct.unpack_from(">H", message, offset)[0] & 0x3FFF
            continue
        labels.append(message[offset + 1 : offset + 1 + length].decode("latin-1").lower())
        offset += length + 1
    raise WireError("name without end")
