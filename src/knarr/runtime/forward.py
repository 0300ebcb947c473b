"""Port-forward: connections to a port inside a sandbox's network namespace, as localhost there.

Role: port_forward of the runtime. A short-lived thread enters the namespace only to make the socket, which belongs to that
namespace for ever after; connecting and the streams run in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket

from knarr.runtime import namespaces
from knarr.runtime.cri import RuntimeFault
from knarr.runtime.pipes import read_some, wait_writable, write_all
from knarr.runtime.workers import run_in_thread

_CONNECT_SECONDS = 10.0


class Connection:
    """One connection; implements cri.ByteStream."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    async def read(self) -> bytes:
        """Some bytes; b"" at the end."""
        return await read_some(self._socket.fileno())

    async def write(self, data: bytes) -> None:
        await write_all(self._socket.fileno(), data)

    async def write_eof(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        self._socket.close()


def _make_sockets(netns: str) -> list[socket.socket]:
    if netns:
        namespaces.enter(netns)
    made = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            made.append(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
    return made


async def connect(netns: str, port: int) -> Connection:
    """Connect to localhost, IPv4 first; "" is the host's namespace. Raises RuntimeFault."""
    try:
        sockets = await run_in_thread(lambda: _make_sockets(netns), "port-forward")
    except OSError as error:
        raise RuntimeFault(f"failed to enter the pod's network: {error.strerror}") from error
    chosen: socket.socket | None = None
    last = errno.EAFNOSUPPORT
    try:
        for sock in sockets:
            last = await _connect_one(sock, port)
            if last == 0:
                chosen = sock
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return Connection(sock)
    finally:
        for sock in sockets:
            if sock is not chosen:
                sock.close()
    raise RuntimeFault(f"failed to connect to localhost:{port} inside the pod: {os.strerror(last).lower()}")


async def _connect_one(sock: socket.socket, port: int) -> int:
    host = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    result = sock.connect_ex((host, port))
    if result == errno.EINPROGRESS:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await wait_writable(sock.fileno())
        except TimeoutError:
            return errno.ETIMEDOUT
        result = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return result
