"""The application that somebody else wrote: five Deployments, applied unmodified with the real kubectl."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, wait_for

MANIFEST = Path(__file__).parent.parent / "dockercoins" / "dockercoins.yaml"
NAMES = ("hasher", "redis", "rng", "webui", "worker")

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def application(cluster: Cluster) -> Iterator[Cluster]:
    cluster.kubectl("apply", "-f", str(MANIFEST))
    for name in NAMES:
        cluster.kubectl("wait", "--for=condition=Available", f"deployment/{name}", "--timeout=60s")
    yield cluster
    cluster.kubectl("delete", "-f", str(MANIFEST), "--ignore-not-found", "--wait=true")


def page(cluster: Cluster, path: str = "/json") -> str:
    port = cluster.get("service", "webui")["spec"]["ports"][0]["nodePort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def hashes(cluster: Cluster) -> int:
    return int(json.loads(page(cluster))["hashes"])


def rate(cluster: Cluster, seconds: float) -> float:
    first, start = hashes(cluster), time.monotonic()
    time.sleep(seconds)
    return (hashes(cluster) - first) / (time.monotonic() - start)


def rises(cluster: Cluster) -> bool:
    # Right after a node process was killed its DNS is away for a moment, and the page says so.
    first = wait_for("an answer of the page", lambda: hashes(cluster) + 1) - 1
    return bool(wait_for("the counter to rise", lambda: hashes(cluster) > first + 5, 60))


def test_the_counter_rises_and_the_page_answers_on_the_node_port(application: Cluster) -> None:
    assert wait_for("the page", lambda: "DockerCoins" in page(application, "/"))
    assert rises(application)


def test_three_workers_raise_the_rate(application: Cluster) -> None:
    rises(application)
    one = rate(application, 4)
    application.kubectl("scale", "deployment", "worker", "--replicas=3")
    application.kubectl("rollout", "status", "deployment/worker", "--timeout=60s")
    three = wait_for("a higher rate", lambda: (now := rate(application, 4)) > 1.8 * one and now, 40)
    assert three > 1.8 * one
    application.kubectl("scale", "deployment", "worker", "--replicas=1")


def test_a_killed_container_is_started_again(application: Cluster) -> None:
    def restarts() -> int:
        pods = application.get("pods", "-l", "app=rng")["items"]
        return int(sum(status["restartCount"] for pod in pods for status in pod["status"].get("containerStatuses", ())))

    before = restarts()
    # The init of a PID namespace ignores even KILL from inside, so the program is asked to end, which python does on INT.
    application.kubectl("exec", "deployment/rng", "--", "python3", "-c", "import os; os.kill(1, 2)")
    wait_for("a restart", lambda: restarts() > before)
    assert rises(application)


def test_a_deleted_pod_is_replaced(application: Cluster) -> None:
    old = application.get("pods", "-l", "app=hasher")["items"][0]["metadata"]["name"]
    application.kubectl("delete", "pod", old)
    wait_for("another pod", lambda: [pod for pod in application.get("pods", "-l", "app=hasher")["items"] if pod["metadata"]["name"] != old])
    application.kubectl("wait", "--for=condition=Available", "deployment/hasher", "--timeout=60s")
    assert rises(application)


@pytest.mark.parametrize("component", ["apiserver", "control", "e2e-node-1"])
def test_kill_of_a_component_is_survived(application: Cluster, component: str) -> None:
    pods = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["containerID"] for pod in application.get("pods")["items"]}
    pid = application.component_pid(component)
    os.kill(pid, signal.SIGKILL)
    wait_for("a new process", lambda: application.component_pid(component) not in (0, pid))
    assert rises(application)
    application.kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s")
    # The component works again: a change needs all of them.
    application.kubectl("scale", "deployment", "rng", "--replicas=2")
    application.kubectl("wait", "--for=jsonpath={.status.readyReplicas}=2", "deployment/rng", "--timeout=60s")
    application.kubectl("scale", "deployment", "rng", "--replicas=1")
    now = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["containerID"] for pod in application.get("pods")["items"]}
    assert {name: now[name] for name in pods if name in now} == {name: pods[name] for name in pods if name in now}, "a container was made anew"


def test_delete_leaves_nothing_of_it(cluster: Cluster) -> None:
    cluster.kubectl("apply", "-n", "default", "-f", str(MANIFEST))
    cluster.kubectl("delete", "-n", "default", "-f", str(MANIFEST))
    wait_for("an empty namespace", lambda: not [item for kind in ("deployments", "replicasets", "pods", "endpointslices") for item in cluster.get(kind)["items"] if item["metadata"]["name"] != "kubernetes"])
