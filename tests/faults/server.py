"""An API server in a process of its own, on disk, for tests that kill it or send it nonsense."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
from bench.servers import TOKEN, free_port

from knarr.cluster import pki


class Server:
    """The API server's process, killed and started again on the same store and port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        pki.ensure(folder, ["localhost", "127.0.0.1"])
        (folder / "tokens.csv").write_text(f'{TOKEN},test,1,"system:masters"\n')
        self.context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "bench.apiserver", str(self.folder), str(self.port)], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                _, writer = await self.connect()
                writer.close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context, limit=1 << 22)


async def request(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], method: str, path: str, body: Any = None) -> tuple[int, Any]:
    reader, writer = streams
    data = b"" if body is None else orjson.dumps(body)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head.split()[1]), orjson.loads(await reader.readexactly(length))
