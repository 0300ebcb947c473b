"""Routes of the kubelet's HTTPS server. Every request is authenticated and authorized first.

Callers: the API server (logs, exec, attach, port-forward), metrics collectors. One handler function per path.
Source: pkg/kubelet/server/server.go.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.http.server import HTTPServer, Request
from knarr.kubelet.server import checkpoint, configz, container_logs, metrics, node_logs, stats, streaming
from knarr.kubelet.server.auth import Authorizer
from knarr.kubelet.volumes import local

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

log = get_logger(__name__)

Route = Callable[["Kubelet", Request, list[str]], Awaitable[None]]
_JSON = [("Content-Type", "application/json")]
_TEXT = [("Content-Type", "text/plain; charset=utf-8")]


async def _healthz(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    request.respond(200, _TEXT, b"ok")


async def _pods(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    items = []
    for worker in kubelet.workers.workers():
        status = kubelet.node.status.get(worker.uid) or worker.pod.get("status") or {}
        items.append({"metadata": worker.pod["metadata"], "spec": worker.pod["spec"], "status": status})
    body = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}
    request.respond(200, _JSON, orjson.dumps(body))


async def _running_pods(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    pods: dict[str, Object] = {}
    for container in await kubelet.runtime.list_containers():
        if container.state.name != "RUNNING":
            continue
        labels = container.labels
        uid = labels.get("io.kubernetes.pod.uid", "")
        meta = {"name": labels.get("io.kubernetes.pod.name", ""), "namespace": labels.get("io.kubernetes.pod.namespace", ""), "uid": uid}
        pod = pods.setdefault(uid, {"metadata": meta, "spec": {"containers": []}, "status": {}})
        pod["spec"]["containers"].append({"name": container.metadata.name, "image": container.image, "resources": {}})
    body = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": list(pods.values())}
    request.respond(200, _JSON, orjson.dumps(body))


async def _local_volumes(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """DELETE /localvolumes/NAME: remove the folder of a released volume."""
    if request.method != "DELETE" or len(parts) != 1:
        request.respond(405, _TEXT, b"method not allowed\n")
        return
    try:
        found = await local.remove(kubelet.config, parts[0])
    except OSError as error:
        request.respond(500, _TEXT, f"{error}\n".encode())
        return
    request.respond(200 if found else 404, _TEXT, b"")


_ROUTES: dict[str, Route] = {
    "healthz": _healthz,
    "pods": _pods,
    "runningpods": _running_pods,
    "containerLogs": container_logs.serve,
    "exec": streaming.serve_exec,
    "attach": streaming.serve_attach,
    "portForward": streaming.serve_port_forward,
    "run": streaming.serve_run,
    "stats": stats.serve,
    "metrics": metrics.serve,
    "configz": configz.serve,
    "logs": node_logs.serve,
    "checkpoint": checkpoint.serve,
    "localvolumes": _local_volumes,
}


def _long(request: Request, route: str) -> str:
    """Whether a request may go on for as long as its client likes, as text."""
    return "true" if route in ("exec", "attach", "portForward") or request.query.get("follow") == ["true"] else "false"


class KubeletServer:
    """Port 10250."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self._authorizer = Authorizer(kubelet.config, kubelet.client)
        self._server: HTTPServer | None = None
        self._inflight: dict[str, int] = {}
        """Labels to requests that are being answered."""

    async def listen(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """Accept connections. Raises OSError when the port is taken."""
        self._server = HTTPServer(self.handle, ssl_context=context)
        await self._server.listen(host, port)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def handle(self, request: Request) -> None:
        """Answer one request."""
        parts = request.path.strip("/").split("/")
        route = _ROUTES.get(parts[0])
        begun, meters = time.monotonic(), self._kubelet.meters
        labels = f'method="{request.method}",path="{parts[0] if route is not None else "other"}",server_type="readwrite",long_running="{_long(request, parts[0])}"'
        meters.count(f"kubelet_http_requests_total{{{labels}}}")
        self._inflight[labels] = self._inflight.get(labels, 0) + 1
        try:
            await self._answer(request, route, parts)
        finally:
            self._inflight[labels] -= 1
            meters.observe("kubelet_http_requests_duration_seconds", time.monotonic() - begun, labels)

    def inflight(self) -> list[tuple[str, float]]:
        """Requests that are being answered, as samples."""
        return [(f"kubelet_http_inflight_requests{{{labels}}}", value) for labels, value in self._inflight.items()]

    async def _answer(self, request: Request, route: Route | None, parts: list[str]) -> None:
        refusal = await self._authorizer.check(request)
        if refusal is not None:
            request.respond(refusal[0], _TEXT, refusal[1].encode())
        elif route is None:
            request.respond(404, _TEXT, b"404 page not found\n")
        else:
            await route(self._kubelet, request, parts[1:])
