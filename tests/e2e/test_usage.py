"""`kubectl top` with nothing installed."""

from __future__ import annotations

import json

import pytest

from tests.e2e.cluster import Cluster, wait_for

pytestmark = pytest.mark.root


def test_kubectl_top_shows_nodes_and_pods(cluster: Cluster) -> None:
    # An unlikely program: it counts forever, which is a whole core when there is one to be had.
    cluster.kubectl(
        "run", "busy", "--image=dockercoins/rng:v0.1", "--image-pull-policy=Never", "--restart=Never", "--overrides",
        json.dumps({"spec": {"terminationGracePeriodSeconds": 0}}), "--command", "--", "python3", "-c", "while True: pass",
    )  # fmt: skip
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "pod/busy", "--timeout=60s")
        line = wait_for("the pod's usage", lambda: cluster.kubectl("top", "pod", "busy", "--no-headers", check=False).split())
        assert line[0] == "busy"
        assert int(line[1].removesuffix("m")) > 20
        node = cluster.kubectl("top", "node", "--no-headers").split()
        assert int(node[1].removesuffix("m")) > 0
        assert node[2].endswith("%")
        containers = json.loads(cluster.kubectl("get", "--raw", "/apis/metrics.k8s.io/v1beta1/namespaces/default/pods/busy"))
        assert containers["kind"] == "PodMetrics"
        assert [c["name"] for c in containers["containers"]] == ["busy"]
        assert "NAME" in cluster.kubectl("get", "nodes.metrics.k8s.io")
    finally:
        cluster.kubectl("delete", "pod", "busy", "--force", "--grace-period=0", "--ignore-not-found")
