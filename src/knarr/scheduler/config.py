"""Settings of the scheduler, and how they are read from a KubeSchedulerConfiguration.

Source: kube-scheduler config v1 (kubescheduler.config.k8s.io/v1).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knarr.client.config import ClientConfig
from knarr.scheduler.arguments import check

_POINTS = (
    "preEnqueue",
    "queueSort",
    "preFilter",
    "filter",
    "postFilter",
    "preScore",
    "score",
    "reserve",
    "permit",
    "preBind",
    "bind",
    "postBind",
)


@dataclass(frozen=True)
class ProfileConfig:
    """One scheduler name and its plugins."""

    scheduler_name: str = "default-scheduler"
    """Pods with this spec.schedulerName are this profile's."""
    enabled: dict[str, int] = field(default_factory=dict)
    """Plugins beside the default ones, or default ones with another weight, at all their extension points."""
    disabled: frozenset[str] = frozenset()
    """Default plugins left out; "*" leaves all out."""
    enabled_points: dict[str, dict[str, int]] = field(default_factory=dict)
    """Plugins with their weights at single extension points, whatever is left out there."""
    disabled_points: dict[str, frozenset[str]] = field(default_factory=dict)
    """Plugins left out at single extension points; "*" leaves all out."""
    plugin_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments by plugin name, in wire form."""
    percentage_of_nodes_to_score: int | None = None
    """See SchedulerConfig; None: that one."""


@dataclass(frozen=True)
class ExtenderConfig:
    """An HTTP extender. Source: config v1 Extender."""

    url_prefix: str
    """E.g. "http://127.0.0.1:8888/scheduler"."""
    filter_verb: str = ""
    """Path below the prefix for filtering; empty: it does not filter."""
    prioritize_verb: str = ""
    preempt_verb: str = ""
    bind_verb: str = ""
    weight: int = 1
    """Multiplies its scores."""
    node_cache_capable: bool = False
    """Send node names instead of whole nodes."""
    managed_resources: frozenset[str] = frozenset()
    """Only pods that ask for one of these concern it; empty: all pods."""
    ignored_resources: frozenset[str] = frozenset()
    """Those of them that only it counts: NodeResourcesFit leaves them alone."""
    tls: ClientConfig | None = None
    """Trust and certificate for an https prefix; None trusts the system's authorities."""
    ignorable: bool = False
    """Go on without it when it fails."""
    http_timeout_seconds: float = 5.0


@dataclass(frozen=True)
class SchedulerConfig:
    """All settings."""

    profiles: tuple[ProfileConfig, ...] = (ProfileConfig(),)
    extenders: tuple[ExtenderConfig, ...] = ()
    percentage_of_nodes_to_score: int = 0
    """Stop looking for feasible nodes at this share of all; 0: adaptive, 100: never stop."""
    pod_initial_backoff_seconds: float = 1.0
    """First wait of a pod that could not be scheduled."""
    pod_max_backoff_seconds: float = 10.0
    """Longest wait."""
    binders: int = 64
    """Bindings under way at the same time."""
    feature_gates: dict[str, bool] = field(default_factory=dict)
    """Gates of upstream by name that are not at their default."""
    random_seed: int | None = None
    """Makes tie breaks repeatable; None: random."""


def _weights(plugins: Iterable[dict[str, Any]]) -> dict[str, int]:
    return {plugin["name"]: int(plugin.get("weight") or 1) for plugin in plugins}


def _profile(document: dict[str, Any], ignored: frozenset[str]) -> ProfileConfig:
    """Read a profile; what extenders alone count (`ignored`) takes the place of ignored resources in its arguments."""
    plugins = document.get("plugins") or {}
    multi = plugins.get("multiPoint") or {}
    enabled_points: dict[str, dict[str, int]] = {}
    disabled_points: dict[str, frozenset[str]] = {}
    for point in _POINTS:
        part = plugins.get(point) or {}
        if part.get("enabled"):
            enabled_points[point] = _weights(part["enabled"])
        if part.get("disabled"):
            disabled_points[point] = frozenset(p["name"] for p in part["disabled"])
    arguments = {entry["name"]: entry.get("args") or {} for entry in document.get("pluginConfig") or ()}
    for name, args in arguments.items():
        check(name, args)
    if ignored:
        arguments["NodeResourcesFit"] = {**arguments.get("NodeResourcesFit", {}), "ignoredResources": sorted(ignored)}
    return ProfileConfig(
        scheduler_name=document.get("schedulerName") or "default-scheduler",
        enabled=_weights(multi.get("enabled") or ()),
        disabled=frozenset(p["name"] for p in multi.get("disabled") or ()),
        enabled_points=enabled_points,
        disabled_points=disabled_points,
        plugin_args=arguments,
        percentage_of_nodes_to_score=document.get("percentageOfNodesToScore"),
    )


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def seconds(value: Any, default: float) -> float:
    """Read a duration as configurations write it ("1m30s"), or a plain number of seconds. Raises ValueError."""
    if value is None:
        return default
    if isinstance(value, int | float):
        return float(value)
    text = str(value)
    parts = _PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text or not parts:
        raise ValueError(f"not a duration: {text!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _pem(tls: dict[str, Any], key: str) -> bytes | None:
    if tls.get(f"{key}Data"):
        return base64.b64decode(tls[f"{key}Data"])
    return Path(tls[f"{key}File"]).read_bytes() if tls.get(f"{key}File") else None


def _extender_tls(document: dict[str, Any]) -> ClientConfig | None:
    tls, demanded = document.get("tlsConfig") or {}, bool(document.get("enableHTTPS"))
    if not tls and not demanded:
        return None
    try:
        authority, certificate, key = (_pem(tls, name) for name in ("ca", "cert", "key"))
    except (OSError, ValueError) as error:
        raise ValueError(f"extender {document['urlPrefix']}: {error}") from error
    return ClientConfig(
        server=document["urlPrefix"],
        ca_data=authority,
        client_cert=certificate,
        client_key=key,
        insecure_skip_tls_verify=bool(tls.get("insecure")) or (demanded and authority is None),
        tls_server_name=tls.get("serverName") or "",
    )


def _extender(document: dict[str, Any]) -> ExtenderConfig:
    managed = document.get("managedResources") or ()
    return ExtenderConfig(
        url_prefix=document["urlPrefix"].rstrip("/"),
        filter_verb=document.get("filterVerb") or "",
        prioritize_verb=document.get("prioritizeVerb") or "",
        preempt_verb=document.get("preemptVerb") or "",
        bind_verb=document.get("bindVerb") or "",
        weight=int(document.get("weight") or 0),
        node_cache_capable=bool(document.get("nodeCacheCapable")),
        managed_resources=frozenset(r["name"] for r in managed),
        ignored_resources=frozenset(r["name"] for r in managed if r.get("ignoredByScheduler")),
        tls=_extender_tls(document),
        ignorable=bool(document.get("ignorable")),
        http_timeout_seconds=seconds(document.get("httpTimeout"), 5.0),
    )


def _check_extenders(extenders: Sequence[ExtenderConfig]) -> None:
    if (binders := sum(bool(extender.bind_verb) for extender in extenders)) > 1:
        raise ValueError(f"extenders: found {binders} extenders implementing bind: only one extender can implement bind")
    managed: set[str] = set()
    for extender in extenders:
        if extender.prioritize_verb and extender.weight <= 0:
            raise ValueError(f"extender {extender.url_prefix}: weight {extender.weight}: must have a positive weight applied to it")
        if twice := managed & extender.managed_resources:
            raise ValueError(f"extender {extender.url_prefix}: {min(twice)}: duplicate extender managed resource name")
        managed |= extender.managed_resources


def read_configuration(document: dict[str, Any]) -> SchedulerConfig:
    """Read a KubeSchedulerConfiguration.

    Raises:
      ValueError: another kind or version, or a value that cannot be read.
    """
    if document.get("kind") != "KubeSchedulerConfiguration" or document.get("apiVersion") != "kubescheduler.config.k8s.io/v1":
        raise ValueError("not a kubescheduler.config.k8s.io/v1 KubeSchedulerConfiguration")
    extenders = tuple(_extender(e) for e in document.get("extenders") or ())
    _check_extenders(extenders)
    ignored = frozenset(name for extender in extenders for name in extender.ignored_resources)
    profiles = tuple(_profile(p, ignored) for p in (document.get("profiles") or [{}]))
    names = [p.scheduler_name for p in profiles]
    if len(set(names)) != len(names):
        raise ValueError("two profiles have the same schedulerName")
    return SchedulerConfig(
        profiles=profiles,
        # Those that may be ignored come last.
        extenders=tuple(sorted(extenders, key=lambda extender: extender.ignorable)),
        percentage_of_nodes_to_score=document.get("percentageOfNodesToScore") or 0,
        pod_initial_backoff_seconds=float(document.get("podInitialBackoffSeconds") or 1),
        pod_max_backoff_seconds=float(document.get("podMaxBackoffSeconds") or 10),
    )


def read_text(content: bytes) -> SchedulerConfig:
    """Read a KubeSchedulerConfiguration as JSON or YAML. Raises ValueError."""
    from knarr.api import yamldoc

    document, _ = yamldoc.load(content)
    if not isinstance(document, dict):
        raise ValueError("not a KubeSchedulerConfiguration")
    return read_configuration(document)


def shown_configuration(config: SchedulerConfig) -> dict[str, Any]:
    """Give the settings as a KubeSchedulerConfiguration, what is at its default included."""
    profiles = []
    for profile in config.profiles:
        enabled = [{"name": name, "weight": weight} for name, weight in profile.enabled.items()]
        points: dict[str, Any] = {"multiPoint": {"enabled": enabled, "disabled": [{"name": name} for name in sorted(profile.disabled)]}}
        for point, names in profile.disabled_points.items():
            points[point] = {"disabled": [{"name": name} for name in sorted(names)]}
        for point, weights in profile.enabled_points.items():
            points.setdefault(point, {})["enabled"] = [{"name": name, "weight": weight} for name, weight in weights.items()]
        arguments = [{"name": name, "args": args} for name, args in profile.plugin_args.items()]
        shown: dict[str, Any] = {"schedulerName": profile.scheduler_name, "plugins": points, "pluginConfig": arguments}
        if profile.percentage_of_nodes_to_score is not None:
            shown["percentageOfNodesToScore"] = profile.percentage_of_nodes_to_score
        profiles.append(shown)
    return {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "percentageOfNodesToScore": config.percentage_of_nodes_to_score,
        "podInitialBackoffSeconds": config.pod_initial_backoff_seconds,
        "podMaxBackoffSeconds": config.pod_max_backoff_seconds,
        "parallelism": 16,
        "profiles": profiles,
        "extenders": [{"urlPrefix": extender.url_prefix, "weight": extender.weight} for extender in config.extenders],
    }
