"""Nodes that go down and come back, each in its way: in order, as if the power had failed, and behind a cut cable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster, wait_for
from tests.host_state import HostState
from tests.images import build

pytestmark = pytest.mark.root

NAME = "e2enodes"
FIRST, SECOND, THIRD = (f"{NAME}-node-{number}" for number in (1, 2, 3))
SETTINGS = """
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
nodeLeaseDurationSeconds: 4
nodeStatusUpdateFrequency: 1s
shutdownGracePeriod: 6s
shutdownGracePeriodCriticalPods: 3s
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(NAME, tmp_path_factory.mktemp(NAME))
    made.knarr("delete", check=False)
    before = HostState.take()
    (made.folder / "kubelet.yaml").write_text(SETTINGS)
    made.up(
        "--nodes", "3", "--kubelet-config", str(made.folder / "kubelet.yaml"),
        "--controller-manager-arg", "node-monitor-grace-period=4s", "--controller-manager-arg", "node-monitor-period=1s",
    )  # fmt: skip
    made.knarr("image", "load", str(build.busybox()))
    yield made
    made.delete()
    left = HostState.take().difference(before)
    assert {key: [line for line in lines if NAME in line] for key, lines in left.items() if any(NAME in line for line in lines)} == {}


def ready(cluster: Cluster, node: str) -> str:
    return str(next(c["status"] for c in cluster.get("node", node)["status"]["conditions"] if c["type"] == "Ready"))


def run(cluster: Cluster, name: str, node: str, script: str, *, seconds: int = 0, priority: str = "") -> None:
    """A pod on a node that is evicted `seconds` after the node is gone."""
    gone = [{"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds} for key in ("not-ready", "unreachable")]
    container = {"name": "c", "image": "busybox", "imagePullPolicy": "Never", "command": ["sh", "-c", script]}
    spec = {"nodeName": node, "containers": [container], "tolerations": gone, "terminationGracePeriodSeconds": 30}
    if priority:
        spec["priorityClassName"] = priority
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "kube-system"}, "spec": spec}))


def forget(cluster: Cluster, *names: str) -> None:
    cluster.kubectl("delete", "pod", "-n", "kube-system", "--force", "--grace-period=0", "--ignore-not-found", *names)


ENDING = "trap 'sleep {seconds}; exit 0' TERM; while :; do sleep 1; done"
FOREVER = "sleep 100000"


def test_a_pod_on_the_hosts_network_shows_the_nodes_name_as_host_name(nodes: Cluster) -> None:
    names = {f"name-{node}": node for node in (FIRST, SECOND)}
    for name, node in names.items():
        container = {"name": "c", "image": "busybox", "imagePullPolicy": "Never", "command": ["hostname"]}
        spec = {"nodeName": node, "hostNetwork": True, "restartPolicy": "Never", "containers": [container], "tolerations": [{"operator": "Exists"}]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "kube-system"}, "spec": spec}
        nodes.kubectl("apply", "-f", "-", stdin=json.dumps(body))
    for name, node in names.items():
        nodes.kubectl("wait", "-n", "kube-system", f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
        assert nodes.kubectl("logs", "-n", "kube-system", name).strip() == node
    forget(nodes, *names)


def test_a_node_that_is_stopped_ends_its_pods_in_order_and_says_so(nodes: Cluster) -> None:
    run(nodes, "plain", SECOND, ENDING.format(seconds=1), seconds=600)
    run(nodes, "critical", SECOND, ENDING.format(seconds=0), seconds=600, priority="system-cluster-critical")
    nodes.kubectl("wait", "-n", "kube-system", "--for=condition=Ready", "pod/plain", "pod/critical", "--timeout=60s")
    start = time.monotonic()
    nodes.knarr("node", "stop", SECOND)
    assert time.monotonic() - start < 25
    ends = {}
    for name in ("plain", "critical"):
        status = nodes.get("pod", name, "-n", "kube-system")["status"]
        assert (status["phase"], status["reason"]) == ("Failed", "Terminated")
        assert any(c["type"] == "DisruptionTarget" and c["reason"] == "TerminationByKubelet" for c in status["conditions"])
        ended = status["containerStatuses"][0]["state"]["terminated"]
        assert ended["exitCode"] == 0
        ends[name] = ended["finishedAt"]
    assert ends["plain"] <= ends["critical"]
    assert ready(nodes, SECOND) != "True"
    nodes.knarr("node", "start", SECOND)
    wait_for("the node to be Ready again", lambda: ready(nodes, SECOND) == "True")
    forget(nodes, "plain", "critical")


def test_nodes_that_are_killed_are_found_out_their_pods_evicted_and_they_come_back(nodes: Cluster) -> None:
    run(nodes, "evicted", SECOND, FOREVER)
    run(nodes, "kept", THIRD, FOREVER, seconds=600)
    nodes.kubectl("wait", "-n", "kube-system", "--for=condition=Ready", "pod/evicted", "pod/kept", "--timeout=60s")
    for node in (SECOND, THIRD):
        nodes.knarr("node", "kill", node)
    for node in (SECOND, THIRD):
        wait_for("the node to be missed", lambda node=node: ready(nodes, node) == "Unknown")
        wait_for("the taint", lambda node=node: "node.kubernetes.io/unreachable" in json.dumps(nodes.get("node", node)["spec"]))
    assert ready(nodes, FIRST) == "True"
    wait_for("the eviction", lambda: "deletionTimestamp" in nodes.get("pod", "evicted", "-n", "kube-system")["metadata"])
    assert "deletionTimestamp" not in nodes.get("pod", "kept", "-n", "kube-system")["metadata"]
    for node in (SECOND, THIRD):
        nodes.knarr("node", "start", node)
    for node in (SECOND, THIRD):
        wait_for("the node to be Ready again", lambda node=node: ready(nodes, node) == "True")
        wait_for("the taint to go", lambda node=node: "unreachable" not in json.dumps(nodes.get("node", node)["spec"]))
    wait_for("the evicted pod to go", lambda: "evicted" not in nodes.kubectl("get", "pods", "-n", "kube-system"))
    wait_for("the kept pod to run again", lambda: nodes.get("pod", "kept", "-n", "kube-system")["status"]["containerStatuses"][0]["restartCount"] == 1)
    forget(nodes, "kept")


def test_nodes_behind_cut_cables_go_on_and_are_taken_back(nodes: Cluster) -> None:
    known = {n["name"]: n["netns"] for n in json.loads(nodes.knarr("status", "-o", "json").stdout)["nodes"]}
    cables = [["ip", "link", "set", machine_end(known[node])] for node in (SECOND, THIRD)]
    lonely = {node: f"lonely-{node}" for node in (SECOND, THIRD)}
    for node, name in lonely.items():
        run(nodes, name, node, FOREVER, seconds=600)
    nodes.kubectl("wait", "-n", "kube-system", "--for=condition=Ready", *(f"pod/{name}" for name in lonely.values()), "--timeout=60s")
    before = {name: nodes.get("pod", name, "-n", "kube-system")["status"]["containerStatuses"][0]["containerID"] for name in lonely.values()}
    for cable in cables:
        subprocess.run([*cable, "down"], check=True)
    try:
        for node in lonely:
            wait_for("the node to be missed", lambda node=node: ready(nodes, node) == "Unknown")
    finally:
        for cable in cables:
            subprocess.run([*cable, "up"], check=True)
    for node, name in lonely.items():
        wait_for("the node to be Ready again", lambda node=node: ready(nodes, node) == "True")
        after = nodes.get("pod", name, "-n", "kube-system")["status"]["containerStatuses"][0]
        assert (after["containerID"], after["restartCount"]) == (before[name], 0)
    forget(nodes, *lonely.values())


def test_a_machine_that_goes_down_ends_the_pods_of_all_its_nodes_in_order_and_comes_back(nodes: Cluster) -> None:
    for node in (FIRST, THIRD):
        run(nodes, f"plain-{node}", node, ENDING.format(seconds=1), seconds=600)
        run(nodes, f"critical-{node}", node, ENDING.format(seconds=0), seconds=600, priority="system-node-critical")
    names = [f"{kind}-{node}" for node in (FIRST, THIRD) for kind in ("plain", "critical")]
    nodes.kubectl("wait", "-n", "kube-system", "--for=condition=Ready", *(f"pod/{name}" for name in names), "--timeout=60s")
    supervisor = int(json.loads(nodes.knarr("status", "-o", "json").stdout)["supervisor"]["pid"])
    # As the init system does when the machine is switched off.
    os.kill(supervisor, signal.SIGTERM)
    wait_for("the supervisor to end", lambda: not os.path.exists(f"/proc/{supervisor}"))
    nodes.up()
    ends = {}
    for name in names:
        status = nodes.get("pod", name, "-n", "kube-system")["status"]
        assert (status["phase"], status["reason"]) == ("Failed", "Terminated"), name
        ended = status["containerStatuses"][0]["state"]["terminated"]
        assert ended["exitCode"] == 0
        ends[name] = ended["finishedAt"]
    for node in (FIRST, THIRD):
        assert ends[f"plain-{node}"] <= ends[f"critical-{node}"]
        wait_for("the node to be Ready again", lambda node=node: ready(nodes, node) == "True")
    forget(nodes, *names)


def machine_end(netns: str) -> str:
    """The end of a node's cable that is on this machine."""
    own = json.loads(subprocess.run(["ip", "-n", netns, "-j", "link", "show", "eth0"], check=True, capture_output=True, text=True).stdout)
    links = json.loads(subprocess.run(["ip", "-j", "link"], check=True, capture_output=True, text=True).stdout)
    return str(next(link["ifname"] for link in links if link["ifindex"] == own[0]["link_index"]))
