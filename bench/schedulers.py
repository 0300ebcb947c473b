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
from contextlib import asynccontextmanager, suppress

from bench import machine
from bench.servers import TOKEN, Target, free_port

_START_SECONDS = 60.0


class Counts:
    """What a scheduler of ours tells of bound pods."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process
        self._seen: list[tuple[float, dict[str, int]]] = []

    async def _line(self) -> None:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the scheduler has ended")
        moment, bound = json.loads(line)
        self._seen.append((moment, bound))

    async def until(self, namespace: str, number: int, limit_seconds: float) -> list[tuple[float, int]]:
        """Wait until so many pods of a namespace are bound; gives (time, number bound so far) over that time."""
        async with asyncio.timeout(limit_seconds):
            while not self._seen or self._seen[-1][1].get(namespace, 0) < number:
                await self._line()
        return [(moment, bound[namespace]) for moment, bound in self._seen if namespace in bound]

    async def follow(self) -> None:
        """Take what it tells, so that it never waits for a reader. Ends with the scheduler."""
        with suppress(RuntimeError):
            while True:
                await self._line()

    async def quiet(self) -> None:
        """Wait until the scheduler has told all events and uses next to no CPU."""
        used = machine.cpu_seconds([self.pid])
        while True:
            await asyncio.sleep(0.5)
            now = machine.cpu_seconds([self.pid])
            if now - used < 0.05:
                return
            used = now


@asynccontextmanager
async def counting_scheduler(target: Target) -> AsyncIterator[Counts]:
    """Run our scheduler, which tells how many pods it has seen bound."""
    process = await _ours(target)
    try:
        yield Counts(process)
    finally:
        process.terminate()
        await process.wait()


async def _ours(target: Target) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "bench.scheduler", target.url, str(target.folder)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    return process


@asynccontextmanager
async def scheduler(target: Target, program: str = "") -> AsyncIterator[None]:
    """Run a scheduler on a server.

    Args:
      program: path of kube-scheduler; "" runs ours.
    """
    if not program:
        async with counting_scheduler(target) as counts:
            reader = asyncio.create_task(counts.follow())
            try:
                yield
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
        return
    process = await _reference(target, program)
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
