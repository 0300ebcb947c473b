"""What `status` and `logs` print."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from knarr.cluster.config import ClusterConfig


def print_status(config: ClusterConfig, status: dict[str, Any] | None, *, as_json: bool) -> int:
    """The cluster and its components; returns 0 when all run, 3 when the cluster is down or a component is."""
    running = status is not None and all(part["state"] == "running" for part in status["components"])
    if as_json:
        nodes = [{"name": node.name, "ip": node.ip, "netns": node.netns} for node in config.nodes]
        print(json.dumps({"name": config.name, "data": config.data_dir, "port": config.api_port, "nodes": nodes, "supervisor": status}, indent=1))
        return 0 if running else 3
    print(f"cluster {config.name}: {'running' if status else 'down'}, data in {config.data_dir}, API on port {config.api_port}")
    for part in status["components"] if status else ():
        line = f"  {part['name']:<12} {part['state']:<20} pid {part['pid'] or '-':<8} since {_age(part['started'])}"
        if part["restarts"]:
            line += f", {part['restarts']} restart{'s' if part['restarts'] > 1 else ''}, last: {part['lastExit']}"
        print(line)
    return 0 if running else 3


def _age(started: float) -> str:
    seconds = int(max(0, time.time() - started))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def print_log(path: Path, *, tail: int, follow: bool) -> int:
    """Print a log file, or its last lines, and go on with what is appended when asked to."""
    with path.open("rb") as file:
        lines = file.readlines() if tail >= 0 else None
        if lines is not None:
            sys.stdout.buffer.writelines(lines[len(lines) - tail :] if tail else [])
        else:
            for block in iter(lambda: file.read(1 << 16), b""):
                sys.stdout.buffer.write(block)
        sys.stdout.flush()
        if follow:
            _follow(path, file.fileno())
    return 0


def _follow(path: Path, descriptor: int) -> None:
    """Write what is appended as inotify tells of it; ends by interrupt. A truncated file is read from its start again."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    modified = 0x2
    libc.inotify_add_watch(watch, os.fsencode(path), modified)
    while True:
        block = os.read(descriptor, 1 << 16)
        if block:
            sys.stdout.buffer.write(block)
            sys.stdout.flush()
            continue
        if os.fstat(descriptor).st_size < os.lseek(descriptor, 0, os.SEEK_CUR):
            os.lseek(descriptor, 0, os.SEEK_SET)
            continue
        os.read(watch, 4096)
