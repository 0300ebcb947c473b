"""`knarr image load|pull|ls|rm`: on every node that this machine runs."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from knarr.cluster import localapi
from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError

BAR_WIDTH = 30


def _nodes(config: ClusterConfig) -> list[str]:
    names = [node.name for node in config.nodes if localapi.socket_path(config, node.name).exists()]
    if not names:
        raise CommandError(f"no node of cluster {config.name!r} runs; `knarr up` starts it")
    return names


def load(config: ClusterConfig, archives: Sequence[str]) -> int:
    """Load archives into every node; "-" is standard input."""
    for archive in archives:
        with tempfile.TemporaryDirectory(prefix="knarr-image-") as folder:
            path = archive
            if archive == "-":
                path = str(Path(folder) / "stdin.tar")
                with open(path, "wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            elif not os.path.exists(path):
                raise CommandError(f"there is no file {archive!r}")
            for node in _nodes(config):
                for message in _ask(config, node, "images/load", path=os.path.abspath(path)):
                    print(f"{node}: loaded {', '.join(message['loaded'])}")
    return 0


def pull(config: ClusterConfig, references: Sequence[str], credentials: str) -> int:
    """Pull images from their registries into every node, with a progress bar on a terminal."""
    username, _, password = credentials.partition(":")
    for reference in references:
        for node in _nodes(config):
            for message in _ask(config, node, "images/pull", image=reference, username=username, password=password):
                if "pulled" in message:
                    print(f"{_clear()}{node}: pulled {reference} ({message['id'][:19]})")
                elif sys.stdout.isatty() and message["total"]:
                    print(bar(node, int(message["done"]), int(message["total"])), end="", flush=True)
    return 0


def _clear() -> str:
    return "\r\x1b[K" if sys.stdout.isatty() else ""


def bar(label: str, done: int, total: int) -> str:
    """One line that replaces itself: label, bar, megabytes."""
    filled = min(BAR_WIDTH, BAR_WIDTH * done // max(total, 1))
    return f"\r\x1b[K{label} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done / 1e6:.1f} of {total / 1e6:.1f} MB"


def remove(config: ClusterConfig, references: Sequence[str]) -> int:
    for reference in references:
        for node in _nodes(config):
            for _ in _ask(config, node, "images/remove", image=reference):
                print(f"{node}: removed {reference}")
    return 0


def show(config: ClusterConfig) -> int:
    """One line per name, as on the first node; further nodes may have pulled others by themselves."""
    rows = [("IMAGE", "ID", "SIZE", "NODES")]
    images: dict[tuple[str, str, int], list[str]] = {}
    for node in _nodes(config):
        for message in _ask(config, node, "images/list"):
            for tag in message["tags"] or message["digests"] or ["<none>"]:
                images.setdefault((tag, message["id"], int(message["size"])), []).append(node)
    rows += [(tag, identity.removeprefix("sha256:")[:12], f"{size / 1e6:.1f} MB", ",".join(nodes)) for (tag, identity, size), nodes in sorted(images.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    return 0


def _ask(config: ClusterConfig, node: str, verb: str, **arguments: object) -> Iterator[dict[str, Any]]:
    try:
        yield from localapi.ask(config, node, verb, **arguments)
    except RuntimeError as error:
        raise CommandError(f"{node}: {error}") from error
