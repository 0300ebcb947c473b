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


JOBS = "/apis/batch/v1/namespaces/default/jobs"
JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY = (
    "application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json", "application/apply-patch+yaml",
)  # fmt: skip


async def patch(server: RunningAPIServer, path: str, content_type: str, body: Any) -> Response:
    headers = [*await server.client.headers(), ("Content-Type", content_type)]
    return await server.client.http.request("PATCH", path, headers, orjson.dumps(body))


async def test_patches_of_version_and_kind_are_refused_or_not_looked_at(apiserver: RunningAPIServer) -> None:
    pod = {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {"suspend": True, "template": {"spec": pod}}}
    assert (await post(apiserver, orjson.dumps(body), path=JOBS)).status == 201
    for path in (f"{JOBS}/x", f"{JOBS}/x/status"):
        for wrong, status, words in (
            (None, 400, "name must be provided"), ("", 400, "name must be provided"), (0, 422, "cannot unmarshal number into Go struct field .apiVersion"),
            ([], 422, "cannot unmarshal array into Go struct field .apiVersion"), ("a/b/c", 422, "unexpected GroupVersion string: a/b/c"),
        ):  # fmt: skip
            for content_type, change in ((MERGE_PATCH, {"apiVersion": wrong}), (JSON_PATCH, [{"op": "add", "path": "/apiVersion", "value": wrong}])):
                answer = await patch(apiserver, path, content_type, change)
                assert (answer.status, words in answer.body.decode()) == (status, True), answer.body
        answer = await patch(apiserver, path, STRATEGIC_PATCH, {"apiVersion": "x", "kind": "y"})
        assert (answer.status, orjson.loads(answer.body)["apiVersion"]) == (200, "batch/v1")


@pytest.mark.parametrize(
    ("method", "path", "content_type", "body", "message"),
    [
        ("POST", "/api/v1/namespaces/default/pods/p/binding", "application/json", {"metadata": {"name": "p"}, "target": {"name": ""}}, "target.name: Required value"),
        ("POST", "/api/v1/namespaces/default/bindings", "application/json", {"metadata": {"name": "p"}, "target": {"kind": "Foo", "name": "n"}},
         'target.kind: Unsupported value: "Foo": supported values: "Node", "<empty>"'),
        ("PATCH", f"{PATH}/a?fieldManager=m", APPLY, {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": 1}},
         "failed to create typed patch object (/; /v1, Kind=ConfigMap): .data.a: expected string, got &value.valueUnstructured{Value:1}"),
        ("PATCH", "/api/v1/namespaces/default/pods/p?fieldManager=m", APPLY,
         {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "x"}}}]}},
         "failed to convert new object (/p; /v1, Kind=Pod) to proper version: unable to convert unstructured object to /v1, Kind=Pod: quantities must"),
        ("GET", f"{PATH}?watch=1&resourceVersion=x", "application/json", None,
         'resourceVersion: Invalid value: "x": strconv.ParseUint: parsing "x": invalid syntax'),
        ("POST", PATH, "application/json", {"metadata": {"name": "rv", "resourceVersion": "5"}}, "resourceVersion should not be set on objects to be created"),
    ],
)  # fmt: skip
async def test_where_upstream_answers_500_to_nonsense_so_do_we(
    apiserver: RunningAPIServer, method: str, path: str, content_type: str, body: Any, message: str
) -> None:
    """Each of these was asked of kube-apiserver 1.35, too; clients see the same."""
    headers = [*await apiserver.client.headers(), ("Content-Type", content_type)]
    answer = await apiserver.client.http.request(method, path, headers, None if body is None else orjson.dumps(body))
    assert answer.status == 500
    assert orjson.loads(answer.body)["message"].startswith(message)


async def test_a_managers_name_may_be_any_bytes_and_a_version_that_is_no_number_is_none(apiserver: RunningAPIServer) -> None:
    made = await post(apiserver, b'{"metadata":{"name":"a","resourceVersion":"x"},"data":{"a":"b"}}', path=f"{PATH}?fieldManager=%ff")
    assert made.status == 201
    assert orjson.loads(made.body)["metadata"]["managedFields"][0]["manager"] == "\ufffd"
    unknown = {"manager": "m", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {"x:y": {}}}
    made = await post(apiserver, orjson.dumps({"metadata": {"name": "b", "managedFields": [unknown]}}))
    assert (made.status, "managedFields" in orjson.loads(made.body)["metadata"]) == (201, False)
