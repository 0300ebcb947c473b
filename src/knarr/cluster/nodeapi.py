"""The node process's own small API on a Unix socket: what `knarr image` asks of a running node.

Role: images belong to the node process, which alone writes its image store; the command line asks it here. HTTP with JSON lines
as answers, so that progress shows while it happens. Root only, by the socket's mode. Not part of Kubernetes' API.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knarr.cluster.config import ClusterConfig

if TYPE_CHECKING:
    from knarr.http.server import Request
    from knarr.runtime.embedded import EmbeddedRuntime
    from knarr.runtime.grpc_cri import GRPCRuntime

TIMEOUT_SECONDS = 3600.0


def socket_path(config: ClusterConfig, node: str) -> Path:
    return config.state / f"{node}.sock"


class NodeAPI:
    """Serves the image verbs of one node until closed."""

    def __init__(self, runtime: EmbeddedRuntime | GRPCRuntime, path: Path) -> None:
        from knarr.http.server import HTTPServer

        self._runtime = runtime
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
            await self._run(request.path.strip("/"), arguments, say)
        except (RuntimeFault, OSError, ValueError, KeyError) as error:
            say(error=str(error))
        stream.close()

    async def _run(self, verb: str, arguments: dict[str, Any], say: Any) -> None:
        from knarr.runtime.cri import AuthConfig

        if verb == "images/list":
            for image in await self._runtime.list_images():
                say(id=image.id, tags=image.repo_tags, digests=image.repo_digests, size=image.size_bytes)
        elif verb == "images/load":
            for image in await self._runtime.load_images(arguments["path"]):
                say(loaded=image.repo_tags or [image.id])
        elif verb == "images/remove":
            if await self._runtime.image_status(arguments["image"]) is None:
                raise ValueError(f"there is no image {arguments['image']!r}")
            await self._runtime.remove_image(arguments["image"])
            say(removed=arguments["image"])
        elif verb == "images/pull":
            auth = [AuthConfig(username=arguments["username"], password=arguments["password"])] if arguments.get("username") else []

            layers: dict[str, tuple[int, int]] = {}

            def progress(digest: str, done: int, total: int) -> None:
                layers[digest] = (done, total)
                say(done=sum(part for part, _ in layers.values()), total=sum(whole for _, whole in layers.values()))

            image_id = await self._runtime.pull_image(arguments["image"], auth, progress=progress)
            say(pulled=arguments["image"], id=image_id)
        else:
            raise ValueError(f"unknown request {verb!r}")


class _UnixConnection(http.client.HTTPConnection):
    """The standard client over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._unix_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(str(self._unix_path))


def ask(config: ClusterConfig, node: str, verb: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The answer's lines as they arrive.

    Raises:
      ConnectionError: the node does not run.
      RuntimeError: the node refused, with its words.
    """
    connection = _UnixConnection(socket_path(config, node))
    try:
        connection.request("POST", "/" + verb, json.dumps(arguments))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConnectionError(f"node {node!r} is not running; `knarr up` starts it") from error
    with connection.getresponse() as answer:
        for line in answer:
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise RuntimeError(message["error"])
            yield message
    connection.close()
