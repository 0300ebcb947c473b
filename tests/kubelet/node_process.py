"""A node in a process of its own, that can be killed like one: kubelet, runtime and pod network over the folders of a test.

`NodeProcess` is the test's side. It keeps one helper process that has imported everything; each `start` forks a node from it, so
that a hundred starts cost little. A node dies by SIGKILL, from outside or by itself at the n-th step of what it does: nothing of
its code runs afterwards, as after a crash. Steps are the ends of blocking work (files, mounts, groups), the calls of conmon and
runc, of the pod network, and the writes of a pod's status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class NodeProcess:
    """See the module.

    Args:
      settings: folder, data, group, kubeconfig, node_name; bridge and pod_cidr for a network, and options of KubeletConfig.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.pid = 0
        self.died = asyncio.Event()
        self._ready, self._armed = asyncio.Event(), asyncio.Event()
        self._helper: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.said: list[str] = []

    async def start(self) -> None:
        """Start a node and wait until it handles pods."""
        if self._helper is None:
            self._helper = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.kubelet.node_process", cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._reading = asyncio.ensure_future(self._read())
        self.died.clear(), self._ready.clear()
        assert self._helper.stdin is not None
        self._helper.stdin.write(json.dumps(self.settings).encode() + b"\n")
        await self._helper.stdin.drain()
        async with asyncio.timeout(60):
            await self._ready.wait()

    async def arm(self, step: int) -> None:
        """Let the node die at its n-th step from now on; 0: never."""
        (Path(self.settings["folder"]) / "step").write_text(str(step))
        self._armed.clear()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)
        waits = [asyncio.ensure_future(event.wait()) for event in (self.died, self._armed)]
        done, pending = await asyncio.wait(waits, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        assert done, "the node does not answer"

    async def _read(self) -> None:
        assert self._helper is not None
        assert self._helper.stdout is not None
        while line := (await self._helper.stdout.readline()).decode():
            word, _, rest = line.strip().partition(" ")
            self.said.append(line.strip())
            if word == "pid":
                self.pid = int(rest)
            elif word == "ready":
                self._ready.set()
            elif word == "armed":
                self._armed.set()
            elif word == "dead":
                self.pid = 0
                self.died.set()

    async def kill(self) -> None:
        """SIGKILL; returns when the node is gone."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            await asyncio.wait_for(self.died.wait(), 20)

    async def close(self) -> None:
        """End node and helper."""
        await self.kill()
        if self._helper is not None and self._reading is not None:
            assert self._helper.stdin is not None
            self._helper.stdin.close()
            await self._helper.wait()
            await self._reading
            self._helper = None


# The helper's side


def _main() -> None:
    """Fork a node for every line of settings, one at a time, and tell of its end."""
    import knarr.kubelet.kubelet
    import knarr.network.podnet
    import knarr.runtime.embedded  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            settings = json.loads(line)
            asyncio.run(_node(settings))
            os._exit(0)
        _say(f"pid {pid}")
        os.waitpid(pid, 0)
        _say("dead")


def _say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


async def _node(settings: dict[str, Any]) -> None:
    from knarr.client.config import ClientConfig
    from knarr.client.rest import Client
    from knarr.kubelet.config import EvictionConfig, KubeletConfig
    from knarr.kubelet.kubelet import Kubelet
    from knarr.network.podnet import BridgeNetwork
    from knarr.runtime.embedded import EmbeddedRuntime, RuntimeConfig

    folder, data = Path(settings["folder"]), Path(settings["data"])
    network = BridgeNetwork(
        bridge=settings["bridge"], pod_cidrs=[settings["pod_cidr"]], cluster_cidrs=[settings["pod_cidr"]],
        state_dir=folder / "net", table=settings["table"], link_prefix=settings["link_prefix"],
    )  # fmt: skip
    await network.start()
    runtime = EmbeddedRuntime(RuntimeConfig(root=str(data / "root"), state=str(folder / "state"), network=network, cgroup_root=settings["group"]))
    await runtime.start()
    client = Client(ClientConfig.from_kubeconfig(settings["kubeconfig"]))
    config = KubeletConfig(
        node_name=settings["node_name"], root_dir=str(data / "kubelet"), pod_logs_dir=str(folder / "logs"), cgroup_root=settings["group"],
        resolv_conf="/etc/resolv.conf", eviction=EvictionConfig(hard={}), **settings.get("options", {}),
    )  # fmt: skip
    kubelet = Kubelet(client, runtime, runtime, config)
    running = asyncio.ensure_future(kubelet.run())
    ready = asyncio.ensure_future(kubelet.ready.wait())
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    steps = Steps()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: steps.arm(int((folder / "step").read_text()), network))
    _say("ready")
    await running


class Steps:
    """Counts the steps of this process, and ends it at one of them."""

    def __init__(self) -> None:
        self._left, self._lock, self._counting = 0, threading.Lock(), False

    def arm(self, left: int, network: Any) -> None:
        """Die at the n-th step from now on, at 0 never."""
        if not self._counting:
            self._counting = True
            self._count(network)
        with self._lock:
            self._left = left
        _say("armed")

    def step(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _count(self, network: Any) -> None:
        from knarr.client.rest import Client
        from knarr.runtime import sandbox
        from knarr.runtime.conmon import Conmon
        from knarr.runtime.runc import Runc
        from knarr.runtime.workers import Workers

        run, in_thread, to_thread = Workers.run, sandbox.run_in_thread, asyncio.to_thread

        def counted(function: Callable[[], Any]) -> Callable[[], Any]:
            def body() -> Any:
                result = function()
                self.step()
                return result

            return body

        async def counted_run(workers: Any, function: Callable[[], Any]) -> Any:
            return await run(workers, counted(function))

        async def counted_thread(function: Callable[[], Any], name: str) -> Any:
            return await in_thread(counted(function), name)

        async def counted_to_thread(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return await to_thread(counted(lambda: function(*args, **options)))

        Workers.run = counted_run  # type: ignore[method-assign,assignment]
        sandbox.run_in_thread = counted_thread  # type: ignore[assignment]
        asyncio.to_thread = counted_to_thread
        calls = ((Conmon, "create"), (Runc, "start"), (Client, "patch"), (Client, "delete"), (type(network), "setup"), (type(network), "teardown"))
        for owner, name in calls:
            setattr(owner, name, _around(getattr(owner, name), self.step))


def _around(method: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    async def call(*args: Any, **options: Any) -> Any:
        step()
        result = await method(*args, **options)
        step()
        return result

    return call


if __name__ == "__main__":
    _main()
