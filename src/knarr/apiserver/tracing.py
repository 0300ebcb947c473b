"""Traces of requests by OpenTelemetry: spans with their parents from `traceparent`, sent to a collector by OTLP over gRPC.

A request has a span when its caller's sampled one is its parent, or by chance at the configured rate. Callers that are not privileged
get a trace of their own with a link to theirs. Below it stand the verb and the calls of webhooks, which are told their parent in turn.
The few messages of OTLP are written by hand, as those of etcd are.

Loop: the exporter. Owner: the API server, when a tracing configuration is given. Input: ended spans; bound: QUEUE_SPANS, further ones
are dropped. A batch goes when it is full or EXPORT_SECONDS are over.

Source: apiserver pkg/server/options/tracing.go, pkg/endpoints/filters/traces.go, component-base/tracing; opentelemetry-proto trace/v1;
W3C Trace Context.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request
from knarr.storage.etcd_wire import data, integer, message

log = get_logger(__name__)

DEFAULT_ENDPOINT = "localhost:4317"
QUEUE_SPANS, BATCH_SPANS, EXPORT_SECONDS = 2048, 512, 5.0
CALL_TIMEOUT_SECONDS = 10.0
PRIVILEGED = frozenset({"system:masters", "system:monitoring"})
INTERNAL, SERVER, CLIENT = 1, 2, 3
_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_MILLION = 1_000_000

Attributes = dict[str, "str | int"]


class Span:
    """One span in the making. `traceparent` is for whoever is called on its behalf."""

    __slots__ = ("_tracing", "attributes", "began", "failed", "kind", "link", "name", "parent", "span_id", "trace_id")

    def __init__(self, tracing: Tracing, name: str, kind: int, trace_id: bytes, parent: bytes, attributes: Attributes) -> None:
        self._tracing = tracing
        self.name = name
        self.kind = kind
        self.trace_id = trace_id
        self.span_id = os.urandom(8)
        self.parent = parent
        self.attributes = attributes
        self.link: tuple[bytes, bytes] | None = None
        self.failed = ""
        self.began = time.time_ns()

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-01"

    def child(self, name: str, attributes: Attributes, kind: int = INTERNAL) -> Span:
        return Span(self._tracing, name, kind, self.trace_id, self.span_id, attributes)

    def end(self) -> None:
        """The work is done: the span is on its way to the collector."""
        self._tracing.ended(_encoded(self, time.time_ns()))


CURRENT: ContextVar[Span | None] = ContextVar("span", default=None)
"""The span of what is being done."""


@contextlib.contextmanager
def inside(name: str, attributes: Attributes, kind: int = INTERNAL) -> Iterator[Span | None]:
    """Run the body in a span below the current one, if there is one; gives it, or None."""
    current = CURRENT.get()
    if current is None:
        yield None
        return
    span = current.child(name, attributes, kind)
    token = CURRENT.set(span)
    try:
        yield span
    except Exception as error:
        span.failed = str(error) or type(error).__name__
        raise
    finally:
        CURRENT.reset(token)
        span.end()


def load(path: str) -> tuple[str, int]:
    """Read a TracingConfiguration: (endpoint, samples per million). Raises ValueError, OSError."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"tracing configuration {path} cannot be read: {error}") from error
    versions = ("apiserver.config.k8s.io/v1", "apiserver.config.k8s.io/v1beta1", "apiserver.config.k8s.io/v1alpha1")
    if not isinstance(document, dict) or document.get("kind") != "TracingConfiguration" or document.get("apiVersion") not in versions:
        raise ValueError(f"{path} is no TracingConfiguration of apiserver.config.k8s.io")
    rate = document.get("samplingRatePerMillion") or 0
    if not isinstance(rate, int) or not 0 <= rate <= _MILLION:
        raise ValueError(f"{path}: samplingRatePerMillion: Invalid value: {rate}: must be from 0 to {_MILLION}")
    return str(document.get("endpoint") or DEFAULT_ENDPOINT), rate


class Tracing:
    """See the module's docstring."""

    def __init__(self, path: str, instance: str) -> None:
        """Args: instance: the server's identity. Raises ValueError, OSError."""
        self._endpoint, rate = load(path)
        self._bound = rate * (1 << 63) // _MILLION
        self._resource = message(1, _attribute("service.name", "apiserver") + _attribute("service.instance.id", instance))
        self._spans: list[bytes] = []
        self._wakeup = asyncio.Event()
        self._tasks = Tasks()
        self._exporter: asyncio.Task[None] | None = None
        self._channel: Any = None
        self._closing = False
        self.dropped = 0

    def begin(self, request: Request, info: RequestInfo, user: UserInfo) -> Span | None:
        """The span of a request; None when it is not sampled."""
        found = _PARENT.fullmatch(request.headers.get("traceparent", ""))
        trusted = found is not None and not PRIVILEGED.isdisjoint(user.groups)
        if found is not None and trusted:
            if not int(found[3], 16) & 1:
                return None
            trace_id, parent = bytes.fromhex(found[1]), bytes.fromhex(found[2])
        else:
            trace_id, parent = os.urandom(16), b""
            if int.from_bytes(trace_id[8:], "big") >> 1 >= self._bound:
                return None
        attributes: Attributes = {
            "http.method": request.method, "http.scheme": "https" if request.is_tls else "http", "http.target": request.raw_path,
            "http.user_agent": request.headers.get("user-agent", ""), "net.sock.peer.addr": request.peer[0], "audit-id": request.headers.get("audit-id", ""),
        }  # fmt: skip
        if request.query_string:
            attributes["http.target"] = f"{request.raw_path}?{request.query_string}"
        span = Span(self, span_name(request, info), SERVER, trace_id, parent, attributes)
        span.began -= int((asyncio.get_running_loop().time() - request.received_at) * 1e9)
        if found is not None and not trusted:
            span.link = (bytes.fromhex(found[1]), bytes.fromhex(found[2]))
        return span

    # -- the exporter ----------------------------------------------------------------------------------------------------------
    def ended(self, span: bytes) -> None:
        if len(self._spans) >= QUEUE_SPANS:
            self.dropped += 1
            return
        self._spans.append(span)
        if self._exporter is None:
            self._exporter = self._tasks.spawn(self._export_for_ever(), "trace-exporter")
        if len(self._spans) >= BATCH_SPANS:
            self._wakeup.set()

    async def _export_for_ever(self) -> None:
        while not self._closing:
            self._wakeup.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXPORT_SECONDS):
                    await self._wakeup.wait()
            while self._spans:
                batch, self._spans = self._spans[:BATCH_SPANS], self._spans[BATCH_SPANS:]
                await self._export(batch)

    async def _export(self, batch: list[bytes]) -> None:
        import grpc.aio

        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._endpoint)
        scope = message(1, data(1, b"knarr.apiserver"))
        body = message(1, self._resource + message(2, scope + b"".join(message(2, span) for span in batch)))
        try:
            await self._channel.unary_unary(_METHOD)(body, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.warning("traces are lost", spans=len(batch), endpoint=self._endpoint, error=error.details() or str(error.code()))

    async def close(self) -> None:
        """Send what is left, if that goes quickly."""
        self._closing = True
        self._wakeup.set()
        if self._exporter is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                    await asyncio.wait((self._exporter,))
        await self._tasks.close()
        if self._channel is not None:
            await self._channel.close()


def span_name(request: Request, info: RequestInfo) -> str:
    """The method and the path's pattern."""
    if not info.is_resource:
        return request.method
    parts = [request.method + (f" /apis/{info.group}" if info.group else " /api"), info.version]
    if info.namespace:
        parts.append("namespaces/{:namespace}")
    parts.append(info.resource)
    if info.name:
        parts.append("{:name}")
    if info.subresource:
        parts.append(info.subresource)
    return "/".join(parts)


# -- OTLP ----------------------------------------------------------------------------------------------------------------------
def _key_value(key: str, value: str | int) -> bytes:
    # An empty text, or zero, is written, too: the field tells the kind of the value.
    if isinstance(value, str):
        return data(1, key.encode()) + message(2, message(1, value.encode()))
    return data(1, key.encode()) + message(2, integer(3, value) or b"\x18\x00")


def _attribute(key: str, value: str | int) -> bytes:
    """An attribute of a resource."""
    return message(1, _key_value(key, value))


def _moment(number: int, nanoseconds: int) -> bytes:
    return bytes([number << 3 | 1]) + struct.pack("<Q", nanoseconds)


def _encoded(span: Span, end: int) -> bytes:
    attributes = b"".join(message(9, _key_value(key, value)) for key, value in span.attributes.items())
    link = message(13, data(1, span.link[0]) + data(2, span.link[1])) if span.link is not None else b""
    status = message(15, data(2, span.failed.encode()) + integer(3, 2)) if span.failed else b""
    return (
        data(1, span.trace_id) + data(2, span.span_id) + data(4, span.parent) + data(5, span.name.encode()) + integer(6, span.kind)
        + _moment(7, span.began) + _moment(8, end) + attributes + link + status
    )  # fmt: skip
