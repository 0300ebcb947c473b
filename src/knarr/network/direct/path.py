"""The direct path of one node: which pods take it, which are held back, and the programs at their links.

Role: `podnet` owns one and tells it of pods and links, `overlay` of other nodes' pods, the policy engine of pods that
some policy isolates, the node process of reasons to hold all. Segments of TCP between pods that nobody holds pass the
node without its IP stack; all else, and everything while something is held, takes the stack, whose tables are complete.
Switching to the direct path and back is safe at any time for a living connection: in the stack it is tracked from its
next segment on. What a policy may have to say about it depends on who began it, so before a pod is held, its living
connections are told to the kernel's tracking the way round they are (`adoption`).
Invariants: a pod that has a living translated connection, or began one since it is known here, is never direct; so
answers always meet their translation. Programs hang on links and go with them; nothing is pinned.
Threads: every call may come from any thread.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import ip_network

from knarr.aiokits.log import get_logger
from knarr.network import conntrack, rtnl
from knarr.network.direct import adoption, programs
from knarr.network.direct.bpf import ARRAY, CLASSIFIER, HASH, LPM_TRIE, MAPPABLE, NO_PREALLOCATION, Map, Program
from knarr.network.netlink import NETLINK_NETFILTER, NetlinkSocket
from knarr.network.netns import open_netlink

log = get_logger(__name__)

_ISOLATED, _SHAPED = 1, 2
"""Bits of a place's `HELD` byte."""
_PLACES = programs.STATE_BYTES // programs.PLACE_BYTES
_MAX_PEERS, _MAX_PLAIN = 16384, 65536


@dataclass(slots=True)
class _Pod:
    addresses: tuple[str, ...]
    place: int
    netns: str
    cookie: int = 0


class DirectPath:
    """See the module. Opens with every pod held: the reasons in `held` must be released first.

    Args:
      netns: Path of the node's network namespace; None is the process's.
      held: Reasons to hold everything until they are released.
      host_held: Reasons to track the connections of the host's own processes to Services; "rules" until its pod network has rules for it.

    Raises:
      OSError: this kernel has not what is needed (eBPF with redirection to peers and numbers of namespaces, Linux 5.14).
    """

    def __init__(self, netns: str | None = None, held: Iterable[str] = (), host_held: Iterable[str] = ()) -> None:
        self._netns = netns
        self._lock = threading.RLock()
        self._held = set(held)
        self._host_held = {"rules", *host_held}
        self._pods: dict[str, _Pod] = {}
        self._by_address: dict[str, _Pod] = {}
        self._isolated: frozenset[str] = frozenset()
        self._free = list(range(_PLACES - 1, 0, -1))
        self._peers: dict[str, bytes] = {}
        self._maps: list[Map] = []
        try:
            self._addresses = self._map("pods", HASH, 16, programs.PODS_VALUE.size, _PLACES * 2)
            self._prefixes = self._map("peers", LPM_TRIE, 20, programs.PEERS_VALUE.size, _MAX_PEERS)
            self.plain = self._map("plain", HASH, programs.ADDRESS_PORT.size, 4, _MAX_PLAIN)
            self.members = self._map("members", HASH, 8, 4, _PLACES * 2)
            self.state = state = self._map("state", ARRAY, 4, programs.STATE_BYTES, 1, MAPPABLE)
            self._state = state.memory()
            self._from_pod = Program("from_pod", CLASSIFIER, programs.from_pod(self._addresses, self._prefixes, self.plain, state))
            self._from_tunnel = Program("from_tunnel", CLASSIFIER, programs.from_tunnel(self._addresses, state))
        except BaseException:
            for made in self._maps:
                made.close()
            raise
        with open_netlink(netns) as netlink:
            self.members.set(struct.pack("=Q", netlink.netns_cookie()), struct.pack("=I", programs.HOST))
        self._settle()

    def _map(self, name: str, kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = NO_PREALLOCATION) -> Map:
        made = Map(name, kind, key_bytes, value_bytes, entries, flags)
        self._maps.append(made)
        return made

    def close(self) -> None:
        """Let go of programs and maps; those at links go on with what they know, and may still be held and released."""
        with self._lock:
            for part in (*self._maps, self._from_pod, self._from_tunnel):
                part.close()
            self._maps = []

    # Pods of this node

    def watch(self, netlink: NetlinkSocket, index: int) -> None:
        """Put the program at a pod's link, before the pod can send anything; idempotent."""
        netlink.send(*rtnl.classify(index, self._from_pod.fd, "from_pod"))

    def add(self, sandbox_id: str, addresses: Collection[str], index: int, mac: str, netns: str, *, shaped: bool) -> None:
        """Take a pod in, whose link is watched. `shaped`: its link limits what it receives, so nothing may go past it."""
        with self._lock:
            if sandbox_id in self._pods or not self._free or not self._maps:
                return
            pod = _Pod(tuple(addresses), self._free.pop(), netns)
            self._pods[sandbox_id] = pod
            self._by_address.update(dict.fromkeys(pod.addresses, pod))
            held = (_SHAPED if shaped else 0) | (_ISOLATED if self._isolated.intersection(pod.addresses) else 0)
            at = pod.place * programs.PLACE_BYTES
            self._state[at : at + 2] = bytes((0, held))
            value = programs.PODS_VALUE.pack(index, at, bytes.fromhex(mac.replace(":", "")))
            self._addresses.set_all([(programs.packed(address), value) for address in pod.addresses])
            try:
                with open_netlink(netns) as inside:
                    pod.cookie = inside.netns_cookie()
                self.members.set(struct.pack("=Q", pod.cookie), struct.pack("=I", programs.POD))
            except OSError as error:
                # Its connections to Services are translated, as without us.
                log.debug("a pod's namespace cannot be looked at", path=netns, error=str(error))

    def remove(self, sandbox_id: str) -> None:
        """Forget a pod; idempotent."""
        with self._lock:
            pod = self._pods.pop(sandbox_id, None)
            if pod is None:
                return
            self._addresses.delete_all(map(programs.packed, pod.addresses))
            if pod.cookie:
                self.members.delete(struct.pack("=Q", pod.cookie))
            for address in pod.addresses:
                if self._by_address.get(address) is pod:
                    del self._by_address[address]
            self._free.insert(0, pod.place)

    def add_node(self, addresses: Iterable[str]) -> None:
        """The node's own addresses in the pod network: asked for often enough to be known; idempotent."""
        with self._lock:
            self._addresses.set_all([(programs.packed(address), programs.PODS_VALUE.pack(0, 0, bytes(6))) for address in addresses])

    # Pods of other nodes

    def watch_tunnel(self, netlink: NetlinkSocket, index: int) -> None:
        """Put the program at the tunnel's device; idempotent."""
        netlink.send(*rtnl.classify(index, self._from_tunnel.fd, "from_tunnel"))

    def set_peer(self, cidr: str, index: int = 0, mac: str = "", own_mac: str = "", mtu: int = 0) -> None:
        """Where pods of another node are: behind a tunnel's device that carries packets of up to `mtu` bytes, or (index 0) wherever the IP stack knows."""
        network = ip_network(cidr)
        raw = [bytes.fromhex(text.replace(":", "")) or bytes(6) for text in (mac, own_mac)]
        key = struct.pack("=I", network.prefixlen + (96 if network.version == 4 else 0)) + programs.packed(str(network.network_address))
        with self._lock:
            if self._maps:
                self._prefixes.set(key, programs.PEERS_VALUE.pack(index, *raw, mtu))
                self._peers[cidr] = key

    def drop_peer(self, cidr: str) -> None:
        """Forget another node's pods; idempotent."""
        with self._lock:
            key = self._peers.pop(cidr, None)
            if key is not None and self._maps:
                self._prefixes.delete(key)

    # Who is held

    def isolate(self, addresses: Collection[str]) -> None:
        """Exactly these addresses are subject to policies from now on: hold their pods. Call it before a policy comes into force."""
        with self._lock:
            wanted = frozenset(addresses)
            changed = wanted ^ self._isolated
            self._isolated = wanted
            for pod in {id(pod): pod for address in changed if (pod := self._by_address.get(address))}.values():
                at = pod.place * programs.PLACE_BYTES + programs.HELD
                if not wanted.intersection(pod.addresses):
                    self._state[at] &= ~_ISOLATED
                elif not self._state[at] & _ISOLATED:
                    # Twice: what is begun between the first look and the holding is seen by the second.
                    self._adopt(pod)
                    self._state[at] |= _ISOLATED
                    self._adopt(pod)

    def _adopt(self, pod: _Pod) -> None:
        try:
            connections = adoption.living(pod.netns, pod.addresses)
            with open_netlink(self._netns, NETLINK_NETFILTER) as netlink:
                conntrack.adopt(netlink, connections)
        except OSError as error:
            log.warning("living connections of a pod that is isolated now may be cut", addresses=" ".join(pod.addresses), error=str(error))

    def hold(self, reason: str) -> None:
        """Everything takes the stack until the reason is released."""
        with self._lock:
            self._held.add(reason)
            self._settle()

    def release(self, reason: str) -> None:
        """Take a reason back."""
        with self._lock:
            self._held.discard(reason)
            self._settle()

    def hold_host(self, reason: str) -> None:
        """Connections that the host's own processes begin are tracked from now on."""
        with self._lock:
            self._host_held.add(reason)
            self._state[programs.HOST_SWITCH] = 0

    def release_host(self, reason: str) -> None:
        """Take a reason back."""
        with self._lock:
            self._host_held.discard(reason)
            self._state[programs.HOST_SWITCH] = not self._host_held

    @property
    def open(self) -> bool:
        """Whether pods that are not held themselves go directly now."""
        return bool(self._state[0])

    def _settle(self) -> None:
        if self._held:
            self._state[0] = 0
        elif not self._state[0]:
            self._find_translated()
            self._state[0] = 1

    def _find_translated(self) -> None:
        """Connections that were translated before our programs saw their pods."""
        with open_netlink(self._netns, NETLINK_NETFILTER) as netlink:
            for address in conntrack.translated_tcp_sources(netlink):
                pod = self._by_address.get(address)
                if pod is not None:
                    self._state[pod.place * programs.PLACE_BYTES + programs.TRANSLATED] = 1

    def is_direct(self, address: str) -> bool:
        """Whether segments of a pod of this node go directly, for `why` and tests."""
        with self._lock:
            pod = self._by_address.get(address)
            at = pod.place * programs.PLACE_BYTES if pod is not None else 0
            return pod is not None and self.open and self._state[at : at + 2] == b"\0\0"


def available(netns: str | None, held: Iterable[str], host_held: Iterable[str]) -> DirectPath | None:
    """A direct path, or None where the kernel has not what it needs, which is logged."""
    try:
        return DirectPath(netns, held, host_held)
    except OSError as error:
        log.info("pods have no direct path on this kernel", reason=str(error).splitlines()[0])
        return None
