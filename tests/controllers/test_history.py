"""Revisions of StatefulSets and DaemonSets: what comes back, what is adopted, names that are taken, what is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from knarr.api import meta
from knarr.api.resources import CONTROLLER_REVISIONS, DAEMON_SETS, NODES, PODS, STATEFUL_SETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.testing.apiserver import running_apiserver
from tests.controllers.test_controllers import NS, controllers, until

HASH = "controller-revision-hash"
_KINDS = [STATEFUL_SETS, DAEMON_SETS]


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    async with running_apiserver() as server, controllers(server, "daemonset,statefulset,serviceaccount") as running:
        yield running


def _template(value: str) -> Object:
    container = {"name": "c", "image": "i", "env": [{"name": "V", "value": value}]}
    return {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [container]}}


async def _create(client: Client, kind: Resource) -> None:
    spec: Object = {"selector": {"matchLabels": {"app": "w"}}, "template": _template("0"), "revisionHistoryLimit": 1}
    if kind is STATEFUL_SETS:
        spec.update(replicas=0, serviceName="w")
    await client.create(kind, {"metadata": {"name": "w", "namespace": NS}, "spec": spec})


async def _change(client: Client, kind: Resource, value: str) -> None:
    await client.patch(kind, "w", NS, {"spec": {"template": _template(value)}})


async def _revisions(client: Client) -> dict[str, int]:
    """Numbers of revisions by the value in their template."""
    found = (await client.list(CONTROLLER_REVISIONS, NS))["items"]
    return {item["data"]["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"]: item["revision"] for item in found}


async def _until_revisions(client: Client, wanted: dict[str, int]) -> None:
    async def there() -> bool:
        return await _revisions(client) == wanted

    await until(there)


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.plural)
async def test_a_template_that_comes_back_gets_the_highest_number_and_the_oldest_revision_goes(client: Client, kind: Resource) -> None:
    await _create(client, kind)
    await _until_revisions(client, {"0": 1})
    await _change(client, kind, "1")
    await _until_revisions(client, {"0": 1, "1": 2})
    await _change(client, kind, "0")
    await _until_revisions(client, {"1": 2, "0": 3})
    await _change(client, kind, "2")
    await _until_revisions(client, {"0": 3, "2": 4})


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.plural)
async def test_a_name_that_is_taken_by_other_data_counts_as_a_collision(client: Client, kind: Resource) -> None:
    await _create(client, kind)
    await _until_revisions(client, {"0": 1})
    name = (await client.list(CONTROLLER_REVISIONS, NS))["items"][0]["metadata"]["name"]
    await client.delete(kind, "w", NS)
    await client.delete(CONTROLLER_REVISIONS, name, NS)
    taken = {"metadata": {"name": name, "namespace": NS}, "revision": 7, "data": {"spec": {"template": _template("other")}}}
    await client.create(CONTROLLER_REVISIONS, taken)
    await _create(client, kind)
    await _until_revisions(client, {"other": 7, "0": 1})

    async def counted() -> bool:
        return bool(((await client.get(kind, "w", NS)).get("status") or {}).get("collisionCount") == 1)

    await until(counted)


async def test_the_pods_of_twin_revisions_of_a_daemonset_become_those_of_the_one_that_stays(client: Client) -> None:
    await client.create(NODES, {"metadata": {"name": "n"}})
    await client.patch(NODES, "n", None, {"spec": {"taints": None}})
    await _create(client, DAEMON_SETS)
    await _until_revisions(client, {"0": 1})

    async def labels() -> set[str | None]:
        return {meta.labels(pod).get(HASH) for pod in (await client.list(PODS, NS))["items"]}

    async def has_pod() -> bool:
        return bool(await labels())

    await until(has_pod)
    first = (await client.list(CONTROLLER_REVISIONS, NS))["items"][0]
    # Nobody's, and without the label that pods are told apart by.
    twin = {"metadata": {"name": "twin", "namespace": NS, "labels": {"app": "w"}}, "revision": 5, "data": first["data"]}
    await client.create(CONTROLLER_REVISIONS, twin)
    await client.patch(DAEMON_SETS, "w", NS, {"metadata": {"annotations": {"look": "again"}}})

    async def merged() -> bool:
        found = (await client.list(CONTROLLER_REVISIONS, NS))["items"]
        names = [(item["metadata"]["name"], meta.labels(item).get(HASH), item["revision"]) for item in found]
        return names == [("twin", "twin", 5)] and await labels() == {"twin"}

    await until(merged)
