"""OpenAPI documents: whole, consistent, and with what kubectl looks for."""

import json
from typing import Any

import pytest

from knarr.api.openapi import CustomAPI, OpenAPIDocuments
from knarr.api.scheme import SCHEME, Resource, Subresource


@pytest.fixture(scope="module")
def documents() -> OpenAPIDocuments:
    return OpenAPIDocuments()


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*(references(item) for item in value.values()))
    return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()


def test_every_reference_of_every_document_resolves(documents: OpenAPIDocuments) -> None:
    index = json.loads(documents.v3_index())["paths"]
    assert "api/v1" in index
    for path, entry in index.items():
        document = documents.v3(path)
        assert document is not None
        assert entry["serverRelativeURL"] == f"/openapi/v3/{path}?hash={document.hash}"
        body = json.loads(document.body)
        assert {f"#/components/schemas/{name}" for name in body["components"]["schemas"]} >= references(body)
    assert documents.v3("apis/none/v1") is None


def test_each_resource_can_be_patched_with_field_validation(documents: OpenAPIDocuments) -> None:
    for resource in SCHEME.resources():
        if "patch" not in resource.verbs:
            continue
        path = f"apis/{resource.group}/{resource.version}" if resource.group else f"api/{resource.version}"
        document = documents.v3(path)
        assert document is not None
        scope = "namespaces/{namespace}/" if resource.namespaced else ""
        operation = json.loads(document.body)["paths"][f"/{path}/{scope}{resource.plural}/{{name}}"]["patch"]
        assert operation["x-kubernetes-group-version-kind"] == {"group": resource.group, "version": resource.version, "kind": resource.kind}
        assert "fieldValidation" in {p["name"] for p in operation["parameters"]}
        assert "application/strategic-merge-patch+json" in operation["requestBody"]["content"]


def test_merge_keys_are_published(documents: OpenAPIDocuments) -> None:
    document = documents.v3("api/v1")
    assert document is not None
    containers = json.loads(document.body)["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"]
    assert (containers["x-kubernetes-patch-merge-key"], containers["x-kubernetes-list-type"]) == ("name", "map")


def test_operation_ids_are_unique(documents: OpenAPIDocuments) -> None:
    body = json.loads(documents.v2().body)
    ids = [operation["operationId"] for item in body["paths"].values() for operation in item.values() if isinstance(operation, dict)]
    assert len(ids) == len(set(ids))
    assert {f"#/definitions/{name}" for name in body["definitions"]} >= references(body)


def test_custom_resources_come_and_go() -> None:
    documents = OpenAPIDocuments()
    before = documents.v3_index()
    resource = Resource("stable.example.com", "v1", "crontabs", "crontab", "CronTab", True, verbs=("get", "list", "create", "patch"), custom=True,
                        subresources={"status": Subresource("status", "stable.example.com", "v1", "CronTab", ("get", "update"))})
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {
        "n": {"x-kubernetes-int-or-string": True}, "e": {"type": "string", "nullable": True}}}}}
    documents.set_custom([CustomAPI(resource, schema)])
    assert documents.v3_index() != before
    document = documents.v3("apis/stable.example.com/v1")
    assert document is not None
    body = json.loads(document.body)
    made = body["components"]["schemas"]["com.example.stable.v1.CronTab"]
    assert made["x-kubernetes-group-version-kind"] == [{"group": "stable.example.com", "version": "v1", "kind": "CronTab"}]
    assert made["properties"]["metadata"]["allOf"][0]["$ref"].endswith("ObjectMeta")
    assert "/apis/stable.example.com/v1/namespaces/{namespace}/crontabs/{name}/status" in body["paths"]
    spec = json.loads(documents.v2().body)["definitions"]["com.example.stable.v1.CronTab"]["properties"]["spec"]["properties"]
    assert spec["n"] == {"x-kubernetes-int-or-string": True}
    assert "type" not in spec["e"]
    documents.set_custom([])
    assert documents.v3_index() == before
    assert documents.v3("apis/stable.example.com/v1") is None
