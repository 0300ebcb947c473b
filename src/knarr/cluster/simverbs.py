"""`knarr simulate nodes=1000 pods=5000 stages=FILE`: nodes and pods without machines and containers, beside the real ones.

What is declared is kept in the data folder (simulation.json, stages.yaml), so that the next `knarr up` simulates it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knarr.cluster import supervisor
from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError, admin_client, is_running, need_control_plane
from knarr.cluster.progress import Progress

MOST_NODES = 10_000
WAIT_SECONDS = 600.0


@dataclass(slots=True)
class Simulation:
    """What a cluster simulates."""

    nodes: int = 0
    pods: int = 0
    tainted: bool = True


def _file(config: ClusterConfig) -> Path:
    return config.data / "simulation.json"


def _stages_file(config: ClusterConfig) -> Path:
    return config.data / "stages.yaml"


def load(config: ClusterConfig) -> Simulation:
    try:
        return Simulation(**json.loads(_file(config).read_text()))
    except FileNotFoundError:
        return Simulation()


def stages_text(config: ClusterConfig) -> str:
    """The stages that a file has declared; "" means the built-in ones."""
    try:
        return _stages_file(config).read_text()
    except FileNotFoundError:
        return ""


def simulate(config: ClusterConfig, settings: Sequence[str], *, tainted: bool | None, progress: Progress) -> int:
    """Change what is simulated and wait until it is there; without settings, say what is."""
    need_control_plane(config)
    wanted = load(config)
    if not settings and tainted is None:
        print(f"nodes={wanted.nodes} pods={wanted.pods} stages={_stages_file(config) if stages_text(config) else 'built-in'}")
        return 0
    if not is_running(config):
        raise CommandError(f"cluster {config.name!r} is not running; `knarr up` starts it")
    for setting in settings:
        _apply(config, wanted, setting)
    if tainted is not None:
        wanted.tainted = tainted
    if wanted.pods and not wanted.nodes:
        raise CommandError("simulated pods need simulated nodes: knarr simulate nodes=10 pods=100")
    _file(config).write_text(json.dumps(dataclasses.asdict(wanted)))
    began = time.monotonic()
    supervisor.ask(config, "simulate")
    asyncio.run(converge(config, wanted, progress))
    if not wanted.nodes:
        with contextlib.suppress(RuntimeError):
            supervisor.ask(config, "forget", component="simulator")
        _file(config).unlink(missing_ok=True)
    progress.done(f"{wanted.nodes} simulated nodes, {wanted.pods} simulated pods ({time.monotonic() - began:.1f} s)")
    return 0


def _apply(config: ClusterConfig, wanted: Simulation, setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or name not in ("nodes", "pods", "stages"):
        raise CommandError(f"{setting!r}: expected nodes=NUMBER, pods=NUMBER or stages=FILE")
    if name == "stages":
        _take_stages(config, value)
        return
    if not value.isdigit() or (name == "nodes" and int(value) > MOST_NODES):
        raise CommandError(f"{setting!r}: expected a number" + (f" up to {MOST_NODES}" if name == "nodes" else ""))
    setattr(wanted, name, int(value))


def _take_stages(config: ClusterConfig, path: str) -> None:
    """Check a file of stages and keep a copy; an empty path goes back to the built-in ones."""
    from knarr.simulate import stages

    if not path:
        _stages_file(config).unlink(missing_ok=True)
        return
    try:
        text = Path(path).read_text()
        stages.read(text)
    except (OSError, stages.BadStage) as error:
        raise CommandError(f"{path}: {error}") from error
    _stages_file(config).write_text(text)


async def converge(config: ClusterConfig, wanted: Simulation, progress: Progress) -> None:
    """Wait for the nodes, declare the pods, and wait for those to be ready unless a file says what becomes of them.

    Raises:
      CommandError: nothing has come nearer for WAIT_SECONDS.
    """
    from knarr.api.resources import NODES
    from knarr.simulate import nodes, workload

    client = admin_client(config)

    async def count_nodes() -> int:
        return len((await client.list(NODES, label_selector=f"{nodes.LABEL}=true"))["items"])

    try:
        if not wanted.pods:
            await workload.ensure(client, 0)
        await _until("simulated nodes", count_nodes, wanted.nodes, progress)
        if wanted.pods:
            await workload.ensure(client, wanted.pods)
            if stages_text(config):
                # Its stages may let pods wait or break for ever: nothing tells when all is as it should be.
                return
            await _until("simulated pods", lambda: workload.ready_pods(client), wanted.pods, progress)
    finally:
        await client.close()


async def _until(what: str, count: Callable[[], Awaitable[int]], wanted: int, progress: Progress) -> None:
    deadline, closest = 0.0, -1
    while (found := await count()) != wanted:
        progress.step(f"{what}: {found} of {wanted}")
        if closest < 0 or abs(found - wanted) < closest:
            closest, deadline = abs(found - wanted), time.monotonic() + WAIT_SECONDS
        if time.monotonic() > deadline:
            raise CommandError(f"{what}: {found} of {wanted}, and no nearer for {WAIT_SECONDS:.0f} s; read `knarr logs simulator`")
        await asyncio.sleep(0.5)
