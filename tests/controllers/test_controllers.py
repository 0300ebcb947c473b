"""Controllers against a real API server, with what the recordings do not show."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from knarr.aiokits import clock
from knarr.api.errors import StatusError
from knarr.api.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    NAMESPACES,
    NODES,
    PODS,
    REPLICA_SETS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
)
from knarr.api.scheme import SCHEME, Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from knarr.testing.controllers import running_controllers

NS = "default"


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            try:
                if await condition():
                    return
            except StatusError:
                pass
            await asyncio.sleep(0.02)


@asynccontextmanager
async def controllers(server: RunningAPIServer, enabled: str, **settings: Any) -> AsyncIterator[Client]:
    """Run some controllers for the time of a test."""
    async with running_controllers(server, enabled, **settings):
        yield server.client


@pytest_asyncio.fixture
async def everything() -> AsyncIterator[Client]:
    async with running_apiserver() as server:
        key = Path(server.server.config.service_account_key).read_bytes()
        settings = {"root_ca": b"the CA", "service_account_key": key}
        async with controllers(server, "*", **settings) as client:
            yield client


def _resource(plural: str) -> Resource:
    return max((res for res in SCHEME.resources() if res.plural == plural), key=lambda res: res.version == "v1")


def _deployment(name: str, replicas: int = 2) -> Object:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    return {
        "metadata": {"name": name, "namespace": NS},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
    }


async def _is_gone(client: Client, resource: Resource, name: str, namespace: str | None = NS) -> bool:
    try:
        await client.get(resource, name, namespace)
    except StatusError as error:
        return error.code == 404
    return False


async def _names(client: Client, resource: Resource) -> set[str]:
    return {obj["metadata"]["name"] for obj in (await client.list(resource, NS))["items"]}


# Deleting


@pytest.mark.parametrize("policy", ["Background", "Foreground"])
async def test_what_an_owner_made_goes_with_it(everything: Client, policy: str) -> None:
    client = everything
    await client.create(DEPLOYMENTS, _deployment("d"))

    async def made() -> bool:
        return len(await _names(client, PODS)) == 2

    async def all_gone() -> bool:
        return not (await _names(client, DEPLOYMENTS) or await _names(client, REPLICA_SETS) or await _names(client, PODS))

    await until(made)
    await client.delete(DEPLOYMENTS, "d", NS, propagation_policy=policy)
    await until(all_gone)


async def test_orphans_stay_and_lose_their_owner(everything: Client) -> None:
    client = everything
    await client.create(DEPLOYMENTS, _deployment("d"))

    async def made() -> bool:
        return len(await _names(client, PODS)) == 2

    async def orphaned() -> bool:
        sets = (await client.list(REPLICA_SETS, NS))["items"]
        return await _is_gone(client, DEPLOYMENTS, "d") and len(sets) == 1 and not sets[0]["metadata"].get("ownerReferences")

    await until(made)
    await client.delete(DEPLOYMENTS, "d", NS, propagation_policy="Orphan")
    await until(orphaned)
    assert len(await _names(client, PODS)) == 2


def _map(name: str, *owners: Object) -> Object:
    references = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "blockOwnerDeletion": True,
        }
        for owner in owners
    ]
    return {"metadata": {"name": name, "namespace": NS, "ownerReferences": references}}


async def test_object_whose_owner_never_was_is_deleted(everything: Client) -> None:
    await everything.create(CONFIG_MAPS, _map("lost", {"metadata": {"name": "none", "uid": "no-such-uid"}}))
    await until(lambda: _is_gone(everything, CONFIG_MAPS, "lost"))


async def test_object_with_another_owner_stays(everything: Client) -> None:
    client = everything
    first, second = [await client.create(CONFIG_MAPS, _map(name)) for name in ("first", "second")]
    await client.create(CONFIG_MAPS, _map("shared", first, second))
    await client.delete(CONFIG_MAPS, "first", NS)

    async def let_go() -> bool:
        references = (await client.get(CONFIG_MAPS, "shared", NS))["metadata"]["ownerReferences"]
        return [item["name"] for item in references] == ["second"]

    await until(let_go)


async def test_circle_of_owners_is_deleted_in_the_foreground(everything: Client) -> None:
    client = everything
    a = await client.create(CONFIG_MAPS, _map("a"))
    b = await client.create(CONFIG_MAPS, _map("b", a))
    c = await client.create(CONFIG_MAPS, _map("c", b))
    await client.patch(CONFIG_MAPS, "a", NS, {"metadata": _map("a", c)["metadata"]})
    await client.delete(CONFIG_MAPS, "a", NS, propagation_policy="Foreground")

    async def all_gone() -> bool:
        return not await _names(client, CONFIG_MAPS) & {"a", "b", "c"}

    await until(all_gone)


async def test_owners_of_custom_kinds_count_too(everything: Client) -> None:
    client = everything
    names = {"plural": "widgets", "kind": "Widget", "singular": "widget", "listKind": "WidgetList"}
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    definition = {
        "metadata": {"name": "widgets.example.org"},
        "spec": {"group": "example.org", "names": names, "scope": "Namespaced", "versions": [version]},
    }
    await client.create(_resource("customresourcedefinitions"), definition)
    widgets = Resource("example.org", "v1", "widgets", "widget", "Widget", True)
    made: list[Object] = []

    async def created() -> bool:
        made.append(
            await client.create(widgets, {"apiVersion": "example.org/v1", "kind": "Widget", "metadata": {"name": "w", "namespace": NS}})
        )
        return True

    await until(created)
    owner = {"apiVersion": "example.org/v1", "kind": "Widget", "name": "w", "uid": made[0]["metadata"]["uid"]}
    await client.create(CONFIG_MAPS, {"metadata": {"name": "owned", "namespace": NS, "ownerReferences": [owner]}})
    await asyncio.sleep(0.3)
    assert not await _is_gone(client, CONFIG_MAPS, "owned")
    await client.delete(widgets, "w", NS)
    await until(lambda: _is_gone(client, CONFIG_MAPS, "owned"), 40)


async def test_namespace_goes_with_everything_in_it(everything: Client) -> None:
    client = everything
    await client.create(NAMESPACES, {"metadata": {"name": "full"}})
    await until(lambda: client.get(SERVICE_ACCOUNTS, "default", "full"))
    await until(lambda: client.get(CONFIG_MAPS, "kube-root-ca.crt", "full"))
    held = {"metadata": {"name": "held", "namespace": "full", "finalizers": ["example.org/held"]}}
    await client.create(SECRETS, held)
    await client.delete(NAMESPACES, "full")

    async def waits_for_finalizer() -> bool:
        conditions = (await client.get(NAMESPACES, "full"))["status"].get("conditions") or ()
        return any(item["type"] == "NamespaceFinalizersRemaining" and item["status"] == "True" for item in conditions)

    await until(waits_for_finalizer)
    await client.patch(SECRETS, "held", "full", {"metadata": {"finalizers": None}})
    await until(lambda: _is_gone(client, NAMESPACES, "full", None), 20)


# Accounts and certificates


async def test_secret_for_a_service_account_gets_a_token_that_works(everything: Client) -> None:
    client = everything
    await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
    annotations = {"kubernetes.io/service-account.name": "default"}
    secret = {"metadata": {"name": "s", "namespace": NS, "annotations": annotations}, "type": "kubernetes.io/service-account-token"}
    await client.create(SECRETS, secret)
    found: Object = {}

    async def filled() -> bool:
        found.update((await client.get(SECRETS, "s", NS)).get("data") or {})
        return found.keys() >= {"token", "namespace", "ca.crt"}

    await until(filled)
    assert base64.b64decode(found["ca.crt"]) == b"the CA"
    review = {"spec": {"token": base64.b64decode(found["token"]).decode()}}
    answer = await client.create(Resource("authentication.k8s.io", "v1", "tokenreviews", "tokenreview", "TokenReview", False), review)
    assert answer["status"]["user"]["username"] == "system:serviceaccount:default:default"
    await client.delete(SERVICE_ACCOUNTS, "default", NS)
    await until(lambda: _is_gone(client, SECRETS, "s"))


async def test_approved_request_is_signed_for_its_subject(apiserver: RunningAPIServer) -> None:
    folder = Path(apiserver.server.config.client_ca).parent
    ca_cert, ca_key = (folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "jane"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "team")])
    pem = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    requests = _resource("certificatesigningrequests")
    spec = {
        "request": base64.b64encode(pem).decode(),
        "signerName": "kubernetes.io/kube-apiserver-client",
        "usages": ["client auth"],
        "expirationSeconds": 3600,
    }
    async with controllers(apiserver, "csrsigning,csrapproving", ca_cert=ca_cert, ca_key=ca_key) as client:
        request = await client.create(requests, {"metadata": {"name": "jane"}, "spec": spec})
        request["status"] = {"conditions": [{"type": "Approved", "status": "True", "reason": "Test", "message": ""}]}
        await client.update(requests, request, subresource="approval")
        found: list[str] = []

        async def signed() -> bool:
            found.append(((await client.get(requests, "jane")).get("status") or {}).get("certificate") or "")
            return bool(found[-1])

        await until(signed)
    certificate = x509.load_pem_x509_certificate(base64.b64decode(found[-1]))
    assert certificate.subject == name
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert 3600 <= lifetime.total_seconds() <= 3600 + 600
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_cert))


# Nodes


_NODE_CONTROLLERS = "node-lifecycle-controller,taint-eviction-controller,node-ipam-controller,serviceaccount-controller"


async def _beat(client: Client, name: str) -> None:
    condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": clock.now_rfc3339()}
    await client.patch(NODES, name, None, {"status": {"conditions": [condition]}}, type="strategic", subresource="status")


async def test_silent_node_is_tainted_and_its_pods_evicted(apiserver: RunningAPIServer) -> None:
    settings = {"node_monitor_grace_seconds": 1.5, "node_startup_grace_seconds": 1.5, "node_monitor_period_seconds": 0.3}
    async with controllers(apiserver, _NODE_CONTROLLERS, **settings) as client:
        for name in ("silent", "alive"):
            await client.create(NODES, {"metadata": {"name": name}})
            await _beat(client, name)
        ranges = {(await client.get(NODES, name))["spec"].get("podCIDR") for name in ("silent", "alive")}
        quick = [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}]
        await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
        for name, tolerations in (("leaves", quick), ("stays", [{"operator": "Exists"}])):
            spec = {
                "nodeName": "silent",
                "containers": [{"name": "c", "image": "i"}],
                "tolerations": tolerations,
                "terminationGracePeriodSeconds": 0,
            }
            await client.create(PODS, {"metadata": {"name": name, "namespace": NS}, "spec": spec})

        async def tainted() -> bool:
            await _beat(client, "alive")
            taints = (await client.get(NODES, "silent"))["spec"].get("taints") or ()
            return {(item["key"], item["effect"]) for item in taints} >= {
                ("node.kubernetes.io/unreachable", "NoSchedule"), ("node.kubernetes.io/unreachable", "NoExecute"),
            }  # fmt: skip

        async def evicted() -> bool:
            await _beat(client, "alive")
            return await _is_gone(client, PODS, "leaves")

        await until(tainted)
        await until(evicted)
        assert not await _is_gone(client, PODS, "stays")
        assert not (await client.get(NODES, "alive"))["spec"].get("taints")
        await _beat(client, "silent")

        async def back() -> bool:
            await _beat(client, "silent")
            return not (await client.get(NODES, "silent"))["spec"].get("taints")

        await until(back)
        assert len(ranges) == 2


# Endpoints


async def test_many_endpoints_are_spread_over_slices_and_packed_again(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, "endpointslice-controller,serviceaccount-controller", max_endpoints_per_slice=10) as client:
        await client.create(NODES, {"metadata": {"name": "n"}})
        await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
        await client.create(
            SERVICES, {"metadata": {"name": "s", "namespace": NS}, "spec": {"selector": {"a": "b"}, "ports": [{"port": 80}]}}
        )
        for number in range(25):
            meta = {"name": f"p{number}", "namespace": NS, "labels": {"a": "b"}}
            await client.create(PODS, {"metadata": meta, "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}})
            status = {"phase": "Running", "podIP": f"10.244.0.{number}", "podIPs": [{"ip": f"10.244.0.{number}"}]}
            status["conditions"] = [{"type": "Ready", "status": "True"}]
            await client.patch(PODS, f"p{number}", NS, {"status": status}, type="strategic", subresource="status")

        async def sizes() -> list[int]:
            slices = (await client.list(ENDPOINT_SLICES, NS, label_selector="kubernetes.io/service-name=s"))["items"]
            return sorted(len(item.get("endpoints") or ()) for item in slices)

        async def spread() -> bool:
            found = await sizes()
            return sum(found) == 25 and max(found) <= 10 and len(found) == 3

        await until(spread)
        for number in range(24):
            await client.delete(PODS, f"p{number}", NS, grace_period_seconds=0)

        async def packed() -> bool:
            return sum(await sizes()) == 1

        await until(packed)
        await client.delete(SERVICES, "s", NS)


# The manager itself


async def test_manager_leaves_no_task_behind(apiserver: RunningAPIServer) -> None:
    before = {task.get_name() for task in asyncio.all_tasks()}
    async with controllers(apiserver, "*"):
        assert len(asyncio.all_tasks()) > len(before)
    await asyncio.sleep(0.1)
    left = {task.get_name() for task in asyncio.all_tasks()} - before
    assert not [name for name in left if name.startswith(("informer", "deployment", "worker")) or name.endswith("controller")]


# Claims of devices


async def test_claim_is_made_from_its_template_and_goes_with_the_pod(everything: Client) -> None:
    client = everything
    claims, templates = _resource("resourceclaims"), _resource("resourceclaimtemplates")
    requests = [{"name": "gpu", "exactly": {"deviceClassName": "gpu.example.org"}}]
    template = {
        "metadata": {"name": "t", "namespace": NS},
        "spec": {"metadata": {"labels": {"l": "1"}}, "spec": {"devices": {"requests": requests}}},
    }
    await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
    pod = {"metadata": {"name": "p", "namespace": NS}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    pod["spec"]["resourceClaims"] = [{"name": "device", "resourceClaimTemplateName": "t"}]
    await client.create(PODS, pod)
    # The pod may be first.
    await asyncio.sleep(0.1)
    await client.create(templates, template)
    found: list[str] = []

    async def named() -> bool:
        statuses = (await client.get(PODS, "p", NS))["status"].get("resourceClaimStatuses") or ()
        found[:] = [item["resourceClaimName"] for item in statuses]
        return bool(found)

    await until(named)
    claim = await client.get(claims, found[0], NS)
    assert claim["metadata"]["annotations"] == {"resource.kubernetes.io/pod-claim-name": "device"}
    assert claim["metadata"]["labels"] == {"l": "1"}
    assert claim["spec"]["devices"]["requests"][0]["name"] == "gpu"
    # Deleted by accident it is made again; with the pod over it goes.
    await client.delete(claims, found[0], NS)

    async def made_again() -> bool:
        await named()
        listed = (await client.list(claims, NS))["items"]
        return len(listed) == 1 and [listed[0]["metadata"]["name"]] == found and listed[0]["metadata"]["uid"] != claim["metadata"]["uid"]

    await until(made_again)
    assert len(await _names(client, claims)) == 1
    await client.patch(PODS, "p", NS, {"status": {"phase": "Succeeded"}}, type="strategic", subresource="status")

    async def none_left() -> bool:
        return not await _names(client, claims)

    await until(none_left)
    await client.delete(PODS, "p", NS)


async def test_claim_that_nobody_uses_any_more_is_free_for_another_node(everything: Client) -> None:
    client, claims = everything, _resource("resourceclaims")
    spec = {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "gpu.example.org"}}]}}
    meta = {"name": "shared", "namespace": NS, "finalizers": ["resource.kubernetes.io/delete-protection"]}
    claim = await client.create(claims, {"metadata": meta, "spec": spec})
    result = {"request": "gpu", "driver": "d.example.org", "pool": "p", "device": "x"}
    consumer = {"resource": "pods", "name": "gone", "uid": "uid-of-a-pod-long-gone"}
    claim["status"] = {"allocation": {"devices": {"results": [result]}}, "reservedFor": [consumer]}
    await client.update(claims, claim, subresource="status")

    async def free() -> bool:
        now = await client.get(claims, "shared", NS)
        return not now.get("status") and not now["metadata"].get("finalizers")

    await until(free)


# Volumes


async def test_volume_is_attached_for_its_pod_and_detached_when_the_node_lets_go(everything: Client) -> None:
    client = everything
    volumes, claims, attachments = _resource("persistentvolumes"), _resource("persistentvolumeclaims"), _resource("volumeattachments")
    await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
    for name in ("one", "two"):
        annotations = {"volumes.kubernetes.io/controller-managed-attach-detach": "true"}
        await client.create(NODES, {"metadata": {"name": name, "annotations": annotations}})
        await _beat(client, name)
    source = {"driver": "d.example.org", "volumeHandle": "h"}
    common = {"accessModes": ["ReadWriteOnce"], "storageClassName": "x"}
    await client.create(volumes, {"metadata": {"name": "v"}, "spec": {**common, "capacity": {"storage": "1Gi"}, "csi": source}})
    await client.create(
        claims, {"metadata": {"name": "c", "namespace": NS}, "spec": {**common, "resources": {"requests": {"storage": "1Gi"}}}}
    )

    async def run_on(node: str) -> None:
        pod_volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]
        spec = {"nodeName": node, "volumes": pod_volumes, "containers": [{"name": "c", "image": "i"}], "terminationGracePeriodSeconds": 0}
        await client.create(PODS, {"metadata": {"name": f"on-{node}", "namespace": NS}, "spec": spec})

    async def nodes_attached() -> list[str]:
        return [item["spec"]["nodeName"] for item in (await client.list(attachments))["items"]]

    async def on(node: str) -> bool:
        return await nodes_attached() == [node]

    async def reported() -> bool:
        found = (await client.get(NODES, "one"))["status"].get("volumesAttached") or []
        return [item["name"] for item in found] == ["kubernetes.io/csi/d.example.org^h"]

    await run_on("one")
    await until(lambda: on("one"))
    (attachment,) = (await client.list(attachments))["items"]
    await client.patch(attachments, attachment["metadata"]["name"], None, {"status": {"attached": True}}, subresource="status")
    await until(reported)
    in_use = {"status": {"volumesInUse": ["kubernetes.io/csi/d.example.org^h"]}}
    await client.patch(NODES, "one", None, in_use, subresource="status")
    await run_on("two")
    await client.delete(PODS, "on-one", NS, grace_period_seconds=0)
    await asyncio.sleep(0.5)
    # Still mounted there, so neither detached nor attached twice.
    assert await on("one")
    await client.patch(NODES, "one", None, {"status": {"volumesInUse": None}}, subresource="status")
    await until(lambda: on("two"))
    assert not (await client.get(NODES, "one"))["status"].get("volumesAttached")
    assert attachment["metadata"]["name"].startswith("csi-")
