"""Attach: the streams of a container's first process, through conmon's socket.

Role: attach of the runtime. conmon drops a client that does not read, so what arrives is taken off the socket at once and kept
in memory up to a bound; beyond it the attach ends (the log has everything). Callers: embedded.py.
Source: containers/conmon src/conn_sock.c: one packet is one byte of channel (2 stdout, 3 stderr) and the data.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

from knarr.runtime import conmon
from knarr.runtime.container import Containers
from knarr.runtime.container_model import Container
from knarr.runtime.cri import RuntimeFault
from knarr.runtime.pipes import Merged, write_all

_PACKET = 8192
_CHUNKS = 2048


def _split(_: int, packet: bytes) -> tuple[int, bytes]:
    return (2 if packet[0] == 3 else 1), packet[1:]


class Attach:
    """One attached client; implements cri.Stream."""

    def __init__(self, containers: Containers, container: Container, *, stdin: bool) -> None:
        self._containers, self._container = containers, container
        self._bundle = containers.bundle(container.id)
        self._socket = _connect(self._bundle)
        self._stdin = stdin
        self._output = Merged([(1, os.dup(self._socket.fileno()))], chunks=_CHUNKS, split=_split)

    def read(self) -> AsyncIterator[tuple[int, bytes]]:
        return self._output.read()

    async def write_stdin(self, data: bytes) -> None:
        if self._stdin:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await write_all(self._socket.fileno(), data, _PACKET)

    async def close_stdin(self) -> None:
        """End of this client's input; the container's stays open unless it was made with stdin_once."""
        if self._stdin:
            self._stdin = False
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    async def resize(self, width: int, height: int) -> None:
        conmon.control(self._bundle, 1, height, width)

    async def wait(self) -> int:
        return await self._containers.wait_ended(self._container)

    async def close(self) -> None:
        """Detach; the container goes on. Idempotent."""
        await self._output.close()
        self._socket.close()


def _connect(bundle: str) -> socket.socket:
    """Connect by way of a descriptor: the path may be longer than a socket address."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{directory}/attach")
        finally:
            os.close(directory)
    except OSError as error:
        sock.close()
        raise RuntimeFault(f"cannot attach: {error.strerror}") from error
    sock.setblocking(False)
    return sock


async def attach(containers: Containers, container: Container, *, stdin: bool) -> Attach:
    """Attach to a running container; raises RuntimeFault."""
    await asyncio.sleep(0)
    return Attach(containers, container, stdin=stdin and container.config.stdin)
