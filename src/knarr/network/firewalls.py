"""Other people's firewalls that would stop pods: found, named, never touched.

Role: `FirewallWatch` looks at the start of a node and at every change of rules, `knarr why` when asked. A
packet must pass every table's chains of a hook, so a chain that drops or rejects what none of its rules let through
stops pods whatever our own tables accept; only its owner can open it. Docker sets such a policy for forwarded packets,
firewalld ends with such a rule, ufw has both.
Invariants: reads only. Rules of nf_tables (iptables-nft's as well) and of the older ip_tables are seen.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from knarr.aiokits.log import get_logger
from knarr.client.events import EventRecorder
from knarr.client.rest import Client
from knarr.network.netlink import NETLINK_NETFILTER, NetlinkSocket, attributes, cstring, text
from knarr.network.netns import entered, open_netlink
from knarr.network.tablewatch import RulesetWatch

log = get_logger(__name__)

_GETCHAIN, _GETRULE = (10 << 8) | 4, (10 << 8) | 7
OWN = ("knarr", "kp")
_HOOKS = {1: "input", 2: "forward"}
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_SILENT = {"counter", "log", "meta", "limit"}
"""Expressions that decide nothing in a last rule."""
PODS_WAY, HOST_WAY = frozenset((0, 2, 4)), frozenset((0, 1, 3, 4))
"""Hooks that packets between pods pass (prerouting, forward, postrouting), and those between the host and a pod (input and output for forward)."""
_OLD = {2: ("ip", "ip_tables_names", 0, 88), 10: ("ip6", "ip6_tables_names", 41, 140)}
"""Family: name, its list of tables, socket level, and where an entry says at which offset its target is."""
_GET_INFO, _GET_ENTRIES = 64, 65
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Blocker:
    """A chain that ends in a refusal. `hook` is "forward" (pods to anywhere) or "input" (pods to this machine: DNS, API)."""

    hook: str
    chain: str
    """ "family table chain"."""

    def __str__(self) -> str:
        what = "forwards for pods" if self.hook == "forward" else "gets from pods (DNS, the API server)"
        return f"a firewall of this machine ({self.chain}) drops what the machine {what} unless one of its rules lets it through"


@dataclass(frozen=True, slots=True)
class _Chain:
    """A base chain of somebody else's."""

    name: str
    hook: int
    drops: bool
    """Whether what comes to its end is dropped."""
    rules: list[memoryview]


def _chains(own: tuple[str, ...], netns: str | None) -> list[_Chain]:
    found = []
    with open_netlink(netns, NETLINK_NETFILTER) as netlink:
        for family, name in _FAMILIES.items():
            for body in netlink.dump(_GETCHAIN, struct.pack("=BBH", family, 0, 0), "listing chains"):
                fields = dict(attributes(body, 4))
                if body[0] != family or 4 not in fields or 5 not in fields or (table := cstring(fields[1])).startswith(own):
                    continue
                hook, chain = struct.unpack(">I", dict(attributes(fields[4]))[1])[0], cstring(fields[3])
                drops = struct.unpack(">I", fields[5])[0] == 0
                found.append(_Chain(f"{name} {table} {chain}", hook, drops, _rules(netlink, family, table, chain)))
    return found


def blockers(own: tuple[str, ...] = OWN, netns: str | None = None) -> list[Blocker]:
    """Chains that may stop pods, of tables whose names do not begin with one of `own`. Raises OSError."""
    return look(own, netns)[0]


def look(own: tuple[str, ...] = OWN, netns: str | None = None) -> tuple[list[Blocker], dict[str, frozenset[int]]]:
    """`blockers`, and all chains with rules of somebody else's, whatever those do, with their hooks. Raises OSError."""
    blocking, watching = [], {}
    for chain in _chains(own, netns):
        if chain.hook in _HOOKS and (chain.drops or _end_in_refusal(chain.rules)):
            blocking.append(Blocker(_HOOKS[chain.hook], chain.name))
        if chain.drops or chain.rules:
            watching[chain.name] = frozenset((chain.hook,))
    with entered(netns):
        for family in _OLD:
            blocking.extend(_old_policies(family))
            watching.update(_old_tables_with_rules(family))
    return blocking, watching


def forward_drops(own: tuple[str, ...] = OWN, netns: str | None = None) -> list[str]:
    """The chains of `blockers` on the forward hook."""
    return [blocker.chain for blocker in blockers(own, netns) if blocker.hook == "forward"]


def _old_tables_with_rules(family: int) -> dict[str, frozenset[int]]:
    name, listing, level, _target_field = _OLD[family]
    found = {}
    try:
        with open(f"/proc/thread-self/net/{listing}") as file:
            tables = file.read().split()
        for table in tables:
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
                info = _ask(sock, level, _GET_INFO, 84, table=table)
            hooks, entries, size = struct.unpack_from("=I", info, 32)[0], *struct.unpack_from("=II", info, 76)
            # One entry for each hook's policy and one that ends the table are always there.
            if size and entries > hooks.bit_count() + 1:
                found[f"{name} {table}"] = frozenset(number for number in range(5) if hooks >> number & 1)
    except OSError as error:
        log.debug("tables of ip_tables cannot be read", family=name, error=str(error))
    return found


def _end_in_refusal(rules: list[memoryview]) -> bool:
    last = [_expression(item) for _kind, item in attributes(rules[-1])] if rules else []
    deciding = [(name, data) for name, data in last if name not in _SILENT]
    return len(deciding) == 1 and _refuses(*deciding[0])


def _rules(netlink: NetlinkSocket, family: int, table: str, chain: str) -> list[memoryview]:
    """The expressions of each rule of a chain."""
    found = []
    # The kernel lists this chain only: others, ours first of all, may have thousands of rules.
    wanted = struct.pack("=BBH", family, 0, 0) + text(1, table) + text(2, chain)
    for body in netlink.dump(_GETRULE, wanted, "listing rules"):
        fields = dict(attributes(body, 4))
        if body[0] == family and 4 in fields and cstring(fields[1]) == table and cstring(fields[2]) == chain:
            found.append(fields[4])
    return found


def _expression(item: memoryview) -> tuple[str, memoryview]:
    fields = dict(attributes(item))
    return cstring(fields[1]), fields.get(2, memoryview(b""))


def _refuses(name: str, data: memoryview) -> bool:
    if name == "reject":
        return True
    fields = dict(attributes(data))
    if name == "target":
        # iptables-nft's form of targets that nf_tables has not.
        return 1 in fields and cstring(fields[1]) in ("REJECT", "DROP")
    if name != "immediate" or 2 not in fields:
        return False
    verdict = dict(attributes(fields[2])).get(2)
    code = dict(attributes(verdict)).get(1) if verdict is not None else None
    return code is not None and struct.unpack(">i", code)[0] == 0


def _old_policies(family: int) -> list[Blocker]:
    """Policies of ip_tables' filter table, which nf_tables does not show."""
    name, listing, level, target_field = _OLD[family]
    try:
        with open(f"/proc/thread-self/net/{listing}") as file:
            if "filter" not in file.read().split():
                return []
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            info = _ask(sock, level, _GET_INFO, 84)
            underflows, size = struct.unpack_from("=5I", info, 56), struct.unpack_from("=I", info, 80)[0]
            entries = _ask(sock, level, _GET_ENTRIES, 40 + size, size)[40:]
    except OSError as error:
        log.debug("rules of ip_tables cannot be read", family=name, error=str(error))
        return []
    found = []
    for hook, title in _HOOKS.items():
        start = underflows[hook]
        target = start + struct.unpack_from("=H", entries, start + target_field)[0]
        if struct.unpack_from("=i", entries, target + 32)[0] == -1:
            found.append(Blocker(title, f"{name} filter {title.upper()}"))
    return found


def _ask(sock: socket.socket, level: int, option: int, length: int, size: int = 0, table: str = "filter") -> bytes:
    buffer = ctypes.create_string_buffer(struct.pack("=32sI", table.encode(), size), length)
    room = ctypes.c_uint32(length)
    if _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(room)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer.raw


class FirewallWatch:
    """Tells in events of the node which firewalls may stop its pods, those that come later as well.

    Args:
      own: What the names of our own tables begin with, of other clusters as well.
      netns: Path of the node's network namespace; None is the process's.
      on_watchers: Told after each look at which hooks somebody else's rules see packets.
    """

    def __init__(
        self, client: Client, node_name: str, *, own: tuple[str, ...] = OWN, netns: str | None = None, on_watchers: Callable[[frozenset[int]], None] | None = None
    ) -> None:
        self._recorder = EventRecorder(client, "knarr-network", node_name)
        # As kubelets do: the node's name stands for its uid, so that events of one node are found together.
        self._node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name, "uid": node_name}}
        self._own = own
        self._netns = netns
        self._on_watchers = on_watchers
        self._wake = asyncio.Event()
        self._watch = RulesetWatch(self._wake.set, netns=netns, settle_seconds=1.0)
        self.known: frozenset[Blocker] = frozenset()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._watch.start()
        self._wake.set()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    blocking, others = await asyncio.to_thread(look, self._own, self._netns)
                    found = frozenset(blocking)
                    if self._on_watchers is not None:
                        await asyncio.to_thread(self._on_watchers, frozenset().union(*others.values()))
                except OSError as error:
                    log.warning("firewalls of this machine cannot be read", error=str(error))
                    continue
                for blocker in sorted(found - self.known, key=str):
                    log.warning("a firewall of this machine may stop pods", hook=blocker.hook, chain=blocker.chain)
                    self._recorder.event(self._node, "Warning", "FirewallMayBlockPods", str(blocker))
                for blocker in sorted(self.known - found, key=str):
                    self._recorder.event(self._node, "Normal", "FirewallOpened", f"{blocker.chain} no longer drops by default")
                self.known = found
        finally:
            self._watch.close()
            await self._recorder.close()
