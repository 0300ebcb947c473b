"""/metrics: request counters and durations by upstream's names, cheap on the hot path.

A request costs one dictionary look-up and two additions; the prometheus text is made when it is asked for.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request

BUCKETS = (0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60)
VERBS = {
    "get": "GET", "list": "LIST", "watch": "WATCH", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE",
    "deletecollection": "DELETECOLLECTION", "post": "POST", "put": "PUT", "head": "HEAD",
}  # fmt: skip


class _Series:
    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.buckets = [0] * (len(BUCKETS) + 1)


class Metrics:
    """See the module's docstring."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._series: dict[tuple[str, str, str, str, str, bool, int], _Series] = {}
        self.inflight = 0
        self.started = time.time()
        self.sources: list[Callable[[], list[str]]] = []
        """Further text, made on demand: each gives whole lines of the exposition format."""
        self._long: dict[tuple[str, str, str, str], int] = {}

    def begin(self) -> None:
        self.inflight += 1

    def end(self) -> None:
        self.inflight -= 1

    def observe(self, info: RequestInfo, request: Request) -> None:
        """Count an answered request."""
        key = (info.group, info.version, info.resource, info.subresource, info.verb, bool(info.name), request.status)
        series = self._series.get(key)
        if series is None:
            if len(self._series) > 20_000:
                return
            series = self._series[key] = _Series()
        seconds = self._clock() - request.received_at
        series.count += 1
        series.total += seconds
        series.buckets[bisect_left(BUCKETS, seconds)] += 1

    def watching(self, info: RequestInfo, step: int) -> None:
        """Count watches that are open."""
        key = (info.group, info.version, info.resource, (info.namespace and "namespace") or "cluster")
        self._long[key] = self._long.get(key, 0) + step

    def render(self) -> bytes:
        """Return the exposition text."""
        lines: list[str] = []
        self._requests(lines)
        lines.append("# HELP apiserver_current_inflight_requests [STABLE] Maximal number of currently used inflight request limit of this apiserver per request kind in last second.")
        lines.append("# TYPE apiserver_current_inflight_requests gauge")
        lines.append(f'apiserver_current_inflight_requests{{request_kind="mutating"}} {self.inflight}')
        lines.append('apiserver_current_inflight_requests{request_kind="readOnly"} 0')
        lines.append("# HELP apiserver_longrunning_requests [STABLE] Gauge of all active long-running apiserver requests broken out by verb, group, version, resource, scope and component. Not all requests are tracked this way.")
        lines.append("# TYPE apiserver_longrunning_requests gauge")
        for (group, version, resource, scope), count in self._long.items():
            lines.append(
                f'apiserver_longrunning_requests{{component="apiserver",group="{group}",resource="{resource}",scope="{scope}",subresource="",verb="WATCH",version="{version}"}} {count}')
        for source in self.sources:
            lines += source()
        from prometheus_client import REGISTRY, generate_latest

        process: bytes = generate_latest(REGISTRY)
        return "\n".join(lines).encode() + b"\n" + process

    def _requests(self, lines: list[str]) -> None:
        lines.append("# HELP apiserver_request_total [STABLE] Counter of apiserver requests broken out for each verb, dry run value, group, version, resource, scope, component, and HTTP response code.")
        lines.append("# TYPE apiserver_request_total counter")
        for key, series in self._series.items():
            lines.append(f'apiserver_request_total{{{_labels(key)},code="{key[6]}",dry_run=""}} {series.count}')
        lines.append("# HELP apiserver_request_duration_seconds [STABLE] Response latency distribution in seconds for each verb, dry run value, group, version, resource, subresource, scope and component.")
        lines.append("# TYPE apiserver_request_duration_seconds histogram")
        merged: dict[tuple[str, str, str, str, str, bool, int], _Series] = {}
        for key, series in self._series.items():
            if key[4] == "watch":
                continue
            whole = merged.setdefault((*key[:6], 0), _Series())
            whole.count += series.count
            whole.total += series.total
            whole.buckets = [a + b for a, b in zip(whole.buckets, series.buckets, strict=True)]
        for key, series in merged.items():
            labels = _labels(key) + ',dry_run=""'
            running = 0
            for bound, count in zip(BUCKETS, series.buckets, strict=False):
                running += count
                lines.append(f'apiserver_request_duration_seconds_bucket{{{labels},le="{bound}"}} {running}')
            lines.append(f'apiserver_request_duration_seconds_bucket{{{labels},le="+Inf"}} {series.count}')
            lines.append(f"apiserver_request_duration_seconds_sum{{{labels}}} {series.total:.6f}")
            lines.append(f"apiserver_request_duration_seconds_count{{{labels}}} {series.count}")


def _labels(key: tuple[str, str, str, str, str, bool, int]) -> str:
    group, version, resource, subresource, verb, named, _ = key
    scope = "resource" if named or verb == "create" else "cluster" if resource else ""
    return (
        f'component="apiserver",group="{group}",resource="{resource}",scope="{scope}",subresource="{subresource}",'
        f'verb="{VERBS.get(verb, verb.upper())}",version="{version}"'
    )
