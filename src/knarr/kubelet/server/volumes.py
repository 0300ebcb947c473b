"""What the volumes of claims hold and have left, and what containers' logs take: kubelet_volume_stats_*, log files. Caller: metrics.

Source: pkg/kubelet/metrics/collectors (volume_stats.go, log_metrics.go), pkg/volume/metrics_statfs.go.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from knarr.kubelet import machine, sandboxes, usage
from knarr.kubelet.pod_worker import Stage
from knarr.kubelet.server.page import Page

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_STATS: tuple[tuple[str, str, Callable[[machine.DiskUsage], float]], ...] = (
    ("capacity_bytes", "Size of the volume.", lambda d: d.capacity),
    ("available_bytes", "What is left of the volume.", lambda d: d.available),
    ("used_bytes", "What is taken of the volume.", lambda d: d.used),
    ("inodes", "Inodes of the volume.", lambda d: d.inodes),
    ("inodes_free", "Inodes that are left in the volume.", lambda d: d.inodes_free),
    ("inodes_used", "Inodes that are taken in the volume.", lambda d: d.inodes - d.inodes_free),
)


async def fill(kubelet: Kubelet, page: Page) -> None:
    """Add both to a page."""
    begun = time.monotonic()
    claims, logs = await asyncio.to_thread(_read, kubelet)
    kubelet.meters.observe("kubelet_volume_metric_collection_duration_seconds", time.monotonic() - begun, 'metric_source="statfs"')
    if claims:
        for name, text, value in _STATS:
            page.add(f"kubelet_volume_stats_{name}", "gauge", text, [(labels, value(d)) for labels, d in claims])
    page.add("kubelet_container_log_filesystem_used_bytes", "gauge", "What the container's log takes.", logs)


def _read(kubelet: Kubelet) -> tuple[list[tuple[dict[str, str], machine.DiskUsage]], list[tuple[dict[str, str], float]]]:
    claims: dict[tuple[str, str], machine.DiskUsage] = {}
    logs: list[tuple[dict[str, str], float]] = []
    for worker in kubelet.workers.workers():
        if worker.orphan or worker.stage >= Stage.TERMINATED:
            continue
        meta = worker.pod["metadata"]
        mounted = kubelet.node.volumes.of(worker.uid).volumes
        for volume in worker.pod["spec"].get("volumes") or []:
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if "ephemeral" in volume:
                claim = f"{meta['name']}-{volume['name']}"
            path = mounted[volume["name"]].path if volume["name"] in mounted else ""
            if claim and os.path.isdir(path) and (meta["namespace"], claim) not in claims:
                claims[meta["namespace"], claim] = machine.disk(path)
        folder = sandboxes.log_directory(kubelet.config, worker.pod)
        labels = {"uid": worker.uid, "namespace": meta.get("namespace", ""), "pod": meta["name"]}
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            logs.append(({**labels, "container": name}, usage.tree(os.path.join(folder, name)).size))
    return [({"namespace": namespace, "persistentvolumeclaim": name}, found) for (namespace, name), found in claims.items()], logs
