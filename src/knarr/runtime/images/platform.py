"""Which of an index's manifests fits this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any

_NAMES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x"}
ARCHITECTURE = _NAMES.get(platform.machine(), platform.machine())
_VARIANTS = {"arm64": ("", "v8"), "arm": ("v7", "v6", "v5", ""), "amd64": ("", "v1")}


def _rank(descriptor: dict[str, Any]) -> int | None:
    """Lower is better; None does not run here. A descriptor without a platform fits anything."""
    wanted = descriptor.get("platform")
    if not wanted:
        annotations = descriptor.get("annotations") or {}
        return None if annotations.get("vnd.docker.reference.type") else 50
    if wanted.get("os", "linux") != "linux" or wanted.get("architecture") != ARCHITECTURE:
        return None
    variants = _VARIANTS.get(ARCHITECTURE, ("",))
    variant = wanted.get("variant") or ""
    return variants.index(variant) if variant in variants else None


def choose(manifests: Iterable[dict[str, Any]], present: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any] | None:
    """The best fitting descriptor among those that are present, or None."""
    ranked = [(rank, position, item) for position, item in enumerate(manifests) if (rank := _rank(item)) is not None and present(item)]
    return min(ranked, key=lambda entry: entry[:2])[2] if ranked else None
