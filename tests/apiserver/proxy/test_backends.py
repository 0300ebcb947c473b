"""Pods and Services behind the API server's proxy: plain and over TLS, requests and upgraded connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest

from knarr.api import resources as R
from knarr.apiserver.proxy import locations
from knarr.http.server import HTTPServer, Request
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import make_namespace, pod, refused

from .test_proxies import Kubelet, _raw, kubelet

__all__ = ["kubelet"]


class Backend(Kubelet):
    """A program in a pod; what it is asked to upgrade comes back in upper case."""

    async def handle(self, request: Request) -> None:
        if request.headers.get("upgrade") != "websocket":
            await super().handle(request)
            return
        self.asked.append((request.method, request.path, request.headers.get("sec-websocket-protocol", "")))
        raw = request.upgrade()
        raw.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: chat\r\n\r\n")
        while data := await raw.read():
            raw.write(data.upper())
            await raw.drain()
        raw.close()


@pytest.fixture
async def backends(apiserver: RunningAPIServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, tuple[Backend, int]]]:
    """By scheme: a program and its port; pod and Service "web" of namespace "t" lead to both."""
    # Loopback addresses are refused as targets; here the pod has one.
    monkeypatch.setattr(locations, "_proxyable", lambda host: True)
    monkeypatch.setattr(locations, "endpoint_of", lambda _slices, _namespace, _name, port_name: ("127.0.0.1", made[port_name][1]))
    pairs = testing.test_pki()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(pairs.api_server.certificate), str(pairs.api_server.key))
    made: dict[str, tuple[Backend, int]] = {}
    servers = []
    for scheme, tls in (("http", None), ("https", context)):
        backend = Backend()
        server = HTTPServer(backend.handle, ssl_context=tls)
        made[scheme] = (backend, await server.listen("127.0.0.1", 0))
        servers.append(server)
    client = apiserver.client
    await make_namespace(client, "t")
    await client.create(R.PODS, pod("web", "t", containers=[{"name": "a", "image": "i", "ports": [{"containerPort": made["http"][1]}]}]), "t")
    current = await client.get(R.PODS, "web", "t")
    current["status"] = {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
    await client.update(R.PODS, current, subresource="status")
    ports = [{"name": name, "port": number} for name, number in (("http", 80), ("https", 443))]
    await client.create(R.SERVICES, {"metadata": {"name": "web", "namespace": "t"}, "spec": {"ports": ports}}, "t")
    yield made
    for server in servers:
        await server.close()


def paths(made: dict[str, tuple[Any, int]]) -> dict[str, str]:
    """Place in the API to the scheme that it is reached by."""
    base = "/api/v1/namespaces/t"
    plain, secure = made["http"][1], made["https"][1]
    return {
        f"{base}/pods/web/proxy": "http",
        f"{base}/pods/web:{plain}/proxy": "http",
        f"{base}/pods/http:web:{plain}/proxy": "http",
        f"{base}/pods/https:web:{secure}/proxy": "https",
        f"{base}/services/web:http/proxy": "http",
        f"{base}/services/web:80/proxy": "http",
        f"{base}/services/https:web:https/proxy": "https",
        f"{base}/services/https:web:443/proxy": "https",
    }


async def test_requests_of_every_method_reach_pods_and_services_by_both_schemes(apiserver: RunningAPIServer, backends: dict[str, tuple[Backend, int]]) -> None:
    for path, scheme in paths(backends).items():
        backend = backends[scheme][0]
        for method in ("GET", "PUT", "POST", "PATCH", "DELETE", "OPTIONS"):
            backend.asked.clear()
            answer = await apiserver.client.request(method, f"{path}/deep/er", query={"q": "1"}, body=b"body" if method in ("PUT", "POST", "PATCH") else b"")
            assert answer.body.startswith(f"{method} /deep/er?q=1 {path}/deep/er -".encode()), (method, path)
            assert backend.asked == [(method, "/deep/er", "q=1")]


@pytest.mark.parametrize("offset", range(8))
async def test_a_websocket_passes_to_pods_and_services_by_both_schemes(apiserver: RunningAPIServer, backends: dict[str, tuple[Backend, int]], offset: int) -> None:
    path, scheme = list(paths(backends).items())[offset]
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Protocol": "chat"}
    async with _raw(apiserver) as client:
        response, raw = await client.upgrade("GET", f"{path}/talk", headers)
        assert (response.status, response.headers["sec-websocket-protocol"]) == (101, "chat")
        assert raw is not None
        received = b""
        async with asyncio.timeout(5):
            for word in (b"one ", b"two"):
                raw.write(word)
            while len(received) < 7:
                received += await raw.read()
        assert received == b"ONE TWO"
        raw.close()
    assert backends[scheme][0].asked == [("GET", "/talk", "chat")]


async def test_an_upgrade_passes_to_a_node(apiserver: RunningAPIServer, kubelet: Kubelet) -> None:
    async with _raw(apiserver) as client:
        response, raw = await client.upgrade("POST", "/api/v1/nodes/n1/proxy/exec/t/p/a", {"Connection": "Upgrade", "Upgrade": "SPDY/3.1"})
        assert response.status == 101
        assert raw is not None
        raw.write(b"bye")
        async with asyncio.timeout(5):
            assert await raw.read() == b"BYE"
        raw.close()
    assert kubelet.asked[0][:2] == ("POST", "/exec/t/p/a")


async def test_what_cannot_be_reached_is_told(apiserver: RunningAPIServer, backends: dict[str, tuple[Backend, int]]) -> None:
    client = apiserver.client
    with refused(400, "invalid"):
        await client.request("GET", "/api/v1/namespaces/t/pods/ftp:web:80/proxy/")
    with refused(503, "error trying to reach service"):
        await client.request("GET", "/api/v1/namespaces/t/pods/web:1/proxy/")
    # Plain text to a port that speaks TLS, and the other way round.
    with refused(503, "error trying to reach service"):
        await client.request("GET", f"/api/v1/namespaces/t/pods/https:web:{backends['http'][1]}/proxy/")
