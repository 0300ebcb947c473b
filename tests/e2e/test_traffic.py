"""Traffic that nobody may notice: a rolling update under steady load, through a Service, a node port and an Ingress."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

LIMIT_SECONDS = 100
PROGRAM = (Path(__file__).parent / "web.py").read_text()


def objects() -> list[dict[str, Any]]:
    """A web server with the usual readiness probe and preStop, a Service with a node port, an Ingress."""
    container = {
        "name": "web",
        "image": "dockercoins/rng:v0.1",
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", PROGRAM],
        "ports": [{"containerPort": 80}],
        "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 1},
        "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
    }
    labels = {"app": "traffic"}
    template = {"metadata": {"labels": labels}, "spec": {"terminationGracePeriodSeconds": 10, "containers": [container]}}
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    backend = {"service": {"name": "traffic", "port": {"number": 80}}}
    rule = {"host": "traffic.test", "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    meta = {"name": "traffic", "namespace": "default"}
    deployment = {"replicas": 3, "selector": {"matchLabels": labels}, "strategy": strategy, "template": template}
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": deployment},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"type": "NodePort", "selector": labels, "ports": [{"port": 80}]}},
        {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": meta, "spec": {"ingressClassName": "knarr", "rules": [rule]}},
    ]


@pytest.fixture
def traffic(cluster: Cluster) -> Iterator[Cluster]:
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects()})
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    cluster.kubectl("rollout", "status", "deployment/traffic", "--timeout=60s")
    yield cluster
    cluster.kubectl("delete", "-f", "-", "--wait=true", stdin=manifest)


def ways(cluster: Cluster) -> dict[tuple[str, bool], str]:
    """URL by name of way and whether connections are kept."""
    spec = cluster.get("service", "traffic")["spec"]
    slot = json.loads(Path(f"/var/lib/knarr/{cluster.name}/cluster.json").read_text())["slot"]
    ingress = f"http://127.0.0.1:{8000 + slot if slot else 80}/"
    return {
        ("service", True): f"http://{spec['clusterIP']}/",
        ("node port", False): f"http://127.0.0.1:{spec['ports'][0]['nodePort']}/",
        ("ingress", True): ingress,
        ("ingress", False): ingress,
    }


def load(url: str, *, keep: bool) -> subprocess.Popen[str]:
    header = [] if keep else ["-H", "Connection: close"]
    command = ["nice", "wrk", "-t1", "-c2", f"-d{LIMIT_SECONDS}s", "--timeout", "8s", "-H", "Host: traffic.test", *header, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_no_request_fails_while_a_deployment_rolls(traffic: Cluster) -> None:
    urls = ways(traffic)

    def routed() -> bool:
        command = ["wrk", "-t1", "-c1", "-d1s", "-H", "Host: traffic.test", urls["ingress", True]]
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
        return "requests in" in output and "Non-2xx" not in output

    wait_for("the ingress", routed)
    before = {pod["metadata"]["name"] for pod in traffic.get("pods", "-l", "app=traffic")["items"]}
    loads = {(way, keep): load(url, keep=keep) for (way, keep), url in urls.items()}
    try:
        traffic.kubectl("rollout", "restart", "deployment/traffic")
        traffic.kubectl("rollout", "status", "deployment/traffic", "--timeout=90s")
        # Asked to stop, wrk tells what it has seen.
        for process in loads.values():
            process.send_signal(signal.SIGINT)
        outputs = {name: process.communicate(timeout=60)[0] for name, process in loads.items()}
    finally:
        for process in loads.values():
            process.kill()
            process.wait()
    after = {pod["metadata"]["name"] for pod in traffic.get("pods", "-l", "app=traffic")["items"] if not pod["metadata"].get("deletionTimestamp")}
    assert not before & after
    for name, output in outputs.items():
        done = re.search(r"(\d+) requests in", output)
        assert done is not None, (name, output)
        assert int(done[1]) > 50, (name, output)
        assert "Socket errors" not in output, (name, output)
        assert "Non-2xx" not in output, (name, output)
