"""Another machine joins the cluster, carries pods, is cut off and comes back, and leaves."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from tests.dockercoins import images
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.machine import Machine

pytestmark = pytest.mark.root

NODE = "far-node"
SERVE = "import http.server as h; h.HTTPServer(('', 80), h.SimpleHTTPRequestHandler).serve_forever()"


@pytest.fixture(scope="module")
def machine(cluster: Cluster) -> Iterator[Machine]:
    made = Machine("e2efar", cluster)
    made.start()
    verb, *arguments = shlex.split(cluster.knarr("token", "create").stdout)[1:]
    made.knarr(verb, *arguments, "--node-name", NODE)
    made.knarr("image", "load", str(images.archive()))
    yield made
    made.stop()


def pod(name: str, node: str) -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: dockercoins/rng:v0.1
    imagePullPolicy: Never
    command: [python3, -c, "{SERVE}"]
    readinessProbe: {{tcpSocket: {{port: 80}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {name}}}, ports: [{{port: 80}}]}}
---
"""


def ready(cluster: Cluster) -> str:
    return next(c["status"] for c in cluster.get("node", NODE)["status"]["conditions"] if c["type"] == "Ready")


def fetch(cluster: Cluster, source: str, target: str) -> str:
    program = f"import urllib.request as u; print(u.urlopen('http://{target}/', timeout=5).status)"
    return cluster.kubectl("exec", source, "--", "python3", "-c", program, check=False).strip()


def test_pods_of_both_machines_reach_each_other_directly_and_by_service(cluster: Cluster, machine: Machine) -> None:
    own = cluster.get("nodes")["items"]
    assert next(n for n in own if n["metadata"]["name"] == NODE)["status"]["addresses"][0]["address"] == machine.address
    here = next(n["metadata"]["name"] for n in own if n["metadata"]["name"] != NODE)
    cluster.kubectl("apply", "-f", "-", stdin=pod("far", NODE) + pod("near", here))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/far", "pod/near", "--timeout=60s")
    address = cluster.get("pod", "far")["status"]["podIP"]
    assert fetch(cluster, "near", address) == "200"
    assert fetch(cluster, "near", "far") == "200"
    assert fetch(cluster, "far", "near") == "200"
    cluster.kubectl("logs", "far")
    requests = cluster.get("csr")["items"]
    assert all(item["status"].get("certificate") for item in requests)
    assert {item["spec"]["signerName"] for item in requests} >= {"kubernetes.io/kube-apiserver-client-kubelet", "kubernetes.io/kubelet-serving"}


def test_a_machine_that_left_is_gone_and_the_token_ends(cluster: Cluster, machine: Machine) -> None:
    cluster.knarr("node", "rm", NODE)
    assert NODE not in cluster.kubectl("get", "nodes")
    machine.knarr("down")
    for name in ("far", "near"):
        cluster.kubectl("delete", "pod,service", name, "--force", "--grace-period=0", "--wait=false")
    cluster.kubectl("delete", "csr", "--all")
    wait_for("the pods to go", lambda: "far" not in cluster.kubectl("get", "pods"))
