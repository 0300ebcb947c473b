"""Which API servers share this store, so that the kubernetes Service names them all, and no other.

Each keeps a key with its address that ends by itself soon after its last renewal; the endpoints are those of all keys. Where only one
server can write (the embedded stores) there is nothing to agree on.

Source: pkg/controlplane/reconcilers/lease.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from knarr.api import errors
from knarr.storage.errors import StoreError
from knarr.storage.protocol import ANY

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

PREFIX = "/registry/core/masterleases/"
LEASE_SECONDS = 15


async def announce(server: APIServer) -> list[str]:
    """Say that this server is there; returns the addresses of all that are. Raises StatusError."""
    address = server.advertise_address
    store = server.storage.store
    value = orjson.dumps({"kind": "Endpoints", "apiVersion": "v1", "metadata": {}, "subsets": [{"addresses": [{"ip": address}]}]})
    try:
        await store.put(PREFIX + address, value, expected=ANY, lease_seconds=LEASE_SECONDS)
        found = await _known(server)
    except StoreError as error:
        raise errors.internal(str(error)) from error
    return sorted({*found, address})


async def withdraw(server: APIServer) -> list[str]:
    """Say that this server ends; returns the addresses of the others. Raises StatusError."""
    try:
        await server.storage.store.remove(PREFIX + server.advertise_address, expected=ANY)
        return sorted(await _known(server))
    except StoreError as error:
        raise errors.internal(str(error)) from error


async def _known(server: APIServer) -> list[str]:
    page = await server.storage.store.scan(PREFIX)
    return [item.key.removeprefix(PREFIX) for item in page.items]
