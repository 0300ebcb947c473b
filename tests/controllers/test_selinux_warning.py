"""Pods that share a volume and want it labelled differently are told of each other."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.api.resources import (
    CSI_DRIVERS,
    EVENTS,
    NAMESPACES,
    PERSISTENT_VOLUME_CLAIMS,
    PERSISTENT_VOLUMES,
    PODS,
    SERVICE_ACCOUNTS,
)
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.volume.selinuxwarning import conflict
from knarr.testing.apiserver import RunningAPIServer
from tests.controllers.test_controllers import controllers, until

NAMES = "selinux-warning-controller,serviceaccount-controller"
DRIVER = "csi.example.com"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("", "", False),
        ("u:r:t:s0:c1,c2", "u:r:t:s0:c1,c2", False),
        ("u:r:t:s0:c1,c2", ":::s0:c1,c2", False),
        ("u:r:t:s0:c1,c2", ":::s0:c98,c99", True),
        (":::s0:c1,c2", "", True),
        ("u:r:t:s0", "u:r:other:s0", True),
        ("u:r::s0", "u::t:s0", False),
    ],
)
def test_labels_conflict_where_no_default_can_make_them_equal(one: str, other: str, expected: bool) -> None:
    assert conflict(one, other) is expected
    assert conflict(other, one) is expected


def _pod(name: str, claim: str, level: str, **security: Any) -> Object:
    container = {"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]
    context = {"seLinuxOptions": {"level": level}, **security}
    return {"metadata": {"name": name}, "spec": {"containers": [container], "volumes": volumes, "securityContext": context}}


async def _volume(client: Client, name: str, namespace: str) -> None:
    """A claim bound to a volume that shares its handle with the others."""
    size = {"storage": "1Gi"}
    source = {"csi": {"driver": DRIVER, "volumeHandle": "shared"}}
    wanted = {"accessModes": ["ReadWriteMany"], "resources": {"requests": size}, "volumeName": name, "storageClassName": ""}
    claim = await client.create(PERSISTENT_VOLUME_CLAIMS, {"metadata": {"name": name}, "spec": wanted}, namespace)
    reference = {"namespace": namespace, "name": name, "uid": claim["metadata"]["uid"]}
    spec = {"accessModes": ["ReadWriteMany"], "capacity": size, "claimRef": reference, **source}
    await client.create(PERSISTENT_VOLUMES, {"metadata": {"name": name}, "spec": spec})


async def _told(client: Client, namespace: str, name: str, reason: str) -> str:
    found: list[str] = []

    async def told() -> bool:
        events = (await client.list(EVENTS, namespace))["items"]
        found[:] = [one["message"] for one in events if (one["involvedObject"]["name"], one["reason"]) == (name, reason)]
        return bool(found)

    await until(told)
    return found[0]


async def test_pods_are_told_of_other_labels_and_policies_once_the_driver_mounts_with_labels(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, NAMES) as client:
        await client.create(NAMESPACES, {"metadata": {"name": "other"}})

        async def accounts() -> bool:
            return all([(await client.list(SERVICE_ACCOUNTS, namespace))["items"] for namespace in ("default", "other")])

        await until(accounts)
        await _volume(client, "a", "default")
        await _volume(client, "b", "other")
        await client.create(PODS, _pod("one", "a", "s0:c1,c2"), "default")
        await client.create(PODS, _pod("same", "a", "s0:c1,c2"), "default")
        await client.create(PODS, _pod("two", "a", "s0:c3,c4"), "default")
        await client.create(PODS, _pod("far", "b", "s0:c1,c2", seLinuxChangePolicy="Recursive"), "other")
        await client.create(CSI_DRIVERS, {"metadata": {"name": DRIVER}, "spec": {"seLinuxMount": True}})
        text = await _told(client, "default", "two", "SELinuxLabelConflict")
        assert text.startswith('SELinuxLabel ":::s0:c3,c4" conflicts with pod ')
        assert text.endswith("If both pods land on the same node, only one of them may access the volume.")
        assert "conflicts with pod two that uses the same volume" in await _told(client, "default", "one", "SELinuxLabelConflict")
        text = await _told(client, "other", "far", "SELinuxChangePolicyConflict")
        assert text.startswith('SELinuxChangePolicy"Recursive" conflicts with another pod that uses the same volume as this pod with a different')
        events = (await client.list(EVENTS, "default"))["items"]
        assert not any("with pod same" in one["message"] for one in events if one["involvedObject"]["name"] == "one")
        # What one pod mounts twice with two labels no node can give it.
        twice = _pod("twice", "a", "s0:c1,c2")
        again = {**twice["spec"]["containers"][0], "name": "d", "securityContext": {"seLinuxOptions": {"level": "s0:c9,c10"}}}
        twice["spec"]["containers"].append(again)
        await client.create(PODS, twice, "default")
        text = await _told(client, "default", "twice", "MultipleSELinuxLabels")
        assert text == 'Volume "v" is mounted twice with different SELinux labels inside this pod'
