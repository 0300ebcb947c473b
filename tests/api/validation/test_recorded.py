"""Every object that a real API server judged, judged by the functions alone: the same causes, in any order.

Pods, services, jobs and CustomResourceDefinitions are changed by their strategies before they are judged; they are compared
by the replay against a whole server (tests/apiserver).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from knarr.api.decode import decode
from knarr.api.defaulting import default
from knarr.api.errors import StatusError
from knarr.api.scheme import SCHEME, Resource
from knarr.api.validation import validate_create

RECORDED = Path(__file__).parents[2] / "apiserver" / "recorded"
CHANGED_BY_STRATEGIES = {"pods", "services", "jobs", "customresourcedefinitions"}
DIFFERENT = {
    r"\.meta\.metadata\.namespace=other$": "the server drops the namespace of cluster-wide objects first",
    r"limitranges\.meta\.metadata\.name!$": "the strategy makes a name up",
    r"apiservices\.meta\.metadata\.name": "the name is judged once upstream",
    r"csidrivers\.(meta\.metadata\.name=a|spec\.nodeAllocatable)": "a long name is reported twice; a field behind a gate is dropped before",
    r"persistentvolumeclaims\.spec\.dataSource=": "the strategy drops sources that nothing can provide",
    r"endpoints\.subsets=\[\{addresses:_\[\{ip:_abc": "upstream reports the address twice",
    r"resourceslices\.spec\.devices=.*taints": "the strategy drops the field while its gate is off",
    r"endpointslices\.endpoints=.*deprecatedTopology": "the strategy drops the field",
    r"validatingadmissionpolic|webhookconfigurations": "expressions are compiled by the admission plugin",
    r"statefulsets\.spec\.updateStrategy=.*maxUnavailable:_0": "the strategy drops the field while its gate is off",
    r"resourceclaims\..*adminAccess": "needs the namespace's labels",
    r"invalid\.request\.": "judged before validation",
}


def _resource(path: str) -> tuple[Resource, str | None] | None:
    """The resource that a collection's path names."""
    parts = urlsplit(path).path.strip("/").split("/")
    group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
    namespace = None
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    found = SCHEME.resource(group, version, rest[0]) if len(rest) == 1 else None
    return (found, namespace) if found is not None else None


def _steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in ("invalid.jsonl.gz", "defaults.jsonl.gz"):
        with gzip.open(RECORDED / file, "rt") as lines:
            for scenario in map(json.loads, lines):
                for step in scenario["steps"]:
                    if step["method"] == "POST" and step["status"] in (201, 422):
                        yield scenario["scenario"], step


def _judge(resource: Resource, namespace: str | None, step: dict[str, Any]) -> list[list[str]] | None:
    body = step.get("body")
    try:
        obj, _ = decode(
            resource, body.encode() if isinstance(body, str) else orjson.dumps(body), step.get("contentType", "application/json"), ""
        )
    except StatusError:
        return None
    default(resource, obj)
    metadata = obj.setdefault("metadata", {})
    if not isinstance(metadata, dict):
        return None
    if resource.namespaced:
        metadata["namespace"] = namespace
    if metadata.get("generateName") and not metadata.get("name"):
        metadata["name"] = metadata["generateName"] + "abcde"
    metadata.pop("resourceVersion", None)
    if "status" in resource.subresources and resource.plural != "nodes":
        obj.pop("status", None)
    return sorted([error.type, error.field] for error in validate_create(resource, obj))


def test_the_same_causes_as_a_real_server() -> None:
    different: dict[str, Any] = {}
    compared = 0
    for scenario, step in _steps():
        found = _resource(step["path"])
        if found is None or found[0].plural in CHANGED_BY_STRATEGIES:
            continue
        if any(re.search(pattern, scenario) for pattern in DIFFERENT):
            continue
        causes = _judge(*found, step)
        if causes is None:
            continue
        compared += 1
        wanted = sorted(step.get("causes") or []) if step["status"] == 422 else []
        if causes != wanted:
            different[scenario] = (wanted, causes)
    assert different == {}
    assert compared > 1000


def _pod() -> dict[str, Any]:
    container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": "100m", "memory": "100Mi"}}, "ports": [{"containerPort": 80}]}
    return {"metadata": {"name": "x", "namespace": "default", "labels": {"app": "x"}}, "spec": {"containers": [container]}}


@pytest.mark.parametrize("plural", ["pods", "deployments", "jobs"])
def test_a_plain_object_is_valid(plural: str) -> None:
    resource = next(r for r in SCHEME.resources() if r.plural == plural and r.version == "v1")
    template = {"metadata": {"labels": {"app": "x"}}, "spec": _pod()["spec"]}
    spec: dict[str, Any] = {"template": template, "selector": {"matchLabels": {"app": "x"}}}
    if plural == "jobs":
        spec["manualSelector"] = True
        template["spec"]["restartPolicy"] = "Never"
    obj = _pod() if plural == "pods" else {"metadata": {"name": "x", "namespace": "default"}, "spec": spec}
    default(resource, obj)
    assert validate_create(resource, obj) == []
