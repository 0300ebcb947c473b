"""Everything that is no resource: discovery, /version, health checks, /metrics, OpenAPI, the list of paths.

Source: apiserver server/healthz, server/routes, kube-apiserver's own check names.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from knarr.api import errors
from knarr.apiserver import discovery, flowdebug, negotiation
from knarr.apiserver.attributes import PathHandler, UserInfo
from knarr.apiserver.call import audit_id, respond_no_such_path, to_pretty, to_yaml, wants_pretty
from knarr.apiserver.metrics import family
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

GIT_VERSION = "v1.35.0+knarr"
ETCD = ("etcd",)
HOOKS = (
    "start-apiserver-admission-initializer", "generic-apiserver-start-informers", "priority-and-fairness-config-consumer",
    "priority-and-fairness-filter", "storage-object-count-tracker-hook", "start-apiextensions-informers", "start-apiextensions-controllers",
    "crd-informer-synced", "start-system-namespaces-controller", "start-cluster-authentication-info-controller",
    "start-kube-apiserver-identity-lease-controller", "start-kube-apiserver-identity-lease-garbage-collector",
    "start-legacy-token-tracking-controller", "start-service-ip-repair-controllers", "rbac/bootstrap-roles",
    "scheduling/bootstrap-system-priority-classes", "priority-and-fairness-config-producer", "bootstrap-controller",
    "start-kubernetes-service-cidr-controller", "aggregator-reload-proxy-client-cert", "start-kube-aggregator-informers",
    "apiservice-status-local-available-controller", "apiservice-status-remote-available-controller", "apiservice-registration-controller",
    "apiservice-discovery-controller", "kube-apiserver-autoregistration", "autoregister-completion", "apiservice-openapi-controller",
    "apiservice-openapiv3-controller",
)  # fmt: skip
HEADERS = "Cache-Control: no-cache, private\r\n"


def _packed(body: bytes) -> bytes:
    """Return the protobuf form of a discovery document."""
    from knarr.apiserver.protoforms import encode_envelope

    obj = orjson.loads(body)
    obj.setdefault("apiVersion", "v1")
    return encode_envelope(obj)


class Paths:
    """Handles requests to paths outside of resources."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        self.handlers: dict[str, PathHandler] = {}
        """Exact paths served by other parts (token keys)."""
        self.proxies: list[Callable[[Request, UserInfo], object]] = []

    async def handle(self, request: Request, user: UserInfo) -> None:
        """Answer. Raises StatusError 404, 405."""
        path = request.path
        stripped = path.rstrip("/") or "/"
        handler = self.handlers.get(stripped)
        if handler is not None:
            await handler(request)
            return
        if request.method not in ("GET", "HEAD"):
            raise errors.route_not_found() if stripped.startswith(("/api", "/apis")) else errors.method_not_allowed()
        first = stripped.split("/", 2)[1] if stripped != "/" else ""
        if first in ("api", "apis"):
            await self._discovery(request, stripped, user)
        elif first == "version":
            self._json(request, version())
        elif first in ("healthz", "livez", "readyz"):
            if self._server.encryption is not None:
                await self._server.encryption.refresh()
            self._health(request, first, stripped[len(first) + 2:])
        elif stripped in ("/metrics", "/metrics/slis"):
            body = self._server.metrics.render() if stripped == "/metrics" else "\n".join([*self._health_metrics(), ""]).encode()
            request.respond(200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")], body)
        elif stripped.startswith(flowdebug.PATH):
            dump = self._server.flow.debug(stripped.removeprefix(flowdebug.PATH), details="includeRequestDetails" in request.query)
            if dump is None:
                raise errors.route_not_found()
            request.respond(200, [
                ("Audit-Id", audit_id(request)), ("Cache-Control", "no-cache, private"), ("Content-Type", "text/plain; charset=utf-8"),
            ], dump)
        elif first == "openapi":
            await self._server.openapi.handle(request)
        elif stripped == "/":
            self._json(request, {"paths": self._paths()})
        else:
            raise errors.route_not_found()

    async def _discovery(self, request: Request, path: str, user: UserInfo) -> None:
        clause = discovery.wanted(path, request.headers.get("accept", ""))
        if clause is None:
            raise errors.not_acceptable(negotiation.SUPPORTED)
        aggregated = bool(clause.as_kind)
        found = self._server.discovery.document(path, aggregated=aggregated)
        if found is None:
            if await self._server.delegate_path(request, user):
                return
            respond_no_such_path(request)
            return
        body, etag = found
        parameters = ";g={2};v={3};as={1}".format(*clause) if aggregated else ""
        headers = [("Audit-Id", audit_id(request)), ("Content-Type", clause.media_type + parameters)]
        if aggregated:
            headers += [("ETag", etag), ("Vary", "Accept"), ("Cache-Control", "public")]
            if request.headers.get("if-none-match") == etag:
                request.respond(304, headers, b"")
                return
        else:
            headers.append(("Cache-Control", "no-cache, private"))
        if clause.media_type == negotiation.PROTOBUF:
            body = _packed(body)
        elif clause.media_type == negotiation.YAML:
            body = to_yaml(body)
        elif wants_pretty(request):
            body = to_pretty(body)
        request.respond(200, headers, body)

    @staticmethod
    def _json(request: Request, value: object) -> None:
        body = orjson.dumps(value)
        # These documents are for people too: upstream indents them always.
        request.respond(200, [
            ("Audit-Id", audit_id(request)), ("Cache-Control", "no-cache, private"), ("Content-Type", "application/json"),
        ], to_pretty(body))

    def _paths(self) -> list[str]:
        paths = ["/.well-known/openid-configuration", "/api", "/api/v1", "/apis", "/apis/"]
        for group, versions in self._server.discovery.groups().items():
            paths.append(f"/apis/{group}")
            paths += [f"/apis/{group}/{version}" for version in versions]
        for kind in ("healthz", "livez", "readyz"):
            paths.append(f"/{kind}")
            paths += [f"/{kind}/{name}" for name in self._checks(kind)]
        paths += ["/metrics", "/openapi/v2", "/openapi/v3", "/openapi/v3/", "/openid/v1/jwks", "/version"]
        return sorted(set(paths))

    # -- health ------------------------------------------------------------------------------------------------------------------
    def _checks(self, kind: str) -> dict[str, Callable[[], str]]:
        """Return check name -> function giving "" when well, else the reason."""
        server = self._server
        ok = lambda: ""
        hook = lambda: "" if server.is_ready() else "not finished"
        checks: dict[str, Callable[[], str]] = {"ping": ok, "log": ok, "etcd": server.store_trouble}
        encryption = server.encryption
        if encryption is not None and encryption.checked and kind != "livez":
            checks["kms-providers"] = lambda: encryption.trouble
        if kind == "readyz":
            checks["etcd-readiness"] = server.store_trouble
            checks["informer-sync"] = hook
        for name in HOOKS:
            checks[f"poststarthook/{name}"] = hook
        checks["autoregister-completion"] = checks.pop("poststarthook/autoregister-completion")
        checks["poststarthook/autoregister-completion"] = hook
        if kind == "readyz":
            checks["shutdown"] = lambda: "process is shutting down" if server.stopping else ""
        return checks

    def _health(self, request: Request, kind: str, name: str) -> None:
        checks = self._checks(kind)
        headers = [("Audit-Id", audit_id(request)), ("Cache-Control", "no-cache, private"), ("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")]
        if name:
            check = checks.get(name)
            if check is None:
                raise errors.route_not_found()
            trouble = check()
            if trouble:
                request.respond(500, headers, f"internal server error: {trouble}\n".encode())
            else:
                request.respond(200, headers, b"ok")
            return
        excluded = set(request.query.get("exclude", []))
        lines: list[str] = []
        failed: list[str] = []
        for check_name, check in checks.items():
            if check_name in excluded:
                excluded.discard(check_name)
                lines.append(f"[+]{check_name} excluded: ok\n")
                continue
            trouble = check()
            if trouble:
                failed.append(check_name)
                lines.append(f"[-]{check_name} failed: reason withheld\n")
            else:
                lines.append(f"[+]{check_name} ok\n")
        if excluded:
            names = ", ".join(f'"{each}"' for each in sorted(excluded))
            lines.append(f"warn: some health checks cannot be excluded: no matches for {names}\n")
        if failed:
            request.respond(500, headers, ("".join(lines) + f"{kind} check failed\n").encode())
        elif "verbose" in request.query:
            request.respond(200, headers, ("".join(lines) + f"{kind} check passed\n").encode())
        else:
            request.respond(200, headers, b"ok")

    def _health_metrics(self) -> list[str]:
        """Return /metrics/slis: what each check says."""
        samples = [
            (f'name="{name}",type="{kind}"', 0 if check() else 1)
            for kind in ("healthz", "livez", "readyz") for name, check in self._checks(kind).items()
        ]  # fmt: skip
        return family("kubernetes_healthcheck", "gauge", "[STABLE] This metric records the result of a single healthcheck.", samples)


def build_info() -> list[str]:
    """Return the metrics that say which server this is."""
    told = version()
    labels = {
        "build_date": told["buildDate"], "compiler": told["compiler"], "git_commit": told["gitCommit"], "git_tree_state": told["gitTreeState"],
        "git_version": told["gitVersion"], "go_version": told["goVersion"], "major": told["major"], "minor": told["minor"],
        "platform": told["platform"],
    }  # fmt: skip
    text = (
        "[ALPHA] A metric with a constant '1' value labeled by major, minor, git version, git commit, git tree state, build date, Go version, "
        "and compiler from which Kubernetes was built, and platform on which it is running."
    )
    return family("kubernetes_build_info", "gauge", text, [(",".join(f'{name}="{value}"' for name, value in labels.items()), 1)])


def version() -> dict[str, str]:
    return {
        "major": "1", "minor": "35", "emulationMajor": "1", "emulationMinor": "35", "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "34", "gitVersion": GIT_VERSION, "gitCommit": "0" * 40, "gitTreeState": "clean",
        "buildDate": "2025-12-17T00:00:00Z", "goVersion": "go1.25.0", "compiler": "cpython",
        "platform": f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine())}",
    }  # fmt: skip
