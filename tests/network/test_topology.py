"""Which endpoints the proxy takes for a node after their conditions and hints."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.network.proxy.topology import NodeView, categorise, collect

from .world import endpoint_slice

HERE = NodeView("here", "east")


def _endpoint(number: int, text: str) -> dict[str, Any]:
    """ "east+west" hints zones, "@here+there" nodes, both behind a space; "!" before it: not ready, "~": terminates and still serves."""
    conditions = {"ready": text[:1] not in ("!", "~"), "serving": not text.startswith("!"), "terminating": text.startswith("~")}
    endpoint: dict[str, Any] = {"addresses": [f"10.77.0.{number}"], "conditions": conditions, "nodeName": "there"}
    for hint in text.strip("!~").split():
        field = "forNodes" if hint.startswith("@") else "forZones"
        endpoint.setdefault("hints", {})[field] = [{"name": name} for name in hint.strip("@").split("+")]
    return endpoint


def _chosen(node: NodeView, *texts: str) -> list[int]:
    """Positions of the endpoints that serve the cluster-wide policy on a node."""
    part = endpoint_slice("web", [("http", "TCP", 8080)], [_endpoint(number, text) for number, text in enumerate(texts)])
    found = collect([part], "http", "TCP", "IPv4", node, False)
    return [int(endpoint.ip.rpartition(".")[2]) for endpoint in categorise(found, node, uses_cluster=True, uses_local=False).cluster]


@pytest.mark.parametrize(
    ("endpoints", "chosen"),
    [
        (["east", "west", "east"], [0, 2]),
        (["east+west", "west", "north"], [0]),
        (["east", "west", ""], [0, 1, 2]),
        (["west", "north"], [0, 1]),
        (["east", "west", "!"], [0]),
        (["!east", "west", "west"], [1, 2]),
        (["~east", "west"], [1]),
        (["~east", "~west", "!east"], [0, 1]),
        (["east @here", "east @there", "west @there"], [0]),
        (["east @there", "east @there", "west @there"], [0, 1]),
        (["east @here", "east", "west"], [0, 1]),
        (["@there", "@there"], [0, 1]),
        ([], []),
    ],
)
def test_hints_count_when_every_ready_endpoint_has_one_and_some_are_for_this_node(endpoints: list[str], chosen: list[int]) -> None:
    assert _chosen(HERE, *endpoints) == chosen


def test_a_node_without_a_zone_takes_all_endpoints() -> None:
    assert _chosen(NodeView("here"), "east", "west") == [0, 1]


def test_hints_do_not_count_for_the_local_policy() -> None:
    endpoints = [{**_endpoint(number, zone), "nodeName": node} for number, (zone, node) in enumerate([("west", "here"), ("east", "there")])]
    found = collect([endpoint_slice("web", [("http", "TCP", 8080)], endpoints)], "http", "TCP", "IPv4", HERE, False)
    backends = categorise(found, HERE, uses_cluster=True, uses_local=True)
    assert [endpoint.ip for endpoint in backends.local] == ["10.77.0.0"]
    assert [endpoint.ip for endpoint in backends.cluster] == ["10.77.0.1"]


def test_conditions_that_nobody_set_are_good_ones() -> None:
    endpoints = [{"addresses": ["10.77.0.1"]}, {"addresses": ["10.77.0.2"], "conditions": {"ready": False, "terminating": True}}]
    found = collect([endpoint_slice("web", [("http", "TCP", 8080)], endpoints)], "http", "TCP", "IPv4", HERE, False)
    assert [(item.ready, item.serving, item.terminating) for item in found] == [(True, True, False), (False, True, True)]
