"""Custom resources: served at once, converted by webhook, gone with their definition."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from knarr.api import errors
from knarr.api.resources import CUSTOM_RESOURCE_DEFINITIONS
from knarr.http.server import Request
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer
from tests.servers import https_server

BASE = "/apis/stable.example.com"


def definition(**spec: Any) -> dict[str, Any]:
    version = lambda name, storage: {
        "name": name, "served": True, "storage": storage,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}}},
        "subresources": {"status": {}},
    }
    return {
        "metadata": {"name": "crontabs.stable.example.com"},
        "spec": {
            "group": "stable.example.com", "scope": "Namespaced", "names": {"plural": "crontabs", "kind": "CronTab", "shortNames": ["ct"]},
            "versions": [version("v1", True), version("v2", False)], **spec,
        },
    }  # fmt: skip


async def get(server: RunningAPIServer, path: str) -> Any:
    return orjson.loads((await server.client.request("GET", path)).body)


async def established(server: RunningAPIServer) -> None:
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(errors.StatusError):
                found = await get(server, f"{BASE}/v1")
                if found["resources"]:
                    return
            await asyncio.sleep(0.01)


def cron_tab(name: str, version: str = "v1") -> dict[str, Any]:
    return {"apiVersion": f"stable.example.com/{version}", "kind": "CronTab", "metadata": {"name": name}, "spec": {"hostPort": "a:1"}}


async def test_definition_is_served_within_moments_and_every_version_shows_the_object(apiserver: RunningAPIServer) -> None:
    await apiserver.client.create(CUSTOM_RESOURCE_DEFINITIONS, definition())
    await established(apiserver)
    await apiserver.client.request("POST", f"{BASE}/v1/namespaces/default/crontabs", body=cron_tab("a"))
    shown = await get(apiserver, f"{BASE}/v2/namespaces/default/crontabs/a")
    assert shown["apiVersion"] == "stable.example.com/v2"
    listed = await get(apiserver, f"{BASE}/v2/crontabs")
    assert [item["apiVersion"] for item in listed["items"]] == ["stable.example.com/v2"]
    status = (await apiserver.client.get(CUSTOM_RESOURCE_DEFINITIONS, "crontabs.stable.example.com"))["status"]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {"NamesAccepted": "True", "Established": "True"}


async def test_deleted_definition_takes_its_objects_along(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition())
    await established(apiserver)
    for name in ("a", "b"):
        await client.request("POST", f"{BASE}/v1/namespaces/default/crontabs", body=cron_tab(name))
    await client.delete(CUSTOM_RESOURCE_DEFINITIONS, "crontabs.stable.example.com")
    async with asyncio.timeout(5):
        while (await client.list(CUSTOM_RESOURCE_DEFINITIONS))["items"]:
            await asyncio.sleep(0.01)
    with pytest.raises(errors.StatusError):
        await client.request("GET", f"{BASE}/v1")
    # The same name again begins empty.
    await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition())
    await established(apiserver)
    assert (await get(apiserver, f"{BASE}/v1/crontabs"))["items"] == []


@contextlib.asynccontextmanager
async def conversion_webhook() -> AsyncIterator[tuple[str, list[int]]]:
    """A webhook that keeps hostPort in v1 and host, port in v2; yields its URL and the sizes of the calls it got."""
    calls: list[int] = []

    def converted(obj: dict[str, Any], version: str) -> dict[str, Any]:
        spec = dict(obj["spec"])
        if version.endswith("v2") and "hostPort" in spec:
            spec["host"], spec["port"] = spec.pop("hostPort").split(":")
        elif version.endswith("v1") and "host" in spec:
            spec["hostPort"] = f"{spec.pop('host')}:{spec.pop('port')}"
        return {**obj, "apiVersion": version, "spec": spec}

    async def handle(request: Request) -> None:
        review = orjson.loads(await request.body())
        asked = review["request"]
        calls.append(len(asked["objects"]))
        review["response"] = {
            "uid": asked["uid"], "result": {"status": "Success"},
            "convertedObjects": [converted(obj, asked["desiredAPIVersion"]) for obj in asked["objects"]],
        }
        del review["request"]
        request.respond(200, [("Content-Type", "application/json")], orjson.dumps(review))

    async with https_server(handle) as port:
        yield f"https://127.0.0.1:{port}/convert", calls


async def test_webhook_converts_on_write_read_list_and_watch(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    bundle = base64.b64encode(Path(testing._folder().name, "ca.crt").read_bytes()).decode()
    async with conversion_webhook() as (url, calls):
        webhook = {"conversionReviewVersions": ["v1"], "clientConfig": {"url": url, "caBundle": bundle}}
        await client.create(CUSTOM_RESOURCE_DEFINITIONS, definition(conversion={"strategy": "Webhook", "webhook": webhook}))
        await established(apiserver)
        for number in range(5):
            await client.request("POST", f"{BASE}/v1/namespaces/default/crontabs", body=cron_tab(f"c{number}"))
        assert calls == []
        listed = await get(apiserver, f"{BASE}/v2/namespaces/default/crontabs")
        assert [item["spec"] for item in listed["items"]] == [{"host": "a", "port": "1"}] * 5
        assert calls == [5]
        await get(apiserver, f"{BASE}/v2/namespaces/default/crontabs/c0")
        assert calls == [5], "what was converted once is kept"
        new = cron_tab("new", "v2") | {"spec": {"host": "b", "port": "2"}}
        made = orjson.loads((await client.request("POST", f"{BASE}/v2/namespaces/default/crontabs", body=new)).body)
        assert made["spec"] == {"host": "b", "port": "2"}
        assert (await get(apiserver, f"{BASE}/v1/namespaces/default/crontabs/new"))["spec"] == {"hostPort": "b:2"}
        patched = await client.request(
            "PATCH", f"{BASE}/v2/namespaces/default/crontabs/new", body=b'{"spec":{"port":"3"}}',
            headers={"Content-Type": "application/merge-patch+json"},
        )
        assert orjson.loads(patched.body)["spec"] == {"host": "b", "port": "3"}
        version = made["metadata"]["resourceVersion"]
        http = client.http
        path = f"{BASE}/v2/namespaces/default/crontabs?watch=true&resourceVersion={version}"
        async with http.stream("GET", path, await client.headers()) as stream, asyncio.timeout(5):
            event = orjson.loads(await anext(stream.iter_lines()))
        assert (event["type"], event["object"]["spec"]) == ("MODIFIED", {"host": "b", "port": "3"})


async def test_field_selectors_look_at_the_version_asked_for(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    bundle = base64.b64encode(Path(testing._folder().name, "ca.crt").read_bytes()).decode()
    crontabs = f"{BASE}/v2/namespaces/default/crontabs"
    async with conversion_webhook() as (url, _):
        webhook = {"conversionReviewVersions": ["v1"], "clientConfig": {"url": url, "caBundle": bundle}}
        body = definition(conversion={"strategy": "Webhook", "webhook": webhook})
        for version, names in zip(body["spec"]["versions"], (["hostPort"], ["host", "port"]), strict=True):
            version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"] = {name: {"type": "string"} for name in names}
            version["selectableFields"] = [{"jsonPath": f".spec.{name}"} for name in names]
        await client.create(CUSTOM_RESOURCE_DEFINITIONS, body)
        await established(apiserver)
        for number, host in enumerate(("a", "b", "a")):
            tab = cron_tab(f"c{number}") | {"spec": {"hostPort": f"{host}:{number}"}}
            await client.request("POST", f"{BASE}/v1/namespaces/default/crontabs", body=tab)
        listed = await get(apiserver, f"{crontabs}?fieldSelector=spec.host%3Da")
        assert [item["metadata"]["name"] for item in listed["items"]] == ["c0", "c2"]
        listed = await get(apiserver, f"{BASE}/v1/crontabs?fieldSelector=spec.hostPort%3Db:1")
        assert [item["metadata"]["name"] for item in listed["items"]] == ["c1"]
        with pytest.raises(errors.StatusError, match="field label not supported"):
            await get(apiserver, f"{crontabs}?fieldSelector=spec.hostPort%3Db:1")
        path = f"{crontabs}?watch=true&fieldSelector=spec.host%3Da&resourceVersion={listed['metadata']['resourceVersion']}"
        async with client.http.stream("GET", path, await client.headers()) as stream, asyncio.timeout(5):
            for spec in ({"host": "c"}, {"host": "a"}):
                await client.request(
                    "PATCH", f"{crontabs}/c0", body=orjson.dumps({"spec": spec}), headers={"Content-Type": "application/merge-patch+json"})
            await client.request("DELETE", f"{crontabs}?fieldSelector=spec.host%3Da,spec.port!%3D0")
            lines = stream.iter_lines()
            events = [orjson.loads(await anext(lines)) for _ in range(3)]
        assert [(e["type"], e["object"]["metadata"]["name"], e["object"]["spec"]) for e in events] == [
            ("DELETED", "c0", {"host": "a", "port": "0"}), ("ADDED", "c0", {"host": "a", "port": "0"}),
            ("DELETED", "c2", {"host": "a", "port": "2"}),
        ]  # fmt: skip


async def test_two_hundred_definitions_are_served_quickly(apiserver: RunningAPIServer) -> None:
    async def one(number: int) -> None:
        body = definition()
        body["metadata"]["name"] = f"crontabs.g{number}.example.com"
        body["spec"]["group"] = f"g{number}.example.com"
        await apiserver.client.create(CUSTOM_RESOURCE_DEFINITIONS, body)

    async with asyncio.timeout(10):
        await asyncio.gather(*[one(number) for number in range(200)])
        while True:
            groups = (await get(apiserver, "/apis"))["groups"]
            if sum(group["name"].endswith("example.com") for group in groups) == 200:
                break
            await asyncio.sleep(0.05)
