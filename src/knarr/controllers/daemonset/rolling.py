"""Which pods of a DaemonSet to delete and which nodes to give new ones in one rolling step; pure.

Source: pkg/controller/daemon/update.go (rollingUpdate).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from knarr.api.types import Object
from knarr.controllers import podutil
from knarr.controllers.daemonset import util


def plan(
    ds: Object, nodes: Iterable[Object], pods_by_node: Mapping[str, list[Object]], digest: str, now: float
) -> tuple[list[Object], list[str]]:
    """Plan one step.

    Returns:
      (pods to delete, names of nodes that get a pod).
    """
    fitting = {node["metadata"]["name"]: util.should_run(node, ds)[0] for node in nodes}
    desired = sum(fitting.values())
    by_node = dict(pods_by_node)
    for name, fits in fitting.items():
        if fits:
            by_node.setdefault(name, [])
    max_surge, max_unavailable = util.surge(ds, desired), util.unavailable(ds, desired)
    if desired > 0 and max_surge == 0 and max_unavailable == 0:
        max_unavailable = 1
    if max_surge == 0:
        return _replace(ds, by_node, digest, max_unavailable, now), []
    return _surge(ds, by_node, fitting, digest, desired, max_surge, now)


def _replace(ds: Object, by_node: Mapping[str, list[Object]], digest: str, most: int, now: float) -> list[Object]:
    min_ready = ds["spec"].get("minReadySeconds") or 0
    gone = 0
    allowed: list[Object] = []
    candidates: list[Object] = []
    for pods in by_node.values():
        found = util.updated_and_old(pods, ds, digest)
        if found is None:
            gone += 1
            continue
        new, old = found
        if (new is None) == (old is None):
            gone += 1
        elif new is not None:
            gone += not podutil.is_available(new, min_ready, now)
        elif old is not None and not podutil.is_available(old, min_ready, now):
            # It serves nobody: replacing it costs nothing.
            allowed.append(old)
            gone += 1
        elif old is not None and gone < most:
            candidates.append(old)
    return allowed + candidates[: max(0, most - gone)]


def _surge(
    ds: Object, by_node: Mapping[str, list[Object]], fitting: Mapping[str, bool], digest: str, desired: int, most: int, now: float
) -> tuple[list[Object], list[str]]:
    min_ready = ds["spec"].get("minReadySeconds") or 0
    delete: list[Object] = []
    leaving: list[Object] = []
    allowed: list[str] = []
    candidates: list[str] = []
    surging = available = 0
    for name, pods in by_node.items():
        found = util.updated_and_old(pods, ds, digest)
        if found is None:
            surging += 1
            continue
        new, old = found
        counted = old if old is not None else new
        available += counted is not None and podutil.is_available(counted, min_ready, now)
        if old is None:
            continue
        if new is None:
            if not podutil.is_available(old, min_ready, now):
                if fitting.get(name):
                    allowed.append(name)
                else:
                    delete.append(old)
            elif not fitting.get(name):
                leaving.append(old)
            elif surging < most:
                candidates.append(name)
        elif podutil.is_available(new, min_ready, now):
            delete.append(old)
        else:
            surging += 1
    delete += leaving[: max(0, available - desired)]
    return delete, allowed + candidates[: max(0, most - surging)]
