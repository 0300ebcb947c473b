"""Discovery, plain and aggregated, in the forms that clients ask for."""

from __future__ import annotations

import orjson
import pytest

from knarr.api import protobuf
from knarr.http.client import Response
from knarr.testing.apiserver import RunningAPIServer

AGGREGATED = "g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
OLD = AGGREGATED.replace("v=v2", "v=v2beta1")


async def get(server: RunningAPIServer, path: str, accept: str, **headers: str) -> Response:
    given = [(name, value) for name, value in await server.client.headers() if name.lower() != "accept"]
    return await server.client.http.request("GET", path, [*given, ("Accept", accept), *headers.items()])


@pytest.mark.parametrize(
    ("accept", "status", "content_type"),
    [
        (f"application/json;{AGGREGATED}", 200, f"application/json;{AGGREGATED}"),
        (f"application/json;{AGGREGATED},application/json;{OLD},application/json", 200, f"application/json;{AGGREGATED}"),
        (f"application/json,application/json;{AGGREGATED}", 200, f"application/json;{AGGREGATED}"),
        (f"application/yaml;{AGGREGATED}", 200, f"application/yaml;{AGGREGATED}"),
        (f"application/vnd.kubernetes.protobuf;{AGGREGATED}", 200, f"application/vnd.kubernetes.protobuf;{AGGREGATED}"),
        (f"application/json;{OLD}", 406, "application/json"),
        (f"application/json;{OLD},application/json", 200, "application/json"),
        ("application/yaml", 200, "application/yaml"),
        ("text/html", 406, "application/json"),
    ],
)
async def test_a_client_gets_the_form_it_asks_for(apiserver: RunningAPIServer, accept: str, status: int, content_type: str) -> None:
    for path in ("/api", "/apis"):
        answer = await get(apiserver, path, accept)
        assert (answer.status, answer.headers["content-type"]) == (status, content_type)
    if "protobuf" in content_type:
        assert protobuf.decode(answer.body)["items"][0]["metadata"]["name"] == "apiregistration.k8s.io"


async def test_the_aggregated_document_says_a_kinds_version_where_it_is_another_and_knows_its_own_tag(apiserver: RunningAPIServer) -> None:
    answer = await get(apiserver, "/apis", f"application/json;{AGGREGATED}")
    apps = next(item for item in orjson.loads(answer.body)["items"] if item["metadata"]["name"] == "apps")
    assert apps["metadata"] == {"name": "apps"}
    deployments = next(one for one in apps["versions"][0]["resources"] if one["resource"] == "deployments")
    assert deployments["responseKind"] == {"group": "", "version": "", "kind": "Deployment"}
    assert {sub["subresource"]: sub["responseKind"] for sub in deployments["subresources"]} == {
        "scale": {"group": "autoscaling", "version": "v1", "kind": "Scale"}, "status": {"group": "", "version": "", "kind": "Deployment"},
    }  # fmt: skip
    again = await get(apiserver, "/apis", f"application/json;{AGGREGATED}", **{"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
