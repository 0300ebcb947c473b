"""`knarr up --controller-manager-arg NAME=VALUE`: kube-controller-manager's options that the controllers here have. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from knarr.api import times


def _seconds(text: str) -> float:
    return times.parse_duration(text) / 1e9


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "cluster-signing-duration": ("signing_seconds", _seconds),
    "horizontal-pod-autoscaler-downscale-stabilization": ("hpa_downscale_stabilization_seconds", _seconds),
    "horizontal-pod-autoscaler-sync-period": ("hpa_sync_seconds", _seconds),
    "horizontal-pod-autoscaler-tolerance": ("hpa_tolerance", float),
    "node-cidr-mask-size": ("node_cidr_mask_size", int),
    "node-monitor-grace-period": ("node_monitor_grace_seconds", _seconds),
    "node-monitor-period": ("node_monitor_period_seconds", _seconds),
    "node-startup-grace-period": ("node_startup_grace_seconds", _seconds),
    "terminated-pod-gc-threshold": ("terminated_pod_gc_threshold", int),
}


def parse(arguments: Iterable[str]) -> dict[str, Any]:
    """Fields of ControllersConfig. Raises ValueError that names the argument and what would be right."""
    out: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not equals or name not in _OPTIONS:
            raise ValueError(f"--controller-manager-arg {argument!r}: expected NAME=VALUE with a name of {', '.join(sorted(_OPTIONS))}")
        field, convert = _OPTIONS[name]
        try:
            out[field] = convert(value)
        except ValueError as error:
            raise ValueError(f"--controller-manager-arg {name}: {value!r} is not {'a duration such as 40s' if convert is _seconds else 'a number'}") from error
    return out
