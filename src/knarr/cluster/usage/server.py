"""The extension API server of metrics.k8s.io/v1beta1: NodeMetrics and PodMetrics, get and list, as objects or Tables.

Caller: the control process. Only the API server's aggregator may connect (its front-proxy certificate); it has authenticated and
authorized the caller before. What objects exist is asked of the API server at each request, what they use of usage.collector.
Source: k8s.io/metrics pkg/apis/metrics/v1beta1, kubernetes-sigs/metrics-server pkg/api.
"""

from __future__ import annotations

import ssl
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.api import errors, times
from knarr.api.errors import StatusError
from knarr.api.resources import NODES, PODS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster.usage.collector import Collector, Usage
from knarr.http.server import HTTPServer, Request

GROUP, VERSION = "metrics.k8s.io", "v1beta1"
PROXY_NAME = "front-proxy-client"
_JSON = [("Content-Type", "application/json")]
_KINDS = {"nodes": "NodeMetrics", "pods": "PodMetrics"}


class UsageServer:
    """Listens until closed.

    Args:
      certificate, key: PEM files of the serving certificate.
      proxy_ca: PEM file of the authority of the aggregator's client certificate.
    """

    def __init__(self, client: Client, collector: Collector, *, certificate: str, key: str, proxy_ca: str) -> None:
        self._client = client
        self._collector = collector
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(proxy_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = HTTPServer(self._handle, ssl_context=context)

    async def listen(self, host: str) -> int:
        """Serve on a free port; returns it."""
        return await self._server.listen(host, 0)

    async def close(self) -> None:
        await self._server.close()

    async def _handle(self, request: Request) -> None:
        try:
            body = await self._answer(request)
        except StatusError as error:
            request.respond(error.code, _JSON, orjson.dumps(error.status()))
        else:
            request.respond(200, _JSON, orjson.dumps(body))

    async def _answer(self, request: Request) -> Object:
        _authenticate(request)
        parts = request.path.strip("/").split("/")
        if (document := _documents().get("/".join(parts))) is not None:
            return document
        if parts[:3] != ["apis", GROUP, VERSION] or request.method not in ("GET", "HEAD"):
            raise errors.route_not_found()
        rest = parts[3:]
        namespace = None
        if not rest:
            raise errors.route_not_found()
        if rest[0] == "namespaces" and len(rest) >= 3:
            namespace, rest = rest[1], rest[2:]
        if rest[0] not in _KINDS or len(rest) > 2 or (rest[0] == "nodes" and namespace is not None):
            raise errors.route_not_found()
        plural, name = rest[0], rest[1] if len(rest) == 2 else ""
        if name and plural == "pods" and namespace is None:
            raise errors.route_not_found()
        items, version = await self._measure(plural, namespace, name, request)
        if name and not items:
            raise errors.not_found(f"{plural}.{GROUP}", f"{namespace}/{name}" if namespace else name)
        if "as=Table" in request.headers.get("accept", ""):
            return _table(plural, items, version)
        if name:
            return {"kind": _KINDS[plural], "apiVersion": f"{GROUP}/{VERSION}", **items[0]}
        return {"kind": f"{_KINDS[plural]}List", "apiVersion": f"{GROUP}/{VERSION}", "metadata": {"resourceVersion": version}, "items": items}

    async def _measure(self, plural: str, namespace: str | None, name: str, request: Request) -> tuple[list[Object], str]:
        def one(key: str) -> str:
            return (request.query.get(key) or [""])[0]

        wanted = f"metadata.name={name}" if name else one("fieldSelector")
        res = NODES if plural == "nodes" else PODS
        found = await self._client.list(res, namespace, label_selector="" if name else one("labelSelector"), field_selector=wanted)
        objects = found.get("items") or []
        if plural == "nodes":
            await self._collector.refresh([o["metadata"]["name"] for o in objects], all_nodes=not wanted and not one("labelSelector"))
            measured = [_node_metrics(o, self._collector.node(o["metadata"]["name"])) for o in objects]
        else:
            running = [o for o in objects if o["spec"].get("nodeName") and (o.get("status") or {}).get("phase") == "Running"]
            await self._collector.refresh({o["spec"]["nodeName"] for o in running})
            measured = [_pod_metrics(o, self._collector.pod(o["spec"]["nodeName"], (o["metadata"]["namespace"], o["metadata"]["name"]))) for o in running]
        return [item for item in measured if item is not None], found["metadata"].get("resourceVersion", "")


def _authenticate(request: Request) -> None:
    """Refuse everybody but the aggregator. Raises StatusError."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    der = request.peer_certificate_der()
    names = [a.value for a in x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)] if der else []
    if names != [PROXY_NAME]:
        raise errors.unauthorized("Unauthorized")


def _metadata(obj: Object) -> Object:
    source = obj["metadata"]
    out: Object = {"name": source["name"]}
    if source.get("namespace"):
        out["namespace"] = source["namespace"]
    out["creationTimestamp"] = clock.now_rfc3339()
    if source.get("labels"):
        out["labels"] = source["labels"]
    return out


def _resources(used: Usage) -> Object:
    return {"cpu": f"{used.cpu_ns}n" if used.cpu_ns else "0", "memory": f"{used.memory_bytes // 1024}Ki"}


def _window(seconds: float) -> str:
    return times.format_duration(round(seconds * 1000) * 1_000_000)


def _node_metrics(node: Object, used: Usage | None) -> Object | None:
    if used is None:
        return None
    return {"metadata": _metadata(node), "timestamp": clock.rfc3339(used.time), "window": _window(used.window_seconds), "usage": _resources(used)}


def _pod_metrics(pod: Object, containers: dict[str, Usage] | None) -> Object | None:
    """None while a container of the pod has no numbers: half a pod would mislead an autoscaler."""
    if not containers:
        return None
    first = min(containers.values(), key=lambda used: used.window_seconds)
    return {
        "metadata": _metadata(pod),
        "timestamp": clock.rfc3339(first.time),
        "window": _window(first.window_seconds),
        "containers": [{"name": name, "usage": _resources(used)} for name, used in containers.items()],
    }


def _table(plural: str, items: list[Object], version: str) -> Object:
    columns = [("Name", "name"), ("cpu", ""), ("memory", ""), ("Window", "duration")]
    rows = []
    for item in items:
        parts = [item["usage"]] if plural == "nodes" else [c["usage"] for c in item["containers"]]
        cpu = sum(int(p["cpu"].removesuffix("n")) for p in parts)
        memory = sum(int(p["memory"].removesuffix("Ki")) for p in parts)
        partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
        rows.append({"cells": [item["metadata"]["name"], f"{cpu}n" if cpu else "0", f"{memory}Ki", item["window"]], "object": partial})
    definitions = [{"name": name, "type": "string", "format": form, "description": "", "priority": 0} for name, form in columns]
    return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": version}, "columnDefinitions": definitions, "rows": rows}


def _resource(plural: str, *, namespaced: bool) -> Object:
    return {"name": plural, "singularName": "", "namespaced": namespaced, "kind": _KINDS[plural], "verbs": ["get", "list"]}


def _documents() -> dict[str, Object]:
    """Discovery and OpenAPI by path."""
    group_version = {"groupVersion": f"{GROUP}/{VERSION}", "version": VERSION}
    group = {"name": GROUP, "versions": [group_version], "preferredVersion": group_version}
    return {
        "apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]},
        f"apis/{GROUP}": {"kind": "APIGroup", "apiVersion": "v1", **group},
        f"apis/{GROUP}/{VERSION}": {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{GROUP}/{VERSION}",
            "resources": [_resource("nodes", namespaced=False), _resource("pods", namespaced=True)],
        },
        "openapi/v3": {"paths": {f"apis/{GROUP}/{VERSION}": {"serverRelativeURL": f"/openapi/v3/apis/{GROUP}/{VERSION}"}}},
        f"openapi/v3/apis/{GROUP}/{VERSION}": _openapi(),
    }


def _openapi() -> Object:
    """Schemas and paths, so that `kubectl explain` and typed clients know the group."""
    quantities = {"type": "object", "additionalProperties": {"type": "string"}}
    measured: dict[str, Any] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "timestamp": {"type": "string", "format": "date-time", "description": "End of the interval that was measured."},
        "window": {"type": "string", "description": "Length of that interval."},
    }
    usage = {**quantities, "description": "CPU in nanocores and memory (working set) in use."}
    container = {"type": "object", "required": ["name", "usage"], "properties": {"name": {"type": "string"}, "usage": usage}}
    schemas: dict[str, Any] = {
        "NodeMetrics": {"type": "object", "description": "What a node uses.", "properties": {**measured, "usage": usage}},
        "PodMetrics": {"type": "object", "description": "What a pod's containers use.", "properties": {**measured, "containers": {"type": "array", "items": container}}},
    }
    base = f"/apis/{GROUP}/{VERSION}"
    paths = {}
    for kind, path in (("NodeMetrics", "/nodes"), ("NodeMetrics", "/nodes/{name}"), ("PodMetrics", "/namespaces/{namespace}/pods"), ("PodMetrics", "/namespaces/{namespace}/pods/{name}"), ("PodMetrics", "/pods")):
        marked = {"x-kubernetes-action": "get" if path.endswith("{name}") else "list", "x-kubernetes-group-version-kind": {"group": GROUP, "version": VERSION, "kind": kind}}
        paths[base + path] = {"get": {**marked, "responses": {"200": {"description": "OK"}}}}
    named = {
        f"io.k8s.metrics.pkg.apis.metrics.{VERSION}.{kind}": {**schema, "x-kubernetes-group-version-kind": [{"group": GROUP, "version": VERSION, "kind": kind}]}
        for kind, schema in schemas.items()
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes metrics", "version": VERSION}, "paths": paths, "components": {"schemas": named}}
