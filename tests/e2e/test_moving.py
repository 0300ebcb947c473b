"""A machine with a cluster whose ranges are chosen and that has two families; then it gets another address, and another pod network."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knarr.network.announcer import LABEL
from tests import tools
from tests.dockercoins import images
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.machine import FAR, Machine

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SERVE = "import http.server as h, socket; h.HTTPServer.address_family = socket.AF_INET6; h.HTTPServer(('::', 80), h.SimpleHTTPRequestHandler).serve_forever()"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web", "labels": {"app": "web"}},
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "c", "image": "dockercoins/rng:v0.1", "imagePullPolicy": "Never", "command": ["python3", "-c", SERVE]}],
    },
}
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "selector": {"app": "web"}, "ports": [{"port": 80}]},
}
BALANCED = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "balanced"}, "spec": {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": [{"port": 80}]}}
OPTIONS = ["--service-cidr", "10.30.0.0/20,fd30::/112", "--pod-cidr", "10.40.0.0/16,fd40::/56", "--node-port-range", "31000-31099", "--load-balancer-pool", f"{FAR}.100-{FAR}.110", "--announce"]  # fmt: skip
RANGE = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"}, "spec": {"cidrs": ["10.31.0.0/24"]}}


class Moving(Machine):
    """A machine with a cluster of its own."""

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        return self.run(tools.kubectl(), *arguments, check=check)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        manifest = self.cluster.folder / "objects.json"
        manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        self.kubectl("apply", "-f", str(manifest))

    def fetch(self, url: str) -> str:
        """The status of a page that a pod asks for."""
        program = f"import ssl, urllib.request as u; print(u.urlopen('{url}', timeout=3, context=ssl._create_unverified_context()).status)"
        return self.kubectl("exec", "web", "--", "python3", "-c", program, check=False).strip()

    def pids(self) -> dict[str, int]:
        status = json.loads(self.knarr("status", "-o", "json").stdout)
        return {part["name"]: part["pid"] for part in status["supervisor"]["components"]}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    made = Moving("e2emove", Cluster("e2emove", tmp_path_factory.mktemp("moving")))
    try:
        made.start()
        made.knarr("up", *OPTIONS)
        made.knarr("image", "load", str(images.archive()))
        made.apply(POD, SERVICE, BALANCED)
        made.kubectl("wait", "--for=condition=Ready", "pod/web", "--timeout=60s")
        yield made
    finally:
        made.stop()


def test_ranges_two_families_and_further_service_ranges_are_as_asked_for(machine: Moving) -> None:
    addresses = [item["ip"] for item in machine.get("pod", "web")["status"]["podIPs"]]
    assert [address.rpartition(".")[0] or address[:5] for address in addresses] == ["10.40.0", "fd40:"]
    service = machine.get("service", "web")
    first, second = service["spec"]["clusterIPs"]
    assert first.startswith("10.30.")
    assert second.startswith("fd30::")
    assert 31000 <= service["spec"]["ports"][0]["nodePort"] <= 31099
    for url in (f"http://{first}/", f"http://[{second}]/", f"http://[{addresses[1]}]/", "http://web/"):
        wait_for(url, lambda url=url: machine.fetch(url) == "200", 20)
    refused = json.dumps({"spec": {"ports": [{"port": 80, "nodePort": 32000}]}})
    assert "32000" not in machine.kubectl("patch", "service", "web", "--type=merge", "-p", refused, check=False)
    (balancer,) = machine.get("service", "balanced")["status"]["loadBalancer"]["ingress"]
    assert balancer["ip"] == f"{FAR}.100"
    # The router knows nothing of it but what it is told by ARP.
    near = f"import urllib.request as u; print(u.urlopen('http://{balancer['ip']}/', timeout=3).status)"
    wait_for("the announced address from the network", lambda: machine.outside("python3", "-c", near).strip() == "200", 20)
    machine.apply(RANGE)
    machine.kubectl("wait", "--for=condition=Ready", "servicecidr/more", "--timeout=20s")
    further = {**SERVICE, "metadata": {"name": "further"}, "spec": {"selector": {"app": "web"}, "clusterIP": "10.31.0.77", "ports": [{"port": 80}]}}
    machine.apply(further)
    for url in ("http://10.31.0.77/", f"http://{balancer['ip']}/"):
        wait_for(f"{url} from a pod", lambda url=url: machine.fetch(url) == "200", 20)
        own = f"import urllib.request as u; print(u.urlopen('{url}', timeout=3).status)"
        wait_for(f"{url} from the machine", lambda own=own: machine.run("python3", "-c", own, check=False).strip() == "200", 20)


def test_pods_services_and_the_api_follow_the_machines_address(machine: Moving) -> None:
    api = "https://kubernetes.default/readyz"
    wait_for("the API from a pod", lambda: machine.fetch(api) == "200", 20)
    before = machine.pids()
    address = machine.move(77)
    wait_for("the node's new address", lambda: machine.get("nodes")["items"][0]["status"]["addresses"][0]["address"] == address, 20)
    wait_for("the API's new address", lambda: machine.get("endpointslice", "kubernetes")["endpoints"][0]["addresses"] == [address], 20)
    wait_for("the pod's new host address", lambda: machine.get("pod", "web")["status"]["hostIP"] == address, 20)
    wait_for("the API from a pod again", lambda: machine.fetch(api) == "200", 20)
    machine.kubectl("logs", "web")
    port = machine.get("service", "web")["spec"]["ports"][0]["nodePort"]
    ask = f"import urllib.request as u; print(u.urlopen('http://{address}:{port}/', timeout=3).status)"
    # From here, which is another machine to it.
    wait_for("the node port at the new address", lambda: machine.outside("python3", "-c", ask).strip() == "200", 20)
    assert machine.pids() == before
    assert all(status["restartCount"] == 0 for status in machine.get("pod", "web")["status"]["containerStatuses"])


PLUGIN = """#!/bin/sh
# A plugin of specification 1.1 around the distribution's, which knows 1.0 only: it adds what came after.
here=$(dirname "$0"); input=$(cat)
case $CNI_COMMAND in
  STATUS) [ ! -e "$here/broken" ] || { echo '{"cniVersion":"1.1.0","code":50,"msg":"the fabric is down"}'; exit 1; } ;;
  GC) echo "$input" >>"$here/gc" ;;
  *) echo "$input" | sed 's/"cniVersion": *"1.1.0"/"cniVersion":"1.0.0"/g; s/"type": *"wrapped"/"type":"bridge"/' | /usr/lib/cni/bridge | sed 's/"cniVersion": *"1.0.0"/"cniVersion":"1.1.0"/' ;;
esac
"""


def test_a_foreign_configuration_makes_the_network_and_its_status_and_garbage_collection_count(machine: Moving, tmp_path: Path) -> None:
    def ready() -> tuple[str, str]:
        conditions = machine.get("nodes")["items"][0]["status"]["conditions"]
        return next((item["status"], item["message"]) for item in conditions if item["type"] == "Ready")

    (tmp_path / "wrapped").write_text(PLUGIN)
    (tmp_path / "wrapped").chmod(0o755)
    ranges = [[{"subnet": "10.88.0.0/24"}]]
    ipam = {"type": "host-local", "ranges": ranges, "dataDir": str(tmp_path / "leases"), "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "wrapped", "bridge": "knarrtestcni", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam}
    # Nodes look every ten seconds else.
    (tmp_path / "kubelet.yaml").write_text("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nnodeStatusUpdateFrequency: 1s\n")
    assert LABEL in machine.get("nodes")["items"][0]["metadata"]["labels"]
    machine.knarr("down")
    network = ["--pod-network", "cni", "--cni-conf-dir", str(tmp_path / "conf"), "--cni-bin-dir", f"{tmp_path},/usr/lib/cni"]
    assert "wait for a CNI configuration" in machine.knarr("up", "--announce=off", "--kubelet-config", str(tmp_path / "kubelet.yaml"), *network).stderr
    wait_for("a node that waits", lambda: ready()[0] == "False" and "no CNI configuration" in ready()[1], 20)
    # As the manifest of a network does while the node runs.
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "10-test.conflist").write_text(json.dumps({"cniVersion": "1.1.0", "name": "test", "plugins": [bridge]}))
    wait_for("no mark of announcing", lambda: LABEL not in machine.get("nodes")["items"][0]["metadata"]["labels"], 20)
    wait_for("the pod in the other network", lambda: machine.get("pod", "web")["status"].get("podIP", "").startswith("10.88.0."), 30)
    machine.kubectl("wait", "--for=condition=Ready", "pod/web", "--timeout=30s")
    wait_for("a Service over it", lambda: machine.fetch("http://web/") == "200", 20)

    (tmp_path / "broken").touch()
    wait_for("a node that is not ready", lambda: ready()[0] == "False" and "the fabric is down" in ready()[1], 40)
    (tmp_path / "broken").unlink()
    wait_for("a node that is ready again", lambda: ready()[0] == "True", 40)
    (tmp_path / "gc").unlink(missing_ok=True)
    os.kill(next(pid for name, pid in machine.pids().items() if name.endswith("node-1")), signal.SIGKILL)
    wait_for("garbage collection after a kill", lambda: (tmp_path / "gc").exists() and (tmp_path / "gc").read_text().strip(), 20)
    told = json.loads((tmp_path / "gc").read_text().splitlines()[-1])
    leases = [path.read_text().split()[0] for path in (tmp_path / "leases" / "test").iterdir() if path.name.startswith("10.88")]
    assert sorted(item["containerID"] for item in told["cni.dev/valid-attachments"]) == sorted(leases)
    assert len(leases) == 1
    machine.kubectl("delete", "pod", "web", "--wait=true")
    wait_for("no lease", lambda: not [path for path in (tmp_path / "leases" / "test").iterdir() if path.name.startswith("10.88")], 20)
