"""Schedulers to measure, each in a process of its own: ours, and optionally kube-scheduler on the reference's API server."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.servers import TOKEN, Target, free_port

_START_SECONDS = 60.0


@asynccontextmanager
async def scheduler(target: Target, program: str = "") -> AsyncIterator[None]:
    """Run a scheduler on a server.

    Args:
      program: path of kube-scheduler; "" runs ours.
    """
    if program:
        process = await _reference(target, program)
    else:
        command = [sys.executable, "-m", "bench.scheduler", target.url, str(target.folder)]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.readline()
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def _reference(target: Target, program: str) -> asyncio.subprocess.Process:
    kubeconfig = target.folder / "scheduler.kubeconfig"
    cluster = {"server": target.url, "certificate-authority": str(target.folder / "ca.crt")}
    document = {
        "apiVersion": "v1", "kind": "Config", "current-context": "bench", "clusters": [{"name": "bench", "cluster": cluster}],
        "users": [{"name": "bench", "user": {"token": TOKEN}}], "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
    }  # fmt: skip
    settings = {
        "apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration", "leaderElection": {"leaderElect": False},
        # Upstream's own limit of 50 requests a second would measure nothing but itself.
        "clientConnection": {"kubeconfig": str(kubeconfig), "qps": 5000, "burst": 5000},
    }  # fmt: skip
    kubeconfig.write_text(json.dumps(document))
    config = target.folder / "scheduler.json"
    config.write_text(json.dumps(settings))
    port = free_port()
    with (target.folder / "scheduler.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(program, f"--config={config}", f"--secure-port={port}", "--bind-address=127.0.0.1", stdout=log, stderr=log)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{port}/readyz", context=context, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    deadline = time.monotonic() + _START_SECONDS
    while not await asyncio.to_thread(is_ready):
        if process.returncode is not None or time.monotonic() > deadline:
            raise RuntimeError("the reference's scheduler did not start:\n" + (target.folder / "scheduler.log").read_text()[-2000:])
        await asyncio.sleep(0.1)
    return process
