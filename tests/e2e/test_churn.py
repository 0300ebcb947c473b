"""Service churn under kills: the process with kubelet, proxy and DNS dies by SIGKILL while Services change; afterwards all is as declared."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knarr.network.dns.wire import A, build_query, read_addresses
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

ROUNDS, COUNT, SOURCE_PORT = 2, 8, 24_700
SERVER = """import os, socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 5000))
while True:
    data, peer = sock.recvfrom(100)
    sock.sendto(os.environ["APP"].encode(), peer)
"""


def pod(app: str) -> dict[str, Any]:
    container = {
        "name": "c",
        "image": "dockercoins/rng:v0.1",
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", SERVER],
        "env": [{"name": "APP", "value": app}],
    }
    meta = {"name": f"churn-{app}", "namespace": "default", "labels": {"churn": app}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]}}


def service(name: str, app: str) -> dict[str, Any]:
    ports = [{"port": 53, "targetPort": 5000, "protocol": "UDP"}]
    meta = {"name": name, "namespace": "default", "labels": {"test": "churn"}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": {"churn": app}, "ports": ports}}


def apply(cluster: Cluster, objects: list[dict[str, Any]]) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


@pytest.fixture
def pods(cluster: Cluster) -> Iterator[Cluster]:
    apply(cluster, [pod("a"), pod("b")])
    cluster.kubectl("wait", "--for=condition=Ready", "pod/churn-a", "pod/churn-b", "--timeout=60s")
    yield cluster
    cluster.kubectl("delete", "services", "-l", "test=churn")
    cluster.kubectl("delete", "pods", "-l", "churn", "--wait=true")


def ask(address: str, source_port: int) -> str:
    """Who answers a datagram; always from the same port, so that a remembered connection would show."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.bind(("0.0.0.0", source_port))
        sock.connect((address, 53))
        sock.send(b"?")
        return sock.recv(100).decode()


def resolve(dns: str, name: str) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.connect((dns, 53))
        sock.send(build_query(1, f"{name}.default.svc.cluster.local", A))
        return read_addresses(sock.recv(2000))


def remembered(address: str) -> list[str]:
    """The tracked UDP connections to a Service's address."""
    return [line for line in Path("/proc/net/nf_conntrack").read_text().splitlines() if " udp " in line and f"dst={address} " in line]


def churn(generator: random.Random, wanted: dict[str, str], serial: int) -> list[str]:
    """Change `wanted` (Service to app) at random; returns the Services to delete."""
    gone = generator.sample(sorted(wanted), COUNT // 4)
    for name in gone:
        del wanted[name]
    for name in generator.sample(sorted(wanted), len(wanted) // 2):
        wanted[name] = "b" if wanted[name] == "a" else "a"
    for number in range(COUNT - len(wanted)):
        wanted[f"churn-{serial}-{number}"] = generator.choice("ab")
    return gone


def test_services_are_as_declared_after_kills_of_proxy_dns_and_kubelet_under_churn(pods: Cluster) -> None:
    generator = random.Random(6)
    dns = pods.get("service", "kube-dns", "-n", "kube-system")["spec"]["clusterIP"]
    node = pods.get("nodes")["items"][0]["metadata"]["name"]
    wanted = {f"churn-0-{number}": generator.choice("ab") for number in range(COUNT)}
    apply(pods, [service(name, app) for name, app in wanted.items()])
    for turn in range(1, ROUNDS + 1):
        addresses = as_declared(pods, dns, wanted)
        gone = churn(generator, wanted, turn)
        first = kill(pods, node, 0)
        apply(pods, [service(name, app) for name, app in wanted.items()])
        kill(pods, node, first)
        pods.kubectl("delete", "service", *gone)
        for name in gone:
            forgotten(dns, name, addresses[name])
    as_declared(pods, dns, wanted)


def kill(cluster: Cluster, node: str, former: int) -> int:
    """Kill the node's process once it is another than the former one; returns which it was."""

    def other() -> int:
        found = cluster.component_pid(node)
        return found if found != former else 0

    pid: int = wait_for("a node process", other)
    os.kill(pid, signal.SIGKILL)
    return pid


def forgotten(dns: str, name: str, address: str) -> None:
    wait_for(f"the name of {name} is gone", lambda: not resolve(dns, name))
    wait_for(f"flows to {name} are gone", lambda: not remembered(address))


def as_declared(cluster: Cluster, dns: str, wanted: dict[str, str]) -> dict[str, str]:
    """Each Service answers at its address with its pod, and its name is that address; returns the addresses."""
    listed = cluster.get("services", "-l", "test=churn")["items"]
    addresses = {item["metadata"]["name"]: item["spec"]["clusterIP"] for item in listed}
    assert addresses.keys() == wanted.keys()
    for number, (name, app) in enumerate(wanted.items()):
        serves(dns, name, addresses[name], app, SOURCE_PORT + number)
    return addresses


def serves(dns: str, name: str, address: str, app: str, source_port: int) -> None:
    wait_for(f"{name} is {app}", lambda: ask(address, source_port) == app)
    wait_for(f"the name of {name}", lambda: resolve(dns, name) == [address])
