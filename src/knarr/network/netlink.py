"""Netlink without a library: sockets, messages and attributes, for the few families that the network component speaks.

Role: the wire floor below `rtnl` (links, addresses, routes), `nftables` (set elements) and `conntrack`. A general
library costs 23 MB of resident memory and about a millisecond per message; a pod's whole network is some ten messages
that this module packs into two datagrams.
Invariants: a `NetlinkSocket` stays in the network namespace it was opened in, whatever the calling thread does later.
Calls block for as long as the kernel works on them (micro- to milliseconds), so the event loop reaches them through one
worker thread.
Must not know: Kubernetes, files, what a message means.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType

NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_SO_RCVBUFFORCE = 33
_SO_SNDBUFFORCE = 32
_SO_NETNS_COOKIE = 71
_RECEIVE_BYTES = 1 << 18
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class NetlinkError(OSError):
    """The kernel refused a message. `errno` is set; the text holds what was asked and the kernel's own explanation.

    `index` is the message's place in the request, so that a batch can blame one of its parts.
    """

    def __init__(self, code: int, what: str, hint: str = "", index: int = 0) -> None:
        super().__init__(code, f"{what}: {os.strerror(code)}" + (f" ({hint})" if hint else ""))
        self.index = index


class Message:
    """One request: type, flags (REQUEST and ACK are implied), body after the header, and words for error texts."""

    __slots__ = ("body", "flags", "kind", "what")

    def __init__(self, kind: int, flags: int, body: bytes, what: str) -> None:
        self.kind = kind
        self.flags = flags
        self.body = body
        self.what = what


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, padded to four bytes."""
    length = len(value)
    return _ATTRIBUTE.pack(length + 4, kind) + value + _PADDING[length & 3]


def nested(kind: int, *attributes: bytes) -> bytes:
    """Encode an attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def u8(kind: int, value: int) -> bytes:
    """An attribute of one byte."""
    return attribute(kind, bytes((value,)))


def u16(kind: int, value: int) -> bytes:
    """An attribute of two bytes in host order."""
    return attribute(kind, struct.pack("=H", value))


def u32(kind: int, value: int) -> bytes:
    """An attribute of four bytes in host order."""
    return attribute(kind, struct.pack("=I", value))


def be32(kind: int, value: int) -> bytes:
    """An attribute of four bytes in network order (netfilter)."""
    return attribute(kind, struct.pack(">I", value))


def text(kind: int, value: str) -> bytes:
    """An attribute holding a zero-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def attributes(data: bytes | memoryview, offset: int = 0) -> Iterator[tuple[int, memoryview]]:
    """Yield (type without flags, value) of each attribute from `offset` on; stops at a malformed one."""
    view = memoryview(data)
    end = len(view)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(view, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & NLA_TYPE_MASK, view[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def cstring(value: memoryview) -> str:
    """Decode a zero-terminated string attribute."""
    return bytes(value).split(b"\0", 1)[0].decode(errors="replace")


class NetlinkSocket:
    """A socket of one netlink family in the network namespace of the thread that opens it.

    Not for use by two threads at once.
    """

    def __init__(self, family: int, *, buffer_bytes: int = 1 << 20) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            # The forced variants pass the sysctl limits; a batch must go out in a single datagram.
            for option, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
                try:
                    self._socket.setsockopt(socket.SOL_SOCKET, option, buffer_bytes)
                except PermissionError:
                    self._socket.setsockopt(socket.SOL_SOCKET, plain, buffer_bytes)
            self._socket.settimeout(60)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor, for event loops."""
        return self._socket.fileno()

    def grow_send_buffer(self, size_bytes: int) -> None:
        """Let one datagram of this size be sent."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size_bytes * 2)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes * 2)

    def send_all(self, messages: Sequence[Message]) -> list[NetlinkError | None]:
        """Carry out messages in order, in one datagram; each may fail by itself.

        Returns:
          One entry per message: None when the kernel accepted it.
        """
        if not messages:
            return []
        first = self._sequence + 1
        parts: list[bytes] = []
        for message in messages:
            self._sequence += 1
            body = message.body
            parts.append(
                _HEADER.pack(len(body) + 16, message.kind, message.flags | NLM_F_REQUEST | NLM_F_ACK, self._sequence & 0xFFFFFFFF, 0)
            )
            parts.append(body)
            parts.append(_PADDING[len(body) & 3])
        self._socket.send(b"".join(parts))
        results: list[NetlinkError | None] = [None] * len(messages)
        missing = len(messages)
        while missing:
            for kind, _flags, sequence, answer in self._receive():
                index = sequence - first
                if kind != NLMSG_ERROR or not 0 <= index < len(messages):
                    continue
                missing -= 1
                results[index] = decode_error(answer, messages[index].what, index)
        return results

    def send(self, *messages: Message, ignore: tuple[int, ...] = ()) -> None:
        """Carry out messages in order.

        Raises:
          NetlinkError: the first refusal whose errno is not in `ignore`; later messages were still carried out.
        """
        for error in self.send_all(messages):
            if error is not None and error.errno not in ignore:
                raise error

    def dump(self, kind: int, body: bytes, what: str, *, flags: int = NLM_F_DUMP) -> list[memoryview]:
        """Read a whole table; returns the bodies of all answers. Retries when the kernel says the dump was torn.

        Raises:
          NetlinkError: the kernel refused.
        """
        for _attempt in range(5):
            self._sequence += 1
            sequence = self._sequence
            self._socket.send(_HEADER.pack(len(body) + 16, kind, NLM_F_REQUEST | flags, sequence & 0xFFFFFFFF, 0) + body)
            answers, torn = self._collect(sequence, what, multiple=bool(flags & NLM_F_DUMP))
            if not torn:
                return answers
        return answers

    def _collect(self, sequence: int, what: str, *, multiple: bool) -> tuple[list[memoryview], bool]:
        answers: list[memoryview] = []
        torn = False
        while True:
            for kind, flags, received, body in self._receive():
                if received != sequence:
                    continue
                torn = torn or bool(flags & NLM_F_DUMP_INTR)
                if kind == NLMSG_ERROR:
                    error = decode_error(body, what, 0)
                    if error is not None:
                        raise error
                    return answers, torn
                if kind == NLMSG_DONE:
                    return answers, torn
                answers.append(body)
                if not multiple and not flags & NLM_F_MULTI:
                    return answers, torn

    def _receive(self) -> list[tuple[int, int, int, memoryview]]:
        data = self._socket.recv(_RECEIVE_BYTES)
        return list(split(data))

    def send_raw(self, data: bytes) -> None:
        """Send a datagram that the caller framed itself (a netfilter batch)."""
        self._socket.send(data)

    def receive(self) -> list[tuple[int, int, int, memoryview]]:
        """Receive one datagram as (type, flags, sequence, body) tuples."""
        return self._receive()

    def next_sequences(self, count: int) -> int:
        """Reserve `count` sequence numbers; returns the first."""
        first = self._sequence + 1
        self._sequence += count
        return first

    def subscribe(self, group: int) -> None:
        """Join a multicast group; answers then also hold its notifications."""
        self._socket.setsockopt(_SOL_NETLINK, 1, group)

    def set_option(self, level: int, option: int, value: bytes) -> None:
        """Set a socket option."""
        self._socket.setsockopt(level, option, value)

    def netns_cookie(self) -> int:
        """The kernel's number, never used again, of the network namespace that the socket lives in (Linux 5.14 and later)."""
        return int(struct.unpack("=Q", self._socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])

    def set_blocking(self, blocking: bool) -> None:
        """Switch between the blocking calls above and use from an event loop."""
        self._socket.settimeout(60 if blocking else 0)


def frame(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One message with its header and padding."""
    return _HEADER.pack(len(body) + 16, kind, flags, sequence & 0xFFFFFFFF, 0) + body + _PADDING[len(body) & 3]


def split(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield (type, flags, sequence, body) of each message of a datagram."""
    view = memoryview(data)
    offset = 0
    while offset + 16 <= len(view):
        length, kind, flags, sequence, _port = _HEADER.unpack_from(view, offset)
        if length < 16:
            return
        yield kind, flags, sequence, view[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def decode_error(body: memoryview, what: str, index: int) -> NetlinkError | None:
    """Read an acknowledgement; None when it says success."""
    code = -struct.unpack_from("=i", body)[0]
    if code == 0:
        return None
    hint = ""
    # With CAP_ACK the request itself is not echoed: its header alone precedes the explanation.
    for kind, value in attributes(body, 20):
        if kind == 1:
            hint = cstring(value)
    return NetlinkError(code, what, hint, index)


GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL)
"""What removing something already removed may answer; pass as `ignore` where that is fine."""
