"""Counts and times of what this kubelet did, for /metrics: counters and histograms by name and labels.

Callers: every part of the kubelet through `Node.count` and `Node.observe`; `server.metrics` renders them. A metric's name here is
its full sample name, labels included as text, so that counting is one dictionary write. `Metered` counts and times the calls of a
runtime under upstream's operation names. Bound: label values are operations, reasons and container kinds, never names of pods.
Source: pkg/kubelet/metrics/metrics.go, pkg/kubelet/kuberuntime/instrumented_services.go.
"""

from __future__ import annotations

import inspect
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds; what upstream's client library uses where a metric names none."""
POD_START_BUCKETS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 20, 30, 45, 60, 120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)


class Histogram:
    """One histogram without labels."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self, name: str, labels: str) -> Iterable[tuple[str, float]]:
        """(sample, value) in the order of the text format; `labels` without braces."""
        before, seen = f"{labels}," if labels else "", 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{{before}le="{"+Inf" if bound is None else format(bound, "g")}"}}', seen
        inner = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{inner}", self.total
        yield f"{name}_count{inner}", seen


class Meters:
    """All counters and histograms of one kubelet."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        """Sample name (with labels) to its count since the start."""
        self.gauges: dict[str, float] = {}
        """Metric name to a value that is set now and then."""
        self.histograms: dict[str, dict[str, Histogram]] = {}
        """Metric name to label text to its histogram."""

    def count(self, sample: str, amount: int = 1) -> None:
        self.counters[sample] = self.counters.get(sample, 0) + amount

    def observe(self, name: str, value: float, labels: str = "", bounds: tuple[float, ...] = BUCKETS) -> None:
        """Add a value to a histogram; its bounds are those of the first call."""
        series = self.histograms.setdefault(name, {})
        found = series.get(labels)
        if found is None:
            found = series[labels] = Histogram(bounds)
        found.observe(value)


_OPERATIONS = {
    "version": "version",
    "status": "status",
    "run_pod_sandbox": "run_podsandbox",
    "stop_pod_sandbox": "stop_podsandbox",
    "remove_pod_sandbox": "remove_podsandbox",
    "pod_sandbox_status": "podsandbox_status",
    "list_pod_sandboxes": "list_podsandbox",
    "list_pod_sandbox_stats": "list_podsandbox_stats",
    "create_container": "create_container",
    "start_container": "start_container",
    "stop_container": "stop_container",
    "remove_container": "remove_container",
    "list_containers": "list_containers",
    "container_status": "container_status",
    "update_container_resources": "update_container",
    "reopen_container_log": "reopen_container_log",
    "list_container_stats": "list_container_stats",
    "exec_sync": "exec_sync",
    "list_images": "list_images",
    "image_status": "image_status",
    "pull_image": "pull_image",
    "remove_image": "remove_image",
    "image_fs_info": "image_fs_info",
}


class Metered:
    """A runtime or image service whose calls are counted and timed; everything else is the inner one's."""

    def __init__(self, inner: Any, meters: Meters) -> None:
        self._inner = inner
        self._meters = meters
        for method, operation in _OPERATIONS.items():
            if inspect.iscoroutinefunction(getattr(inner, method, None)):
                setattr(self, method, self._timed(method, operation))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _timed(self, method: str, operation: str) -> Callable[..., Any]:
        inner, meters, labels = self._inner, self._meters, f'operation_type="{operation}"'
        total, errors = f"kubelet_runtime_operations_total{{{labels}}}", f"kubelet_runtime_operations_errors_total{{{labels}}}"

        async def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            meters.count(total)
            try:
                return await getattr(inner, method)(*args, **kwargs)
            except Exception:
                meters.count(errors)
                raise
            finally:
                meters.observe("kubelet_runtime_operations_duration_seconds", time.monotonic() - started, labels)

        return timed
