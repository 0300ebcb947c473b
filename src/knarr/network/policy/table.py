"""The policy table in the kernel: base chains, and bringing it from one wanted state to the next in one transaction.

Role: used by `engine` from its worker thread (blocking). The base chain hooks forwarded packets only: what the node
itself sends to or receives from its pods (probes, DNS) is always allowed. Of a tracked connection only the original
direction is judged, and every packet of it, so that a changed policy counts for living connections at once; answers
pass. The base chain is there only while some pod is isolated.
Invariants: memory equals kernel after every call; other tables are untouched. A fresh load replaces whatever table of
that name there was, in the same transaction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable
from ipaddress import ip_address

from knarr.network.expressions import (
    CT_DIRECTION,
    CT_STATE,
    DROP,
    EQUAL,
    GREATER_EQUAL,
    LESS_EQUAL,
    META_L4PROTO,
    RETURN,
    SET_INTERVAL,
    TYPE_PORT,
    TYPE_PROTO,
    Family,
    R,
    add_base_chain,
    add_chain,
    add_rule,
    add_set,
    add_table,
    compare,
    ct_load,
    delete_chain,
    delete_set,
    delete_table,
    lookup,
    masked,
    meta_load,
    payload,
    verdict,
)
from knarr.network.netlink import NETLINK_NETFILTER, NetlinkSocket
from knarr.network.netns import open_netlink
from knarr.network.nftables import Element, ElementBatch, jump
from knarr.network.nftables import delete_table as remove_table
from knarr.network.policy.model import PROTOCOL_NUMBERS
from knarr.network.policy.state import Chain, Match, PeerSet, Wanted

_FORWARD_HOOK = 2
_PRIORITY = -5
_CT_RELATED = 4


OnIsolate = Callable[[Collection[str]], None]
"""Called with all addresses that policies are about to isolate, before the kernel hears of it."""


class PolicyTable:
    """One inet table. Not for use by two threads at once."""

    def __init__(self, name: str, *, netns: str | None = None, on_isolate: OnIsolate | None = None) -> None:
        self.name = name
        self._on_isolate = on_isolate
        self._netns = netns
        self._netlink: NetlinkSocket | None = None
        self._current = Wanted({}, {}, {}, set())
        self._number = 0

    def socket(self) -> NetlinkSocket:
        """The netfilter socket in the node's namespace."""
        if self._netlink is None:
            self._netlink = open_netlink(self._netns, NETLINK_NETFILTER)
        return self._netlink

    def load(self, wanted: Wanted) -> None:
        """Write the whole table anew, in one transaction: no packet sees half of it."""
        batch = ElementBatch(self.name)
        add_table(batch, self.name)
        delete_table(batch, self.name)
        add_table(batch, self.name)
        self._skeleton(batch)
        self._difference(batch, Wanted({}, {}, {}, set()), wanted)
        self._commit(batch, wanted)

    def change(self, wanted: Wanted) -> None:
        """Bring the table to a new state.

        Raises:
          StateMismatch: the table is not as we left it; call `load`.
          NetlinkError: the kernel refused; nothing has changed.
        """
        batch = ElementBatch(self.name)
        self._difference(batch, self._current, wanted)
        self._commit(batch, wanted)

    def _commit(self, batch: ElementBatch, wanted: Wanted) -> None:
        if self._on_isolate is not None:
            self._on_isolate([str(ip_address(packed)) for _version, packed in wanted.isolated])
        batch.commit(self.socket())
        self._current = wanted

    def remove(self) -> None:
        """Delete the table."""
        remove_table(self.name, self._netns)
        self._current = Wanted({}, {}, {}, set())

    def close(self) -> None:
        """Close the socket; the table stays."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _skeleton(self, batch: ElementBatch) -> None:
        for version in (4, 6):
            family = Family(version)
            types, length = (family.address_type,), family.length
            for direction in ("ingress", "egress"):
                add_set(batch, self.name, f"{direction}{version}", key_types=types, key_bytes=length, number=self._next(), verdicts=True)
            add_set(batch, self.name, f"self{version}", key_types=types * 2, key_bytes=length * 2, number=self._next())

    def _hook(self, batch: ElementBatch) -> None:
        add_base_chain(batch, self.name, "forward", hook=_FORWARD_HOOK, priority=_PRIORITY)
        accept = verdict(1)
        related = ct_load(CT_STATE, R) + masked(R, _CT_RELATED) + compare(R, bytes(4), 1)
        add_rule(batch, self.name, "forward", ct_load(CT_DIRECTION, R) + compare(R, b"\x01") + accept)
        add_rule(batch, self.name, "forward", related + accept)
        for version in (4, 6):
            family = Family(version)
            own = family.source(R) + family.target(R + family.words) + lookup(f"self{version}", R) + accept
            add_rule(batch, self.name, "forward", family.only() + own)
            add_rule(batch, self.name, "forward", family.only() + family.source(R) + lookup(f"egress{version}", R, 0))
            add_rule(batch, self.name, "forward", family.only() + family.target(R) + lookup(f"ingress{version}", R, 0))

    def _difference(self, batch: ElementBatch, old: Wanted, new: Wanted) -> None:
        for name in new.sets.keys() - old.sets.keys():
            self._add_set(batch, new.sets[name])
        for name in new.sets.keys() & old.sets.keys():
            if new.sets[name] is not old.sets[name]:
                batch.delete(name, map(Element, old.sets[name].elements - new.sets[name].elements))
                batch.add(name, map(Element, new.sets[name].elements - old.sets[name].elements))
        for name in new.chains.keys() - old.chains.keys():
            self._add_chain(batch, new.chains[name])
        self._members(batch, old, new)
        # Where no pod is isolated, no packet passes here.
        if new.members and not old.members:
            self._hook(batch)
        elif old.members and not new.members:
            delete_chain(batch, self.name, "forward")
        # Last, when nothing refers to them any more.
        for name in old.chains.keys() - new.chains.keys():
            delete_chain(batch, self.name, name)
        for name in old.sets.keys() - new.sets.keys():
            delete_set(batch, self.name, name)

    def _members(self, batch: ElementBatch, old: Wanted, new: Wanted) -> None:
        for key, chain in old.members.items():
            if new.members.get(key) != chain:
                batch.delete(key[0], [Element(key[1])])
        for key, chain in new.members.items():
            if old.members.get(key) != chain:
                batch.add(key[0], [Element(key[1], jump(chain))])
        for version, packed in old.isolated - new.isolated:
            batch.delete(f"self{version}", [Element(packed + packed)])
        for version, packed in new.isolated - old.isolated:
            batch.add(f"self{version}", [Element(packed + packed)])

    def _add_set(self, batch: ElementBatch, wanted: PeerSet) -> None:
        family = Family(wanted.version)
        if wanted.kind == "ranges":
            add_set(
                batch, self.name, wanted.name, key_types=(family.address_type,), key_bytes=family.length, number=self._next(), flags=SET_INTERVAL,
            )  # fmt: skip
            batch.add(wanted.name, _range_elements(wanted.ranges, family.length))
            return
        types = (family.address_type,) if wanted.kind == "hosts" else (family.address_type, TYPE_PROTO, TYPE_PORT)
        length = family.length if wanted.kind == "hosts" else family.length + 8
        add_set(batch, self.name, wanted.name, key_types=types, key_bytes=length, number=self._next())
        batch.add(wanted.name, map(Element, wanted.elements))

    def _add_chain(self, batch: ElementBatch, chain: Chain) -> None:
        add_chain(batch, self.name, chain.name)
        for match in chain.matches:
            add_rule(batch, self.name, chain.name, _rule(chain, match))
        add_rule(batch, self.name, chain.name, verdict(DROP))


def _rule(chain: Chain, match: Match) -> bytes:
    family = Family(chain.version)
    code = family.only() if match.set_name or match.port is not None else b""
    if match.set_name:
        code += family.source(R) if chain.direction == "ingress" else family.target(R)
        if match.ports_in_set:
            at = R + family.words
            code += meta_load(META_L4PROTO, at) + payload(2, 2, 2, at + 1)
        code += lookup(match.set_name, R)
    if match.port is not None:
        protocol, first, last = match.port
        code += meta_load(META_L4PROTO, R) + compare(R, bytes((PROTOCOL_NUMBERS[protocol],)))
        if (first, last) != (0, 65535):
            code += payload(2, 2, 2, R)
            if first == last:
                code += compare(R, struct.pack(">H", first), EQUAL)
            else:
                code += compare(R, struct.pack(">H", first), GREATER_EQUAL) + compare(R, struct.pack(">H", last), LESS_EQUAL)
    return code + verdict(RETURN)


def _range_elements(ranges: Iterable[tuple[int, int]], length: int) -> list[Element]:
    """Interval sets hold where a range begins and, marked, where it has ended."""
    out = []
    for first, last in ranges:
        out.append(Element(first.to_bytes(length, "big")))
        if last < (1 << (8 * length)) - 1:
            out.append(Element((last + 1).to_bytes(length, "big"), closes=True))
    return out
