"""GET /containerLogs/<namespace>/<pod>/<container>: a container's log, once or followed.

Caller: server.server, for the API server's pods/log. Source: pkg/kubelet/server getContainerLogs, kubelet_pods.go
validateContainerLogStatus.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.api.types import Object
from knarr.http.server import Request
from knarr.kubelet import logs, podutil
from knarr.kubelet.logs import LogOptions
from knarr.runtime.cri import ContainerState, NotFound, RuntimeFault

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_TEXT = [("Content-Type", "text/plain; charset=utf-8")]


class BadOption(Exception):
    """A query parameter that cannot be; the text says which."""


def parse_options(query: dict[str, list[str]]) -> LogOptions:
    """Read PodLogOptions from a query. Raises BadOption."""
    def one(name: str) -> str | None:
        values = query.get(name)
        return values[-1] if values and values[-1] != "" else None

    def number(name: str, least: int) -> int | None:
        raw = one(name)
        if raw is None:
            return None
        try:
            value = int(raw)
        except ValueError as e:
            raise BadOption(f"unable to decode query: {name}: {raw}") from e
        if value < least:
            raise BadOption(f"{name}: Invalid value: {value}: must be greater than or equal to {least}")
        return value

    def flag(name: str) -> bool:
        return (one(name) or "").lower() in ("1", "true", "t", "yes")

    options = LogOptions(
        follow=flag("follow"),
        previous=flag("previous"),
        timestamps=flag("timestamps"),
        tail_lines=number("tailLines", 0),
        limit_bytes=number("limitBytes", 1),
        stream=one("stream") or "All",
    )
    seconds, since = number("sinceSeconds", 1), one("sinceTime")
    if seconds is not None and since is not None:
        raise BadOption("at most one of `sinceTime` or `sinceSeconds` may be specified")
    if seconds is not None:
        options.since_ns = int((clock.now() - seconds) * 1e9)
    elif since is not None:
        try:
            options.since_ns = logs.timestamp_ns(since.encode())
        except ValueError as e:
            raise BadOption(f"sinceTime: {since} is no time") from e
    if options.stream not in ("All", "Stdout", "Stderr"):
        raise BadOption(f"stream: Unsupported value: {options.stream}")
    if options.tail_lines is not None and options.stream != "All":
        raise BadOption("`tailLines` and specific `stream` are mutually exclusive for now")
    return options


def container_of_status(pod_name: str, status: Object, name: str, *, previous: bool) -> str:
    """The id of the container whose log is meant. Raises LookupError with upstream's text."""
    found = next(
        (
            s
            for kind in ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses")
            if (s := podutil.status_of(status.get(kind), name)) is not None
        ),
        None,
    )
    if found is None:
        raise LookupError(f'container "{name}" in pod "{pod_name}" is not available')
    state, ended = found.get("state") or {}, (found.get("lastState") or {}).get("terminated") or {}
    last_id = ended.get("containerID") or ""
    if previous:
        if not last_id:
            raise LookupError(f'previous terminated container "{name}" in pod "{pod_name}" not found')
        full = last_id
    elif "running" in state:
        full = found.get("containerID") or ""
    elif "terminated" in state or ended:
        full = (state.get("terminated") or {}).get("containerID") or last_id
        if not full:
            raise LookupError(f'container "{name}" in pod "{pod_name}" is terminated')
    else:
        reason = (state.get("waiting") or {}).get("reason") or ""
        words = {"ErrImagePull": "image can't be pulled", "ImagePullBackOff": "trying and failing to pull image"}
        raise LookupError(f'container "{name}" in pod "{pod_name}" is waiting to start: {words.get(reason, reason)}')
    return str(full).partition("://")[2]


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Answer with the log's bytes."""
    if len(parts) != 3 or not all(parts):
        request.respond(400, _TEXT, b'{"message": "missing namespace, pod or container name"}')
        return
    namespace, pod_name, name = parts
    worker = kubelet.workers.by_name(namespace, pod_name)
    if worker is None:
        request.respond(404, _TEXT, f'{{"message": "pod \\"{pod_name}\\" does not exist\\n"}}'.encode())
        return
    if podutil.container(worker.pod, name) is None:
        request.respond(404, _TEXT, f'{{"message": "container \\"{name}\\" not found in pod \\"{pod_name}\\"\\n"}}'.encode())
        return
    try:
        options = parse_options(request.query)
        status = kubelet.node.status.get(worker.uid) or worker.pod.get("status") or {}
        container_id = container_of_status(pod_name, status, name, previous=options.previous)
        container = await kubelet.runtime.container_status(container_id)
    except BadOption as e:
        request.respond(422, _TEXT, str(e).encode())
        return
    except LookupError as e:
        request.respond(400, _TEXT, str(e).encode())
        return
    except NotFound:
        request.respond(400, _TEXT, f"unable to retrieve container logs for {kubelet.config.runtime_scheme}://{container_id}".encode())
        return
    await _stream(kubelet, request, container.log_path, container_id, options)


async def _stream(kubelet: Kubelet, request: Request, path: str, container_id: str, options: LogOptions) -> None:
    async def ended() -> bool:
        try:
            return (await kubelet.runtime.container_status(container_id)).state is ContainerState.EXITED
        except RuntimeFault:
            return True

    with kubelet.container_changes(container_id) as changed:
        disconnected = request.disconnected
        disconnected.add_done_callback(lambda _: changed.set())
        try:
            os.close(logs.open_log(path))
        except FileNotFoundError:
            request.respond(500, _TEXT, f'failed to try resolving symlinks in path "{path}": no such file or directory'.encode())
            return
        except OSError as e:
            request.respond(500, _TEXT, f'failed to open log file "{path}": {e.strerror}'.encode())
            return
        chunks = logs.read(path, options, ended, changed)
        try:
            first = b""
            if not options.follow:
                first = await anext(chunks, b"")
            stream = await request.start_stream(200, _TEXT)
            if first:
                stream.write(first)
            async for chunk in chunks:
                stream.write(chunk)
                await stream.drain()
                if disconnected.done():
                    break
            stream.close()
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]
