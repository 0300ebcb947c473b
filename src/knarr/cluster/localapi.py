"""A component process's own small API on a Unix socket, for the command line: HTTP with JSON lines as answers, so that progress shows.

Role: what only that process can do or know: images belong to the node process, which alone writes its image store; the scheduler's
last decision lives in the control process. Root only, by the socket's mode. Not part of Kubernetes' API.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knarr.cluster.config import ClusterConfig

if TYPE_CHECKING:
    from knarr.http.server import Request

TIMEOUT_SECONDS = 3600.0

Say = Callable[..., None]
"""Sends one line of the answer; its keyword arguments are the object's members."""
Answer = Callable[[str, dict[str, Any], Say], Awaitable[None]]
"""Carries out one verb with its arguments. ValueError, KeyError, OSError and RuntimeFault become the answer's error."""


def socket_path(config: ClusterConfig, process: str) -> Path:
    return config.state / f"{process}.api.sock"


class LocalAPI:
    """Serves one process's verbs until closed."""

    def __init__(self, path: Path, answer: Answer) -> None:
        from knarr.http.server import HTTPServer

        self._answer = answer
        self._path = path
        self._server = HTTPServer(self._handle)

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        await self._server.listen_unix(str(self._path))
        os.chmod(self._path, 0o600)

    async def close(self) -> None:
        await self._server.close()
        self._path.unlink(missing_ok=True)

    async def _handle(self, request: Request) -> None:
        from knarr.runtime.cri import RuntimeFault

        stream = await request.start_stream(200, [("Content-Type", "application/x-ndjson")])

        def say(**message: Any) -> None:
            stream.write(json.dumps(message).encode() + b"\n")

        try:
            arguments = json.loads(await request.body() or b"{}")
            await self._answer(request.path.strip("/"), arguments, say)
        except (RuntimeFault, OSError, ValueError, KeyError) as error:
            say(error=str(error))
        stream.close()


class _UnixConnection(http.client.HTTPConnection):
    """The standard client over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._unix_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(str(self._unix_path))


def ask(config: ClusterConfig, process: str, verb: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The answer's lines as they arrive.

    Raises:
      ConnectionError: the process does not run.
      RuntimeError: it refused, with its words.
    """
    connection = _UnixConnection(socket_path(config, process))
    try:
        connection.request("POST", "/" + verb, json.dumps(arguments))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConnectionError(f"{process!r} is not running; `knarr up` starts it") from error
    with connection.getresponse() as answer:
        for line in answer:
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise RuntimeError(message["error"])
            yield message
    connection.close()
