"""The kubelet's own server: who may ask, and what it answers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest_asyncio

from knarr.http.client import HTTPClient
from knarr.testing.apiserver import _folder
from knarr.testing.apiserver import test_pki as make_pki
from tests.kubelet.conftest import Bench

PORT = 16395


@pytest_asyncio.fixture
async def served(bench: Bench) -> AsyncIterator[Bench]:
    """A kubelet with its port open."""
    await serve(bench)
    yield bench


async def serve(bench: Bench) -> None:
    """Start the kubelet anew with its port open."""
    await bench.stop()
    serving = make_pki().node_serving(bench.folder, bench.node_name, ["127.0.0.1"])
    bench.options = {
        "port": PORT,
        "serving_cert": str(serving.certificate),
        "serving_key": str(serving.key),
        "client_ca": str(Path(_folder().name) / "ca.crt"),
    }
    await bench.start()


def client_of(*, certificate: bool) -> HTTPClient:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        pair = make_pki().kubelet_client
        context.load_cert_chain(str(pair.certificate), str(pair.key))
    return HTTPClient(f"https://127.0.0.1:{PORT}", ssl_context=context)


async def test_strangers_are_refused(served: Bench) -> None:
    client = client_of(certificate=False)
    try:
        assert (await client.request("GET", "/pods")).status == 401
        answer = await client.request("GET", "/pods", headers=[("Authorization", "Bearer nonsense")])
        assert answer.status == 401
    finally:
        await client.close()


async def test_pods_statistics_metrics_and_logs_are_served(served: Bench) -> None:
    await served.run("p", "echo one; echo two >&2; sleep 1000", container={"resources": {"limits": {"memory": "64Mi", "cpu": "1"}}})
    await served.until_ready("p")
    client = client_of(certificate=True)
    try:
        assert (await client.request("GET", "/healthz")).body == b"ok"
        pods = orjson.loads((await client.request("GET", "/pods")).body)
        assert [p["metadata"]["name"] for p in pods["items"]] == ["p"]
        summary = orjson.loads((await client.request("GET", "/stats/summary")).body)
        assert summary["node"]["memory"]["workingSetBytes"] > 0
        one = next(p for p in summary["pods"] if p["podRef"]["name"] == "p")
        assert one["containers"][0]["memory"]["usageBytes"] > 0
        assert one["cpu"]["usageCoreNanoSeconds"] > 0
        for path, name in (
            ("/metrics", b"kubelet_running_pods 1"),
            ("/metrics/resource", b'container_memory_working_set_bytes{container="c",namespace="test",pod="p"}'),
            ("/metrics/cadvisor", b"container_cpu_usage_seconds_total{"),
            ("/metrics/probes", b"process_start_time_seconds"),
        ):
            assert name in (await client.request("GET", path)).body, path
        assert orjson.loads((await client.request("GET", "/configz")).body)["kubeletconfig"]["clusterDomain"] == "cluster.local"
        logs = f"/containerLogs/{served.namespace}/p/c"
        async with asyncio.timeout(5):
            while b"two" not in (body := (await client.request("GET", logs)).body):
                await asyncio.sleep(0.02)
        assert sorted(body.splitlines()) == [b"one", b"two"]
        assert (await client.request("GET", logs + "?tailLines=1")).body in (b"one\n", b"two\n")
        assert (await client.request("GET", logs + "?limitBytes=2")).body in (b"on", b"tw")
        assert (await client.request("GET", logs + "?stream=Stderr")).body == b"two\n"
        assert (await client.request("GET", logs + "?previous=true")).status == 400
        assert (await client.request("GET", f"/containerLogs/{served.namespace}/p/nope")).status == 404
    finally:
        await client.close()


async def test_a_followed_log_shows_new_lines_and_ends_with_the_container(served: Bench) -> None:
    await served.run("p", "for i in 1 2 3; do echo $i; sleep 0.3; done")
    client = client_of(certificate=True)
    try:
        await served.until("p", lambda p: p and (p["status"].get("containerStatuses") or [{}])[0].get("state", {}).get("running"))
        got = b""
        async with asyncio.timeout(10), client.stream("GET", f"/containerLogs/{served.namespace}/p/c?follow=true") as answer:
            async for chunk in answer.iter_chunks():
                got += chunk
        assert got == b"1\n2\n3\n"
    finally:
        await client.close()


async def test_a_checkpoint_is_answered_as_upstream_does_where_the_runtime_has_none(served: Bench) -> None:
    await served.run("p", "sleep 1000")
    await served.until_ready("p")
    client = client_of(certificate=True)
    try:
        for path, status, words in (
            ("/checkpoint/test/none/c", 404, b"pod does not exist"),
            ("/checkpoint/test/p/none", 404, b"container none does not exist"),
            ("/checkpoint/test/p/c?timeout=soon", 404, b"cannot parse value of timeout parameter"),
            ("/checkpoint/test/p/c", 500, b"checkpointing of test/p/c failed (rpc error: code = Unimplemented"),
        ):
            answer = await client.request("POST", path)
            assert (answer.status, answer.body[: len(words)]) == (status, words)
    finally:
        await client.close()
