"""Gateway API end to end: definitions installed while the controller runs, a request through HAProxy, statuses."""

from __future__ import annotations

import asyncio
import tempfile
from typing import Any

import grpc.aio
import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.errors import StatusError
from knarr.api.resources import CUSTOM_RESOURCE_DEFINITIONS, ENDPOINT_SLICES, NAMESPACES, RESOURCE_QUOTAS, SERVICES
from knarr.api.scheme import Resource
from knarr.client.informer import Informers
from knarr.network.ingress import IngressController
from knarr.network.ingress.gatewayapi import CONTROLLER, GATEWAY_CLASSES, GATEWAYS, GROUP, GRPC_ROUTES, HTTP_ROUTES, REFERENCE_GRANTS
from knarr.network.ingress.haproxy import Listen
from knarr.network.loadbalancer import LoadBalancerController

from .test_ingress import Running, headless, own_address, running
from .world import free_ports

__all__ = ["running"]
pytestmark = pytest.mark.timeout(60)


def definition(resource: Resource) -> dict[str, Any]:
    """The resource with any content, as the real definitions serve it."""
    names = {"plural": resource.plural, "singular": resource.singular, "kind": resource.kind, "listKind": resource.list_kind}
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": resource.version, "served": True, "storage": True, "subresources": {"status": {}}, "schema": schema}
    approval = {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api/pull/2997"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{GROUP}", "annotations": approval},
        "spec": {"group": GROUP, "scope": "Namespaced" if resource.namespaced else "Cluster", "names": names, "versions": [version]},
    }


def made(resource: Resource, name: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": "default"} if resource.namespaced else {})}
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "spec": spec}


async def eventually(check: Any) -> None:
    async with asyncio.timeout(10):
        while not await check():
            await asyncio.sleep(0.05)


async def create(client: Any, resource: Resource, obj: dict[str, Any]) -> None:
    async def attempt() -> bool:
        try:
            await client.create(resource, obj, obj["metadata"].get("namespace"))
        except StatusError as error:
            # Until a definition is established its resource is not found.
            if error.code != 404:
                raise
            return False
        return True

    await eventually(attempt)


async def install(client: Any) -> None:
    """The definitions, a class of ours and a Gateway with one listener."""
    for resource in (GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES):
        await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition(resource))
    await create(client, GATEWAY_CLASSES, made(GATEWAY_CLASSES, "ours", controllerName=CONTROLLER))
    await create(client, GATEWAYS, made(GATEWAYS, "gw", gatewayClassName="ours", listeners=[{"name": "http", "port": 80, "protocol": "HTTP"}]))


async def test_a_route_is_served_as_soon_as_somebody_installs_the_definitions(running: Running) -> None:
    client = running.client
    await running.expose("a")
    await install(client)
    rule = {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": [{"name": "a", "port": 80}]}
    await create(client, HTTP_ROUTES, made(HTTP_ROUTES, "r", parentRefs=[{"name": "gw"}], hostnames=["g.test"], rules=[rule]))

    async def served() -> bool:
        try:
            return (await running.get("g.test", "/x"))[:2] == (200, "a /x http 127.0.0.1")
        except (OSError, IndexError):
            return False

    await eventually(served)

    async def told() -> bool:
        found = await client.get(HTTP_ROUTES, "r", "default")
        parents = (found.get("status") or {}).get("parents") or []
        return bool(parents) and all(item["status"] == "True" for item in parents[0]["conditions"])

    await eventually(told)
    gateway = await client.get(GATEWAYS, "gw", "default")
    assert gateway["status"]["addresses"] == [{"type": "IPAddress", "value": "192.0.2.7"}]
    version = gateway["metadata"]["resourceVersion"]
    await asyncio.sleep(0.3)
    # Once told, statuses are left alone.
    assert (await client.get(GATEWAYS, "gw", "default"))["metadata"]["resourceVersion"] == version


def match(path: str = "/", kind: str = "PathPrefix", **more: Any) -> dict[str, Any]:
    return {"path": {"type": kind, "value": path}, **more}


def to(name: str, *matches: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"matches": list(matches), "backendRefs": [{"name": name, "port": 80}], **more}


async def test_matches_and_filters_do_what_the_specification_says(running: Running) -> None:
    client = running.client
    for name in ("a", "b"):
        await running.expose(name)
    await install(client)
    header = lambda value, **more: {"headers": [{"name": "X-Kind", "value": value, **more}]}
    moved = {"hostname": "new.test", "port": 8080, "statusCode": 301, "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/to"}}
    change = {"set": [{"name": "X-Test", "value": "set: a, b"}], "remove": ["X-Gone"]}
    rules = [
        to("a", match()),
        to("b", match("/h", **header("one"))),
        to("b", match("/h", **header("t(wo|hree)", type="RegularExpression"))),
        to("b", match("/q", queryParams=[{"name": "v", "value": "x y"}])),
        to("b", match("/m", method="POST")),
        to("b", match("/re/[0-9]+", "RegularExpression")),
        to("b", match("/[a-z]+/cond", "RegularExpression", **header("one"))),
        to("b", match("/old"), filters=[{"type": "URLRewrite", "urlRewrite": {"hostname": "in.test", "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}}}]),
        {"matches": [match("/gone")], "filters": [{"type": "RequestRedirect", "requestRedirect": moved}]},
        to("b", match("/change"), filters=[{"type": "RequestHeaderModifier", "requestHeaderModifier": change}, {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"add": [{"name": "X-Out", "value": "yes"}], "remove": ["Server"]}}]),
    ]  # fmt: skip
    await create(client, HTTP_ROUTES, made(HTTP_ROUTES, "r", parentRefs=[{"name": "gw"}], hostnames=["g.test"], rules=rules))

    async def served() -> bool:
        try:
            return (await running.get("g.test"))[0] == 200
        except (OSError, IndexError):
            return False

    await eventually(served)
    expected = [
        ("/h", {}, "a"), ("/h", {"headers": "x-kind: one\r\n"}, "b"), ("/h/x", {"headers": "X-Kind: three\r\n"}, "b"), ("/h", {"headers": "X-Kind: threes\r\n"}, "a"),
        ("/q?v=x%20y&w=1", {}, "b"), ("/q?v=x", {}, "a"), ("/m", {"method": "POST"}, "b"), ("/m", {}, "a"),
        ("/re/12", {}, "b"), ("/re/12x", {}, "a"), ("/q/cond", {}, "a"), ("/q/cond", {"headers": "X-Kind: one\r\n"}, "b"), ("/other", {}, "a"),
    ]  # fmt: skip
    for path, options, name in expected:
        status, body, _head = await running.get("g.test", path, **options)
        assert (status, body.split(" ")[0]) == (200, name), (path, options)
    _status, body, head = await running.get("g.test", "/old/x?y=1")
    assert body.startswith("b /new/x?y=1 ")
    assert "saw-host: in.test" in head
    assert (await running.get("g.test", "/old"))[1].startswith("b /new ")
    status, _body, head = await running.get("g.test", "/gone/away?z=1")
    assert (status, "location: http://new.test:8080/to/away?z=1" in head) == (301, True)
    _status, _body, head = await running.get("g.test", "/change")
    assert "saw-x-test: set: a, b" in head
    assert "x-out: yes" in head
    assert "server: web" not in head


async def test_copies_timeouts_and_grants_through_the_proxy(running: Running) -> None:
    client = running.client
    copies = await running.expose("b")
    await running.expose("a")
    await client.create(NAMESPACES, {"metadata": {"name": "routes"}})
    await install(client)
    await client.patch(
        GATEWAYS, "gw", "default", {"spec": {"listeners": [{"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}}]}}, type="merge"
    )  # fmt: skip
    await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition(REFERENCE_GRANTS))
    there = {"name": "a", "port": 80, "namespace": "default"}
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "b", "port": 80, "namespace": "default"}}}
    spec = {"parentRefs": [{"name": "gw", "namespace": "default"}], "hostnames": ["g.test"], "rules": [{"backendRefs": [there], "filters": [mirror], "timeouts": {"request": "5s"}}]}
    await create(client, HTTP_ROUTES, {**made(HTTP_ROUTES, "r", **spec), "metadata": {"name": "r", "namespace": "routes"}})

    async def answers(status: int) -> bool:
        try:
            return (await running.get("g.test"))[0] == status
        except (OSError, IndexError):
            return False

    await eventually(lambda: answers(500))
    permit = {"from": [{"group": GROUP, "kind": "HTTPRoute", "namespace": "routes"}], "to": [{"group": "", "kind": "Service"}]}
    await create(client, REFERENCE_GRANTS, made(REFERENCE_GRANTS, "permit", **permit))
    await eventually(lambda: answers(200))
    before = copies.requests
    for number in range(5):
        status, body, _head = await running.get("g.test", f"/x{number}", method="POST", headers="Content-Length: 0\r\n")
        assert (status, body.split(" ")[0]) == (200, "a")

    async def copied() -> bool:
        return copies.requests == before + 5

    await eventually(copied)
    await client.delete(REFERENCE_GRANTS, "permit", "default")
    await eventually(lambda: answers(500))


async def test_every_gateway_has_an_address_of_its_own_and_shares_nothing(apiserver: Any) -> None:
    http, https = free_ports(2)
    listen, informers = Listen(("*",), http, https), Informers(apiserver.client)
    folder = tempfile.mkdtemp(prefix="kng-")
    async with Tasks() as tasks:
        controller = IngressController(apiserver.client, informers, folder=folder, listen=listen, status_addresses=["192.0.2.7"], gateway_services=True)
        tasks.spawn(controller.run(), "ingress")
        # Nothing translates addresses here, so they are such as lead to the proxy by themselves, and listeners have its port.
        tasks.spawn(LoadBalancerController(apiserver.client, informers, pool=["127.77.0.0/28"]).run(), "load balancer")
        client, running = apiserver.client, Running(apiserver.client, controller, listen)
        for name in ("a", "b"):
            await running.expose(name)
        for resource in (GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES):
            await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition(resource))
        for name in ("a", "b"):
            listener = {"name": "http", "port": http, "protocol": "HTTP"}
            await create(client, GATEWAYS, made(GATEWAYS, f"gw-{name}", gatewayClassName="knarr", listeners=[listener]))
            await create(client, HTTP_ROUTES, made(HTTP_ROUTES, name, parentRefs=[{"name": f"gw-{name}"}], rules=[to(name, match(f"/{name}"))]))
        places: dict[str, str] = {}

        async def given() -> bool:
            for name in ("a", "b"):
                status = (await client.get(GATEWAYS, f"gw-{name}", "default")).get("status") or {}
                if any(item["type"] == "Programmed" and item["status"] == "True" for item in status.get("conditions") or ()):
                    places[name] = status["addresses"][0]["value"]
            return len(set(places.values())) == 2

        await eventually(given)
        await running.controller.proxy.wait_ready()
        for name, other in (("a", "b"), ("b", "a")):
            for path, status in ((f"/{name}", 200), (f"/{other}", 404)):
                assert await status_at(places[name], http, path) == status, (name, path)
        service = await client.get(SERVICES, "gw-a-knarr", "default")
        assert service["metadata"]["labels"]["gateway.networking.k8s.io/gateway-name"] == "gw-a"
        assert service["metadata"]["ownerReferences"][0]["name"] == "gw-a"
        # A Gateway whose Service is refused says why, and costs the others nothing.
        await client.create(NAMESPACES, {"metadata": {"name": "full"}})
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"services": "0"}}}
        made_quota = await client.create(RESOURCE_QUOTAS, quota, "full")
        # Nobody counts here.
        await client.update(RESOURCE_QUOTAS, {**made_quota, "status": {"hard": {"services": "0"}, "used": {"services": "0"}}}, subresource="status")
        poor = made(GATEWAYS, "poor", gatewayClassName="knarr", listeners=[{"name": "http", "port": http, "protocol": "HTTP"}])
        await create(client, GATEWAYS, {**poor, "metadata": {"name": "poor", "namespace": "full"}})

        async def explained() -> bool:
            found = (await client.get(GATEWAYS, "poor", "full")).get("status") or {}
            return any(item["reason"] == "AddressNotAssigned" and "quota" in item["message"] for item in found.get("conditions") or ())

        await eventually(explained)
        await client.delete(GATEWAYS, "gw-a", "default")

        async def gone() -> bool:
            return {item["metadata"]["name"] for item in (await client.list(SERVICES, "default"))["items"]} & {"gw-a-knarr", "gw-b-knarr"} == {"gw-b-knarr"}

        await eventually(gone)
    await informers.close()


async def status_at(address: str, port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x.test\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return int(answer.split(b" ")[1])


async def test_calls_of_grpc_go_to_the_service_of_their_method(running: Running) -> None:
    client = running.client

    class Echo(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda request, _context: details.method.encode() + b" " + request)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))

    class Port:
        port = server.add_insecure_port(f"{own_address()}:0")

    await server.start()
    try:
        svc, part = headless("calls", Port())  # type: ignore[arg-type]
        await client.create(SERVICES, svc, "default")
        await client.create(ENDPOINT_SLICES, part, "default")
        await install(client)
        await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition(GRPC_ROUTES))
        rule = {"matches": [{"method": {"service": "shop.Cart", "method": "Add"}}], "backendRefs": [{"name": "calls", "port": 80}]}
        await create(client, GRPC_ROUTES, made(GRPC_ROUTES, "r", parentRefs=[{"name": "gw"}], hostnames=["grpc.test"], rules=[rule]))
        options = [("grpc.default_authority", "grpc.test")]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.listen.http_port}", options=options) as channel:

            async def answered() -> bool:
                try:
                    return bool(await channel.unary_unary("/shop.Cart/Add")(b"one", wait_for_ready=True, timeout=5) == b"/shop.Cart/Add one")
                except grpc.aio.AioRpcError:
                    return False

            await eventually(answered)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/shop.Cart/Remove")(b"one", timeout=5)
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(None)
