"""Names, hosts files and resolver settings of pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from knarr.kubelet import downward, expansion, identity
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.durations import go_duration
from knarr.kubelet.env import service_variables
from knarr.kubelet.images import normalize


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a": 'x"y'}}, "spec": {"containers": [], **spec}}


def config(folder: Path, text: str = "nameserver 9.9.9.9\nsearch host.example\noptions timeout:2\n") -> KubeletConfig:
    (folder / "resolv.conf").write_text(text)
    return KubeletConfig("node", cluster_dns=("10.0.0.10",), cluster_domain="cluster.local", resolv_conf=str(folder / "resolv.conf"))


def test_a_cluster_first_pod_asks_the_cluster_and_searches_its_namespace(tmp_path: Path) -> None:
    dns, notes = identity.pod_dns(pod(), config(tmp_path))
    assert dns.servers == ["10.0.0.10"]
    assert dns.searches == ["n.svc.cluster.local", "svc.cluster.local", "cluster.local", "host.example"]
    assert dns.options == ["ndots:5"]
    assert notes == []


def test_a_host_network_pod_has_the_hosts_resolver_unless_it_says_otherwise(tmp_path: Path) -> None:
    settings = config(tmp_path)
    assert identity.pod_dns(pod(hostNetwork=True), settings)[0].servers == ["9.9.9.9"]
    assert identity.pod_dns(pod(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet"), settings)[0].servers == ["10.0.0.10"]


def test_own_settings_are_added_and_limits_told(tmp_path: Path) -> None:
    own = {"nameservers": ["1.1.1.1", "2.2.2.2", "3.3.3.3", "4.4.4.4"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}
    dns, notes = identity.pod_dns(pod(dnsPolicy="None", dnsConfig=own), config(tmp_path))
    assert dns.servers == ["1.1.1.1", "2.2.2.2", "3.3.3.3"]
    assert dns.options == ["ndots:2", "edns0"]
    assert notes[0].startswith("Nameserver limits were exceeded")


def test_host_names_follow_the_spec() -> None:
    assert identity.host_name(pod(hostname="h", subdomain="s"), "c.l") == ("h", "s.n.svc.c.l")
    assert identity.kernel_host_name(pod(hostname="h", subdomain="s", setHostnameAsFQDN=True), "c.l") == "h.s.n.svc.c.l"
    with pytest.raises(identity.IdentityError, match="too long"):
        identity.kernel_host_name(pod(hostname="h" * 60, subdomain="s", setHostnameAsFQDN=True), "c.l")


def test_the_hosts_file_says_whose_it_is_and_ends_with_aliases() -> None:
    text = identity.hosts_file(pod(hostAliases=[{"ip": "1.2.3.4", "hostnames": ["x", "y"]}]), ["10.1.0.5"], "c.l")
    assert text.startswith("# Kubernetes-managed hosts file.\n")
    assert "10.1.0.5\tp\n" in text
    assert text.endswith("# Entries added by HostAliases.\n1.2.3.4\tx\ty\n")
    assert identity.hosts_file(pod(hostNetwork=True), [], "c.l").startswith("# Kubernetes-managed hosts file (host network).\n")


@pytest.mark.parametrize(
    ("text", "expected"), [("$(A)", "1"), ("$$(A)", "$(A)"), ("$(B)", "$(B)"), ("$(A", "$(A"), ("$", "$"), ("a$$b$x", "a$b$x")]
)
def test_expansion_knows_escapes_and_leaves_the_unknown(text: str, expected: str) -> None:
    assert expansion.expand(text, expansion.mapping({"A": "1"})) == expected


def test_the_downward_api_quotes_and_rounds_up() -> None:
    assert downward.field(pod(), "metadata.labels") == 'a="x\\"y"'
    assert downward.field(pod(), "metadata.labels['a']") == 'x"y'
    container = {"name": "c", "resources": {"limits": {"cpu": "1250m", "memory": "64Mi"}}}
    assert downward.resource(pod(), container, {"resource": "limits.cpu"}, {}) == "2"
    assert downward.resource(pod(), container, {"resource": "limits.cpu", "divisor": "1m"}, {}) == "1250"
    assert downward.resource(pod(), container, {"resource": "limits.memory", "divisor": "1Mi"}, {}) == "64"
    assert downward.resource(pod(), {"name": "d"}, {"resource": "limits.memory"}, {"memory": "100"}) == "100"
    with pytest.raises(downward.DownwardError):
        downward.field(pod(), "spec.secret")


def test_services_become_variables_of_their_namespace_and_the_api_always() -> None:
    def service(name: str, namespace: str, address: str) -> dict[str, Any]:
        ports = [{"name": "web", "port": 80, "protocol": "TCP"}]
        return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": address, "ports": ports}}

    services = [service("my-app", "n", "10.0.0.7"), service("kubernetes", "default", "10.0.0.1"), service("headless", "n", "None")]
    variables = service_variables(services, "n", links=True)
    assert variables["MY_APP_SERVICE_HOST"] == "10.0.0.7"
    assert variables["MY_APP_SERVICE_PORT_WEB"] == "80"
    assert variables["MY_APP_PORT_80_TCP"] == "tcp://10.0.0.7:80"
    assert variables["KUBERNETES_SERVICE_HOST"] == "10.0.0.1"
    assert not [v for v in variables if v.startswith("HEADLESS")]
    assert set(service_variables(services, "n", links=False)) == {v for v in variables if v.startswith("KUBERNETES_")}


def test_image_names_are_completed_as_docker_does() -> None:
    assert normalize("redis") == "docker.io/library/redis:latest"
    assert normalize("a/b:1") == "docker.io/a/b:1"
    assert normalize("localhost:5000/x") == "localhost:5000/x:latest"
    with pytest.raises(ValueError, match="invalid reference format"):
        normalize("UPPER/x:::1")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (0.85, "850ms"), (10, "10s"), (160, "2m40s"), (300, "5m0s"), (3661.5, "1h1m1.5s")])
def test_durations_read_as_gos(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
