"""Request traces: what a collector is sent, whose trace it belongs to, and what webhooks are told."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import orjson
import pytest

from knarr.api.resources import CONFIG_MAPS, VALIDATING_WEBHOOK_CONFIGURATIONS
from knarr.apiserver.tracing import load
from knarr.http.server import Request
from knarr.storage.etcd_wire import fields
from knarr.testing.apiserver import running_apiserver
from tests.apiserver.auth.test_outside import _ca, _server
from tests.apiserver.identities import with_token

pytestmark = pytest.mark.timeout(60)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Seen(NamedTuple):
    name: str
    kind: int
    trace: str
    span: str
    parent: str
    attributes: dict[str, Any]
    link: str
    nanoseconds: int


def _parts(body: bytes) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for number, value in fields(body):
        found.setdefault(number, []).append(value)
    return found


def _attributes(items: list[bytes]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in items:
        pair = _parts(item)
        value = _parts(pair[2][0])
        out[pair[1][0].decode()] = value[1][0].decode() if 1 in value else value[3][0]
    return out


def _spans(body: bytes) -> list[Seen]:
    out = []
    for resource in _parts(body)[1]:
        whole = _parts(resource)
        assert _attributes(_parts(whole[1][0])[1])["service.name"] == "apiserver"
        for scope in whole[2]:
            for raw in _parts(scope)[2]:
                one = _parts(raw)
                begin, end = (value if isinstance(value, int) else struct.unpack("<Q", value)[0] for value in (one[7][0], one[8][0]))
                link = _parts(one[13][0])[1][0].hex() if 13 in one else ""
                parent = one[4][0].hex() if 4 in one else ""
                out.append(Seen(one[5][0].decode(), one[6][0], one[1][0].hex(), one[2][0].hex(), parent, _attributes(one.get(9, [])), link, end - begin))
    return out


@pytest.fixture
async def collector(tmp_path: Path) -> AsyncIterator[tuple[str, list[Seen]]]:
    """(path of a tracing configuration, the spans received so far)."""
    received: list[Seen] = []

    async def export(body: bytes, context: object) -> bytes:
        received.extend(_spans(body))
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(export)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("opentelemetry.proto.collector.trace.v1.TraceService", {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    path = tmp_path / "tracing.yaml"
    path.write_text(f"apiVersion: apiserver.config.k8s.io/v1\nkind: TracingConfiguration\nendpoint: 127.0.0.1:{port}\n")
    yield str(path), received
    await server.stop(None)


async def test_a_sampled_request_has_spans_below_that_of_its_caller(collector: tuple[str, list[Seen]]) -> None:
    path, received = collector
    told: list[str] = []

    async def judge(request: Request) -> None:
        told.append(request.headers["traceparent"])
        uid = orjson.loads(await request.body())["request"]["uid"]
        answer = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": {"uid": uid, "allowed": True}}
        request.respond(200, [("Content-Type", "application/json")], json.dumps(answer).encode())

    async with _server(judge) as url, running_apiserver(tracing_config=path) as server:
        rules = [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}]
        await server.client.create(VALIDATING_WEBHOOK_CONFIGURATIONS, {"metadata": {"name": "judge"}, "webhooks": [{
            "name": "judge.example.com", "rules": rules, "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": {"url": url, "caBundle": base64.b64encode(_ca().read_bytes()).decode()},
        }]})  # fmt: skip
        collection = "/api/v1/namespaces/default/configmaps"
        await server.client.request("POST", collection, body={"metadata": {"name": "a"}}, headers=SAMPLED)
        await server.client.request("GET", f"{collection}/a", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        await server.client.get(CONFIG_MAPS, "a", "default")
        async with with_token(server, "") as nobody:
            await nobody.request("GET", "/healthz", headers=SAMPLED)
    by_name = {span.name: span for span in received}
    # Neither who says that he does not sample, nor who says nothing, nor who may not decide.
    assert sorted(by_name) == ["Call validating webhook", "Create", "POST /api/v1/namespaces/{:namespace}/configmaps"]
    root, verb, call = by_name["POST /api/v1/namespaces/{:namespace}/configmaps"], by_name["Create"], by_name["Call validating webhook"]
    assert (root.trace, root.parent, root.kind) == (TRACE, PARENT, 2)
    assert {span.trace for span in received} == {TRACE}
    assert (verb.parent, call.parent, call.kind) == (root.span, verb.span, 3)
    assert root.attributes["http.status_code"] == 201
    assert root.attributes["http.target"] == collection
    assert call.attributes["webhook"] == "judge.example.com"
    assert told == [f"00-{TRACE}-{call.span}-01"]
    assert root.nanoseconds >= verb.nanoseconds > call.nanoseconds > 0


async def test_at_the_full_rate_everybody_is_sampled_and_strangers_get_a_trace_of_their_own(collector: tuple[str, list[Seen]]) -> None:
    path, received = collector
    with open(path, "a") as file:
        file.write("samplingRatePerMillion: 1000000\n")
    async with running_apiserver(tracing_config=path) as server:
        async with with_token(server, "") as nobody:
            await nobody.request("GET", "/livez", headers=SAMPLED)
            await nobody.request("GET", "/readyz")
    live, ready = (next(span for span in received if span.attributes["http.target"] == target) for target in ("/livez", "/readyz"))
    assert (live.name, live.parent, live.link) == ("GET", "", TRACE)
    assert TRACE not in (live.trace, ready.trace)
    assert ready.link == ""


@pytest.mark.parametrize("text", ["kind: Else", "apiVersion: apiserver.config.k8s.io/v1\nkind: TracingConfiguration\nsamplingRatePerMillion: 2000000"])
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracing.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"tracing\.yaml"):
        load(str(tmp_path / "tracing.yaml"))
