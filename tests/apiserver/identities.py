"""Clients of other users of a running test server, and small helpers of the auth and admission tests."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

from knarr.api import resources as R
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.testing.apiserver import RunningAPIServer


@contextlib.asynccontextmanager
async def as_user(server: RunningAPIServer, user: str, *groups: str) -> AsyncIterator[Client]:
    """A client that impersonates."""
    client = Client(dataclasses.replace(server.client_config, impersonate_user=user, impersonate_groups=groups))
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def with_token(server: RunningAPIServer, token: str) -> AsyncIterator[Client]:
    """A client that shows a bearer token and no certificate."""
    client = Client(dataclasses.replace(server.client_config, client_cert=b"", client_key=b"", token=token))
    try:
        yield client
    finally:
        await client.close()


@contextlib.contextmanager
def refused(code: int, *parts: str):  # type: ignore[no-untyped-def]
    """The block must raise a StatusError of this code whose message holds all the parts."""
    with pytest.raises(StatusError) as caught:
        yield caught
    assert caught.value.code == code, caught.value.message
    for part in parts:
        assert part in caught.value.message


async def make_namespace(client: Client, name: str, labels: dict[str, str] | None = None) -> Object:
    """Create a namespace with its default service account, which no controller makes here."""
    namespace = await client.create(R.NAMESPACES, {"metadata": {"name": name, "labels": labels or {}}})
    await client.create(R.SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": name}}, name)
    return namespace


def pod(name: str, namespace: str, **spec: object) -> Object:
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": [{"name": "c", "image": "img:1"}], **spec},
    }  # fmt: skip
