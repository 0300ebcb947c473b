"""Rows that wrk measures: one object, creates, lists; 32 connections, TLS, keep-alive."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.row import Row
from bench.servers import Target, beside

ROWS = ("get", "create", "list-500", "list-all-10000")
OBJECTS = 10_000
CONNECTIONS = 32
SCRIPT = """
local thread_number = 0
function setup(thread) thread:set("id", thread_number); thread_number = thread_number + 1 end
function init(args) n = 0 end
function request()
  n = n + 1
  local name = "%s-" .. id .. "-" .. n
  return wrk.format("POST", nil, nil, '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"' .. name .. '"},"data":{"key":"value","number":"' .. n .. '"}}')
end
"""


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(each) for each in beside(options)]
        for target in targets:
            target.request("POST", "/api/v1/namespaces", b'{"metadata":{"name":"bench"}}')
        runs: dict[str, Callable[[Target, int], float]] = {
            "get": lambda target, run: wrk(target, "/api/v1/namespaces/bench/configmaps/one", options.seconds),
            "create": lambda target, run: wrk(target, "/api/v1/namespaces/bench/configmaps", options.seconds, SCRIPT % f"run{run}"),
            "list-500": lambda target, run: wrk(target, "/api/v1/namespaces/big/configmaps?limit=500", options.seconds),
            "list-all-10000": lambda target, run: wrk(target, "/api/v1/namespaces/big/configmaps", options.seconds),
        }
        for target in targets:
            if any(name != "create" for name in names):
                fill(target, OBJECTS if any(name.startswith("list") for name in names) else 0)
        for name in names:
            # In turn, so that a drift of the machine hits both alike.
            values: list[list[float]] = [[] for _ in targets]
            for run in range(options.repeat):
                for number, target in enumerate(targets):
                    values[number].append(runs[name](target, run))
            yield Row(name, "requests/s", values[0], values[1] if len(values) > 1 else [])


def fill(target: Target, count: int) -> None:
    """One object to get, and a namespace with many to list."""
    target.request(
        "POST",
        "/api/v1/namespaces/bench/configmaps",
        b'{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"one"},"data":{"key":"value"}}',
    )
    if not count:
        return
    target.request("POST", "/api/v1/namespaces", b'{"metadata":{"name":"big"}}')
    script = """
local made = 0
function request()
  made = made + 1
  return wrk.format("POST", nil, nil, '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"object-' .. string.format("%05d", made) .. '","labels":{"app":"bench"}},"data":{"key":"value"}}')
end
"""
    size = 0
    while size < count:
        wrk(
            target,
            "/api/v1/namespaces/big/configmaps",
            2,
            f"local first = {size}\n" + script.replace("local made = 0", "local made = first"),
            connections=16,
            threads=1,
        )
        answer = json.loads(target.request("GET", "/api/v1/namespaces/big/configmaps?limit=1"))
        size = len(answer["items"]) + int(answer["metadata"].get("remainingItemCount", 0))
    trim(target, count)


def trim(target: Target, count: int) -> None:
    """Delete what is over the count, so that every run lists the same number."""
    items = json.loads(target.request("GET", "/api/v1/namespaces/big/configmaps"))["items"]
    for item in items[count:]:
        target.request("DELETE", f"/api/v1/namespaces/big/configmaps/{item['metadata']['name']}")


def wrk(
    target: Target, path: str, seconds: float, script: str = "", *, connections: int = CONNECTIONS, threads: int = 1, headers: Sequence[str] = (),
) -> float:  # fmt: skip
    """Requests a second that wrk saw answered. Raises RuntimeError when any answer was not of the 2xx class."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "wrk",
            "-t",
            str(threads),
            "-c",
            str(connections),
            "-d",
            f"{max(1, round(seconds))}s",
            "-H",
            target.header,
            "-H",
            "Content-Type: application/json",
        ]
        for header in headers:
            command += ["-H", header]
        if script:
            lua = Path(folder) / "load.lua"
            lua.write_text(script)
            command += ["-s", str(lua)]
        output = subprocess.run([*command, target.url + path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    if found is None or ("Non-2xx" in output and not script.startswith("local first")):
        raise RuntimeError(output)
    return float(found[1])
