"""A machine with a whole cluster gets another address: everything goes on, and nothing is restarted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tools
from tests.dockercoins import images
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SERVE = "import http.server as h; h.HTTPServer(('', 80), h.SimpleHTTPRequestHandler).serve_forever()"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web", "labels": {"app": "web"}},
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "c", "image": "dockercoins/rng:v0.1", "imagePullPolicy": "Never", "command": ["python3", "-c", SERVE]}],
    },
}
SERVICE = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80}]}}
ASK_API = "import ssl, urllib.request as u; print(u.urlopen('https://kubernetes.default/readyz', timeout=3, context=ssl._create_unverified_context()).status)"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine("e2emove", Cluster("e2emove", tmp_path))
    made.start()
    yield made
    made.stop()


def pids(machine: Machine) -> dict[str, int]:
    status = json.loads(machine.knarr("status", "-o", "json").stdout)
    return {part["name"]: part["pid"] for part in status["supervisor"]["components"]}


def test_pods_services_and_the_api_follow_the_machines_address(machine: Machine) -> None:
    machine.knarr("up")
    machine.knarr("image", "load", str(images.archive()))

    def kubectl(*arguments: str, check: bool = True) -> str:
        return machine.run(tools.kubectl(), *arguments, check=check)

    def get(*arguments: str) -> Any:
        return json.loads(kubectl("get", *arguments, "-o", "json"))

    manifest = machine.cluster.folder / "objects.json"
    manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [POD, SERVICE]}))
    kubectl("apply", "-f", str(manifest))
    kubectl("wait", "--for=condition=Ready", "pod/web", "--timeout=60s")
    inside = ("exec", "web", "--", "python3", "-c", ASK_API)
    wait_for("the API from a pod", lambda: kubectl(*inside, check=False).strip() == "200", 20)
    before = pids(machine)
    address = machine.move(77)
    wait_for("the node's new address", lambda: get("nodes")["items"][0]["status"]["addresses"][0]["address"] == address, 20)
    wait_for("the API's new address", lambda: get("endpointslice", "kubernetes")["endpoints"][0]["addresses"] == [address], 20)
    wait_for("the pod's new host address", lambda: get("pod", "web")["status"]["hostIP"] == address, 20)
    wait_for("the API from a pod again", lambda: kubectl(*inside, check=False).strip() == "200", 20)
    kubectl("logs", "web")
    port = get("service", "web")["spec"]["ports"][0]["nodePort"]
    fetch = f"import urllib.request as u; print(u.urlopen('http://{address}:{port}/', timeout=3).status)"
    # From here, which is another machine to it.
    wait_for("the node port at the new address", lambda: machine.outside("python3", "-c", fetch).strip() == "200", 20)
    assert pids(machine) == before
    assert all(status["restartCount"] == 0 for status in get("pod", "web")["status"]["containerStatuses"])
