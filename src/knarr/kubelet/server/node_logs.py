"""GET /logs/: the host's log files, for administrators. Caller: server.server. Source: pkg/kubelet ServeLogs."""

from __future__ import annotations

import html
import os
import stat
from typing import TYPE_CHECKING

from knarr.http.server import Request
from knarr.kubelet.volumes.subpath import open_beneath

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_ROOT = "/var/log"
_TEXT = [("Content-Type", "text/plain; charset=utf-8")]
_CHUNK = 256 * 1024


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """List a folder or send a file below the host's log folder; links may not leave it."""
    path = "/".join(p for p in parts if p)
    try:
        fd = open_beneath(_ROOT, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        request.respond(404, _TEXT, b"404 page not found\n")
        return
    try:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            entries = sorted(os.listdir(fd))
            body = "<pre>\n" + "".join(f'<a href="{html.escape(e)}">{html.escape(e)}</a>\n' for e in entries) + "</pre>\n"
            request.respond(200, [("Content-Type", "text/html; charset=utf-8")], body.encode())
            return
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            request.respond(404, _TEXT, b"404 page not found\n")
            return
        stream = await request.start_stream(200, _TEXT)
        while data := os.read(fd, _CHUNK):
            stream.write(data)
            await stream.drain()
        stream.close()
    finally:
        os.close(fd)
