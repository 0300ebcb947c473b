"""Logs, streams and proxies through the API server, to a kubelet and a backend that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from knarr.api import resources as R
from knarr.apiserver.proxy import locations
from knarr.apiserver.proxy.rewrite import rewrite_html, rewrite_url
from knarr.http.client import HTTPClient
from knarr.http.server import HTTPServer, Request
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import make_namespace, pod, refused


class Kubelet:
    """Answers as a kubelet would, and remembers the requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.certificates: list[bytes | None] = []
        self.followers_left = asyncio.Event()

    async def handle(self, request: Request) -> None:
        self.asked.append((request.method, request.path, request.query_string))
        self.certificates.append(request.peer_certificate_der())
        if request.path.endswith("/broken"):
            request.respond(400, [("Content-Type", "text/plain")], b"container not there yet")
        elif request.path.startswith("/containerLogs/") and "follow=true" in request.query_string:
            stream = await request.start_stream(200, [("Content-Type", "text/plain")])
            stream.write(b"first\n")
            await stream.closed
            self.followers_left.set()
        elif request.path.startswith("/containerLogs/"):
            request.respond(200, [("Content-Type", "text/plain")], b"line 1\nline 2\n")
        elif request.path.startswith(("/exec/", "/portForward/")):
            raw = request.upgrade()
            raw.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n")
            while data := await raw.read():
                raw.write(data.upper())
                if data.endswith(b"bye"):
                    break
            raw.close()
        elif request.path == "/page":
            request.respond(200, [("Content-Type", "text/html")], b'<a href="/other">x</a><a href="relative">y</a>')
        elif request.path == "/moved":
            request.respond(302, [("Location", "/elsewhere/")], b"")
        else:
            body = f"{request.method} {request.path}?{request.query_string} {request.headers.get('x-forwarded-uri', '')} {request.headers.get('authorization', '-')}"
            request.respond(200, [("Content-Type", "text/plain")], body.encode() + b" " + await request.body())


@pytest.fixture
async def kubelet(apiserver: RunningAPIServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kubelet]:
    # Loopback addresses are refused as targets; here the node is one.
    monkeypatch.setattr(locations, "_proxyable", lambda host: True)
    pairs = testing.test_pki()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(pairs.api_server.certificate), str(pairs.api_server.key))
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(str(Path(testing._folder().name) / "ca.crt"))
    made = Kubelet()
    server = HTTPServer(made.handle, ssl_context=context)
    port = await server.listen("127.0.0.1", 0)
    client = apiserver.client
    await make_namespace(client, "t")
    await client.create(R.NODES, {"metadata": {"name": "n1"}})
    node = await client.get(R.NODES, "n1")
    node["status"] = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}], "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}
    await client.update(R.NODES, node, subresource="status")
    await client.create(R.PODS, pod("p", "t", nodeName="n1", containers=[{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]), "t")
    yield made
    await server.close()


@contextlib.asynccontextmanager
async def _raw(server: RunningAPIServer) -> AsyncIterator[HTTPClient]:
    """A bare client with the admin's certificate."""
    config = server.client_config
    client = HTTPClient(config.server, config.ssl_context())
    try:
        yield client
    finally:
        await client.close()


async def test_logs_come_from_the_kubelet_with_our_certificate(apiserver: RunningAPIServer, kubelet: Kubelet) -> None:
    client = apiserver.client
    answer = await client.request("GET", "/api/v1/namespaces/t/pods/p/log", query={"container": "a", "tailLines": "5", "timestamps": "true"})
    assert (answer.body, answer.headers["content-type"]) == (b"line 1\nline 2\n", "text/plain")
    assert kubelet.asked == [("GET", "/containerLogs/t/p/a", "tailLines=5&timestamps=true")]
    assert kubelet.certificates[0] is not None
    with refused(400, "a container name must be specified for pod p, choose one of: [a b]"):
        await client.request("GET", "/api/v1/namespaces/t/pods/p/log")
    with refused(400, "container c is not valid for pod p"):
        await client.request("GET", "/api/v1/namespaces/t/pods/p/log", query={"container": "c"})
    with refused(422, "tailLines: Invalid value: -1"):
        await client.request("GET", "/api/v1/namespaces/t/pods/p/log", query={"container": "a", "tailLines": "-1"})
    await client.create(R.PODS, pod("waiting", "t"), "t")
    assert (await client.request("GET", "/api/v1/namespaces/t/pods/waiting/log")).body == b""


async def test_a_followed_log_ends_at_the_kubelet_when_its_reader_leaves(apiserver: RunningAPIServer, kubelet: Kubelet) -> None:
    async with _raw(apiserver) as client:
        async with client.stream("GET", "/api/v1/namespaces/t/pods/p/log?container=a&follow=true") as response:
            async for chunk in response.iter_chunks():
                assert chunk == b"first\n"
                break
            response.abort()
    async with asyncio.timeout(5):
        await kubelet.followers_left.wait()


async def test_an_upgraded_stream_passes_untouched_both_ways(apiserver: RunningAPIServer, kubelet: Kubelet) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": "v4.channel.k8s.io"}
    async with _raw(apiserver) as client:
        path = "/api/v1/namespaces/t/pods/p/exec?container=a&command=sh&command=-c&stdin=true&stdout=true"
        response, raw = await client.upgrade("POST", path, headers)
        assert response.status == 101
        assert response.headers["x-stream-protocol-version"] == "v4.channel.k8s.io"
        assert raw is not None
        raw.write(b"hello ")
        raw.write(b"bye")
        received = b""
        async with asyncio.timeout(5):
            while data := await raw.read():
                received += data
        assert received == b"HELLO BYE"
        raw.close()
    assert kubelet.asked == [("POST", "/exec/t/p/a", "command=sh&command=-c&input=1&output=1")]
    with refused(400, "Upgrade request required"):
        await apiserver.client.request("POST", "/api/v1/namespaces/t/pods/p/exec", query={"container": "a", "command": "ls"})


async def test_a_node_proxy_passes_requests_and_hides_credentials(apiserver: RunningAPIServer, kubelet: Kubelet) -> None:
    client = apiserver.client
    answer = await client.request("POST", "/api/v1/nodes/n1/proxy/some/path", query={"a": "b"}, body=b"body", headers={"Authorization": "Basic x"})
    assert answer.body == b"POST /some/path?a=b /api/v1/nodes/n1/proxy/some/path - body"
    page = await client.request("GET", "/api/v1/nodes/n1/proxy/page")
    assert page.body == b'<a href="/api/v1/nodes/n1/proxy/other">x</a><a href="relative">y</a>'
    async with _raw(apiserver) as raw:
        moved = await raw.request("GET", "/api/v1/nodes/n1/proxy/moved")
        assert (moved.status, moved.headers["location"]) == (302, "/api/v1/nodes/n1/proxy/elsewhere/")
        bare = await raw.request("GET", "/api/v1/nodes/n1/proxy?x=1")
        assert (bare.status, bare.headers["location"]) == (301, "/api/v1/nodes/n1/proxy/?x=1")


async def test_a_service_proxy_picks_a_ready_endpoint_by_port_name(apiserver: RunningAPIServer, kubelet: Kubelet) -> None:
    client = apiserver.client
    backend = Kubelet()
    server = HTTPServer(backend.handle)
    port = await server.listen("127.0.0.1", 0)
    service = {"metadata": {"name": "s", "namespace": "t"}, "spec": {"ports": [{"name": "web", "port": 80}, {"name": "other", "port": 81}]}}
    await client.create(R.SERVICES, service, "t")
    endpoint_slice = {
        "metadata": {"name": "s-1", "namespace": "t", "labels": {"kubernetes.io/service-name": "s"}}, "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.9.9.9"], "conditions": {"ready": False}}, {"addresses": ["10.9.9.8"], "conditions": {"ready": True}}],
        "ports": [{"name": "web", "port": port, "protocol": "TCP"}],
    }  # fmt: skip
    await client.create(R.ENDPOINT_SLICES, endpoint_slice, "t")
    slices = apiserver.server.store("discovery.k8s.io", "endpointslices")
    assert locations.endpoint_of(slices, "t", "s", "web") == ("10.9.9.8", port)
    for name in ("s:web", "http:s:web", "s:80"):
        found = locations.service_location(apiserver.server.store("", "services"), slices, "t", name)
        assert (found.scheme, found.host, found.port) == ("http", "10.9.9.8", port)
    with refused(503, 'no endpoints available for service "s:other"'):
        await client.request("GET", "/api/v1/namespaces/t/services/s:other/proxy/")
    with refused(503, 'no service port 99 found for service "s"'):
        await client.request("GET", "/api/v1/namespaces/t/services/s:99/proxy/")
    await server.close()


@pytest.mark.parametrize(("url", "expected"), [
    ("/a/b/", "/p/a/b/"), ("http://10.0.0.1:80/a", "/p/a"), ("http://elsewhere/a", "http://elsewhere/a"), ("a/b", "a/b"), ("/p/a", "/p/a"),
    ("/a?x=1#f", "/p/a?x=1#f"),
])  # fmt: skip
def test_urls_are_rewritten_only_when_they_point_at_the_backend(url: str, expected: str) -> None:
    assert rewrite_url(url, prefix="/p", backend="10.0.0.1:80", request_host="api:6443") == expected


def test_html_keeps_everything_but_the_links() -> None:
    page = '<html><img src="/i.png" alt="/i.png"><script>var a = "/x";</script><a class=k href=/q>t</a></html>'
    assert rewrite_html(page, prefix="/p", backend="b", request_host="h") == (
        '<html><img src="/p/i.png" alt="/i.png"><script>var a = "/x";</script><a class=k href="/p/q">t</a></html>'
    )


@pytest.mark.parametrize(("text", "expected"), [
    ("n", ("", "n", "")), ("n:80", ("", "n", "80")), ("https:n:80", ("https", "n", "80")), ("https:n:", ("https", "n", "")), ("ftp:n:80", None), ("", None),
])  # fmt: skip
def test_names_with_scheme_and_port(text: str, expected: object) -> None:
    assert locations.split_scheme_name_port(text) == expected
