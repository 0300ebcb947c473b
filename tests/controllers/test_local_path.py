"""The local path provisioner: which claims get a volume, where, and what happens to it later."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.api.resources import EVENTS, NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, STORAGE_CLASSES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.volume import localpath, match
from knarr.testing.apiserver import RunningAPIServer
from tests.controllers.test_controllers import NS, controllers, until

ENABLED = "persistentvolume-binder-controller,local-path-provisioner-controller,persistentvolume-expander-controller"


def make_claim(name: str, **spec: Any) -> Object:
    asked = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": localpath.CLASS_NAME}
    return {"metadata": {"name": name, "namespace": NS}, "spec": {**asked, **spec}}


async def prepare(client: Client) -> None:
    await client.create(STORAGE_CLASSES, localpath.default_class())
    node = {"metadata": {"name": "n1", "labels": {"kubernetes.io/hostname": "n1"}, "annotations": {localpath.FOLDER_ANNOTATION: "/data/local-path"}}}
    await client.create(NODES, node)


async def bound(client: Client, name: str) -> bool:
    return bool(((await client.get(PERSISTENT_VOLUME_CLAIMS, name, NS)).get("status") or {}).get("phase") == "Bound")


async def test_a_claim_gets_a_folder_on_the_node_that_the_scheduler_chose_grows_and_goes(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, ENABLED) as client:
        await prepare(client)
        claim = await client.create(PERSISTENT_VOLUME_CLAIMS, make_claim("data"))
        await client.patch(PERSISTENT_VOLUME_CLAIMS, "data", NS, {"metadata": {"annotations": {match.SELECTED_NODE: "n1"}}})
        await until(lambda: bound(client, "data"))
        name = "pvc-" + claim["metadata"]["uid"]
        volume = await client.get(PERSISTENT_VOLUMES, name)
        assert volume["spec"]["local"] == {"path": f"/data/local-path/{name}"}
        assert volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == ["n1"]
        assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Delete"
        await client.patch(PERSISTENT_VOLUME_CLAIMS, "data", NS, {"spec": {"resources": {"requests": {"storage": "3Gi"}}}})

        async def grown() -> bool:
            now = await client.get(PERSISTENT_VOLUME_CLAIMS, "data", NS)
            size = (await client.get(PERSISTENT_VOLUMES, name))["spec"]["capacity"]["storage"]
            return bool((now["status"]["capacity"]["storage"], size) == ("3Gi", "3Gi"))

        await until(grown)
        # A node that is gone has taken the folder with it.
        await client.delete(NODES, "n1")
        await client.patch(PERSISTENT_VOLUME_CLAIMS, "data", NS, {"metadata": {"finalizers": None}})
        await client.delete(PERSISTENT_VOLUME_CLAIMS, "data", NS)

        async def gone() -> bool:
            return not (await client.list(PERSISTENT_VOLUMES))["items"]

        await client.patch(PERSISTENT_VOLUMES, name, None, {"metadata": {"finalizers": None}})
        await until(gone)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"accessModes": ["ReadWriteMany"]}, "only ReadWriteOnce"),
        ({"volumeMode": "Block"}, "no block device"),
    ],
)
async def test_what_a_folder_cannot_be_is_refused_with_an_event(apiserver: RunningAPIServer, spec: Object, words: str) -> None:
    async with controllers(apiserver, ENABLED) as client:
        await prepare(client)
        await client.create(PERSISTENT_VOLUME_CLAIMS, make_claim("data", **spec))
        await client.patch(PERSISTENT_VOLUME_CLAIMS, "data", NS, {"metadata": {"annotations": {match.SELECTED_NODE: "n1"}}})

        async def told() -> bool:
            events = (await client.list(EVENTS, NS))["items"]
            return any(e["reason"] == "ProvisioningFailed" and words in e["message"] for e in events)

        await until(told)
        assert not (await client.list(PERSISTENT_VOLUMES))["items"]


async def test_a_claim_without_a_pod_waits(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, ENABLED) as client:
        await prepare(client)
        await client.create(PERSISTENT_VOLUME_CLAIMS, make_claim("data"))

        async def waits() -> bool:
            return any(e["reason"] == "WaitForFirstConsumer" for e in (await client.list(EVENTS, NS))["items"])

        await until(waits)
        assert not (await client.list(PERSISTENT_VOLUMES))["items"]
