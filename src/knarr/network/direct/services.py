"""Services without translation: a socket that connects to one is led to an endpoint before it sends anything.

Role: the service proxy of a node owns one and tells it, after each change of its table, what it may serve: TCP
frontends without session affinity, of cluster IPs for everybody and of node ports for the node's own processes. What
else there is, who is no pod of this node, and everything when the node's process is not running, is translated by the
table as before. The hooks hang on the whole cgroup tree and look at the network namespace of a socket first, so
processes of others pay one look-up.
Invariants: a frontend leads to its old endpoints or to its new ones, never to a mixture: endpoints are written under a
new number, the frontend is turned to it, and only then the old ones go. An end of the process takes the hooks away.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network

from knarr.aiokits.log import get_logger
from knarr.network.direct import bpf, programs
from knarr.network.direct.bpf import ARRAY, HASH, NO_PREALLOCATION, Link, Map, Program
from knarr.network.direct.path import DirectPath

log = get_logger(__name__)

Frontend = tuple[str, int]
"""Address ("" for a port of the node) and port."""
Endpoints = tuple[tuple[str, int], ...]

_MAX_FRONTENDS, _MAX_ENDPOINTS = 65536, 262144


@dataclass(slots=True)
class Offer:
    """What one Service offers: frontends that sockets may be led by, and those (outside of the cluster IPs) that the table translates."""

    direct: dict[Frontend, Endpoints] = field(default_factory=dict)
    external: frozenset[Frontend] = frozenset()


NOTHING = Offer()


class DirectServices:
    """See the module.

    Args:
      path: The node's direct path; its pods and the node itself are served.
      cluster_cidrs: All pods' CIDRs.

    Raises:
      OSError: this kernel has not what is needed.
    """

    def __init__(self, path: DirectPath, cluster_cidrs: Sequence[str]) -> None:
        self._plain = path.plain
        self._networks = [_network(cidr) for cidr in cluster_cidrs]
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}
        self._numbers: dict[Frontend, tuple[int, Endpoints]] = {}
        self._next = 1
        self._nodes: tuple[str, ...] = ()
        self._outside: Counter[Frontend] = Counter()
        self._external: Counter[Frontend] = Counter()
        self._links: list[Link] = []
        self._parts: list[Map | Program] = []
        try:
            self._services = self._map("services", HASH, programs.ADDRESS_PORT.size, programs.SERVICE.size, _MAX_FRONTENDS)
            self._endpoints = self._map("endpoints", HASH, programs.ENDPOINT_KEY.size, programs.ADDRESS_PORT.size, _MAX_ENDPOINTS)
            former = self._map("former", ARRAY, 4, programs.FORMER_BYTES, 1, 0)
            for version, connect, name in ((4, bpf.CONNECT4, bpf.PEERNAME4), (6, bpf.CONNECT6, bpf.PEERNAME6)):
                code = programs.connect(version, path.members, self._services, self._endpoints, former, path.state)
                self._parts.append(Program("connect", bpf.SOCKET_ADDRESS, code, connect))
                self._parts.append(Program("peer_name", bpf.SOCKET_ADDRESS, programs.peer_name(version, former), name))
        except BaseException:
            self.close()
            raise

    def _map(self, name: str, kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = NO_PREALLOCATION) -> Map:
        made = Map(name, kind, key_bytes, value_bytes, entries, flags)
        self._parts.append(made)
        return made

    def attach(self) -> None:
        """Begin to serve; idempotent. Raises OSError."""
        with self._lock:
            if self._links:
                return
            cgroup = bpf.root_cgroup()
            try:
                self._links = [Link(part, cgroup) for part in self._parts if isinstance(part, Program)]
            finally:
                os.close(cgroup)

    def close(self) -> None:
        """Stop serving."""
        with self._lock:
            for part in (*self._links, *self._parts):
                part.close()
            self._links, self._parts = [], []

    def load(self, offers: Mapping[str, Offer]) -> None:
        """Serve exactly these, by Service. Raises OSError."""
        gone = {service: NOTHING for service in self._offers if service not in offers}
        self.change({**gone, **offers})

    def change(self, offers: Mapping[str, Offer]) -> None:
        """Replace what some Services offer. Raises OSError: a map is full; what is not written is translated by the table."""
        with self._lock:
            changed: dict[Frontend, Endpoints] = {}
            for service, offer in offers.items():
                before = self._offers.pop(service, NOTHING)
                if offer.direct or offer.external:
                    self._offers[service] = offer
                changed.update((frontend, ()) for frontend in before.direct if frontend not in changed)
                changed.update(offer.direct)
                self._count(before, -1)
                self._count(offer, 1)
            self._write(changed)

    def set_node_addresses(self, addresses: Collection[str]) -> None:
        """The addresses at which the node's own processes find its node ports, the loopback's beside them."""
        with self._lock:
            wanted = (*addresses, "127.0.0.1")
            if wanted == self._nodes:
                return
            ports = {frontend: endpoints for frontend, (_number, endpoints) in self._numbers.items() if not frontend[0]}
            self._write(dict.fromkeys(ports, ()))
            self._nodes = wanted
            self._write(ports)

    def _keys(self, frontend: Frontend, endpoints: Endpoints) -> list[bytes]:
        address, port = frontend
        if address:
            return [programs.address_port(address, port)]
        six = ":" in endpoints[0][0]
        return [programs.address_port(node, port) for node in self._nodes if (":" in node) == six]

    def _write(self, changed: Mapping[Frontend, Endpoints]) -> None:
        added, turned, gone, stale = [], [], [], []
        for frontend, endpoints in changed.items():
            number, former = self._numbers.get(frontend, (0, ()))
            if former == endpoints:
                continue
            if former:
                stale += [programs.ENDPOINT_KEY.pack(number, index) for index in range(len(former))]
            if not endpoints:
                gone += self._keys(frontend, former)
                self._numbers.pop(frontend, None)
                continue
            number, self._next = self._next, self._next % 0xFFFFFFFF + 1
            self._numbers[frontend] = number, endpoints
            added += [(programs.ENDPOINT_KEY.pack(number, index), programs.address_port(*place)) for index, place in enumerate(endpoints)]
            value = programs.SERVICE.pack(number, len(endpoints), 0 if frontend[0] else 1)
            turned += [(key, value) for key in self._keys(frontend, endpoints)]
        self._endpoints.set_all(added)
        self._services.set_all(turned)
        self._services.delete_all(gone)
        self._endpoints.delete_all(stale)

    # Endpoints outside of the pod network: where a connection goes to is where it stays, unless something translates that place, too.

    def _count(self, offer: Offer, step: int) -> None:
        touched: set[Frontend] = set()
        for endpoints in offer.direct.values():
            for place in endpoints:
                if self._is_outside(place[0]):
                    self._outside[place] += step
                    touched.add(place)
        for frontend in offer.external:
            self._external[frontend] += step
            touched.update(place for place in self._outside if place[1] == frontend[1])
        for place in touched:
            key = programs.address_port(*place)
            if self._outside[place] > 0 and self._external[place] <= 0 and self._external["", place[1]] <= 0:
                self._plain.set(key, struct.pack("=I", 1))
            else:
                self._plain.delete(key)

    def _is_outside(self, address: str) -> bool:
        number = int.from_bytes(programs.packed(address), "big")
        return not any(number & mask == start for start, mask in self._networks)


def _network(cidr: str) -> tuple[int, int]:
    """First address and mask, as numbers of 128 bits."""
    network = ip_network(cidr)
    size = network.num_addresses
    return int.from_bytes(programs.packed(str(network.network_address)), "big"), (1 << 128) - size


def available(path: DirectPath, cluster_cidrs: Sequence[str]) -> DirectServices | None:
    """What leads sockets on this node, or None where the kernel has not what it needs, which is logged."""
    try:
        return DirectServices(path, cluster_cidrs)
    except OSError as error:
        log.info("connections to Services are translated, not led, on this kernel", reason=str(error).splitlines()[0])
        return None
