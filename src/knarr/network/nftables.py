"""nf_tables: table skeletons through the nft program, set elements and dumps through netlink.

Role: the floor below proxy, policy and pod network. Rules are few and readable, so `nft` writes them once
(`run_script`); what changes with the cluster are elements of sets and maps, and those go to the kernel directly
(`ElementBatch`): nft would first read back whole maps of tens of thousands of elements to change one of them.
Invariants: a batch is one transaction: all of it is done, or nothing. Key and data bytes are what the kernel compares:
every part of a concatenation is padded to four bytes, numbers from packets are in network order.
Source: linux/include/uapi/linux/netfilter/nf_tables.h, nfnetlink batches.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from knarr.network.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    be32,
    cstring,
    decode_error,
    frame,
    nested,
    text,
)
from knarr.network.netns import entered

_SUBSYSTEM = 10 << 8
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWSETELEM, _GETSETELEM, _DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13, _SUBSYSTEM | 14
_GETTABLE, _DELTABLE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_NFPROTO_INET = 1
_INTERVAL_END = 1
_CHUNK_BYTES = 60_000
_GOTO, _JUMP = 0xFFFFFFFC, 0xFFFFFFFD
_DROP, _ACCEPT = 0, 1
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
_ONE_HEADER, _TWO_HEADERS, _THREE_HEADERS = struct.Struct("=HH"), struct.Struct("=HHHH"), struct.Struct("=HHHHHH")
"""Of attributes in attributes: length and type of each."""
_HEADER_INET = struct.pack(">BBH", _NFPROTO_INET, 0, 0)


class NftError(Exception):
    """The nft program refused a script; the text is what it printed."""


class StateMismatch(Exception):
    """The kernel's sets are not what we believed (somebody flushed them): write everything anew."""


def run_script(script: str, netns: str | None = None) -> None:
    """Apply an nft script in one transaction. Blocks for some milliseconds.

    Raises:
      NftError: with nft's own words.
    """
    with entered(netns):
        done = subprocess.run(["nft", "-f", "-"], input=script, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise NftError(done.stderr.strip() or f"nft ended with {done.returncode}")


def list_table(table: str, netns: str | None = None) -> str:
    """The table as nft prints it; empty when there is none."""
    with entered(netns):
        done = subprocess.run(["nft", "list", "table", "inet", table], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout


def delete_table(table: str, netns: str | None = None) -> None:
    """Remove a table of the inet family with all in it; idempotent."""
    batch = ElementBatch(table)
    batch.raw(_DELTABLE, text(1, table))
    with entered(netns):
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            try:
                batch.commit(netlink)
            except (NetlinkError, StateMismatch) as error:
                if not isinstance(error, StateMismatch):
                    raise


def packed_address(address: str) -> bytes:
    """Four or sixteen bytes of a textual address."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


_PROTOCOL_KEYS = {name: bytes((number, 0, 0, 0)) for name, number in PROTOCOLS.items()}
_PORT = struct.Struct(">HH")


def protocol_key(protocol: str) -> bytes:
    """A layer 4 protocol as a part of a concatenation."""
    return _PROTOCOL_KEYS[protocol]


def port_key(port: int) -> bytes:
    """A port as a part of a concatenation."""
    return _PORT.pack(port, 0)


def number_key(number: int) -> bytes:
    """A number that the kernel itself made (numgen), in host order."""
    return struct.pack("=I", number)


def _verdict(code: int, chain: str = "") -> bytes:
    inner = be32(1, code) + (text(2, chain) if chain else b"")
    return nested(2, nested(2, inner))


def goto(chain: str) -> bytes:
    """Verdict data: continue in a chain, not to return."""
    return _verdict(_GOTO, chain)


def jump(chain: str) -> bytes:
    """Verdict data: visit a chain."""
    return _verdict(_JUMP, chain)


DROP = _verdict(_DROP)
ACCEPT = _verdict(_ACCEPT)


def value(data: bytes) -> bytes:
    """Plain data of a map element, of whole 32-bit words."""
    length = len(data)
    return _TWO_HEADERS.pack(length + 8, 0x8002, length + 4, 1) + data


class Element:
    """One element: key bytes, encoded data (from `value`, `goto`, …; empty in sets).

    In interval sets of concatenations `end` is the range's last key; in those of one field an element that `closes` is the first key behind the range.
    """

    __slots__ = ("closes", "data", "end", "key")

    def __init__(self, key: bytes, data: bytes = b"", end: bytes = b"", *, closes: bool = False) -> None:
        self.key = key
        self.data = data
        self.end = end
        self.closes = closes

    def encode(self) -> bytes:
        """The element as netlink attributes."""
        if not self.end and not self.closes:
            return encode_element(self.key, self.data)
        length = len(self.key)
        body = _TWO_HEADERS.pack(length + 8, 0x8001, length + 4, 1) + self.key
        if self.end:
            body += nested(10, attribute(1, self.end))
        if self.closes:
            body += be32(3, _INTERVAL_END)
        body += self.data
        return _ONE_HEADER.pack(len(body) + 4, 0x8001) + body


def encode_element(key: bytes, data: bytes = b"") -> bytes:
    """An `Element` of just these, encoded: tens of thousands of objects less where many are written."""
    length = len(key)
    return _THREE_HEADERS.pack(length + len(data) + 12, 0x8001, length + 8, 0x8001, length + 4, 1) + key + data


class ElementBatch:
    """Collects element changes of one inet table and commits them as one transaction."""

    def __init__(self, table: str) -> None:
        self._table = text(1, table)
        self._flushes = 0
        self._messages: list[tuple[int, int, bytes, str]] = []

    def __bool__(self) -> bool:
        return bool(self._messages)

    def only_flushes(self) -> ElementBatch:
        """A batch with just the emptied sets of this one."""
        batch = ElementBatch("")
        batch._table = self._table
        batch._messages = self._messages[: self._flushes]
        batch._flushes = self._flushes
        return batch

    @property
    def started_flushed(self) -> bool:
        """Whether the batch begins by emptying sets."""
        return self._flushes > 0

    def raw(self, kind: int, body: bytes, flags: int = 0, what: str = "") -> None:
        """Add any nf_tables message."""
        self._messages.append((kind, flags, body, what or f"nf_tables message {kind & 0xFF}"))

    def flush(self, set_name: str) -> None:
        """Empty a set or map."""
        self._messages.insert(self._flushes, (_DELSETELEM, 0, self._table + text(2, set_name), f"flushing {set_name}"))
        self._flushes += 1

    def add(self, set_name: str, elements: Iterable[Element]) -> None:
        """Add elements; one that is there already with equal data is fine."""
        self.add_encoded(set_name, (element.encode() for element in elements))

    def add_encoded(self, set_name: str, encoded: Iterable[bytes]) -> None:
        """Add elements that are encoded already."""
        self._spread(_NEWSETELEM, NLM_F_CREATE, set_name, encoded, "adding to")

    def delete(self, set_name: str, elements: Iterable[Element]) -> None:
        """Delete elements; one that is missing fails the batch with StateMismatch."""
        keys = (Element(element.key, b"", element.end).encode() for element in elements)
        self._spread(_DELSETELEM, 0, set_name, keys, "deleting from")

    def _spread(self, kind: int, flags: int, set_name: str, encoded: Iterable[bytes], what: str) -> None:
        head = self._table + text(2, set_name)
        chunk: list[bytes] = []
        size = 0
        for item in encoded:
            if size + len(item) > _CHUNK_BYTES:
                self._messages.append((kind, flags, head + nested(3, *chunk), f"{what} {set_name}"))
                chunk, size = [], 0
            chunk.append(item)
            size += len(item)
        if chunk:
            self._messages.append((kind, flags, head + nested(3, *chunk), f"{what} {set_name}"))

    def commit(self, netlink: NetlinkSocket) -> None:
        """Send everything as one transaction and wait for the answer. Nothing to do is fine.

        Raises:
          StateMismatch: something to delete is not there, or something to add is there with other data.
          NetlinkError: any other refusal; nothing was changed.
        """
        if not self._messages:
            return
        count = len(self._messages)
        first = netlink.next_sequences(count + 2)
        begin = struct.pack(">BBH", 0, 0, _SUBSYSTEM >> 8)
        parts = [frame(_BATCH_BEGIN, NLM_F_REQUEST, first, begin)]
        for index, (kind, flags, body, _what) in enumerate(self._messages):
            wants_answer = NLM_F_ACK if index == count - 1 else 0
            parts.append(frame(kind, NLM_F_REQUEST | flags | wants_answer, first + 1 + index, _HEADER_INET + body))
        parts.append(frame(_BATCH_END, NLM_F_REQUEST, first + 1 + count, begin))
        data = b"".join(parts)
        netlink.grow_send_buffer(len(data) + 65536)
        netlink.send_raw(data)
        failure: NetlinkError | None = None
        last = first + count
        while True:
            for kind, _flags, sequence, answer in netlink.receive():
                if kind != NLMSG_ERROR or not first <= sequence <= last:
                    continue
                index = max(0, sequence - first - 1)
                error = decode_error(answer, self._messages[index][3], index)
                failure = failure or error
                # A refusal of the batch as a whole is reported on its first message and nothing else follows.
                if sequence in (last, first):
                    if failure is None:
                        return
                    if failure.errno in (errno.ENOENT, errno.EEXIST, errno.EBUSY):
                        raise StateMismatch(str(failure))
                    raise failure


def read_elements(netlink: NetlinkSocket, table: str, set_name: str) -> list[tuple[bytes, bytes]]:
    """All elements of a set or map as (key, plain data); verdict data comes back empty.

    Raises:
      NetlinkError: no such table or set.
    """
    body = _HEADER_INET + text(1, table) + text(2, set_name)
    found: list[tuple[bytes, bytes]] = []
    for answer in netlink.dump(_GETSETELEM, body, f"reading {set_name}"):
        for kind, content in attributes(answer, 4):
            if kind != 3:
                continue
            for _list_kind, item in attributes(content):
                fields = dict(attributes(item))
                found.append((_data(fields.get(1)), _data(fields.get(2))))
    return found


def _data(field: memoryview | None) -> bytes:
    if field is None:
        return b""
    return next((bytes(content) for kind, content in attributes(field) if kind == 1), b"")


def table_exists(netlink: NetlinkSocket, table: str) -> bool:
    """Whether the inet table is there."""
    try:
        netlink.dump(_GETTABLE, _HEADER_INET + text(1, table), f"reading table {table}", flags=0)
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def tables(netlink: NetlinkSocket) -> list[str]:
    """Names of all inet tables."""
    found: list[str] = []
    for answer in netlink.dump(_GETTABLE, _HEADER_INET, "listing tables"):
        found.extend(cstring(content) for kind, content in attributes(answer, 4) if kind == 1)
    return found


class SetState:
    """What one set or map holds, as we last wrote it; turns a wanted content into the smallest change."""

    __slots__ = ("content", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.content: dict[bytes, bytes] = {}

    def change(self, batch: ElementBatch, wanted: Mapping[bytes, bytes]) -> None:
        """Add to the batch what makes the set hold exactly `wanted` (key to encoded data)."""
        current = self.content
        gone = [Element(key) for key, data in current.items() if wanted.get(key) != data]
        new = [Element(key, data) for key, data in wanted.items() if current.get(key) != data]
        if gone:
            batch.delete(self.name, gone)
        if new:
            batch.add(self.name, new)


def environment_has_nft() -> bool:
    """Whether the nft program can be found."""
    return any(os.access(os.path.join(folder, "nft"), os.X_OK) for folder in [*os.get_exec_path(), "/usr/sbin", "/sbin"])


def join(parts: Sequence[bytes]) -> bytes:
    """A concatenation from its padded parts."""
    return b"".join(parts)
