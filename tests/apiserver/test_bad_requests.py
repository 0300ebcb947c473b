"""What clients should not send: upstream's status and a Status body, nothing stored, nobody else disturbed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knarr.api import errors, typeinfo
from knarr.http.client import HTTPClient, Response
from knarr.testing.apiserver import RunningAPIServer, running_apiserver

PATH = "/api/v1/namespaces/default/configmaps"


async def post(server: RunningAPIServer, body: bytes, content_type: str = "application/json", path: str = PATH) -> Response:
    client = server.client.http
    return await client.request("POST", path, [*await server.client.headers(), ("Content-Type", content_type)], body)


def reason(response: Response) -> str:
    status = orjson.loads(response.body)
    assert status["kind"] == "Status"
    assert status["code"] == response.status
    return str(status["reason"])


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%b]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(12)
) + b"kind: ConfigMap\napiVersion: v1\nmetadata: {name: bomb}\n"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "why"),
    [
        (b"{", "application/json", 400, "BadRequest"),
        (b"", "application/json", 400, "BadRequest"),
        (b"[]", "application/json", 400, "BadRequest"),
        (b'{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":5}}', "application/json", 400, "BadRequest"),
        (b"\xff\xfe", "application/json", 400, "BadRequest"),
        (b'{"a":' * 100_000, "application/json", 400, "BadRequest"),
        (BOMB, "application/yaml", 400, "BadRequest"),
        (b"k8s\x00garbage", "application/vnd.kubernetes.protobuf", 400, "BadRequest"),
        (b"<x/>", "text/xml", 415, "UnsupportedMediaType"),
        (b'{"data":{"k":"' + b"v" * (4 << 20) + b'"}}', "application/json", 413, "RequestEntityTooLarge"),
        (b'{"kind":"Pod","apiVersion":"v1","metadata":{"name":"x"}}', "application/json", 400, "BadRequest"),
        (b'{"metadata":{"name":"Bad_Name"}}', "application/json", 422, "Invalid"),
    ],
)  # fmt: skip
async def test_unusable_body_is_refused(apiserver: RunningAPIServer, body: bytes, content_type: str, status: int, why: str) -> None:
    before = apiserver.server.storage.revision
    response = await post(apiserver, body, content_type)
    assert (response.status, reason(response)) == (status, why)
    assert not apiserver.server.registry.stores["", "configmaps"].cache.in_order("default")
    assert apiserver.server.storage.revision - before <= 3, "only leases of the server itself may have been written"


async def test_wrong_accept_is_not_acceptable(apiserver: RunningAPIServer) -> None:
    client = HTTPClient(apiserver.url, ssl_context=apiserver.client_config.ssl_context())
    response = await client.request("GET", PATH, {"Accept": "text/html"})
    assert (response.status, reason(response)) == (406, "NotAcceptable")
    await client.close()


async def test_half_open_and_idle_connections_do_not_hold_up_anybody(apiserver: RunningAPIServer) -> None:
    tls = apiserver.client_config.ssl_context()
    silent = [await asyncio.open_connection("127.0.0.1", apiserver.server.port, ssl=tls) for _ in range(50)]
    for _, writer in silent[:25]:
        writer.write(b"POST /api/v1/namespaces HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert (await apiserver.client.request("GET", PATH)).status == 200
    for _, writer in silent:
        writer.transport.abort()


def _leaves(name: str, depth: int = 4) -> list[tuple[str, ...]]:
    """Paths of the fields of a type, lists and maps entered, some levels deep."""
    out: list[tuple[str, ...]] = []
    for key, field in typeinfo.message(name).fields.items():
        out.append((key,))
        if "." in field.type and depth > 0 and not typeinfo.message(field.type).form:
            out += [(key, "[]" if field.label == "repeated" else "{}" if field.label == "map" else ".", *rest) for rest in _leaves(field.type, depth - 1)]
    return out


PATHS = sorted(_leaves("k8s.io.api.core.v1.PodSpec", 3))
WRONG = [True, -1, 2**63, 1.5, "x", "", [], {}, [None], {"a": None}, [{"b": []}], "\u0000", None]


def _nested(path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    inner = _nested(rest, value)
    if head == "[]":
        return [inner]
    if head == "{}":
        return {"k": inner}
    return inner if head == "." else {head: inner}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=st.sampled_from(WRONG))
def test_wrong_type_in_any_field_of_a_pod_is_the_clients_fault(path: tuple[str, ...], value: Any) -> None:
    """Never a 5xx; asked of the pure part (decode, default, validate) that every write goes through."""
    from knarr.api.errors import StatusError
    from knarr.api.resources import PODS
    from knarr.apiserver import machinery
    from knarr.apiserver.endpoint import Endpoint
    from knarr.apiserver.registry.pods import Pod

    spec = {"containers": [{"name": "c", "image": "i"}]}
    changed = _nested(path, value)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": "default"}, "spec": {**spec, **changed}}
    endpoint = Endpoint(PODS, None, Pod())
    code = 200
    with contextlib.suppress(orjson.JSONEncodeError):
        try:
            obj, _ = machinery.decode(endpoint, orjson.dumps(pod), "application/json", "Strict")
            machinery.validate_create(endpoint, obj)
        except StatusError as error:
            code = error.code
    assert code == 200 or 400 <= code < 500


async def test_random_bytes_never_make_the_server_fail() -> None:
    async with running_apiserver() as server:
        import random

        source = random.Random(7)
        bodies = [source.randbytes(source.randrange(1, 200)) for _ in range(100)]
        kinds = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"]
        answers = await asyncio.gather(*[post(server, body, kinds[i % 3]) for i, body in enumerate(bodies)])
        assert {answer.status for answer in answers} <= {400, 413, 415, 422}


async def test_timeout_parameter_is_a_duration(apiserver: RunningAPIServer) -> None:
    for path in ("/version", "/api/v1/namespaces/default"):
        for text in ("0s", "3m", "1s"):
            assert (await apiserver.client.request("GET", f"{path}?timeout={text}")).status == 200
        with pytest.raises(errors.StatusError, match="invalid timeout specified in the request URL") as caught:
            await apiserver.client.request("GET", f"{path}?timeout=soon")
        assert caught.value.code == 400
