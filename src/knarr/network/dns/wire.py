"""DNS messages: reading queries and writing answers, by hand because every packet passes here.

Role: used by `server` (each query), `records` (record data) and `forward` (lifetimes). A general library takes about
200 microseconds for what is some ten here.
Invariants: anything malformed raises WireError and nothing else; names are lower case in memory and keep the asker's
spelling on the wire; a message never exceeds what the asker can take (truncation is the writer's work).
Source: RFC 1035, RFC 2308 (negative answers), RFC 2782 (SRV), RFC 6891 (EDNS).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import ip_address
from typing import NamedTuple

A, NS, CNAME, SOA, PTR, TXT, AAAA, SRV, OPT, ANY = 1, 2, 5, 6, 12, 16, 28, 33, 41, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
QR, AA, TC, RD, RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
TYPE_NAMES = {A: "A", NS: "NS", CNAME: "CNAME", SOA: "SOA", PTR: "PTR", TXT: "TXT", AAAA: "AAAA", SRV: "SRV", ANY: "ANY"}
OUR_UDP_BYTES = 1232
"""The largest answer we send over UDP even to those who would take more: it passes any path unfragmented."""

_HEADER = struct.Struct(">HHHHHH")
_QUESTION = struct.Struct(">HH")
_RECORD = struct.Struct(">HHIH")


class WireError(ValueError):
    """A message that cannot be read."""


class Query(NamedTuple):
    """A question as asked."""

    id: int
    flags: int
    name: str
    """Lower case, without the final dot; "" is the root."""
    type: int
    klass: int
    question: bytes
    """The question section as it came, to be sent back."""
    udp_bytes: int
    """How much the asker takes over UDP."""
    edns: bool
    dnssec_ok: bool


class Record(NamedTuple):
    """One resource record; data is wire format for addresses and text, names uncompressed."""

    name: str
    type: int
    ttl: int
    data: bytes


def build_query(identity: int, name: str, kind: int) -> bytes:
    """A query for one name, recursion wanted. Raises WireError for a name that cannot be asked."""
    return _HEADER.pack(identity, RD, 1, 0, 0, 0) + encode_name(name) + _QUESTION.pack(kind, IN)


def read_addresses(message: bytes) -> list[str]:
    """The addresses in an answer's answer section. Raises WireError."""
    lifetimes(message)
    _id, _flags, questions, answers, _authorities, _additionals = _HEADER.unpack_from(message)
    offset = 12
    for _ in range(questions):
        offset = skip_name(message, offset) + 4
    found = []
    for _ in range(answers):
        offset = skip_name(message, offset)
        kind, _klass, _ttl, length = _RECORD.unpack_from(message, offset)
        data = message[offset + 10 : offset + 10 + length]
        if kind in (A, AAAA):
            found.append(str(ip_address(data)))
        offset += 10 + length
    return found


def parse_query(data: bytes) -> Query:
    """Read a query of one question. Raises WireError."""
    if len(data) < 17:
        raise WireError("too short")
    identity, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(data)
    if flags & QR or questions != 1 or answers or authorities:
        raise WireError("not a plain query")
    offset = 12
    labels: list[bytes] = []
    end = len(data)
    while True:
        if offset >= end:
            raise WireError("name runs out of the message")
        length = data[offset]
        if length == 0:
            break
        if length > 63:
            raise WireError("compressed or overlong label in a question")
        labels.append(data[offset + 1 : offset + 1 + length])
        offset += length + 1
    if offset - 12 > 254 or offset + 5 > end:
        raise WireError("question too long")
    kind, klass = _QUESTION.unpack_from(data, offset + 1)
    offset += 5
    question = data[12:offset]
    name = b".".join(labels).decode("latin-1").lower()
    udp_bytes, edns, dnssec_ok = 512, False, False
    for _ in range(additionals):
        # Only OPT at the root matters; anything else (TSIG) ends the search.
        if offset + 11 > end or data[offset] != 0:
            break
        additional, size, extended, length = _RECORD.unpack_from(data, offset + 1)
        if additional != OPT:
            break
        edns, udp_bytes, dnssec_ok = True, max(512, size), bool(extended & 0x8000)
        offset += 11 + length
    return Query(identity, flags, name, kind, klass, question, udp_bytes, edns, dnssec_ok)


def question_type(question: bytes) -> int:
    """The type asked for, of a well-formed query without its id."""
    offset = 10
    while length := question[offset]:
        offset += length + 1
    return int.from_bytes(question[offset + 1 : offset + 3], "big")


def encode_name(name: str) -> bytes:
    """A name without compression. Raises WireError for labels that cannot be."""
    if not name:
        return b"\0"
    out = []
    for label in name.encode("latin-1", "replace").split(b"."):
        if not 0 < len(label) < 64:
            raise WireError(f"bad label in {name!r}")
        out.append(bytes((len(label),)) + label)
    return b"".join(out) + b"\0"


class Writer:
    """Builds one message; owner names are compressed against each other."""

    def __init__(self, question: bytes, name: str) -> None:
        self._parts: list[bytes] = [question]
        self._size = 12 + len(question)
        self._offsets: dict[str, int] = {}
        self._remember(name, 12)

    def _remember(self, name: str, offset: int) -> None:
        while name:
            if offset < 0x4000:
                self._offsets.setdefault(name, offset)
            label, _dot, name = name.partition(".")
            offset += len(label) + 1

    def name(self, name: str) -> bytes:
        """A name to be placed at the message's end, compressed."""
        known = self._offsets.get(name)
        if known is not None:
            return struct.pack(">H", 0xC000 | known)
        rest = name
        head = b""
        while rest and rest not in self._offsets:
            label, _dot, rest = rest.partition(".")
            raw = label.encode("latin-1", "replace")
            if not 0 < len(raw) < 64:
                raise WireError(f"bad label in {name!r}")
            head += bytes((len(raw),)) + raw
        self._remember(name, self._size)
        return head + (struct.pack(">H", 0xC000 | self._offsets[rest]) if rest else b"\0")

    def record(self, record: Record) -> None:
        """Append a record."""
        name = self.name(record.name)
        out = name + _RECORD.pack(record.type, IN, record.ttl, len(record.data)) + record.data
        self._parts.append(out)
        self._size += len(out)

    def opt(self, *, dnssec_ok: bool) -> None:
        """Append our EDNS record."""
        out = b"\0" + _RECORD.pack(OPT, OUR_UDP_BYTES, 0x8000 if dnssec_ok else 0, 0)
        self._parts.append(out)
        self._size += len(out)

    def finish(self, identity: int, flags: int, answers: int, authorities: int, additionals: int) -> bytes:
        """The whole message."""
        return _HEADER.pack(identity, flags, 1, answers, authorities, additionals) + b"".join(self._parts)


def build_answer(
    query: Query,
    code: int,
    answers: Sequence[Record] = (),
    authorities: Sequence[Record] = (),
    additionals: Sequence[Record] = (),
    *,
    authoritative: bool = True,
    limit_bytes: int = 65535,
) -> bytes:
    """Write an answer that fits `limit_bytes`: additional records go first, then the answer is cut and marked truncated."""
    flags = QR | (query.flags & (RD | 0x7800)) | RA | code | (AA if authoritative else 0)
    for kept in (additionals, ()):
        writer = Writer(query.question, query.name)
        for section in (answers, authorities, kept):
            for record in section:
                writer.record(record)
        if query.edns:
            writer.opt(dnssec_ok=query.dnssec_ok)
        message = writer.finish(query.id, flags, len(answers), len(authorities), len(kept) + query.edns)
        if len(message) <= limit_bytes:
            return message
    writer = Writer(query.question, query.name)
    if query.edns:
        writer.opt(dnssec_ok=query.dnssec_ok)
    return writer.finish(query.id, flags | TC, 0, 0, int(query.edns))


def error_answer(data: bytes, code: int) -> bytes | None:
    """An answer to something unreadable: the header alone; None when not even that can be told."""
    if len(data) < 12 or data[2] & 0x80:
        return None
    identity, flags = struct.unpack_from(">HH", data)
    return _HEADER.pack(identity, QR | (flags & (RD | 0x7800)) | code, 0, 0, 0, 0)


def skip_name(data: bytes, offset: int) -> int:
    """The offset behind a name. Raises WireError."""
    end = len(data)
    while offset < end:
        length = data[offset]
        if length == 0:
            return offset + 1
        if length >= 0xC0:
            return offset + 2
        offset += length + 1
    raise WireError("name runs out of the message")


def lifetimes(data: bytes) -> tuple[list[tuple[int, int]], int, bool]:
    """Where an answer's lifetimes are.

    Returns:
      (offset, seconds) of each record's TTL (OPT excluded), the seconds a negative answer may be kept (from its SOA; 0 without one),
      and whether there is any answer record.
    """
    if len(data) < 12:
        raise WireError("too short")
    _id, _flags, questions, answers, authorities, additionals = _HEADER.unpack_from(data)
    offset = 12
    for _ in range(questions):
        offset = skip_name(data, offset) + 4
    found: list[tuple[int, int]] = []
    negative = 0
    for index in range(answers + authorities + additionals):
        offset = skip_name(data, offset)
        if offset + 10 > len(data):
            raise WireError("record runs out of the message")
        kind, _klass, ttl, length = _RECORD.unpack_from(data, offset)
        if kind != OPT:
            found.append((offset + 4, ttl))
        if kind == SOA and index >= answers and length >= 20 and offset + 10 + length <= len(data):
            negative = min(ttl, struct.unpack_from(">I", data, offset + 10 + length - 4)[0])
        offset += 10 + length
    if offset > len(data):
        raise WireError("record runs out of the message")
    return found, negative, answers > 0


def srv_data(priority: int, weight: int, port: int, target: str) -> bytes:
    """Data of an SRV record."""
    return struct.pack(">HHH", priority, weight, port) + encode_name(target)


def soa_data(primary: str, mailbox: str, serial: int, minimum_seconds: int) -> bytes:
    """Data of an SOA record."""
    return encode_name(primary) + encode_name(mailbox) + struct.pack(">IIIII", serial, 7200, 1800, 86400, minimum_seconds)


def text_data(text: str) -> bytes:
    """Data of a TXT record of one string."""
    raw = text.encode()[:255]
    return bytes((len(raw),)) + raw
