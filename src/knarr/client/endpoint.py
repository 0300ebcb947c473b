"""The small HTTPS server of a control plane component: health for everybody, metrics and settings for those who may.

Callers: the control process, for scheduler (10259) and controller manager (10257); tests. /healthz, /livez and /readyz are answered
without asking who wants to know; everything else takes a user who is allowed to get that path.
Source: apiserver pkg/server/healthz, cmd/kube-scheduler/app/server.go, cmd/kube-controller-manager/app/controllermanager.go.
"""

from __future__ import annotations

import resource
import ssl
import time
from collections.abc import Callable, Mapping

import orjson

from knarr.api.types import Object
from knarr.client.delegation import VERBS, Delegation
from knarr.client.rest import Client
from knarr.http.server import HTTPServer, Request

Check = Callable[[], str]
"""Gives "" when all is well, otherwise what is wrong."""

_TEXT = [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")]
_METRICS = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")]
_JSON = [("Content-Type", "application/json")]
_OPEN = ("/healthz", "/livez", "/readyz")

_started = time.time()


class Endpoint:
    """Listens until closed.

    Args:
      checks: by name; "ping" is always there. Those named in `only_ready` count for /readyz alone.
      metrics: the component's own, in text form.
      settings: what /configz shows.
      certificate, key, client_ca: PEM files; users show client certificates of `client_ca`.
    """

    def __init__(
        self, client: Client, *, checks: Mapping[str, Check], metrics: Callable[[], bytes], settings: Callable[[], Object],
        certificate: str, key: str, client_ca: str, only_ready: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self._delegation = Delegation(client, anonymous=True)
        self._checks: dict[str, Check] = {"ping": lambda: "", **checks}
        self._only_ready = only_ready
        self._metrics = metrics
        self._settings = settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
        self._server = HTTPServer(self._handle, ssl_context=context)

    async def listen(self, host: str, port: int) -> int:
        """Serve; returns the port. Raises OSError when it is taken."""
        return await self._server.listen(host, port)

    async def close(self) -> None:
        await self._server.close()

    async def _handle(self, request: Request) -> None:
        path = request.path.rstrip("/") or "/"
        if not path.startswith(_OPEN) and not await self._may(request):
            return
        first = "/" + path.split("/")[1]
        if request.method not in ("GET", "HEAD"):
            request.respond(405, _TEXT, b"Method Not Allowed\n")
        elif first in _OPEN:
            self._answer_health(request, first, path[len(first) :].strip("/"))
        elif path == "/metrics":
            request.respond(200, _METRICS, self._metrics() + _process_metrics())
        elif path == "/configz":
            request.respond(200, _JSON, orjson.dumps(self._settings()))
        else:
            request.respond(404, _TEXT, b"404 page not found\n")

    async def _may(self, request: Request) -> bool:
        user = await self._delegation.authenticate(request)
        if user is None:
            request.respond(401, _TEXT, b"Unauthorized\n")
            return False
        verb = VERBS.get(request.method, request.method.lower())
        if await self._delegation.allowed(user, {"nonResourceAttributes": {"path": request.path, "verb": verb}}):
            return True
        reason = f'forbidden: User "{user.name}" cannot {verb} path "{request.path}"'
        metadata: Object = {}
        status = {
            "kind": "Status", "apiVersion": "v1", "metadata": metadata, "status": "Failure", "message": reason, "reason": "Forbidden",
            "details": metadata, "code": 403,
        }  # fmt: skip
        request.respond(403, _JSON, orjson.dumps(status))
        return False

    def _answer_health(self, request: Request, kind: str, one: str) -> None:
        excluded = set(request.query.get("exclude") or ())
        checks = {n: c for n, c in self._checks.items() if n not in excluded and (kind == "/readyz" or n not in self._only_ready)}
        if one:
            if one not in checks:
                request.respond(404, _TEXT, b"404 page not found\n")
                return
            checks = {one: checks[one]}
        wrong = {name: problem for name, check in checks.items() if (problem := check())}
        if not wrong and "verbose" not in request.query:
            request.respond(200, _TEXT, b"ok")
            return
        lines = [f"[-]{name} failed: {wrong[name]}" if name in wrong else f"[+]{name} ok" for name in checks]
        lines.append(f"{kind.strip('/')} check {'failed' if wrong else 'passed'}")
        request.respond(500 if wrong else 200, _TEXT, ("\n".join(lines) + "\n").encode())


def _process_metrics() -> bytes:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    values = (
        ("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", usage.ru_utime + usage.ru_stime),
        ("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident),
        ("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", _started),
    )
    return "".join(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in values).encode()
