"""The packet's walk names what stops it."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.network.servicewhy import name_steps, service_steps
from knarr.network.why import BadQuestion, Place, Snapshot, parse_place, walk

from .world import endpoint_slice, ready, service


def pod(name: str, ip: str, node: str = "n1", phase: str = "Running", **labels: str) -> dict[str, Any]:
    container = {"ports": [{"name": "http", "containerPort": 8080}]}
    return {
        "metadata": {"namespace": "default", "name": name, "labels": labels},
        "spec": {"nodeName": node, "containers": [container]},
        "status": {"phase": phase, "podIP": ip, "podIPs": [{"ip": ip}]} if ip else {"phase": phase},
    }


def node(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"podCIDR": "10.0.0.0/24"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}


def world(*pods: dict[str, Any], **more: Any) -> Snapshot:
    return Snapshot(pods=list(pods), nodes=[node("n1"), node("n2")], namespaces=[{"metadata": {"name": "default", "labels": {}}}], **more)


def ends(snapshot: Snapshot, target: str, protocol: str = "TCP") -> tuple[bool, str]:
    """(arrives, text of the last deciding step)."""
    steps = [step for step in walk(snapshot, Place("pod", "default", "a"), parse_place(target, port=True), protocol) if step.ok is not None]
    return bool(steps[-1].ok), steps[-1].text


def deny(name: str, kind: str, **labels: str) -> dict[str, Any]:
    spec = {"podSelector": {"matchLabels": labels}, "policyTypes": [kind]}
    return {"metadata": {"namespace": "default", "name": name}, "spec": spec}


def selecting(name: str, **selector: str) -> dict[str, Any]:
    return service(name, "10.96.0.9", [("http", "TCP", 80)], selector=selector)


def test_an_open_way_across_nodes():
    assert ends(world(pod("a", "10.0.0.1"), pod("b", "10.0.1.1", "n2")), "pod/b:8080") == (
        True,
        "node n1 has a route to the pods of node n2",
    )


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("pod/none:80", "does not exist"),
        ("pod/c:80", "is Pending"),
        ("svc/none:80", "does not exist"),
        ("pod/b:metrics", "no port named metrics"),
    ],
)
def test_what_is_not_there(target, text):
    arrives, said = ends(world(pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), pod("c", "", phase="Pending")), target)
    assert not arrives
    assert text in said


@pytest.mark.parametrize(("kind", "labels", "who"), [("Ingress", {"app": "b"}, "default/b"), ("Egress", {"app": "a"}, "default/a")])
def test_a_policy_that_denies_is_named_with_the_pod_it_holds_for(kind, labels, who):
    snapshot = world(pod("a", "10.0.0.1", app="a"), pod("b", "10.0.0.2", app="b"), policies=[deny("wall", kind, **labels)])
    arrives, said = ends(snapshot, "pod/b:8080")
    assert not arrives
    assert f"{kind.lower()} of pod {who} is denied: selected by policy default/wall" in said


def test_a_service_whose_selector_matches_nothing_names_the_selector_and_the_nearest_pod():
    snapshot = world(pod("a", "10.0.0.1"), pod("b", "10.0.0.2", app="web", tier="x"), services=[selecting("web", app="web", tier="y")])
    arrives, said = ends(snapshot, "svc/web:80")
    assert not arrives
    assert "selector app=web,tier=y of service default/web matches none" in said
    assert "nearest: default/b" in said


def test_a_service_whose_pods_are_not_ready_lists_them():
    part = endpoint_slice("web", [("http", "TCP", 8080)], [{"addresses": ["10.0.0.2"], "conditions": {"ready": False}}])
    snapshot = world(pod("a", "10.0.0.1"), pod("b", "10.0.0.2", app="web"), services=[selecting("web", app="web")], slices=[part])
    assert ends(snapshot, "svc/web:80") == (False, "service default/web selects 1 pods, but none is ready: b (running, not ready)")


def test_a_target_port_that_no_pod_names_is_found():
    svc = selecting("web", app="web")
    svc["spec"]["ports"][0]["targetPort"] = "metrics"
    snapshot = world(pod("a", "10.0.0.1"), pod("b", "10.0.0.2", app="web"), services=[svc])
    assert "port named 'metrics', which none of its 1 pods has" in ends(snapshot, "svc/web:80")[1]


def test_through_a_service_every_endpoint_is_tried_and_a_partial_failure_is_told():
    part = endpoint_slice("web", [("http", "TCP", 8080)], [ready("10.0.0.2"), ready("10.0.0.3")])
    snapshot = world(
        pod("a", "10.0.0.1"), pod("b", "10.0.0.2", app="web"), pod("c", "10.0.0.3", app="web", walled="yes"),
        services=[selecting("web", app="web")], slices=[part], policies=[deny("wall", "Ingress", walled="yes")],
    )  # fmt: skip
    steps = walk(snapshot, Place("pod", "default", "a"), parse_place("web:http", port=True))
    assert any("only 1 of 2 endpoints cannot be reached" in step.text for step in steps)
    assert steps[-1].ok is False
    assert ends(snapshot, "10.96.0.9:80")[0] is False


def test_places_are_parsed():
    assert parse_place("pod/x/a") == Place("pod", "x", "a")
    assert parse_place("web.shop:http", port=True) == Place("svc", "shop", "web", "http")
    assert parse_place("[fd00::1]:80", port=True) == Place("ip", "", "fd00::1", "80")
    for bad in ("pod/b", "job/b:80", "a/b/c/d:1"):
        with pytest.raises(BadQuestion):
            parse_place(bad, port=True)


def test_a_service_is_judged_for_whoever_asks():
    pods = [pod("a", "10.0.0.1"), pod("b", "10.0.1.1", "n2", app="b")]
    slices = [endpoint_slice("web", [("http", "TCP", 8080)], [ready("10.0.1.1", node="n2")])]
    snapshot = world(*pods, services=[selecting("web", app="b")], slices=slices, policies=[deny("closed", "Ingress", app="b")])
    steps = service_steps(snapshot, "default", "web")
    assert all(step.ok is not False for step in steps)
    assert "policy default/closed chooses who may enter pod default/b" in steps[-1].text
    assert [step.ok for step in service_steps(snapshot, "default", "web", "http")] == [step.ok for step in steps]


def test_a_service_without_endpoints_and_one_that_does_not_exist_are_refused():
    snapshot = world(pod("a", "10.0.0.1"), services=[selecting("web", app="b")])
    assert service_steps(snapshot, "default", "web")[-1].ok is False
    assert service_steps(snapshot, "default", "none")[-1].text == "service default/none does not exist"
    assert service_steps(snapshot, "other", "web")[-1].text == "service other/web does not exist; there is default/web"


async def test_the_name_of_a_service_is_compared_with_its_addresses():
    async def answer(name: str) -> list[str]:
        return {"web.default.svc.x": ["10.96.0.9"]}.get(name, [])

    steps = await name_steps(selecting("web"), "web.default.svc.x", answer)
    assert steps[0].ok
    steps = await name_steps(selecting("other"), "other.default.svc.x", answer)
    assert steps[0].text == "the cluster's DNS server knows no address of other.default.svc.x"
