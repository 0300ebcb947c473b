"""An extension API server beside ours: its requests, discovery and OpenAPI documents of both kinds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson

from knarr.api import resources as R
from knarr.http.server import Request
from knarr.testing.apiserver import RunningAPIServer
from tests.servers import https_server

GROUP = "ext.example.com"
ROOT = f"/apis/{GROUP}/v1"
META = "io.k8s.apimachinery.pkg.apis.meta.v1."


def swagger() -> dict[str, Any]:
    thing = {"type": "object", "properties": {"spec": {"$ref": "#/definitions/com.example.Spec"}, "listed": {"$ref": f"#/definitions/{META}ListMeta"}}}
    answer = {"200": {"description": "OK", "schema": {"$ref": "#/definitions/com.example.Thing"}}}
    return {
        "swagger": "2.0", "info": {"title": "ext", "version": "v1"},
        "paths": {f"{ROOT}/things": {"get": {"responses": answer}}, "/apis/apps/v1/": {"get": {"description": "theirs", "responses": {}}},
                  "/other": {"get": {"responses": {"200": {"description": "OK", "schema": {"$ref": "#/definitions/com.example.Unused"}}}}}},
        "definitions": {
            "com.example.Thing": thing, "com.example.Spec": {"type": "object"}, "com.example.Unused": {"type": "object"},
            f"{META}ListMeta": {"type": "object", "description": "an older one"},
        },
    }  # fmt: skip


@contextlib.asynccontextmanager
async def extension_server() -> AsyncIterator[tuple[int, list[Request]]]:
    """Serves one resource; yields its port and the requests for it."""
    asked: list[Request] = []
    documents: dict[str, Any] = {
        ROOT: {"kind": "APIResourceList", "groupVersion": f"{GROUP}/v1", "resources": [
            {"name": "things", "singularName": "thing", "namespaced": False, "kind": "Thing", "verbs": ["get", "list"]},
            {"name": "things/status", "singularName": "", "namespaced": False, "kind": "Thing", "verbs": ["get"]},
        ]},
        "/openapi/v3": {"paths": {ROOT[1:]: {"serverRelativeURL": f"/openapi/v3{ROOT}?hash=ABC"}}},
        f"/openapi/v3{ROOT}": {"openapi": "3.0.0", "info": {"title": "ext"}, "paths": {}},
        "/openapi/v2": swagger(),
        f"{ROOT}/things": {"kind": "ThingList", "apiVersion": f"{GROUP}/v1", "items": []},
    }  # fmt: skip

    async def handle(request: Request) -> None:
        asked.append(request)
        found = documents.get(request.path)
        if request.path == "/openapi/v2" and request.headers.get("if-none-match") == '"one"':
            request.respond(304, [("ETag", '"one"')], b"")
            return
        headers = [("Content-Type", "application/json"), ("ETag", '"one"')]
        request.respond(200 if found is not None else 404, headers, orjson.dumps(found))

    async with https_server(handle) as port:
        yield port, asked


async def get(server: RunningAPIServer, path: str) -> Any:
    return orjson.loads((await server.client.request("GET", path)).body)


async def until_available(server: RunningAPIServer) -> None:
    async with asyncio.timeout(10):
        while True:
            status = (await server.client.get(R.API_SERVICES, f"v1.{GROUP}")).get("status") or {}
            if any(c["type"] == "Available" and c["status"] == "True" for c in status.get("conditions") or []):
                return
            await asyncio.sleep(0.02)


async def test_an_extension_server_is_one_with_ours_in_requests_discovery_and_openapi(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    before = await get(apiserver, "/openapi/v2")
    async with extension_server() as (port, asked):
        spec: dict[str, Any] = {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}
        await client.create(R.SERVICES, {"metadata": {"name": "ext"}, "spec": spec}, "default")
        reference = {"namespace": "default", "name": "ext", "port": port}
        wanted = {"group": GROUP, "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 10, "insecureSkipTLSVerify": True, "service": reference}
        await client.create(R.API_SERVICES, {"metadata": {"name": f"v1.{GROUP}"}, "spec": wanted})
        await until_available(apiserver)

        assert (await get(apiserver, f"{ROOT}/things"))["kind"] == "ThingList"
        assert asked[-1].headers["x-remote-user"] == "kubernetes-admin"
        assert GROUP in [group["name"] for group in (await get(apiserver, "/apis"))["groups"]]
        accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
        aggregated = orjson.loads((await client.request("GET", "/apis", headers={"Accept": accept})).body)
        found = next(item for item in aggregated["items"] if item["metadata"]["name"] == GROUP)
        assert found["versions"][0]["resources"] == [{
            "resource": "things", "responseKind": {"group": "", "version": "", "kind": "Thing"}, "scope": "Cluster", "singularResource": "thing",
            "verbs": ["get", "list"],
            "subresources": [{"subresource": "status", "responseKind": {"group": "", "version": "", "kind": "Thing"}, "verbs": ["get"]}],
        }]  # fmt: skip

        index = (await get(apiserver, "/openapi/v3"))["paths"]
        assert (await get(apiserver, index[ROOT[1:]]["serverRelativeURL"]))["info"] == {"title": "ext"}
        merged = await get(apiserver, "/openapi/v2")
        assert set(merged["paths"]) - set(before["paths"]) == {f"{ROOT}/things"}
        assert set(merged["definitions"]) - set(before["definitions"]) == {"com.example.Thing", "com.example.Spec", f"{META}ListMeta_v2"}
        assert merged["definitions"][f"{META}ListMeta"] == before["definitions"][f"{META}ListMeta"]
        assert merged["definitions"]["com.example.Thing"]["properties"]["listed"] == {"$ref": f"#/definitions/{META}ListMeta_v2"}

        await client.delete(R.API_SERVICES, f"v1.{GROUP}")
        async with asyncio.timeout(10):
            while (await get(apiserver, "/openapi/v2")) != before:
                await asyncio.sleep(0.02)
        assert ROOT[1:] not in (await get(apiserver, "/openapi/v3"))["paths"]
