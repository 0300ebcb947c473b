"""Rows of the API server beyond plain reads and writes: server-side apply, custom resources, Tables, protobuf, restart, compaction.

The rows that a client can see run against the reference too, in turn with ours. `restart-50000` and `store-million` are about our
own embedded store: its start with 50,000 objects, and the size of its file after a million updates of 1,000 objects.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.http_rows import fill, wrk
from bench.row import Row
from bench.servers import Target, beside, ours, restarted
from knarr.storage.sqlite import SQLiteStore

ROWS = ("apply", "crd-create-50", "table-500", "protobuf-500", "crds-200", "restart-50000", "store-million")
LOADS = ROWS[:4]
FIELDS, CRDS, STORED, UPDATES, UPDATED = 50, 200, 50_000, 1_000_000, 1000
APPLY = """
local thread_number = 0
function setup(thread) thread:set("id", thread_number); thread_number = thread_number + 1 end
function init(args) n = 0 end
wrk.headers["Content-Type"] = "application/apply-patch+yaml"
function request()
  n = n + 1
  local name = "applied-" .. id .. "-" .. (n %% 200)
  return wrk.format("PATCH", wrk.path .. "/" .. name .. "?fieldManager=bench&force=true", nil,
    '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"' .. name .. '","labels":{"app":"bench"}},"data":{"key":"value","number":"%s' .. n .. '"}}')
end
"""
CUSTOM = """
function init(args) n = 0 end
local spec = '%s'
function request()
  n = n + 1
  return wrk.format("POST", nil, nil, '{"apiVersion":"bench.example.com/v1","kind":"Wide","metadata":{"name":"%s-' .. n .. '"},"spec":' .. spec .. '}')
end
"""


def definition(number: int | None = None) -> dict[str, object]:
    """A CustomResourceDefinition of 50 fields, half of them with rules; number tells many of them apart."""
    suffix = "" if number is None else str(number)
    plural, kind = f"wides{suffix}", f"Wide{suffix}"
    fields: dict[str, object] = {}
    for index in range(FIELDS):
        fields[f"field{index}"] = (
            {"type": "string", "maxLength": 64, "pattern": "^[a-z]+$"} if index % 5 == 0
            else {"type": "integer", "minimum": 0, "maximum": 100} if index % 5 == 1
            else {"type": "array", "maxItems": 10, "items": {"type": "string"}} if index % 5 == 2
            else {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "boolean", "default": True}}} if index % 5 == 3
            else {"type": "boolean"}
        )  # fmt: skip
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": fields}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": f"{plural}.bench.example.com"},
        "spec": {
            "group": "bench.example.com", "scope": "Namespaced", "names": {"plural": plural, "kind": kind},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }  # fmt: skip


def instance() -> str:
    values: dict[str, object] = {}
    for index in range(FIELDS):
        values[f"field{index}"] = ("lower", 7, ["x", "y"], {"a": "text"}, True)[index % 5]
    return json.dumps(values)


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    if any(name in LOADS or name == "crds-200" for name in names):
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(each) for each in beside(options)]
            yield from _client_rows(names, targets, options)
    if "restart-50000" in names:
        yield Row("restart-50000", "s", [_restart() for _ in range(options.repeat)])
    if "store-million" in names:
        size, seconds = asyncio.run(_million())
        yield Row("store-million", "MB", [size], note=f"file after {UPDATES:,} updates of {UPDATED:,} objects in {seconds:.0f} s")


def _client_rows(names: list[str], targets: list[Target], options: argparse.Namespace) -> Iterator[Row]:
    for target in targets:
        target.request("POST", "/api/v1/namespaces", b'{"metadata":{"name":"bench"}}')
        if "table-500" in names or "protobuf-500" in names:
            fill(target, 1000)
        if "crd-create-50" in names:
            install(target, [definition()])
    big = "/api/v1/namespaces/big/configmaps?limit=500"
    loads: dict[str, Callable[[Target, int], float]] = {
        "apply": lambda target, run: wrk(target, "/api/v1/namespaces/bench/configmaps", options.seconds, APPLY % run),
        "crd-create-50": lambda target, run: wrk(
            target, "/apis/bench.example.com/v1/namespaces/bench/wides", options.seconds, CUSTOM % (instance(), f"run{run}")),
        "table-500": lambda target, run: wrk(
            target, big, options.seconds, headers=("Accept: application/json;as=Table;v=v1;g=meta.k8s.io,application/json",)),
        "protobuf-500": lambda target, run: wrk(target, big, options.seconds, headers=("Accept: application/vnd.kubernetes.protobuf",)),
    }  # fmt: skip
    for name in [name for name in names if name in loads]:
        values: list[list[float]] = [[] for _ in targets]
        for run in range(options.repeat):
            for number, target in enumerate(targets):
                values[number].append(loads[name](target, run))
        yield Row(name, "requests/s", values[0], values[1] if len(values) > 1 else [])
    if "crds-200" in names:
        seconds, grown = [], []
        for target in targets:
            before = memory(target.pid)
            seconds.append(install(target, [definition(number) for number in range(CRDS)]))
            grown.append(memory(target.pid) - before)
        yield Row("crds-200", "s", seconds[:1], seconds[1:], "until all are served")
        yield Row("crds-200-memory", "MB", grown[:1], grown[1:])


def install(target: Target, definitions: list[dict[str, object]]) -> float:
    """Create CustomResourceDefinitions and wait until objects of each can be listed; returns seconds."""
    begin = time.monotonic()
    with target.connection() as ask:
        for one in definitions:
            ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json.dumps(one).encode(), 201)
        for one in definitions:
            plural = one["metadata"]["name"].partition(".")[0]  # type: ignore[index]
            while ask("GET", f"/apis/bench.example.com/v1/{plural}") != 200:
                time.sleep(0.01)
    return time.monotonic() - begin


def memory(pid: int) -> float:
    """Proportional set size of a process in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:", 1)[1].split()[0]) / 1000


def _restart() -> float:
    """Seconds from the start of the process until it is ready, its store holding 50,000 objects."""
    with ours() as target:
        folder = target.folder
        with restarted(target, lambda: asyncio.run(_store_many(folder))) as seconds:
            return seconds


def _object(number: int, count: int) -> bytes:
    return json.dumps({
        "kind": "ConfigMap", "apiVersion": "v1", "metadata": {
            "name": f"object-{number}", "namespace": "default", "uid": f"00000000-0000-4000-8000-{number:012d}", "labels": {"app": "bench"},
            "creationTimestamp": "2024-01-01T00:00:00Z",
        }, "data": {"key": "value" * 20, "count": str(count)},
    }, separators=(",", ":")).encode()  # fmt: skip


async def _store_many(folder: Path) -> None:
    store = SQLiteStore(folder / "store.db")
    await store.start()
    for start in range(0, STORED, 1000):
        await asyncio.gather(*(
            store.put(f"/registry/core/configmaps/default/object-{number}", _object(number, 0), expected=0) for number in range(start, start + 1000)
        ))  # fmt: skip
    await store.close()


async def _million() -> tuple[float, float]:
    """(MB of the store's files, seconds) after very many updates of few objects, compaction running as it always does."""
    with tempfile.TemporaryDirectory(prefix="knarr-bench-") as name:
        store = SQLiteStore(Path(name) / "store.db")
        await store.start()
        begin = time.monotonic()
        revisions = [0] * UPDATED
        for count in range(UPDATES // UPDATED):
            puts = await asyncio.gather(*(
                store.put(f"/registry/core/configmaps/default/object-{number}", _object(number, count), expected=revisions[number])
                for number in range(UPDATED)
            ))  # fmt: skip
            revisions = [put.revision for put in puts]
        seconds = time.monotonic() - begin
        size = sum(os.path.getsize(Path(name) / each) for each in os.listdir(name)) / 1e6
        await store.close()
        return size, seconds
