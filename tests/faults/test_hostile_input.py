"""Nonsense of every kind gets upstream's status and a Status body; nothing is stored, memory stays bounded, the server lives."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
import pytest
from bench.servers import TOKEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knarr.api.typeinfo import GATED_OFF
from tests.faults.server import Server

PODS = "/api/v1/namespaces/default/pods"
JSON = "application/json"
MEMORY_LIMIT_BYTES = 400 << 20
SCHEMA = orjson.loads(resources.files("knarr.api.facts").joinpath("schema.json").read_bytes())
PROTOBUF = orjson.loads(resources.files("knarr.api.facts").joinpath("protobuf.json").read_bytes())
MESSAGES = {message["openapi"]: message for message in PROTOBUF.values() if "openapi" in message}
PROTOBUF_NAMES = {message["openapi"]: name for name, message in PROTOBUF.items() if "openapi" in message}
DEFINITIONS = SCHEMA.get("definitions", SCHEMA)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, loop: asyncio.AbstractEventLoop) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("hostile"))
    loop.run_until_complete(made.start())
    yield made
    assert made.process is not None
    assert made.process.poll() is None, "the server died"
    assert memory_bytes(made) < MEMORY_LIMIT_BYTES
    made.kill()


def memory_bytes(server: Server) -> int:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


async def send(server: Server, method: str, path: str, body: bytes, content_type: str = JSON, headers: str = "") -> tuple[int, dict[str, Any]]:
    """(status, decoded body) of one request on a connection of its own."""
    reader, writer = await server.connect()
    try:
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {TOKEN}\r\n{kind}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return await asyncio.wait_for(answer(reader), 20)
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head.split()[1]), orjson.loads(await reader.readexactly(length))


async def stored(server: Server) -> int:
    status, listed = await send(server, "GET", PODS, b"")
    assert status == 200
    return len(listed["items"])


def check_status(result: tuple[int, dict[str, Any]], *codes: int) -> dict[str, Any]:
    status, body = result
    assert status in codes, (status, body)
    assert (body["kind"], body["apiVersion"], body["status"], body["code"]) == ("Status", "v1", "Failure", status)
    assert body["message"]
    return body


def fields(definition: str, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every field of a type that 1.35 has, with the path to it; "[]" stands for a list's element, "{}" for a map's value."""
    known = MESSAGES.get(definition, {})
    for name, field in DEFINITIONS[definition].get("fields", {}).items():
        if name in known.get("new", ()) or name in GATED_OFF.get(PROTOBUF_NAMES.get(definition, ""), ()) or (depth == 0 and name == "status"):
            continue  # not in 1.35, or behind a gate that is off: dropped unread, as upstream does
        yield (*path, name), field
        inner = field.get("items") or field.get("values") or field
        reference = inner.get("ref", "")
        if reference in DEFINITIONS and DEFINITIONS[reference].get("fields") and depth < 5:
            step = ("[]",) if "items" in field else ("{}",) if "values" in field else ()
            yield from fields(reference, (*path, name, *step), depth + 1)


POD_FIELDS = list(fields("io.k8s.api.core.v1.Pod"))


def wrong_values(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON type that the field cannot hold."""
    text, number, fraction, boolean = st.text(min_size=1, max_size=8), st.integers(1, 9), st.just(1.5), st.booleans()
    listing, mapping = st.just(["x"]), st.just({"x": {"y": 1}})
    if "items" in field:
        return st.one_of(text, number, boolean, mapping)
    if "values" in field:
        return st.one_of(text, number, boolean, listing)
    reference = field.get("ref", "")
    if reference:
        kind = DEFINITIONS.get(reference, {})
        if kind.get("intOrString") or reference.endswith(("Quantity", "IntOrString")):
            return st.one_of(boolean, listing, mapping)
        if kind.get("anyValue") or reference.endswith("FieldsV1"):
            return st.nothing()  # any JSON is welcome there
        if reference.endswith(("Time", "MicroTime", "Duration")):
            return st.one_of(number, boolean, listing, mapping)
        return st.one_of(text, number, boolean, listing)
    wrong: dict[str, list[st.SearchStrategy[Any]]] = {
        "string": [number, boolean, listing, mapping],
        "integer": [text, fraction, boolean, listing, mapping],
        "number": [text, boolean, listing, mapping],
        "boolean": [text, number, listing, mapping],
    }
    choices = wrong.get(field.get("type", ""))
    return st.one_of(*choices) if choices else st.nothing()


WRONGABLE = [(path, field) for path, field in POD_FIELDS if not wrong_values(field).is_empty and path[-1] not in ("kind", "apiVersion")]


def place(path: tuple[str, ...], value: Any) -> Any:
    """A document with the value at the path."""
    for step in reversed(path):
        value = [value] if step == "[]" else {"key": value} if step == "{}" else {step: value}
    return value


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        result[key] = merged(result[key], value) if isinstance(result.get(key), dict) and isinstance(value, dict) else value
    return result


GOOD: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_wrong_type_in_any_field_of_a_pod_is_a_bad_request_and_nothing_is_stored(server: Server, loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    path, field = data.draw(st.sampled_from(WRONGABLE))
    value = data.draw(wrong_values(field))
    body = json.dumps(merged(GOOD, place(path, value))).encode()
    result = loop.run_until_complete(send(server, "POST", PODS, body))
    status = check_status(result, 400)
    assert status["reason"] == "BadRequest"
    assert loop.run_until_complete(stored(server)) == 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), kind=st.sampled_from([JSON, "application/yaml", "application/vnd.kubernetes.protobuf"]))
def test_random_bytes_are_refused_in_every_content_type(server: Server, loop: asyncio.AbstractEventLoop, body: bytes, kind: str) -> None:
    check_status(loop.run_until_complete(send(server, "POST", PODS, body, kind)), 400, 422)


MALFORMED = {
    "cut": b'{"apiVersion":"v1","kind":"Pod","metadata":{"na',
    "trailing": b'{"apiVersion":"v1","kind":"Pod"}}',
    "list": b"[]",
    "text": b'"pod"',
    "null": b"null",
    "number": b"12",
    "bad-utf8": b'{"apiVersion":"v1","kind":"Pod","metadata":{"name":"\xff"}}',
    "deep": b'{"metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "deep-list": b"[" * 200_000 + b"]" * 200_000,
    "huge-number": b'{"apiVersion":"v1","kind":"Pod","spec":{"priority":' + b"9" * 5000 + b"}}",
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_malformed_json_is_a_bad_request(server: Server, loop: asyncio.AbstractEventLoop, name: str) -> None:
    # A bare null is an empty object to upstream's decoder: well-formed, but without the fields that a Pod needs.
    check_status(loop.run_until_complete(send(server, "POST", PODS, MALFORMED[name])), 422 if name == "null" else 400)


BOMBS = {
    "aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (ord("b") + i, ord("b") + i, b",".join([b"*%c" % (ord("a") + i)] * 9)) for i in range(8)) + b"metadata: *i\n",
    "merge": b"a: &a {k: v}\n" + b"".join(b"x%d: &x%d {<<: [%s]}\n" % (i, i, b",".join([b"*a"] * 50)) for i in range(200)),
    "deep": b"".join(b" " * i + b"a:\n" for i in range(2000)),
    "flow": b"[" * 50_000,
    "tag": b"!!python/object/apply:os.system ['true']",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_yaml_bombs_are_refused_quickly_and_cheaply(server: Server, loop: asyncio.AbstractEventLoop, name: str) -> None:
    before, start = memory_bytes(server), time.monotonic()
    check_status(loop.run_until_complete(send(server, "POST", PODS, BOMBS[name], "application/yaml")), 400, 413, 422)
    assert time.monotonic() - start < 5
    assert memory_bytes(server) - before < 100 << 20


def test_an_oversized_body_is_too_large(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    body = b'{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"big"},"data":{"k":"' + b"x" * (4 << 20) + b'"}}'
    status = check_status(loop.run_until_complete(send(server, "POST", "/api/v1/namespaces/default/configmaps", body)), 413)
    assert status["reason"] == "RequestEntityTooLarge"


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "image/png", "application/json-patch+json", "nonsense"])
def test_an_unknown_content_type_is_unsupported(server: Server, loop: asyncio.AbstractEventLoop, kind: str) -> None:
    status = check_status(loop.run_until_complete(send(server, "POST", PODS, json.dumps(GOOD).encode(), kind)), 415)
    assert status["reason"] == "UnsupportedMediaType"


def test_an_unknown_accept_is_not_acceptable(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    status = check_status(loop.run_until_complete(send(server, "GET", PODS, b"", "", "Accept: text/csv\r\n")), 406)
    assert status["reason"] == "NotAcceptable"


async def half_open(server: Server, count: int, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    for _ in range(count):
        reader, writer = await server.connect()
        writer.write(data)
        yield reader, writer


def test_slow_and_half_open_clients_do_not_keep_others_waiting(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    async def attack() -> None:
        before = memory_bytes(server)
        held = [pair async for pair in half_open(server, 200, b"POST /api/v1/namespaces/default/pods HTTP/1.1\r\nHost: t\r\nX-Slow: ")]
        held += [pair async for pair in half_open(server, 200, f"POST {PODS} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000000\r\n\r\n{{".encode())]
        start = time.monotonic()
        assert await stored(server) == 0
        assert time.monotonic() - start < 2
        assert memory_bytes(server) - before < 100 << 20
        for _, writer in held:
            writer.transport.abort()
        assert await stored(server) == 0

    loop.run_until_complete(attack())


def test_endless_headers_end_the_connection(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    async def attack() -> None:
        reader, writer = await server.connect()
        writer.write(b"GET /api HTTP/1.1\r\nHost: t\r\n")
        try:
            for number in range(4000):
                writer.write(b"X-%d: %s\r\n" % (number, b"y" * 1000))
                await writer.drain()
            head = await asyncio.wait_for(reader.read(4096), 20)
        except ConnectionError:
            return
        assert head == b"" or head.split()[1] in (b"400", b"431")
        writer.close()

    loop.run_until_complete(attack())
    assert loop.run_until_complete(stored(server)) == 0
