"""Resizing a pod may not add, remove, rename or reorder its containers."""

from __future__ import annotations

import pytest

from knarr.api.errors import StatusError
from knarr.api.resources import PODS, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.testing.apiserver import RunningAPIServer


def patch_of(*names: str) -> Object:
    return {"spec": {"containers": [{"name": name, "resources": {"requests": {"cpu": "20m"}}} for name in names]}}


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        ("strategic", ("b", "a"), "spec.containers[0].name: Forbidden: containers may not be renamed or reordered on resize"),
        ("strategic", ("a", "b", "c"), "spec.containers: Forbidden: containers may not be added or removed on resize"),
        ("merge", ("a",), "spec.containers: Forbidden: containers may not be added or removed on resize"),
    ],
)
async def test_other_containers_than_before_are_refused(apiserver: RunningAPIServer, kind: str, names: tuple[str, ...], words: str) -> None:
    client = apiserver.client
    containers = [{"name": name, "image": "i", "resources": {"requests": {"cpu": "10m"}}} for name in ("a", "b")]
    await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": "default"}})
    await client.create(PODS, {"metadata": {"name": "p", "namespace": "default"}, "spec": {"containers": containers, "automountServiceAccountToken": False}})
    with pytest.raises(StatusError, match=r"may not be") as refused:
        await client.patch(PODS, "p", "default", patch_of(*names), type=kind, subresource="resize")
    assert words in refused.value.message
    changed = await client.patch(PODS, "p", "default", patch_of("a", "b"), type="strategic", subresource="resize")
    assert [c["resources"]["requests"]["cpu"] for c in changed["spec"]["containers"]] == ["20m", "20m"]
