"""Ingresses through a real HAProxy against a real API server: routing, TLS, live changes without a lost request."""

from __future__ import annotations

import asyncio
import base64
import ssl
import tempfile
from typing import Any

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, INGRESS_CLASSES, INGRESSES, SECRETS, SERVICES
from knarr.client.informer import Informers
from knarr.network import netns, rtnl
from knarr.network.ingress import IngressController
from knarr.network.ingress.certificates import self_signed
from knarr.network.ingress.haproxy import Listen
from knarr.network.ingress.model import build

from .world import endpoint_slice, free_ports, service

pytestmark = pytest.mark.timeout(60)


def own_address() -> str:
    """An address of this machine that an endpoint may have (loopback ones are refused by the API)."""
    with netns.open_netlink() as netlink:
        return next(str(interface.ip) for _index, interface, scope in rtnl.addresses(netlink) if scope == 0 and interface.version == 4)


class Web:
    """A backend that answers with its name and what it saw."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.server: asyncio.Server
        self.requests = 0

    async def start(self, **options: Any) -> Web:
        self.server = await asyncio.start_server(self._serve, own_address(), 0, **options)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests += 1
                path = head.split(" ")[1]
                seen = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head.split("\r\n")[1:] if line}
                body = f"{self.name} {path} {seen.get('x-forwarded-proto')} {seen.get('x-forwarded-for')}".encode()
                shown = "".join(f"Saw-{name}: {seen[name]}\r\n" for name in ("host", "x-test", "x-forwarded-prefix") if name in seen)
                writer.write(b"HTTP/1.1 200 OK\r\n%sServer: web\r\nContent-Length: %d\r\n\r\n%s" % (shown.encode(), len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def headless(name: str, web: Web) -> tuple[dict[str, Any], dict[str, Any]]:
    """A headless Service whose endpoint is a server of this process."""
    svc = service(name, "None", [("http", "TCP", 80)])
    svc.pop("status")
    svc["metadata"].pop("uid")
    part = endpoint_slice(name, [("http", "TCP", web.port)], [{"addresses": [own_address()], "conditions": {"ready": True}}])
    return svc, part


def ingress(name: str, rules: list[dict[str, Any]] | None = None, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "default", "annotations": annotations or {}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": meta,
        "spec": {"ingressClassName": "knarr", "rules": rules or [], **spec},
    }


def backend(name: str) -> dict[str, Any]:
    return {"service": {"name": name, "port": {"number": 80}}}


def rule(host: str, *paths: tuple[str, str, str]) -> dict[str, Any]:
    items = [{"path": path, "pathType": kind, "backend": backend(name)} for path, kind, name in paths]
    return {**({"host": host} if host else {}), "http": {"paths": items}}


class Running:
    def __init__(self, client: Any, controller: IngressController, listen: Listen) -> None:
        self.client, self.controller, self.listen = client, controller, listen

    async def get(self, host: str, path: str = "/", *, tls: bool = False, headers: str = "", method: str = "GET") -> tuple[int, str, str]:
        """(status, body, whole head); with TLS the certificate's names come in front of the head."""
        context = None
        if tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        port = self.listen.https_port if tls else self.listen.http_port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=host if tls else None)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n".encode())
        answer = (await asyncio.wait_for(reader.read(), 5)).decode()
        certificate = writer.get_extra_info("ssl_object").getpeercert(True) if tls else b""
        writer.close()
        head, _gap, body = answer.partition("\r\n\r\n")
        return int(head.split(" ")[1]), body, head + certificate.hex()

    async def put(self, ingress_object: dict[str, Any]) -> None:
        name = ingress_object["metadata"]["name"]
        applied = self.controller.applied
        current = await self.client.list(INGRESSES, "default")
        if any(item["metadata"]["name"] == name for item in current.get("items") or []):
            await self.client.update(INGRESSES, ingress_object)
        else:
            await self.client.create(INGRESSES, ingress_object, "default")
        async with asyncio.timeout(10):
            while self.controller.applied == applied:
                await asyncio.sleep(0.01)
            await self.controller.proxy.wait_ready()

    async def expose(self, name: str) -> Web:
        web = await Web(name).start()
        svc, part = headless(name, web)
        await self.client.create(SERVICES, svc, "default")
        await self.client.create(ENDPOINT_SLICES, part, "default")
        return web


@pytest.fixture
async def running(apiserver):
    # Short, because it holds a unix socket, whose path is limited.
    folder = tempfile.mkdtemp(prefix="kni-")
    http, https = free_ports(2)
    listen = Listen(("127.0.0.1",), http, https)
    informers = Informers(apiserver.client)
    async with Tasks() as tasks:
        controller = IngressController(apiserver.client, informers, folder=folder, listen=listen, status_addresses=["192.0.2.7"])
        tasks.spawn(controller.run(), "ingress")
        yield Running(apiserver.client, controller, listen)
    await informers.close()


async def test_hosts_and_paths_lead_to_their_services(running):
    for name in ("a", "b", "c", "d"):
        await running.expose(name)
    assert running.controller.proxy.pid is None
    await running.put(
        ingress("one", [
            rule("foo.test", ("/", "Prefix", "a"), ("/api", "Prefix", "b"), ("/api/exact", "Exact", "c")),
            rule("*.wild.test", ("/", "Prefix", "d")),
        ])
    )  # fmt: skip
    expected = {
        ("foo.test", "/"): "a", ("foo.test", "/apix"): "a", ("foo.test", "/api"): "b", ("foo.test", "/api/x?q=1"): "b", ("foo.test", "/api/exact"): "c",
        ("foo.test", "/api/exact/"): "b", ("FOO.test", "/"): "a", ("x.wild.test", "/"): "d", ("foo.test:8080", "/"): "a",
    }  # fmt: skip
    for (host, path), name in expected.items():
        status, body, _head = await running.get(host, path)
        assert (status, body.split(" ")[0]) == (200, name), (host, path)
        assert body.split(" ")[1:] == [path, "http", "127.0.0.1"]
    for host in ("other.test", "wild.test", "a.b.wild.test"):
        assert (await running.get(host))[0] == 404
    found = await running.client.get(INGRESSES, "one", "default")
    assert found["status"]["loadBalancer"]["ingress"] == [{"ip": "192.0.2.7"}]
    assert (await running.client.get(INGRESS_CLASSES, "knarr"))["spec"]["controller"] == "knarr.dev/ingress"
    await running.put(ingress("fallback", defaultBackend=backend("b")))
    assert (await running.get("other.test", "/z"))[1].startswith("b /z")


async def test_other_classes_and_classless_ingresses_are_left_alone(running):
    await running.expose("a")
    await running.put(ingress("ours", [rule("ours.test", ("/", "Prefix", "a"))]))
    for name, spec in (("foreign", {"ingressClassName": "nginx"}), ("classless", {})):
        obj = ingress(name, [rule(f"{name}.test", ("/", "Prefix", "a"))])
        obj["spec"].pop("ingressClassName")
        obj["spec"].update(spec)
        await running.client.create(INGRESSES, obj, "default")
    await asyncio.sleep(0.2)
    assert (await running.get("foreign.test"))[0] == 404
    assert (await running.get("classless.test"))[0] == 404
    assert not (await running.client.get(INGRESSES, "foreign", "default"))["status"].get("loadBalancer", {}).get("ingress")


def secret(name: str, pem: str) -> dict[str, Any]:
    cut = pem.index("-----BEGIN PRIVATE")
    data = {"tls.crt": base64.b64encode(pem[:cut].encode()).decode(), "tls.key": base64.b64encode(pem[cut:].encode()).decode()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": "default"},
        "type": "kubernetes.io/tls",
        "data": data,
    }


def der_of(pem: str) -> str:
    return ssl.PEM_cert_to_DER_cert(pem[: pem.index("-----BEGIN PRIVATE")]).hex()


async def test_tls_is_served_from_secrets_changes_hot_and_plain_http_is_redirected(running):
    await running.expose("a")
    first, second = self_signed(), self_signed()
    await running.client.create(SECRETS, secret("cert", first), "default")
    await running.put(ingress("tls", [rule("safe.test", ("/", "Prefix", "a"))], tls=[{"hosts": ["safe.test"], "secretName": "cert"}]))
    status, body, head = await running.get("safe.test", "/x", tls=True)
    assert (status, body) == (200, "a /x https 127.0.0.1")
    assert der_of(first) in head
    status, _body, head = await running.get("safe.test", "/x?y=1")
    assert status == 308
    assert "https://safe.test/x?y=1" in head
    pid = running.controller.proxy.pid
    applied = running.controller.applied
    await running.client.update(SECRETS, secret("cert", second))
    async with asyncio.timeout(5):
        while running.controller.applied == applied:
            await asyncio.sleep(0.01)
    assert der_of(second) in (await running.get("safe.test", tls=True))[2]
    assert der_of(second) not in (await running.get("unknown.test", tls=True))[2]
    assert running.controller.proxy.pid == pid


async def test_annotations(running):
    await running.expose("a")
    prefix = "nginx.ingress.kubernetes.io/"
    await running.put(ingress("rewrite", [rule("rewrite.test", ("/app", "Prefix", "a"))], {prefix + "rewrite-target": "/"}))
    await running.put(
        ingress("moved", [rule("moved.test", ("/", "Prefix", "a"))], {prefix + "permanent-redirect": "https://new.test/there"})
    )
    await running.put(ingress("forced", [rule("forced.test", ("/", "Prefix", "a"))], {prefix + "force-ssl-redirect": "true"}))
    assert (await running.get("rewrite.test", "/app/deep"))[1].startswith("a / ")
    status, _body, head = await running.get("moved.test")
    assert (status, "location: https://new.test/there" in head) == (301, True)
    assert (await running.get("forced.test"))[0] == 308


async def test_annotations_that_look_at_requests_and_change_them(running):
    for name in ("a", "b"):
        await running.expose(name)
    prefix = "nginx.ingress.kubernetes.io/"

    async def put(name: str, path: str = "/", target: str = "a", host: str = "", **annotations: str) -> None:
        wanted = {prefix + key.replace("_", "-"): value for key, value in annotations.items()}
        await running.put(ingress(name, [rule(host or f"{name}.test", (path, "ImplementationSpecific", target))], wanted))

    await put("captures", "/app(/|$)(.*)", rewrite_target="/$2", use_regex="true")
    assert (await running.get("captures.test", "/app/x/y?q=1"))[1].startswith("a /x/y?q=1 ")
    assert (await running.get("captures.test", "/APP"))[1].startswith("a / ")
    assert (await running.get("captures.test", "/apple"))[0] == 404
    await put("soon", temporal_redirect="http://else.test/x")
    status, _body, head = await running.get("soon.test", "/?y=1")
    assert (status, "location: http://else.test/x\r" in head) == (302, True)
    await put("root", app_root="/start")
    assert "location: http://root.test/start" in (await running.get("root.test"))[2]
    assert (await running.get("root.test", "/other"))[1].startswith("a /other ")
    await put("listed", allowlist_source_range="10.0.0.0/8, 192.0.2.1")
    assert (await running.get("listed.test"))[0] == 403
    await put("listed", allowlist_source_range="10.0.0.0/8, 127.0.0.0/8")
    assert (await running.get("listed.test"))[0] == 200
    await put("denied", denylist_source_range="127.0.0.1")
    assert (await running.get("denied.test"))[0] == 403
    await put("headers", upstream_vhost="inner.test", x_forwarded_prefix="/pre", server_alias="alias.test")
    _status, _body, head = await running.get("alias.test")
    assert "saw-host: inner.test" in head
    assert "saw-x-forwarded-prefix: /pre" in head
    await put("cors", enable_cors="true", cors_allow_origin="https://o.test")
    status, _body, head = await running.get("cors.test", method="OPTIONS")
    assert (status, "access-control-allow-origin: https://o.test" in head, "access-control-allow-methods: " in head) == (204, True, True)
    assert "access-control-allow-origin: https://o.test" in (await running.get("cors.test"))[2]
    await put("main", host="main.test")
    await put("canary", target="b", host="main.test", canary="true", canary_by_header="X-Canary")
    assert (await running.get("main.test"))[1].startswith("a ")
    assert (await running.get("main.test", headers="X-Canary: always\r\n"))[1].startswith("b ")
    await put("canary", target="b", host="main.test", canary="true", canary_weight="50")
    assert {(await running.get("main.test"))[1][0] for _ in range(40)} == {"a", "b"}


async def test_a_missing_service_answers_503_with_an_event_and_heals(running):
    await running.put(ingress("early", [rule("early.test", ("/", "Prefix", "late"))]))
    assert (await running.get("early.test"))[0] == 503
    await running.expose("late")
    async with asyncio.timeout(5):
        while (await running.get("early.test"))[0] != 200:
            await asyncio.sleep(0.02)


async def test_no_request_is_lost_while_routes_services_and_certificates_change(running):
    a, b = await running.expose("a"), await running.expose("b")
    await running.put(ingress("steady", [rule("steady.test", ("/", "Prefix", "a"))]))
    pid = running.controller.proxy.pid
    statuses: list[int] = []
    stop = False

    async def kept_alive() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.listen.http_port)
        while not stop:
            writer.write(b"GET / HTTP/1.1\r\nHost: steady.test\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
            statuses.append(int(head.split(" ")[1]))
        writer.close()

    async def fresh() -> None:
        while not stop:
            statuses.append((await running.get("steady.test"))[0])

    load = [asyncio.ensure_future(work()) for work in (kept_alive, kept_alive, fresh)]
    for number in range(15):
        target = "b" if number % 2 else "a"
        await running.put(ingress("steady", [rule("steady.test", ("/", "Prefix", target)), rule(f"n{number}.test", ("/", "Prefix", "a"))]))
    stop = True
    await asyncio.gather(*load)
    assert set(statuses) == {200}
    assert len(statuses) > 50
    assert a.requests
    assert b.requests
    assert running.controller.proxy.pid == pid


async def test_a_killed_proxy_comes_back_with_everything(running):
    await running.expose("a")
    await running.put(ingress("one", [rule("one.test", ("/", "Prefix", "a"))]))
    import os
    import signal

    os.kill(running.controller.proxy.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while True:
            try:
                if (await running.get("one.test"))[0] == 200:
                    break
            except (OSError, IndexError):
                await asyncio.sleep(0.05)


def test_the_older_ingress_wins_a_contested_path():
    older = {**ingress("z", [rule("x.test", ("/", "Prefix", "old"))])}
    newer = {**ingress("a", [rule("x.test", ("/", "Prefix", "new"))])}
    older["metadata"]["creationTimestamp"], newer["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    routes = build([newer, older], lambda _namespace, name, _port: [(name, 80)])
    assert routes.prefix == {"x.test|/": "default/old:80||"}
