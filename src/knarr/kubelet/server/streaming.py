"""exec, attach, port-forward and run: interactive streams into containers.

Caller: server.server, for the API server's pods/exec, attach and portforward. The wire protocols are knarr.http.remotecommand's
and knarr.http.portforward's. Paths: /exec/<namespace>/<pod>[/<uid>]/<container>, /portForward/<namespace>/<pod>[/<uid>].
Source: pkg/kubelet/server getExec, getAttach, getPortForward, getRun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.aiokits.log import get_logger
from knarr.http import portforward, remotecommand
from knarr.http.server import Request
from knarr.kubelet import podutil
from knarr.kubelet.pod_worker import PodWorker
from knarr.runtime.cri import ByteStream, ContainerState, NotFound, RuntimeFault, Stream

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

log = get_logger(__name__)

_TEXT = [("Content-Type", "text/plain; charset=utf-8")]


class NoTarget(Exception):
    """The pod or container cannot be had; `status` is the HTTP code."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _worker(kubelet: Kubelet, namespace: str, name: str, uid: str) -> PodWorker:
    worker = kubelet.workers.get(uid) if uid else kubelet.workers.by_name(namespace, name)
    if worker is None:
        raise NoTarget(404, "pod does not exist")
    return worker


async def _container(kubelet: Kubelet, parts: list[str]) -> tuple[PodWorker, str, str]:
    """(worker, container name, container id). Raises NoTarget."""
    if len(parts) not in (3, 4):
        raise NoTarget(404, "404 page not found\n")
    namespace, pod, container = parts[0], parts[1], parts[-1]
    worker = _worker(kubelet, namespace, pod, parts[2] if len(parts) == 4 else "")
    found = await kubelet.runtime.list_containers({podutil.POD_UID_LABEL: worker.uid, podutil.CONTAINER_NAME_LABEL: container})
    running = [c for c in found if c.state is ContainerState.RUNNING]
    if not running:
        raise NoTarget(404, f'container not found ("{container}")')
    return worker, container, max(running, key=lambda c: c.created_at_ns).id


async def serve_exec(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Run a command with streams."""
    await _serve(kubelet, request, parts, attach=False)


async def serve_attach(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Join the streams of a container's own process."""
    await _serve(kubelet, request, parts, attach=True)


async def _serve(kubelet: Kubelet, request: Request, parts: list[str], *, attach: bool) -> None:
    try:
        worker, name, container_id = await _container(kubelet, parts)
        options = remotecommand.parse_options(request.query)
    except NoTarget as e:
        request.respond(e.status, _TEXT, str(e).encode())
        return
    except ValueError as e:
        request.respond(400, _TEXT, str(e).encode())
        return
    command = request.query.get("command") or []
    spec = podutil.container(worker.pod, name) or {}

    async def open_stream() -> Stream:
        if attach:
            return await kubelet.runtime.attach(container_id, tty=bool(spec.get("tty")), stdin=options.stdin)
        return await kubelet.runtime.exec(container_id, command, tty=options.tty, stdin=options.stdin)

    await remotecommand.serve_exec(request, open_stream, options, command=command, attach=attach)


async def serve_port_forward(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Carry connections to ports of a pod."""
    try:
        if len(parts) not in (2, 3):
            raise NoTarget(404, "404 page not found\n")
        worker = _worker(kubelet, parts[0], parts[1], parts[2] if len(parts) == 3 else "")
        sandboxes = await kubelet.runtime.list_pod_sandboxes({podutil.POD_UID_LABEL: worker.uid})
        ready = [s for s in sandboxes if s.state.name == "READY"]
        if not ready:
            raise NoTarget(404, "pod is not running")
    except NoTarget as e:
        request.respond(e.status, _TEXT, str(e).encode())
        return
    sandbox_id = max(ready, key=lambda s: s.created_at_ns).id

    async def connect(port: int) -> ByteStream:
        return await kubelet.runtime.port_forward(sandbox_id, port)

    await portforward.serve_port_forward(request, connect)


async def serve_run(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Run a command to its end and answer with its output."""
    try:
        _, _, container_id = await _container(kubelet, parts)
        command = (request.query.get("cmd") or [""])[0].split()
        result = await kubelet.runtime.exec_sync(container_id, command)
    except NoTarget as e:
        request.respond(e.status, _TEXT, str(e).encode())
        return
    except NotFound as e:
        request.respond(404, _TEXT, str(e).encode())
        return
    except RuntimeFault as e:
        request.respond(500, _TEXT, str(e).encode())
        return
    request.respond(200 if result.exit_code == 0 else 500, _TEXT, result.stdout + result.stderr)
