"""/metrics: request counters and durations by upstream's names, cheap on the hot path.

A request costs one dictionary look-up and a few additions; the prometheus text is made when it is asked for.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from knarr.apiserver.instruments import Counters
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request

BUCKETS = (0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60)
SLI_BUCKETS = BUCKETS[2:]
SIZE_BUCKETS = (1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
MOST_SERIES = 20_000
VERBS = {
    "get": "GET", "list": "LIST", "watch": "WATCH", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE",
    "deletecollection": "DELETECOLLECTION", "post": "POST", "put": "PUT", "head": "HEAD",
}  # fmt: skip
READS = frozenset({"get", "list", "watch", "head"})
CONNECTS = frozenset({"log", "exec", "portforward", "attach", "proxy"})
TOLD_VERBS = frozenset("APPLY CONNECT CREATE DELETE DELETECOLLECTION GET LIST PATCH POST PROXY PUT UPDATE WATCH WATCHLIST".split())
"""What verbs are told by name; all others are "other"."""
APPLY = "application/apply-patch"
_STABILITY = re.compile(r"# HELP \S+ \[(ALPHA|BETA|STABLE)\](?: \(Deprecated since ([0-9.]+)\))?")


class _Key(NamedTuple):
    group: str
    version: str
    resource: str
    subresource: str
    verb: str
    scope: str
    status: int
    dry_run: str

    def labels(self, *, dry_run: bool = False) -> str:
        dry = f'dry_run="{self.dry_run}",' if dry_run else ""
        return (
            f'component="apiserver",{dry}group="{self.group}",resource="{self.resource}",scope="{self.scope}",subresource="{self.subresource}",'
            f'verb="{told_verb(self.verb)}",version="{self.version}"'
        )


def told_verb(verb: str) -> str:
    """Return a verb as metrics tell it."""
    told = VERBS.get(verb) or verb.upper()
    return told if told in TOLD_VERBS else "other"


def verb_of(info: RequestInfo, request: Request) -> str:
    """Return the verb that a request is counted under."""
    if info.subresource in CONNECTS:
        return "connect"
    if info.verb == "patch" and request.headers.get("content-type", "").startswith(APPLY):
        return "apply"
    return info.verb


def scope_of(info: RequestInfo, verb: str) -> str:
    return "resource" if info.name or verb == "create" else "namespace" if info.namespace else "cluster" if info.resource else ""


class _Histogram:
    __slots__ = ("buckets", "count", "total")

    def __init__(self, bounds: int) -> None:
        self.count = 0
        self.total = 0.0
        self.buckets = [0] * (bounds + 1)

    def add(self, other: _Histogram) -> None:
        self.count += other.count
        self.total += other.total
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]


class _Series(_Histogram):
    __slots__ = ("aside", "sizes")

    def __init__(self) -> None:
        super().__init__(len(BUCKETS))
        self.sizes: _Histogram | None = None
        self.aside: _Histogram | None = None
        """What is to be added for the durations without the time that requests waited for others."""

    def set_aside(self, bucket: int, seconds: float, aside: float) -> None:
        if self.aside is None:
            self.aside = _Histogram(len(BUCKETS))
        self.aside.total -= aside
        self.aside.buckets[bucket] -= 1
        self.aside.buckets[bisect_left(BUCKETS, seconds - aside)] += 1


class Metrics:
    """See the module's docstring."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._series: dict[tuple[str, str, str, str, str, str, int, str], _Series] = {}
        self._inflight = {"mutating": 0, "readOnly": 0}
        self.started = time.time()
        self.sources: list[Callable[[], list[str]]] = []
        """Further text, made on demand: each gives whole lines of the exposition format."""
        self._terminated = Counters(
            "apiserver_request_terminations_total", "[ALPHA] Number of requests which apiserver terminated in self-defense.",
            ("code", "component", "group", "resource", "scope", "subresource", "verb", "version"),
        )  # fmt: skip
        self._long: dict[tuple[str, str, str, str], int] = {}

    def begin(self, info: RequestInfo) -> None:
        self._inflight["readOnly" if info.verb in READS else "mutating"] += 1

    def end(self, info: RequestInfo) -> None:
        self._inflight["readOnly" if info.verb in READS else "mutating"] -= 1

    def observe(self, info: RequestInfo, request: Request) -> None:
        """Count an answered request."""
        verb = verb_of(info, request)
        scope = scope_of(info, verb)
        dry_run = "All" if request.query_string and "dryRun=All" in request.query_string else ""
        key = (info.group, info.version, info.resource, info.subresource, verb, scope, request.status, dry_run)
        series = self._series.get(key)
        if series is None:
            if len(self._series) > MOST_SERIES:
                return
            series = self._series[key] = _Series()
            if verb in ("get", "list"):
                series.sizes = _Histogram(len(SIZE_BUCKETS))
        seconds = self._clock() - request.received_at
        series.count += 1
        series.total += seconds
        bucket = bisect_left(BUCKETS, seconds)
        series.buckets[bucket] += 1
        if request.aside_seconds:
            series.set_aside(bucket, seconds, request.aside_seconds)
        sizes = series.sizes
        if sizes is not None:
            sent = request.sent_bytes
            sizes.count += 1
            sizes.total += sent
            sizes.buckets[bisect_left(SIZE_BUCKETS, sent)] += 1

    def terminated(self, info: RequestInfo, request: Request, code: int) -> None:
        """Count a request that was refused or cut short so that the server stays well."""
        verb = verb_of(info, request)
        self._terminated.add(
            str(code), "apiserver", info.group, info.resource, scope_of(info, verb), info.subresource, told_verb(verb), info.version
        )  # fmt: skip

    def watching(self, info: RequestInfo, step: int) -> None:
        """Count watches that are open."""
        key = (info.group, info.version, info.resource, (info.namespace and "namespace") or "cluster")
        self._long[key] = self._long.get(key, 0) + step

    def render(self) -> bytes:
        """Return the exposition text."""
        lines: list[str] = []
        self._requests(lines)
        lines += family("apiserver_current_inflight_requests", "gauge", (
            "[STABLE] Maximal number of currently used inflight request limit of this apiserver per request kind in last second."),
            [(f'request_kind="{kind}"', count) for kind, count in self._inflight.items()])  # fmt: skip
        lines += family("apiserver_longrunning_requests", "gauge", (
            "[STABLE] Gauge of all active long-running apiserver requests broken out by verb, group, version, resource, scope and component. "
            "Not all requests are tracked this way."), [
            (f'component="apiserver",group="{group}",resource="{resource}",scope="{scope}",subresource="",verb="WATCH",version="{version}"', count)
            for (group, version, resource, scope), count in self._long.items()
        ])  # fmt: skip
        lines += self._terminated.lines()
        for source in self.sources:
            lines += source()
        lines += _about_metrics(lines)
        from prometheus_client import REGISTRY, generate_latest

        process: bytes = generate_latest(REGISTRY)
        return "\n".join(lines).encode() + b"\n" + process

    def deprecated(self, is_deprecated: Callable[[str, str, str], bool]) -> list[str]:
        """Return the metric of deprecated resources that were asked for: is_deprecated(group, version, resource)."""
        asked = {key[:4] for key in self._series}
        return family("apiserver_requested_deprecated_apis", "gauge", (
            "[STABLE] Gauge of deprecated APIs that have been requested, broken out by API group, version, resource, subresource, and "
            "removed_release."), [
            (f'group="{group}",removed_release="",resource="{resource}",subresource="{subresource}",version="{version}"', 1)
            for group, version, resource, subresource in sorted(asked) if is_deprecated(group, version, resource)
        ])  # fmt: skip

    def _requests(self, lines: list[str]) -> None:
        whole: dict[_Key, _Histogram] = {}
        lasting: dict[_Key, _Histogram] = {}
        sizes: dict[_Key, _Histogram] = {}
        counts: list[tuple[str, float]] = []
        for parts, series in self._series.items():
            key = _Key(*parts)
            counts.append((f'code="{key.status}",{key.labels(dry_run=True)}', series.count))
            merged = key._replace(status=0)
            whole.setdefault(merged, _Histogram(len(BUCKETS))).add(series)
            # As upstream: of watches the length is told, which says nothing of the server's work; what it need not answer for is taken off.
            if key.verb != "watch" and not key.dry_run:
                own = lasting.setdefault(merged, _Histogram(len(BUCKETS)))
                own.add(series)
                if series.aside is not None:
                    own.add(series.aside)
            if series.sizes is not None:
                sizes.setdefault(merged._replace(dry_run=""), _Histogram(len(SIZE_BUCKETS))).add(series.sizes)
        lines += family("apiserver_request_total", "counter", (
            "[STABLE] Counter of apiserver requests broken out for each verb, dry run value, group, version, resource, scope, component, and "
            "HTTP response code."), counts)  # fmt: skip
        text = "for each verb, {}group, version, resource, subresource, scope and component."
        _histograms(lines, "apiserver_request_duration_seconds", "[STABLE] Response latency distribution in seconds " + text.format("dry run value, "),
                    BUCKETS, whole, dry_run=True)
        _histograms(lines, "apiserver_request_sli_duration_seconds", (
            "[ALPHA] Response latency distribution (not counting webhook duration and priority & fairness queue wait times) in seconds "
            + text.format("")), SLI_BUCKETS, lasting)  # fmt: skip
        _histograms(lines, "apiserver_response_sizes", (
            "[STABLE] Response size distribution in bytes for each group, version, verb, resource, subresource, scope and component."),
            SIZE_BUCKETS, sizes)  # fmt: skip


def _about_metrics(lines: Sequence[str]) -> list[str]:
    """Return the metrics about metrics: nothing here can be disabled or hidden, and nothing is validated twice, so that it could differ."""
    levels: dict[tuple[str, str], int] = {}
    for line in lines:
        told = _STABILITY.match(line)
        if told is not None:
            key = (told[2] or "", told[1])
            levels[key] = levels.get(key, 0) + 1
    return [
        *family("registered_metrics_total", "counter", "[BETA] The count of registered metrics broken by stability level and deprecation version.", [
            (f'deprecated_version="{version}",stability_level="{level}"', count) for (version, level), count in sorted(levels.items())]),
        *family("disabled_metrics_total", "counter", "[BETA] The count of disabled metrics.", [("", 0)]),
        *family("hidden_metrics_total", "counter", "[BETA] The count of hidden metrics.", [("", 0)]),
        *family("apiserver_validation_declarative_validation_mismatch_total", "counter", (
            "[BETA] Number of times declarative validation results differed from handwritten validation results for core types."), [("", 0)]),
        *family("apiserver_validation_declarative_validation_panic_total", "counter", (
            "[BETA] Number of times declarative validation has panicked during validation."), [("", 0)]),
    ]  # fmt: skip


def family(name: str, type: str, text: str, samples: Sequence[tuple[str, float]]) -> list[str]:
    """Return the lines of one metric: samples are (labels, value)."""
    if not samples:
        return []
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {type}"]
    lines += [f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in samples]
    return lines


def _histograms(lines: list[str], name: str, text: str, bounds: Sequence[float], found: dict[_Key, _Histogram], *, dry_run: bool = False) -> None:
    if not found:
        return
    lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
    for key, histogram in found.items():
        labels = key.labels(dry_run=dry_run)
        # Fewer bounds than were counted: the first of them takes in all that is below.
        skipped = len(histogram.buckets) - 1 - len(bounds)
        running = sum(histogram.buckets[:skipped])
        for bound, count in zip(bounds, histogram.buckets[skipped:], strict=False):
            running += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {running}')
        lines.append(f'{name}_bucket{{{labels},le="+Inf"}} {histogram.count}')
        lines.append(f"{name}_sum{{{labels}}} {histogram.total:.6f}")
        lines.append(f"{name}_count{{{labels}}} {histogram.count}")
