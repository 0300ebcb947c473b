"""Topology hints by annotation: shares of the zones, hints of the slices, and the controller that gives and takes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knarr.api.resources import ENDPOINT_SLICES, EVENTS, NODES, PODS, SERVICE_ACCOUNTS, SERVICES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.topologyhints import (
    ZONE,
    Share,
    Slices,
    ZoneHints,
    hints_of,
    is_overloaded,
    redistribute,
    shares_of,
    surplus,
    wants_hints,
    zone_ratios,
)
from knarr.testing.apiserver import RunningAPIServer
from tests.controllers.test_controllers import controllers, until

NS = "default"
MODE, OLD_MODE = "service.kubernetes.io/topology-mode", "service.kubernetes.io/topology-aware-hints"
ENABLED, DISABLED = "TopologyAwareHintsEnabled", "TopologyAwareHintsDisabled"


def _node(zone: str, cpu: str = "2", *labels: str, ready: bool = True) -> Object:
    own = {**({ZONE: zone} if zone else {}), **dict.fromkeys(labels, "")}
    status = {"conditions": [{"type": "Ready", "status": str(ready)}], "allocatable": {"cpu": cpu} if cpu else {}}
    return {"metadata": {"name": "n", "labels": own}, "status": status}


def _endpoint(text: str) -> Object:
    """ "east" is in that zone, "east>west" has a hint for another, a "!" before it makes it not ready."""
    zone, _, hint = text.strip("!").partition(">")
    endpoint: Object = {"addresses": ["10.0.0.1"], "conditions": {"ready": not text.startswith("!")}}
    if zone:
        endpoint["zone"] = zone
    if hint:
        endpoint["hints"] = {"forZones": [{"name": name} for name in hint.split("+")]}
    return endpoint


def _slice(*endpoints: str) -> Object:
    return {"metadata": {"name": "s"}, "endpoints": [_endpoint(text) for text in endpoints]}


def _hints(*slices: Object) -> list[str]:
    """Hint of each endpoint, "" if it has none."""
    endpoints = [endpoint for obj in slices for endpoint in obj["endpoints"]]
    return ["+".join(zone["name"] for zone in (endpoint.get("hints") or {}).get("forZones", ())) for endpoint in endpoints]


def _zones(**ratios: float) -> ZoneHints:
    zones = ZoneHints()
    zones.ratios = ratios
    return zones


# Who asks


@pytest.mark.parametrize(
    ("annotations", "wanted"),
    [
        ({}, False),
        ({MODE: "Auto"}, True),
        ({MODE: "auto"}, True),
        ({MODE: "AUTO"}, False),
        ({MODE: "Disabled"}, False),
        ({OLD_MODE: "auto"}, True),
        ({OLD_MODE: "Auto", MODE: "Disabled"}, True),
        ({OLD_MODE: "Disabled", MODE: "Auto"}, False),
    ],
)
def test_the_annotation_asks_for_hints_and_the_deprecated_one_counts_first(annotations: dict[str, str], wanted: bool) -> None:
    assert wants_hints({"metadata": {"name": "s", "annotations": annotations}}) is wanted


# Nodes


@pytest.mark.parametrize(
    ("nodes", "ratios"),
    [
        ([], {}),
        ([_node("east")], {}),
        ([_node("east"), _node("east")], {}),
        ([_node("east"), _node("west")], {"east": 0.5, "west": 0.5}),
        ([_node("east"), _node("west", ready=False)], {}),
        ([_node("east"), _node("west"), _node("west", ready=False)], {"east": 0.5, "west": 0.5}),
        ([_node("east"), _node("west", "8", "node-role.kubernetes.io/control-plane")], {}),
        ([_node("east"), _node("west"), _node("west", "8", "node-role.kubernetes.io/master")], {"east": 0.5, "west": 0.5}),
        ([_node("east"), _node("west"), _node("")], {}),
        ([_node("east"), _node("west"), _node("north", "")], {}),
        ([_node("east"), _node("west"), _node("", "", ready=False)], {"east": 0.5, "west": 0.5}),
        (
            [_node("east", "500m"), _node("west", "3"), _node("east", "1500m"), _node("north", "5")],
            {"east": 0.2, "north": 0.5, "west": 0.3},
        ),
    ],
)
def test_zones_share_as_their_ready_workers_share_the_cpu(nodes: list[Object], ratios: dict[str, float]) -> None:
    assert zone_ratios(nodes) == ratios


# Shares


def test_shares_lie_between_the_overload_threshold_and_what_others_can_spare() -> None:
    shares, refusal = shares_of({"east": 0.5, "north": 0.3, "west": 0.2}, 20)
    assert refusal == ""
    assert shares == {"east": Share(9, 11, 10.0), "north": Share(5, 7, 6.0), "west": Share(4, 6, 4.0)}


@pytest.mark.parametrize(
    ("ratios", "endpoints", "refusal"),
    [
        ({}, 9, "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes"),
        ({"east": 0.5, "west": 0.5}, 1, "Insufficient number of endpoints (1 endpoints, 2 zones)"),
        ({"east": 0.5, "north": 0.3, "west": 0.2}, 2, "Insufficient number of endpoints (2 endpoints, 3 zones)"),
        # West needs one whole endpoint for its tenth, and two are too few for nine tenths of the load.
        (
            {"east": 0.9, "west": 0.1},
            3,
            "Unable to allocate minimum required endpoints to each zone without exceeding overload threshold (3 endpoints, 2 zones)",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_reason(ratios: dict[str, float], endpoints: int, refusal: str) -> None:
    assert shares_of(ratios, endpoints) == ({}, refusal)


@pytest.mark.parametrize(
    ("desired", "present", "giving", "receiving"),
    [
        ({}, {}, {}, {}),
        ({"east": 2.2, "north": 1.9, "west": 1.9}, {"east": 2, "north": 2, "west": 2}, {}, {}),
        ({"east": 3.4, "west": 2.6}, {"east": 4, "west": 2}, {}, {}),
        ({"east": 2.0, "west": 4.0}, {"east": 4, "west": 2}, {"east": 2}, {"west": 2}),
        ({"east": 2.0, "north": 3.6, "west": 3.4}, {"east": 9}, {"east": 7}, {"north": 4, "west": 3}),
        ({"east": 2.0, "north": 4.6, "west": 5.4}, {"north": 6, "west": 6}, {"north": 1, "west": 1}, {"east": 2}),
        ({"east": 1.0, "west": 1.0}, {"elsewhere": 5}, {}, {}),
    ],
)
def test_endpoints_move_between_zones_only_if_that_helps_enough(
    desired: dict[str, float], present: dict[str, int], giving: dict[str, int], receiving: dict[str, int]
) -> None:
    assert surplus({zone: Share(0, 0, number) for zone, number in desired.items()}, present) == (giving, receiving)


def test_endpoints_are_lent_to_the_neediest_until_one_side_has_enough() -> None:
    slices = [_slice("!east", "east", "west", "east"), _slice("east", "", "east")]
    assert redistribute(slices, {"east": 3}, {"north": 1, "west": 2}) == {"east": -3, "north": 1, "west": 2}
    assert _hints(*slices) == ["", "west", "", "north", "west", "", ""]


_SHARES = {"east": Share(1, 2, 1.5), "west": Share(1, 2, 1.5)}


@pytest.mark.parametrize(
    ("endpoints", "before", "counted"),
    [
        ([], {}, {}),
        (["!east"], {}, {}),
        (["east>east", "east>west", "!east"], {}, {"east": 1, "west": 1}),
        (["east>east+west"], {}, {"east": 1, "west": 1}),
        (["east>east", "east"], {}, None),
        (["east>north"], {}, None),
        (["east>east", "east>east"], {}, {"east": 2}),
        (["east>east", "east>east"], {"east": 1}, None),
    ],
)
def test_a_slice_stays_while_its_hints_fit_the_shares(endpoints: list[str], before: dict[str, int], counted: dict[str, int] | None) -> None:
    assert hints_of(_slice(*endpoints), before, _SHARES) == counted


@pytest.mark.parametrize(
    ("spread", "ratios", "overloaded"),
    [
        ({}, {}, False),
        ({"east": 1}, {}, True),
        ({"east": 5, "west": 5}, {"east": 0.5, "west": 0.5}, False),
        ({"east": 5, "west": 5}, {"east": 0.6, "west": 0.4}, False),
        ({"east": 5, "west": 5}, {"east": 0.65, "west": 0.35}, True),
        ({"east": 5, "west": 5}, {"east": 0.4, "north": 0.2, "west": 0.4}, True),
    ],
)
def test_a_service_is_overloaded_when_a_zone_has_too_few_endpoints(
    spread: dict[str, int], ratios: dict[str, float], overloaded: bool
) -> None:
    assert is_overloaded(spread, ratios) is overloaded


# Hints of a Service


def test_each_ready_endpoint_is_meant_for_its_own_zone_where_the_shares_fit() -> None:
    slices = Slices(create=[_slice("east", "!east", "west")], update=[_slice("west>east", "!west>west", "east")])
    zones = _zones(east=0.5, west=0.5)
    events = zones.add("ns/s", "IPv4", slices)
    assert events == [("Normal", ENABLED, "Topology Aware Hints has been enabled, addressType: IPv4")]
    assert _hints(*slices.create) == ["east", "", "west"]
    assert _hints(*slices.update) == ["west", "", "east"]
    assert zones.add("ns/s", "IPv4", slices) == []


def test_zones_with_many_endpoints_lend_them() -> None:
    slices = Slices(create=[_slice("east", "east", "east", "east", "east", "west")])
    _zones(east=0.5, west=0.5).add("ns/s", "IPv4", slices)
    assert _hints(*slices.create) == ["west", "west", "east", "east", "east", "west"]


def test_unchanged_slices_stay_unless_their_hints_do_not_fit() -> None:
    fitting, missing = _slice("east>east", "west>west"), _slice("east>east", "west")
    before = copy.deepcopy(missing)
    slices = Slices(unchanged=[fitting, missing])
    _zones(east=0.5, west=0.5).add("ns/s", "IPv4", slices)
    assert slices.unchanged == [fitting]
    assert _hints(*slices.update) == ["east", "west"]
    assert missing == before


@pytest.mark.parametrize(
    ("ratios", "endpoints", "reason"),
    [
        ({}, ["east>east", "west>west"], "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes"),
        ({"east": 0.5, "west": 0.5}, ["east>east", "!west>west"], "Insufficient number of endpoints (1 endpoints, 2 zones)"),
        ({"east": 0.5, "west": 0.5}, ["east>east", "west>west", "", "east>east"], "One or more endpoints do not have a zone specified"),
    ],
)
def test_hints_are_removed_from_all_slices_when_they_cannot_be_given(ratios: dict[str, float], endpoints: list[str], reason: str) -> None:
    cached = _slice("!east>east")
    before = copy.deepcopy(cached)
    plain = _slice("!east")
    slices = Slices(update=[_slice(*endpoints)], unchanged=[cached, plain])
    zones = _zones(**ratios)
    assert zones.add("ns/s", "IPv6", slices) == [("Warning", DISABLED, f"{reason}, addressType: IPv6")]
    assert len(slices.update) == 2
    assert not any(_hints(*slices.update))
    assert slices.unchanged == [plain]
    assert cached == before
    assert not zones.forget("ns/s")


def test_nodes_that_change_bring_back_the_services_concerned() -> None:
    zones = ZoneHints()
    assert zones.set_nodes([_node("east"), _node("west")]) == []
    zones.add("ns/hinted", "IPv4", Slices(create=[_slice("east", "west")]))
    assert zones.set_nodes([_node("east"), _node("west", "2200m")]) == []
    assert zones.set_nodes([_node("east"), _node("north")]) == ["ns/hinted"]
    assert zones.set_nodes([_node("east")]) == ["ns/hinted"]
    zones.add("ns/waiting", "IPv4", Slices(create=[_slice("east", "west")]))
    assert zones.set_nodes([_node("east"), _node("west")]) == ["ns/waiting"]
    assert zones.disable("ns/hinted", "IPv4") == [("Warning", DISABLED, "Topology Aware Hints has been disabled, addressType: IPv4")]
    assert zones.disable("ns/hinted", "IPv4") == []
    assert zones.set_nodes([]) == []


_TEXTS = st.builds(
    lambda down, zone, hint: ("!" if down else "") + zone + (">" + hint if hint else ""),
    st.booleans(),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["", "a", "b", "c"]),
)
_SLICES = st.lists(st.lists(_TEXTS, max_size=8).map(lambda texts: _slice(*texts)), max_size=3)


@given(_SLICES, _SLICES, _SLICES, st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_all_ready_endpoints_get_one_hint_or_none_does_and_shares_that_are_met_stay(
    create: list[Object], update: list[Object], unchanged: list[Object], cpus: list[int]
) -> None:
    zones = _zones(**{zone: cpu / sum(cpus) for zone, cpu in zip("abc", cpus, strict=True)})
    before = copy.deepcopy(unchanged)
    slices = Slices(create, update, list(unchanged))
    enabled = zones.add("ns/s", "IPv4", slices)[0].reason == ENABLED
    for obj in slices.all():
        for endpoint, hint in zip(obj["endpoints"], _hints(obj), strict=True):
            if obj in slices.unchanged and not endpoint["conditions"]["ready"]:
                continue
            assert bool(hint) == (enabled and endpoint["conditions"]["ready"])
    assert unchanged == before
    if enabled:
        ready = sum(endpoint["conditions"]["ready"] for obj in slices.all() for endpoint in obj["endpoints"])
        spread = zones._spread["ns/s"]["IPv4"]
        assert sum(spread.values()) == ready
        again = Slices(unchanged=slices.all())
        assert zones.add("ns/s", "IPv4", again) == []
        shares, _refusal = shares_of(zones.ratios, ready)
        assert again.update == [] or any(spread[zone] > share.most for zone, share in shares.items())


# The controller


async def _make_pod(client: Client, name: str, node: str, address: str) -> None:
    meta = {"name": name, "namespace": NS, "labels": {"a": "b"}}
    await client.create(PODS, {"metadata": meta, "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}})
    status: Object = {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    await client.patch(PODS, name, NS, {"status": status}, type="strategic", subresource="status")


async def _set_cpu(client: Client, name: str, cpu: str) -> None:
    status = {"allocatable": {"cpu": cpu}, "capacity": {"cpu": cpu}, "conditions": [{"type": "Ready", "status": "True"}]}
    await client.patch(NODES, name, None, {"status": status}, type="strategic", subresource="status")


async def _slices(client: Client, service: str) -> list[Object]:
    found: list[Object] = (await client.list(ENDPOINT_SLICES, NS, label_selector=f"kubernetes.io/service-name={service}"))["items"]
    return found


async def _by_zone(client: Client) -> list[str]:
    """Zone and hint of each endpoint, e.g. "east>west"."""
    slices = await _slices(client, "s")
    return sorted(
        f"{endpoint.get('zone', '')}>{hint}"
        for obj in slices
        for endpoint, hint in zip(obj.get("endpoints") or (), _hints({**obj, "endpoints": obj.get("endpoints") or []}), strict=True)
    )


async def _told(client: Client, reason: str, start: str) -> bool:
    events = (await client.list(EVENTS, NS, field_selector=f"reason={reason}"))["items"]
    return any(event["message"].startswith(start) and event["involvedObject"]["name"] == "s" for event in events)


async def test_hints_follow_annotation_zones_and_cpu(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, "endpointslice-controller,serviceaccount-controller") as client:
        for name in ("one", "two"):
            await client.create(NODES, {"metadata": {"name": name}})
            await _set_cpu(client, name, "4")
        await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
        for number in range(4):
            await _make_pod(client, f"p{number}", ("one", "two")[number % 2], f"10.244.0.{number + 1}")
        spec: dict[str, Any] = {"selector": {"a": "b"}, "ports": [{"port": 80}], "trafficDistribution": "PreferSameNode"}
        service = {"metadata": {"name": "s", "namespace": NS, "annotations": {MODE: "Auto"}}, "spec": spec}
        await client.create(SERVICES, service)

        async def shows(*wanted: str) -> None:
            async def shown() -> bool:
                return await _by_zone(client) == list(wanted)

            await until(shown)

        # Nodes without zones: no hints, not those of trafficDistribution either, until each has one.
        await shows(">", ">", ">", ">")
        await until(lambda: _told(client, DISABLED, "Insufficient Node information"))
        for name, zone in (("one", "east"), ("two", "west")):
            await client.patch(NODES, name, None, {"metadata": {"labels": {ZONE: zone}}})
        await shows("east>east", "east>east", "west>west", "west>west")
        await until(lambda: _told(client, ENABLED, "Topology Aware Hints has been enabled, addressType: IPv4"))
        assert not any("forNodes" in endpoint["hints"] for obj in await _slices(client, "s") for endpoint in obj["endpoints"])
        # Another part of the CPU: an endpoint is lent.
        await _set_cpu(client, "two", "12")
        await shows("east>east", "east>west", "west>west", "west>west")
        # Without the annotation trafficDistribution counts, and without that nothing.
        await client.patch(SERVICES, "s", NS, {"metadata": {"annotations": {MODE: "Disabled"}}})
        await shows("east>east", "east>east", "west>west", "west>west")
        await until(lambda: _told(client, DISABLED, "Topology Aware Hints has been disabled"))
        await client.patch(SERVICES, "s", NS, {"spec": {"trafficDistribution": None}})
        await shows("east>", "east>", "west>", "west>")
        await client.patch(SERVICES, "s", NS, {"metadata": {"annotations": {MODE: None, OLD_MODE: "auto"}}})
        await shows("east>east", "east>west", "west>west", "west>west")
        # Too few endpoints for two zones.
        for number in range(3):
            await client.delete(PODS, f"p{number}", NS, grace_period_seconds=0)
        await shows("west>")
        await until(lambda: _told(client, DISABLED, "Insufficient number of endpoints (1 endpoints, 2 zones)"))


async def test_hints_outlive_a_restart_of_the_controller(apiserver: RunningAPIServer) -> None:
    names = "endpointslice-controller,serviceaccount-controller"
    async with controllers(apiserver, names) as client:
        for name in ("east", "west"):
            await client.create(NODES, {"metadata": {"name": name, "labels": {ZONE: name}}})
            await _set_cpu(client, name, "4")
        await until(lambda: client.get(SERVICE_ACCOUNTS, "default", NS))
        await _make_pod(client, "p1", "east", "10.244.0.1")
        await _make_pod(client, "p2", "west", "10.244.0.2")
        spec = {"selector": {"a": "b"}, "ports": [{"port": 80}]}
        await client.create(SERVICES, {"metadata": {"name": "s", "namespace": NS, "annotations": {MODE: "Auto"}}, "spec": spec})

        async def hinted() -> bool:
            return await _by_zone(client) == ["east>east", "west>west"]

        await until(hinted)
        versions = [obj["metadata"]["resourceVersion"] for obj in await _slices(client, "s")]
    async with controllers(apiserver, names) as client:
        other = {"metadata": {"name": "t", "namespace": NS}, "spec": spec}
        await client.create(SERVICES, other)

        async def looked_at() -> bool:
            return bool(await _slices(client, "t"))

        await until(looked_at)
        assert [obj["metadata"]["resourceVersion"] for obj in await _slices(client, "s")] == versions
