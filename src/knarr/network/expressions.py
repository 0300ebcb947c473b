"""nf_tables expressions, chains and sets as netlink bytes, for rules that change together with elements.

Role: shared by the proxy's chains and the policy table. A rule is the concatenation of expressions; registers are the
sixteen 32-bit ones from `R` on. Everything here lists well: `nft list ruleset` shows such rules like its own.
Source: linux/include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct

from knarr.network.netlink import NLM_F_APPEND, NLM_F_CREATE, attribute, be32, nested, text, u8
from knarr.network.nftables import ElementBatch

R = 8
"""Number of the first 32-bit register."""
NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE, NEWSET, DELSET = ((10 << 8) | number for number in (0, 2, 3, 5, 6, 8, 9, 11))
EQUAL, NOT_EQUAL, LESS_EQUAL, GREATER_EQUAL = 0, 1, 3, 5
META_MARK, META_NFPROTO, META_L4PROTO = 3, 15, 16
CT_STATE, CT_DIRECTION, CT_STATUS, CT_PROTO_DESTINATION = 0, 1, 2, 12
CT_SOURCE, CT_DESTINATION = {4: 19, 6: 21}, {4: 20, 6: 22}
DROP, ACCEPT, JUMP, GOTO, RETURN = 0, 1, -3, -4, -5
TYPE_IPV4, TYPE_IPV6, TYPE_PROTO, TYPE_PORT = 7, 8, 12, 13
"""nft's own numbers of data types, so that it prints elements well."""
SET_INTERVAL, SET_MAP, SET_CONCAT = 0x4, 0x8, 0x80
_VERDICT_TYPE = 0xFFFFFF00


def expression(name: str, *fields: bytes) -> bytes:
    """One expression of a rule."""
    return nested(1, text(1, name), nested(2, *fields))


def meta_load(key: int, register: int) -> bytes:
    """Load packet metadata."""
    return expression("meta", be32(2, key), be32(1, register))


def meta_set(key: int, register: int) -> bytes:
    """Set packet metadata."""
    return expression("meta", be32(2, key), be32(3, register))


def payload(base: int, offset: int, length: int, register: int) -> bytes:
    """Load bytes of the packet; base 1 is the network header, 2 the transport header."""
    return expression("payload", be32(1, register), be32(2, base), be32(3, offset), be32(4, length))


def compare(register: int, data: bytes, operation: int = EQUAL) -> bytes:
    """End the rule unless the register compares so with data."""
    return expression("cmp", be32(1, register), be32(2, operation), nested(3, attribute(1, data)))


def numgen(modulus: int, register: int) -> bytes:
    """Draw a number below the modulus."""
    return expression("numgen", be32(1, register), be32(2, modulus), be32(3, 1), be32(4, 0))


def lookup(set_name: str, source: int, target: int | None = None) -> bytes:
    """Look a key up; the rule ends when it is missing. target 0 carries out a verdict map's verdict."""
    fields = [text(1, set_name), be32(2, source)]
    if target is not None:
        fields.append(be32(3, target))
    return expression("lookup", *fields)


def update(set_name: str, key: int, data: int, seconds: int) -> bytes:
    """Store an element of a dynamic map, or renew its time."""
    timeout = attribute(6, struct.pack(">Q", seconds * 1000))
    return expression("dynset", text(1, set_name), be32(3, 1), be32(4, key), be32(5, data), timeout)


def original(key: int, register: int) -> bytes:
    """Load what the connection's first packet said before it was translated."""
    return expression("ct", be32(2, key), be32(1, register), u8(3, 0))


def ct_load(key: int, register: int) -> bytes:
    """Load a property of the tracked connection."""
    return expression("ct", be32(2, key), be32(1, register))


def masked(register: int, mask: int) -> bytes:
    """Keep only some bits of a register (host order)."""
    keep = nested(4, attribute(1, struct.pack("=I", mask)))
    return expression("bitwise", be32(1, register), be32(2, register), be32(3, 4), keep, nested(5, attribute(1, bytes(4))))


def mark(bit: int) -> bytes:
    """Set one bit of the packet's mark."""
    keep = nested(4, attribute(1, struct.pack("=I", ~bit & 0xFFFFFFFF)))
    flip = nested(5, attribute(1, struct.pack("=I", bit)))
    bitwise = expression("bitwise", be32(1, R), be32(2, R), be32(3, 4), keep, flip)
    return meta_load(META_MARK, R) + bitwise + meta_set(META_MARK, R)


def unmark(bit: int) -> bytes:
    """Clear one bit of the packet's mark."""
    return meta_load(META_MARK, R) + masked(R, ~bit & 0xFFFFFFFF) + meta_set(META_MARK, R)


def dnat(family: int, address: int, port: int) -> bytes:
    """Send the connection to the address and port in registers."""
    return expression("nat", be32(1, 1), be32(2, 2 if family == 4 else 10), be32(3, address), be32(5, port))


def destination_is_local(*, source: bool = False, opposite: bool = False) -> bytes:
    """End the rule unless the packet's destination (or source) is an address of this host; `opposite` unless it is none."""
    kind = expression("fib", be32(1, R), be32(2, 3), be32(3, 1 if source else 2))
    return kind + compare(R, struct.pack("=I", 2), NOT_EQUAL if opposite else EQUAL)


def verdict(code: int, chain: str = "") -> bytes:
    """What becomes of the packet."""
    inner = nested(2, be32(1, code & 0xFFFFFFFF), *([text(2, chain)] if chain else []))
    return expression("immediate", be32(1, 0), nested(2, inner))


class Family:
    """Where the two families differ."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.words = 1 if version == 4 else 4
        self.length = 4 * self.words
        self.source_offset, self.target_offset = (12, 16) if version == 4 else (8, 24)
        self.address_type = TYPE_IPV4 if version == 4 else TYPE_IPV6

    def only(self) -> bytes:
        """End the rule for packets of the other family."""
        return meta_load(META_NFPROTO, R) + compare(R, bytes((2 if self.version == 4 else 10,)))

    def source(self, register: int = R) -> bytes:
        """Load the source address."""
        return payload(1, self.source_offset, self.length, register)

    def target(self, register: int = R) -> bytes:
        """Load the destination address."""
        return payload(1, self.target_offset, self.length, register)


def add_table(batch: ElementBatch, table: str) -> None:
    """Make an inet table (no matter if it is there)."""
    batch.raw(NEWTABLE, text(1, table), NLM_F_CREATE, f"adding table {table}")


def delete_table(batch: ElementBatch, table: str) -> None:
    """Delete an inet table with all in it."""
    batch.raw(DELTABLE, text(1, table), 0, f"deleting table {table}")


def add_chain(batch: ElementBatch, table: str, name: str) -> None:
    """Make a chain."""
    batch.raw(NEWCHAIN, text(1, table) + text(3, name), NLM_F_CREATE, f"adding chain {name}")


def add_base_chain(batch: ElementBatch, table: str, name: str, *, hook: int, priority: int) -> None:
    """Make a filter chain on a hook, accepting by default."""
    place = nested(4, be32(1, hook), be32(2, priority & 0xFFFFFFFF))
    batch.raw(NEWCHAIN, text(1, table) + text(3, name) + place + be32(5, 1) + text(7, "filter"), NLM_F_CREATE, f"adding chain {name}")


def delete_chain(batch: ElementBatch, table: str, name: str) -> None:
    """Delete a chain that nothing refers to, with its rules."""
    batch.raw(DELRULE, text(1, table) + text(2, name), 0, f"emptying chain {name}")
    batch.raw(DELCHAIN, text(1, table) + text(3, name), 0, f"deleting chain {name}")


def add_rule(batch: ElementBatch, table: str, chain: str, rule: bytes) -> None:
    """Append a rule."""
    batch.raw(NEWRULE, text(1, table) + text(2, chain) + nested(4, rule), NLM_F_CREATE | NLM_F_APPEND, f"adding a rule to {chain}")


def add_set(
    batch: ElementBatch,
    table: str,
    name: str,
    *,
    key_types: tuple[int, ...],
    key_bytes: int,
    number: int,
    flags: int = 0,
    verdicts: bool = False,
) -> None:
    """Make a set, or a verdict map. `number` must be unique within the batch."""
    key_type = 0
    for kind in key_types:
        key_type = key_type << 6 | kind
    body = (
        text(1, table)
        + text(2, name)
        + be32(3, flags | (SET_MAP if verdicts else 0))
        + be32(4, key_type)
        + be32(5, key_bytes)
        + be32(10, number)
    )
    if verdicts:
        body += be32(6, _VERDICT_TYPE) + be32(7, 16)
    batch.raw(NEWSET, body, NLM_F_CREATE, f"adding set {name}")


def delete_set(batch: ElementBatch, table: str, name: str) -> None:
    """Delete a set that nothing refers to."""
    batch.raw(DELSET, text(1, table) + text(2, name), 0, f"deleting set {name}")
