"""POST /checkpoint/{namespace}/{pod}/{container}: as upstream where the container runtime has no checkpoints. Caller: server.server.

Neither the embedded runtime nor the releases of containerd that Debian has make checkpoints, so a request that names a container
is answered like any other failure of the runtime. Source: pkg/kubelet/server/server.go checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.http.server import Request
from knarr.kubelet import podutil

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_TEXT = [("Content-Type", "text/plain; charset=utf-8")]


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Look for the container, then say what stands in the way."""
    if request.method != "POST":
        request.respond(405, _TEXT, b"405: Method Not Allowed")
        return
    if len(parts) != 3:
        request.respond(404, _TEXT, b"404: Page Not Found")
        return
    namespace, name, container = parts
    worker = kubelet.workers.by_name(namespace, name)
    if worker is None:
        request.respond(404, _TEXT, b"pod does not exist")
    elif all(spec["name"] != container for spec in podutil.all_containers(worker.pod)):
        request.respond(404, _TEXT, f"container {container} does not exist".encode())
    elif not (request.query.get("timeout") or ["0"])[-1].lstrip("-").isdigit():
        request.respond(404, _TEXT, b"cannot parse value of timeout parameter")
    else:
        why = "rpc error: code = Unimplemented desc = the container runtime makes no checkpoints"
        request.respond(500, _TEXT, f"checkpointing of {namespace}/{name}/{container} failed ({why})".encode())
