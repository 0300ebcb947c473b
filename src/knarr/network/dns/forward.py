"""Names outside the cluster: asked of the host's resolvers, kept for a while.

Role: the server hands over raw queries that are not the cluster's. Answers pass through as bytes; only lifetimes are
read. Equal questions in flight are asked once.
Invariants: every upstream query has its own socket (a fresh source port) and a random id, and an answer counts only
when id and question agree. Cache and questions in flight are bounded: when full, the oldest entries go, and a question
too many is refused. Resolvers of this machine that would lead back to us are never used: with a stub resolver on the
loopback, its own upstreams are read from systemd-resolved. A node in a network namespace does not reach the machine's
loopback; when nothing else is named there, the DNS server of the node that is the machine asks in its stead.
Source: coredns plugins forward and cache; resolv.conf(5).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.network.dns.wire import NOERROR, NXDOMAIN, TC, Query, WireError, lifetimes

log = get_logger(__name__)

_RESOLV_CONF = Path("/etc/resolv.conf")
_SYSTEMD_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")
_TRY_SECONDS = 2.0
_TOTAL_SECONDS = 6.0
_MAXIMUM_CACHED = 10_000
_MAXIMUM_IN_FLIGHT = 1_000
_KEEP_SECONDS = 3_600
_KEEP_NEGATIVE_SECONDS = 30


class Unanswered(Exception):
    """No resolver gave an answer in time."""


class Overloaded(Exception):
    """Too many questions are waiting for resolvers."""


class Resolver(NamedTuple):
    """A server that answers for names outside the cluster."""

    address: str
    """May have an IPv6 zone, as link-local addresses need."""
    port: int = 53


def read_nameservers(path: Path) -> list[str]:
    """The nameserver lines of a resolv.conf; empty when it cannot be read."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                found.append(str(ip_address(words[1])))
    return found


def _at_home(server: str) -> bool:
    """Whether an address means the machine whose file names it: a loopback one, or none at all."""
    address = ip_address(server)
    return address.is_loopback or address.is_unspecified


class HostResolvers:
    """The host's resolvers, read again when the files change.

    Args:
      own_addresses: Servers that are we ourselves.
      paths: Files to read; the first that names servers elsewhere counts.
      machine: For a node in a network namespace of its own: the DNS servers of the machine's own node. They are asked when the
        files name only what the machine alone reaches.
    """

    def __init__(
        self,
        own_addresses: Collection[str],
        paths: Sequence[Path] = (_RESOLV_CONF, _SYSTEMD_RESOLV_CONF),
        machine: Callable[[], Sequence[Resolver]] | None = None,
    ) -> None:
        self._own = set(own_addresses)
        self._paths = list(paths)
        self._machine = machine
        self._seen: tuple[object, ...] = ()
        self._servers: list[Resolver] = []

    def current(self) -> list[Resolver]:
        """Resolvers in order; checks the files' times, which costs microseconds."""
        stamps = []
        for path in self._paths:
            try:
                status = os.stat(path)
                stamps.append((status.st_mtime_ns, status.st_ino))
            except OSError:
                stamps.append((0, 0))
        if tuple(stamps) != self._seen:
            self._seen = tuple(stamps)
            self._servers = self._read()
            log.info("resolvers of the host", servers=" ".join(server.address for server in self._servers) or "none")
        if not self._servers and self._machine is not None:
            return list(self._machine())
        return self._servers

    def _read(self) -> list[Resolver]:
        for path in self._paths:
            direct = [server for server in self._named(path) if not _at_home(server)]
            if self._machine is not None:
                direct = [server for server in direct if not ip_address(server).is_link_local]
            if direct:
                return [Resolver(server) for server in direct]
        if self._machine is not None:
            return []
        # Only loopback stubs: better than nothing, as none of them is ours.
        return [Resolver(server) for path in self._paths for server in self._named(path)]

    def _named(self, path: Path) -> list[str]:
        return [server for server in read_nameservers(path) if server not in self._own]


class Exchange(asyncio.DatagramProtocol):
    """Waits for the answer to one question on a socket of its own."""

    def __init__(self, identity: int, question: bytes, result: asyncio.Future[bytes]) -> None:
        self._identity = struct.pack(">H", identity)
        self._question = question
        self._result = result

    def datagram_received(self, data: bytes, _address: object) -> None:
        fits = (
            data[:2] == self._identity
            and len(data) > 12
            and data[2] & 0x80
            and data[12 : 12 + len(self._question)].lower() == self._question
        )
        if fits and not self._result.done():
            self._result.set_result(data)

    def error_received(self, error: Exception) -> None:
        if not self._result.done():
            self._result.set_exception(error)


class _Cached:
    __slots__ = ("data", "expires", "offsets", "stored")

    def __init__(self, data: bytes, offsets: list[tuple[int, int]], stored: float, expires: float) -> None:
        self.data = data
        self.offsets = offsets
        self.stored = stored
        self.expires = expires


class Forwarder:
    """See the module.

    Args:
      resolvers: Gives the servers to ask, best first, at each question.
      stub_domains: Domain to its own servers, e.g. {"corp.example": [Resolver("10.0.0.53")]}.
    """

    def __init__(self, resolvers: Callable[[], Sequence[Resolver]], stub_domains: Mapping[str, Sequence[Resolver]] | None = None) -> None:
        self._resolvers = resolvers
        self._stubs = {domain.strip(".").lower(): list(servers) for domain, servers in (stub_domains or {}).items()}
        self._random = random.SystemRandom()
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()
        self._in_flight: dict[bytes, asyncio.Future[bytes]] = {}
        self._tasks = Tasks()
        self._bad_until: dict[Resolver, float] = {}
        self.hits = self.misses = self.failures = 0

    def cached(self, query: Query, data: bytes) -> bytes | None:
        """An answer from memory for a raw query, its lifetimes counted down; None when there is none."""
        entry = self._cache.get(self._key(query, data))
        if entry is None:
            return None
        present = asyncio.get_running_loop().time()
        if present >= entry.expires:
            return None
        self.hits += 1
        answer = bytearray(entry.data)
        answer[0:2] = data[0:2]
        answer[12 : 12 + len(query.question)] = query.question
        age = int(present - entry.stored)
        if age:
            for offset, ttl in entry.offsets:
                struct.pack_into(">I", answer, offset, max(0, ttl - age))
        return bytes(answer)

    @staticmethod
    def _key(query: Query, data: bytes) -> bytes:
        # Flags and what follows the question (EDNS) change the answer; the id and the spelling of the name do not.
        return data[2:4] + query.question.lower() + data[12 + len(query.question) :]

    async def ask(self, query: Query, data: bytes) -> bytes:
        """Have resolvers answer a raw query. Raises Unanswered, Overloaded."""
        known = self.cached(query, data)
        if known is not None:
            return known
        key = self._key(query, data)
        waiting = self._in_flight.get(key)
        if waiting is None:
            if len(self._in_flight) >= _MAXIMUM_IN_FLIGHT:
                raise Overloaded
            self.misses += 1
            waiting = self._in_flight[key] = asyncio.get_running_loop().create_future()
            # Its own task: that the first asker goes away must not fail the others.
            self._tasks.spawn(self._resolve(key, query, data, waiting), "dns: ask upstream")
        answer = await asyncio.shield(waiting)
        return data[:2] + answer[2:12] + query.question + answer[12 + len(query.question) :]

    async def _resolve(self, key: bytes, query: Query, data: bytes, result: asyncio.Future[bytes]) -> None:
        try:
            answer = await self._ask_any(query, data)
            self._remember(key, answer)
            result.set_result(answer)
        except BaseException as error:
            self.failures += 1
            if not result.done():
                result.set_exception(Unanswered(str(error)) if isinstance(error, Exception) else Unanswered("shutting down"))
                # Askers may all have gone; a result nobody reads is no fault.
                result.exception()
            if not isinstance(error, Exception):
                raise
        finally:
            self._in_flight.pop(key, None)

    def _servers_for(self, name: str) -> list[Resolver]:
        rest = name
        while rest:
            if rest in self._stubs:
                return list(self._stubs[rest])
            rest = rest.partition(".")[2]
        return list(self._resolvers())

    async def _ask_any(self, query: Query, data: bytes) -> bytes:
        servers = self._servers_for(query.name)
        loop = asyncio.get_running_loop()
        present = loop.time()
        # Those that failed lately come last, not never: when all fail, the first recovers us.
        servers.sort(key=lambda server: self._bad_until.get(server, 0) > present)
        failure: Exception = Unanswered("no resolver is configured")
        fallback: bytes | None = None
        async with asyncio.timeout(_TOTAL_SECONDS):
            for server in servers:
                try:
                    answer = await self._ask_one(server, query, data)
                except (OSError, TimeoutError, WireError, asyncio.IncompleteReadError) as error:
                    failure = error
                    self._bad_until[server] = loop.time() + 10
                    continue
                if answer[3] & 0xF in (NOERROR, NXDOMAIN):
                    return answer
                fallback = answer
        if fallback is not None:
            return fallback
        raise failure

    async def _ask_one(self, server: Resolver, query: Query, data: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        identity = self._random.getrandbits(16)
        # Recursion is what the asker wants of us, so we want it of the resolver.
        flags = struct.unpack_from(">H", data, 2)[0] | 0x0100
        message = struct.pack(">HH", identity, flags) + data[4:]
        result: asyncio.Future[bytes] = loop.create_future()
        transport, _protocol = await loop.create_datagram_endpoint(
            lambda: Exchange(identity, query.question.lower(), result), remote_addr=server
        )
        try:
            async with asyncio.timeout(_TRY_SECONDS):
                transport.sendto(message)
                answer = await result
        finally:
            transport.close()
        if struct.unpack_from(">H", answer, 2)[0] & TC:
            answer = await self._ask_tcp(server, message, query)
        return answer

    async def _ask_tcp(self, server: Resolver, message: bytes, query: Query) -> bytes:
        async with asyncio.timeout(_TRY_SECONDS):
            reader, writer = await asyncio.open_connection(server.address, server.port)
            try:
                writer.write(struct.pack(">H", len(message)) + message)
                length = struct.unpack(">H", await reader.readexactly(2))[0]
                answer = await reader.readexactly(length)
            finally:
                writer.close()
        if answer[:2] != message[:2] or answer[12 : 12 + len(query.question)].lower() != query.question.lower():
            raise WireError("answer to another question")
        return answer

    def _remember(self, key: bytes, answer: bytes) -> None:
        code = answer[3] & 0xF
        if code not in (NOERROR, NXDOMAIN) or struct.unpack_from(">H", answer, 2)[0] & TC:
            return
        try:
            offsets, negative, positive = lifetimes(answer)
        except WireError:
            return
        if positive and code == NOERROR:
            keep = min([_KEEP_SECONDS, *(ttl for _offset, ttl in offsets)])
        else:
            keep = min(negative, _KEEP_NEGATIVE_SECONDS)
        if keep <= 0:
            return
        present = asyncio.get_running_loop().time()
        self._cache[key] = _Cached(answer, offsets, present, present + keep)
        self._cache.move_to_end(key)
        while len(self._cache) > _MAXIMUM_CACHED:
            self._cache.popitem(last=False)

    async def close(self) -> None:
        """Cancel what is in flight."""
        await self._tasks.close()
