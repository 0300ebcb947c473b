"""The supervisor with real processes: it is run in a child, because it forks and owns signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knarr.cluster import config as cluster_config
from knarr.cluster import supervisor
from knarr.cluster.config import ClusterConfig
from tests.e2e.cluster import wait_for


def sleeper(announce: Callable[[str], None]) -> None:
    announce("up")
    signal.pause()


def crasher(announce: Callable[[str], None]) -> None:
    raise SystemExit(3)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterConfig]:
    monkeypatch.setattr(cluster_config, "STATE_ROOT", tmp_path / "state")
    monkeypatch.setattr(cluster_config, "DATA_ROOT", tmp_path / "root")
    config = cluster_config.new_cluster("default", str(tmp_path / "data"))
    config.logs.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        boss = supervisor.Supervisor(config)
        boss.add("sleeper", sleeper)
        boss.add("crasher", crasher)
        boss.run()
        os._exit(0)
    wait_for("the control socket", lambda: status(config))
    yield config
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0
    assert not (config.state / "control.sock").exists()


def status(config: ClusterConfig) -> dict[str, Any]:
    answer = supervisor.ask(config, "status")
    return {part["name"]: part for part in answer["components"]}


def test_a_killed_component_is_started_again_and_status_says_so(running: ClusterConfig) -> None:
    wait_for("readiness", lambda: status(running)["sleeper"]["ready"] == ["up"])
    first = status(running)["sleeper"]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for("a new process", lambda: status(running)["sleeper"]["pid"] not in (0, first))
    part = status(running)["sleeper"]
    assert (part["restarts"], part["lastExit"]) == (1, "signal SIGKILL")


def test_a_component_that_keeps_dying_waits_longer_each_time(running: ClusterConfig) -> None:
    wait_for("three restarts", lambda: status(running)["crasher"]["restarts"] >= 3)
    assert status(running)["crasher"]["lastExit"] == "exit code 3"
    start = time.monotonic()
    wait_for("a fourth", lambda: status(running)["crasher"]["restarts"] >= 4)
    assert time.monotonic() - start > 2 * supervisor.RESTART_FIRST_SECONDS


def test_an_unknown_request_is_refused_and_the_supervisor_lives(running: ClusterConfig) -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        supervisor.ask(running, "dance")
    assert status(running)
