"""Deployments that fill simulated nodes: `knarr simulate pods=5000`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import DEPLOYMENTS, NAMESPACES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.simulate.nodes import LABEL, TAINT

NAMESPACE = "simulated"
_PODS_EACH = 500
_AT_A_TIME = 16


def make_deployment(name: str, replicas: int) -> Object:
    """A Deployment whose pods go to simulated nodes only."""
    labels = {"app": name}
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "nodeSelector": {LABEL: "true"},
            "tolerations": [{"key": TAINT["key"], "operator": "Exists", "effect": TAINT["effect"]}],
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": "simulated:1", "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}}}],
        },
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {LABEL: "true"}},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
    }


def sizes(pods: int, each: int = _PODS_EACH) -> list[int]:
    """Into how many Deployments of which size a number of pods is cut."""
    return [each] * (pods // each) + ([pods % each] if pods % each else [])


async def ensure(client: Client, pods: int) -> None:
    """Bring the simulated Deployments to so many pods in all; the namespace goes with the last one."""
    if not pods:
        await _ignoring(client.delete(NAMESPACES, NAMESPACE), errors.is_not_found)
        return
    await _ignoring(client.create(NAMESPACES, {"metadata": {"name": NAMESPACE}}), errors.is_already_exists)
    wanted = {f"sim-{number:04d}": size for number, size in enumerate(sizes(pods))}
    present = {item["metadata"]["name"]: item for item in (await client.list(DEPLOYMENTS, NAMESPACE, label_selector=f"{LABEL}=true"))["items"]}
    limit = asyncio.Semaphore(_AT_A_TIME)

    async def bring(name: str, size: int) -> None:
        async with limit:
            if not size:
                await _ignoring(client.delete(DEPLOYMENTS, name, NAMESPACE, propagation_policy="Background"), errors.is_not_found)
            elif name not in present:
                await client.create(DEPLOYMENTS, make_deployment(name, size), NAMESPACE)
            elif present[name]["spec"].get("replicas") != size:
                await client.patch(DEPLOYMENTS, name, NAMESPACE, {"spec": {"replicas": size}})

    await asyncio.gather(*(bring(name, wanted.get(name, 0)) for name in {**wanted, **present}))


async def ready_pods(client: Client) -> int:
    """How many pods of the simulated Deployments are ready."""
    listed = await client.list(DEPLOYMENTS, NAMESPACE, label_selector=f"{LABEL}=true")
    return sum((item.get("status") or {}).get("readyReplicas", 0) for item in listed["items"])


async def _ignoring(call: Awaitable[object], harmless: Callable[[StatusError], bool]) -> None:
    try:
        await call
    except StatusError as error:
        if not harmless(error):
            raise
