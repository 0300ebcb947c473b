"""A node's certificates: asked of the cluster, signed by its controllers, replaced before they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest_asyncio

from knarr.api.resources import CERTIFICATE_SIGNING_REQUESTS, NODES
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.cluster.servingcerts import ServingCertificateApprover
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.kubelet import certificates
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer, running_apiserver

LIFE_SECONDS = 302.0
"""Certificates are dated back by five minutes: this leaves two seconds."""
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}, {"type": "Hostname", "address": "n1"}]},
}


@pytest_asyncio.fixture
async def signing() -> AsyncIterator[RunningAPIServer]:
    """An API server with the controllers that approve and sign."""
    authority = testing.test_pki().authority.pair
    settings = ControllersConfig(
        enabled="csrapproving,csrsigning", ca_cert=authority.certificate_pem(), ca_key=authority.key_pem(), signing_seconds=LIFE_SECONDS
    )
    async with running_apiserver() as server:
        informers = Informers(server.client)
        tasks = [
            asyncio.create_task(ControllerManager(server.client, settings).run()),
            asyncio.create_task(ServingCertificateApprover(server.client, informers).run()),
        ]
        yield server
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await informers.close()


def node_client(server: RunningAPIServer, name: str, folder: Path) -> Client:
    pair = testing.test_pki().authority.issue(folder / name, f"system:node:{name}", groups=["system:nodes"])
    return Client(replace(server.client_config, client_cert=pair.certificate_pem(), client_key=pair.key_pem()))


async def let_nodes_renew(server: RunningAPIServer) -> None:
    from knarr.api.resources import CLUSTER_ROLE_BINDINGS
    from knarr.cluster.tokens import join_roles

    for resource, wanted in join_roles():
        if resource is CLUSTER_ROLE_BINDINGS and "rotation" in wanted["metadata"]["name"]:
            await server.client.create(resource, wanted)


async def test_a_client_certificate_is_replaced_again_and_again_and_works(signing: RunningAPIServer, tmp_path: Path) -> None:
    await let_nodes_renew(signing)
    await signing.client.create(NODES, NODE)
    client = node_client(signing, "n1", tmp_path)
    path = tmp_path / "current.pem"
    serials: list[int] = []
    third = asyncio.Event()

    def installed(certificate: bytes, key: bytes) -> None:
        client.use_certificate(certificate, key)
        serials.append(certificates.parse(certificate).serial_number)
        if len(serials) == 3:
            third.set()

    rotation = certificates.Rotation(client, str(path), lambda: certificates.Template("n1"), installed, fraction=lambda: 0.0)
    task = asyncio.create_task(rotation.run())
    async with asyncio.timeout(20):
        await third.wait()
    task.cancel()
    stored = certificates.load(path)
    assert len(set(serials)) == 3
    assert stored is not None
    assert certificates.parse(stored[0]).serial_number == serials[2]
    assert path.stat().st_mode & 0o777 == 0o600
    await client.close_retired()
    assert (await client.get(NODES, "n1"))["metadata"]["name"] == "n1"
    await client.close()


async def test_a_serving_certificate_names_the_node_and_follows_its_addresses(signing: RunningAPIServer, tmp_path: Path) -> None:
    await signing.client.create(NODES, NODE)
    client = node_client(signing, "n1", tmp_path)
    path = tmp_path / "serving.pem"
    template = certificates.Template("n1", dns=("n1",), ips=("192.0.2.7",))
    seen: asyncio.Queue[bytes] = asyncio.Queue()
    rotation = certificates.Rotation(client, str(path), lambda: template, lambda certificate, key: seen.put_nowait(certificate), fraction=lambda: 0.99999)
    task = asyncio.create_task(rotation.run())
    async with asyncio.timeout(20):
        first = certificates.parse(await seen.get())
        assert certificates.covers(first, ("n1",), ("192.0.2.7",))
        await signing.client.patch(NODES, "n1", None, {"status": {"addresses": [*NODE["status"]["addresses"], {"type": "ExternalIP", "address": "203.0.113.9"}]}}, subresource="status")
        template = certificates.Template("n1", dns=("n1",), ips=("192.0.2.7", "203.0.113.9"))
        rotation.changed()
        while not certificates.covers(certificates.parse(await seen.get()), ("n1",), ("203.0.113.9",)):
            pass
    task.cancel()
    await client.close()


async def test_a_node_is_not_given_the_name_of_another(signing: RunningAPIServer, tmp_path: Path) -> None:
    await signing.client.create(NODES, NODE)
    client = node_client(signing, "n1", tmp_path)
    asked = asyncio.create_task(certificates.ask(client, certificates.Template("n1", dns=("kubernetes",)), timeout_seconds=1.0))
    try:
        await asked
        raise AssertionError("it was signed")
    except TimeoutError:
        found = (await signing.client.list(CERTIFICATE_SIGNING_REQUESTS))["items"]
        assert [item.get("status") or {} for item in found] == [{}]
    await client.close()
