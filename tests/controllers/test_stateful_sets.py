"""StatefulSets: how many pods an update takes away at once, numbers that begin elsewhere, whose the claims are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from knarr.api import meta
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PODS, STATEFUL_SETS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.testing.apiserver import running_apiserver
from tests.controllers.test_controllers import NS, controllers, until

GATE = "MaxUnavailableStatefulSet"
SET = "w"


@asynccontextmanager
async def _client(gate: bool) -> AsyncIterator[Client]:
    gates = {GATE: True} if gate else {}
    async with running_apiserver(feature_gates=gates) as server, controllers(server, "statefulset,serviceaccount", feature_gates=gates) as client:
        yield client


def _template(value: str) -> Object:
    return {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [{"name": "c", "image": "i", "env": [{"name": "V", "value": value}]}]}}


async def _create(client: Client, **spec: object) -> Object:
    whole = {"selector": {"matchLabels": {"app": "w"}}, "template": _template("old"), "serviceName": "w", "podManagementPolicy": "Parallel", **spec}
    return await client.create(STATEFUL_SETS, {"metadata": {"name": SET, "namespace": NS}, "spec": whole})


async def _pods(client: Client) -> dict[int, Object]:
    return {int(pod["metadata"]["name"].rpartition("-")[2]): pod for pod in (await client.list(PODS, NS))["items"]}


async def _until_pods(client: Client, wanted: set[int]) -> None:
    async def there() -> bool:
        return set(await _pods(client)) == wanted

    await until(there)


async def _make_ready(client: Client, number: int) -> None:
    condition = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    await client.patch(PODS, f"{SET}-{number}", NS, {"status": {"phase": "Running", "conditions": [condition]}}, type="strategic", subresource="status")


def _value(pod: Object) -> str:
    return str(pod["spec"]["containers"][0]["env"][0]["value"])


async def _until_updated(client: Client, wanted: set[int]) -> None:
    async def there() -> bool:
        pods = await _pods(client)
        updated = {number for number, pod in pods.items() if _value(pod) == "new"}
        assert updated <= wanted, f"{updated} were updated, {wanted} had to be first"
        return updated == wanted and len(pods) == 4

    await until(there)


@pytest.mark.parametrize(("gate", "steps"), [(False, [{3}, {2}, {1}]), (True, [{3, 2}, {1}])])
async def test_an_update_takes_away_as_many_as_may_be_unavailable_where_the_gate_is_on(gate: bool, steps: list[set[int]]) -> None:
    async with _client(gate) as client:
        strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "50%", "partition": 1}}
        made = await _create(client, replicas=4, updateStrategy=strategy)
        assert ("maxUnavailable" in made["spec"]["updateStrategy"]["rollingUpdate"]) == gate
        await _until_pods(client, {0, 1, 2, 3})
        for number in range(4):
            await _make_ready(client, number)
        await client.patch(STATEFUL_SETS, SET, NS, {"spec": {"template": _template("new")}})
        done: set[int] = set()
        for step in steps:
            done |= step
            await _until_updated(client, done)
            for number in step:
                await _make_ready(client, number)

        async def told() -> bool:
            status = (await client.get(STATEFUL_SETS, SET, NS))["status"]
            return (status["updatedReplicas"], status["currentReplicas"], status["readyReplicas"]) == (3, 1, 4)

        await until(told)


async def test_the_number_of_unavailable_pods_is_kept_where_it_was_stored_with_the_gate_and_is_one_by_default() -> None:
    async with _client(True) as client:
        made = await _create(client, replicas=0)
        assert made["spec"]["updateStrategy"]["rollingUpdate"] == {"partition": 0, "maxUnavailable": 1}
    async with _client(False) as client:
        made = await _create(client, replicas=0)
        assert made["spec"]["updateStrategy"]["rollingUpdate"] == {"partition": 0}
        changed = await client.patch(STATEFUL_SETS, SET, NS, {"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 2}}}})
        assert changed["metadata"]["generation"] == 1


async def test_numbers_begin_where_they_are_told_and_claims_of_what_is_scaled_away_become_the_pods() -> None:
    async with _client(False) as client:
        claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}
        retention = {"whenDeleted": "Delete", "whenScaled": "Delete"}
        set_ = await _create(client, replicas=2, ordinals={"start": 5}, volumeClaimTemplates=[claim], persistentVolumeClaimRetentionPolicy=retention)
        await _until_pods(client, {5, 6})

        async def owners(number: int) -> list[str]:
            found = await client.get(PERSISTENT_VOLUME_CLAIMS, f"data-{SET}-{number}", NS)
            return [reference["uid"] for reference in meta.owner_references(found)]

        async def owned_by(uid: str, *numbers: int) -> None:
            async def so() -> bool:
                return all([await owners(number) == [uid] for number in numbers])

            await until(so)

        await owned_by(set_["metadata"]["uid"], 5, 6)
        condemned = (await _pods(client))[5]["metadata"]["uid"]
        await client.patch(STATEFUL_SETS, SET, NS, {"spec": {"ordinals": {"start": 6}}})
        await _until_pods(client, {6, 7})
        await owned_by(condemned, 5)
        await owned_by(set_["metadata"]["uid"], 6, 7)
