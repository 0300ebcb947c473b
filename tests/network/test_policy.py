"""Network policies in a real kernel, against a model of the specification written down here independently."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import select
import socket
import time
from collections.abc import Collection
from typing import Any

import pytest

from knarr.network.nftables import list_table
from knarr.network.policy.model import compile_policy, decide, read_pod
from knarr.network.policy.state import PolicyState
from knarr.network.policy.table import PolicyTable

from .world import Place, World

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
PORTS = [("TCP", 80), ("TCP", 81), ("UDP", 80)]
NAMESPACES = {"x": {"ns": "x", "team": "one"}, "y": {"ns": "y", "team": "one"}, "z": {"ns": "z"}}


def pod_object(place: Place, namespace: str, name: str, **labels: str) -> dict[str, Any]:
    # "web" is port 80 on most pods and 81 on those named c, so that names have to be resolved per pod.
    number = 81 if name == "c" else 80
    container = {
        "ports": [{"name": "web", "containerPort": number, "protocol": "TCP"}, {"name": "udp", "containerPort": 80, "protocol": "UDP"}]
    }
    return {
        "metadata": {"namespace": namespace, "name": name, "labels": {"pod": name, **labels}},
        "spec": {"nodeName": "here", "containers": [container]},
        "status": {"phase": "Running", "podIP": place.ip, "podIPs": [{"ip": ip} for ip in place.ips]},
    }


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """A label selector, as the API documentation words it."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for term in selector.get("matchExpressions") or []:
        key, values = term["key"], term.get("values") or []
        fine = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[term["operator"]]
        if not fine:
            return False
    return True


def peer_fits(peer: dict[str, Any], namespace: str, other: dict[str, Any]) -> bool:
    if "ipBlock" in peer:
        address = ipaddress.ip_address(other["status"]["podIP"])
        block = peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(hole) for hole in block.get("except", [])
        )
    meta = other["metadata"]
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], NAMESPACES[meta["namespace"]]):
            return False
    elif meta["namespace"] != namespace:
        return False
    return selects(peer.get("podSelector", {}), meta["labels"])


def port_fits(port: dict[str, Any], target: dict[str, Any], protocol: str, number: int) -> bool:
    if port.get("protocol", "TCP") != protocol:
        return False
    wanted = port.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return any(
            p["name"] == wanted and p["protocol"] == protocol and p["containerPort"] == number
            for p in target["spec"]["containers"][0]["ports"]
        )
    return wanted <= number <= port.get("endPort", wanted)


def model(policies: list[dict[str, Any]], source: dict[str, Any], target: dict[str, Any], protocol: str, number: int) -> bool:
    """Whether the specification lets source talk to target."""
    if source is target:
        return True
    for kind, side, subject, other in (("Egress", "egress", source, target), ("Ingress", "ingress", target, source)):
        meta = subject["metadata"]
        mine = [
            p for p in policies
            if p["metadata"]["namespace"] == meta["namespace"] and kind in p["spec"]["policyTypes"] and selects(p["spec"]["podSelector"], meta["labels"])
        ]  # fmt: skip
        if not mine:
            continue
        allowed = False
        for policy in mine:
            for rule in policy["spec"].get(side) or []:
                peers, ports = rule.get("to" if side == "egress" else "from"), rule.get("ports")
                peers_fit = not peers or any(peer_fits(peer, meta["namespace"], other) for peer in peers)
                ports_fit = not ports or any(port_fits(port, target, protocol, number) for port in ports)
                allowed = allowed or (peers_fit and ports_fit)
        if not allowed:
            return False
    return True


class Cluster:
    """Pods of three namespaces on one node, all serving all ports."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.places: dict[str, Place] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        self.state = PolicyState("here")
        self.table = PolicyTable("knt-policy", netns=world.node.path, on_isolate=world.network.direct.isolate)
        for name, labels in NAMESPACES.items():
            self.state.set_namespace(name, labels)

    async def fill(self, names: str = "abc") -> None:
        for namespace in NAMESPACES:
            for name in names:
                place = await self.world.pod(f"{namespace}-{name}")
                for protocol, number in PORTS:
                    place.serve("x", number, udp=protocol == "UDP")
                self.places[f"{namespace}/{name}"] = place
                obj = self.objects[f"{namespace}/{name}"] = pod_object(place, namespace, name, tier="front" if name in "ab" else "back")
                self.state.set_pod(read_pod(obj))
        self.table.load(self.state.wanted())

    def apply(self, policies: list[dict[str, Any]]) -> None:
        wanted = {f"{p['metadata']['namespace']}/{p['metadata']['name']}": p for p in policies}
        for key in list(self.state.policies):
            if key not in wanted:
                self.state.drop_policy(key)
        for policy in wanted.values():
            self.state.set_policy(compile_policy(policy))
        self.table.change(self.state.wanted())

    def relabel(self, generator: Generator) -> None:
        """Give a pod other labels while the policies change."""
        key = generator.random.choice(sorted(self.objects))
        labels = {"pod": generator.random.choice("abcd"), "tier": generator.random.choice(["front", "back"])}
        self.objects[key]["metadata"]["labels"] = labels
        self.state.set_pod(read_pod(self.objects[key]))

    def probe(self, wanted: Collection[tuple[str, str, str, int]] | None = None) -> dict[tuple[str, str, str, int], bool]:
        """Try every pair and port at once: until all that are wanted have answered, and a moment longer for those that should not."""
        result: dict[tuple[str, str, str, int], bool] = {}
        open_sockets: dict[int, tuple[socket.socket, tuple[str, str, str, int]]] = {}
        poll = select.epoll()
        for source, place in self.places.items():
            for target, other in self.places.items():
                for protocol, number in PORTS:
                    key = (source, target, protocol, number)
                    result[key] = False
                    sock = place.open(socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM)
                    sock.setblocking(False)
                    try:
                        sock.connect((other.ip, number))
                    except BlockingIOError:
                        pass
                    if protocol == "UDP":
                        sock.send(b"?")
                    open_sockets[sock.fileno()] = (sock, key)
                    poll.register(sock.fileno(), select.EPOLLIN)
        missing = set(wanted if wanted is not None else result)
        deadline, settled = time.monotonic() + 4.0, False
        while (left := deadline - time.monotonic()) > 0:
            if not missing and not settled:
                deadline, settled = time.monotonic() + 0.15, True
                continue
            for descriptor, _event in poll.poll(left):
                sock, key = open_sockets[descriptor]
                missing.discard(key)
                try:
                    result[key] = bool(sock.recv(100))
                except OSError:
                    result[key] = False
                poll.unregister(descriptor)
        for sock, _key in open_sockets.values():
            sock.close()
        poll.close()
        return result

    def differences(self, policies: list[dict[str, Any]]) -> list[Any]:
        keys = [(source, target, *port) for source in self.places for target in self.places for port in PORTS]
        wanted = {key: self.expected(policies, key) for key in keys}
        found = self.probe([key for key, reached in wanted.items() if reached])
        return [(key, "reached" if reached else "blocked") for key, reached in found.items() if reached != wanted[key]]

    def expected(self, policies: list[dict[str, Any]], key: tuple[str, str, str, int]) -> bool:
        source, target, protocol, number = key
        wanted = model(policies, self.objects[source], self.objects[target], protocol, number)
        if source != target:
            compiled = self.state.policies.values()
            one, two = self.state.pods[source], self.state.pods[target]
            out = decide("egress", one, two, protocol, number, compiled, NAMESPACES)
            into = decide("ingress", two, one, protocol, number, compiled, NAMESPACES)
            assert (out.allowed and into.allowed) == wanted
        return wanted


@pytest.fixture
async def cluster():
    async with World() as world:
        made = Cluster(world)
        yield made
        made.table.remove()
        made.table.close()


class Generator:
    def __init__(self, seed: int, cidrs: list[str]) -> None:
        self.random = random.Random(seed)
        self.cidrs = cidrs

    def selector(self) -> dict[str, Any]:
        pick = self.random.random()
        if pick < 0.25:
            return {}
        if pick < 0.6:
            return {"matchLabels": {"pod": self.random.choice("abc")}}
        if pick < 0.75:
            return {"matchLabels": {"tier": self.random.choice(["front", "back"])}}
        operator = self.random.choice(["In", "NotIn", "Exists", "DoesNotExist"])
        values = {"values": self.random.sample("abcd", 2)} if operator in ("In", "NotIn") else {}
        return {"matchExpressions": [{"key": self.random.choice(["pod", "none"]), "operator": operator, **values}]}

    def namespaces(self) -> dict[str, Any]:
        choice = self.random.random()
        if choice < 0.3:
            return {}
        if choice < 0.7:
            return {"matchLabels": {"ns": self.random.choice("xyz")}}
        return {"matchLabels": {"team": "one"}}

    def peer(self) -> dict[str, Any]:
        pick = self.random.random()
        if pick < 0.3:
            return {"podSelector": self.selector()}
        if pick < 0.55:
            return {"namespaceSelector": self.namespaces()}
        if pick < 0.8:
            return {"namespaceSelector": self.namespaces(), "podSelector": self.selector()}
        block: dict[str, Any] = {"cidr": self.random.choice(["10.77.0.0/24", "10.77.0.0/29", "0.0.0.0/0", *self.cidrs])}
        if self.random.random() < 0.5:
            inside = ipaddress.ip_network(block["cidr"])
            block["except"] = [cidr for cidr in self.random.sample(self.cidrs, 2) if ipaddress.ip_network(cidr).subnet_of(inside)]
        return {"ipBlock": block}

    def port(self) -> dict[str, Any]:
        protocol = self.random.choice(["TCP", "TCP", "UDP"])
        value: dict[str, Any] = self.random.choice(
            [
                {},
                {"port": 80},
                {"port": 81},
                {"port": "web" if protocol == "TCP" else "udp"},
                {"port": 79, "endPort": 80},
                {"port": 1, "endPort": 65535},
            ]
        )
        return {"protocol": protocol, **value}

    def rules(self, side: str) -> list[dict[str, Any]]:
        out = []
        for _ in range(self.random.randint(0, 2)):
            rule: dict[str, Any] = {}
            if self.random.random() < 0.8:
                rule[side] = [self.peer() for _ in range(self.random.randint(1, 2))]
            if self.random.random() < 0.6:
                rule["ports"] = [self.port() for _ in range(self.random.randint(1, 2))]
            out.append(rule)
        return out

    def policy(self, number: int) -> dict[str, Any]:
        types = self.random.choice([["Ingress"], ["Egress"], ["Ingress", "Egress"]])
        spec: dict[str, Any] = {"podSelector": self.selector(), "policyTypes": types}
        if "Ingress" in types:
            spec["ingress"] = self.rules("from")
        if "Egress" in types:
            spec["egress"] = self.rules("to")
        return {"metadata": {"namespace": self.random.choice("xyz"), "name": f"p{number}"}, "spec": spec}


STEPS = int(os.environ.get("KNARR_POLICY_STEPS", "22"))
"""Changes of the random test; KNARR_POLICY_STEPS=400 tries about 3,000 policies in some minutes."""
SEED = int(os.environ.get("KNARR_POLICY_SEED", "20"))


@pytest.mark.timeout(60 + 4 * STEPS)
async def test_hundreds_of_random_policies_agree_with_the_model(cluster):
    await cluster.fill("abcd")
    cidrs = [f"{place.ip}/32" for place in cluster.places.values()]
    generator = Generator(SEED, cidrs)
    policies: list[dict[str, Any]] = []
    total = 0
    for step in range(STEPS):
        # Most policies stay from step to step, so that changes are tried as well as loads.
        policies = [policy for policy in policies if generator.random.random() < 0.6]
        fresh = [generator.policy(step * 100 + number) for number in range(generator.random.randint(1, 14))]
        policies += fresh
        total += len(fresh)
        if step % 3 == 2:
            cluster.relabel(generator)
        await asyncio.to_thread(cluster.apply, policies)
        wrong = await asyncio.to_thread(cluster.differences, policies)
        assert not wrong, (SEED, step, wrong[:5], policies, list_table("knt-policy", cluster.world.node.path))
    assert total > 6 * STEPS
    await asyncio.to_thread(cluster.apply, [])
    assert cluster.state.wanted().chains == {}
    assert all(cluster.probe().values())


def deny_all(namespace: str = "x") -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "name": "deny"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}


async def test_the_node_reaches_isolated_pods_and_pods_reach_themselves(cluster):
    await cluster.fill("a")
    cluster.apply(
        [deny_all(), {**deny_all(), "metadata": {"namespace": "x", "name": "out"}, "spec": {"podSelector": {}, "policyTypes": ["Egress"]}}]
    )
    a = cluster.places["x/a"]
    assert (await asyncio.to_thread(cluster.world.node.ask, a.ip, 80))[0] == "x"
    assert (await asyncio.to_thread(a.ask, a.ip, 80))[0] == "x"
    cluster.world.node.serve("n", 53, udp=True)
    assert (await asyncio.to_thread(lambda: a.ask(cluster.world.network.gateways[0], 53, udp=True)))[0] == "n"


async def test_a_living_connection_is_cut_by_a_new_policy_and_resumes_when_it_goes(cluster):
    await cluster.fill("a")
    server, client = cluster.places["x/a"].open(socket.SOCK_STREAM), cluster.places["y/a"].open(socket.SOCK_STREAM)
    server.bind(("", 7777)), server.listen(), server.settimeout(3), client.settimeout(3)

    def talk() -> None:
        client.connect((cluster.places["x/a"].ip, 7777))
        connection, _peer = server.accept()
        connection.settimeout(0.4)
        client.send(b"1")
        assert connection.recv(10) == b"1"
        cluster.apply([deny_all()])
        client.send(b"2")
        with pytest.raises(TimeoutError):
            connection.recv(10)
        cluster.apply([])
        connection.settimeout(5)
        assert connection.recv(10) == b"2"
        connection.close()

    await asyncio.to_thread(talk)
    server.close(), client.close()


async def test_a_pod_that_is_relabelled_or_replaced_moves_at_once(cluster):
    await cluster.fill("ab")
    allow = {"metadata": {"namespace": "x", "name": "p"}, "spec": {"podSelector": {"matchLabels": {"pod": "a"}}, "policyTypes": ["Ingress"],
             "ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "friend"}}}]}]}}  # fmt: skip
    cluster.apply([allow])
    ask = lambda: asyncio.to_thread(lambda: cluster.places["x/b"].ask(cluster.places["x/a"].ip, 80, seconds=0.3))
    with pytest.raises(TimeoutError):
        await ask()
    cluster.objects["x/b"]["metadata"]["labels"] = {"pod": "friend"}
    cluster.state.set_pod(read_pod(cluster.objects["x/b"]))
    cluster.table.change(cluster.state.wanted())
    assert (await ask())[0] == "x"
    cluster.state.drop_pod("x/b")
    cluster.table.change(cluster.state.wanted())
    with pytest.raises(TimeoutError):
        await ask()


def test_one_pod_of_a_thousand_that_changes_is_the_only_one_looked_at(monkeypatch):
    state = PolicyState("node-1")
    state.set_namespace("x", {"ns": "x"})
    for number in range(1000):
        obj = {
            "metadata": {"namespace": "x", "name": f"p{number}", "labels": {"app": f"a{number}"}},
            "spec": {"nodeName": f"node-{number % 10}", "containers": []},
            "status": {"podIP": f"10.9.{number // 250}.{number % 250 + 1}"},
        }
        state.set_pod(read_pod(obj))
    for number in range(1000):
        spec = {
            "podSelector": {"matchLabels": {"app": f"a{number}"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": f"a{number + 1}"}}}], "ports": [{"port": 80}]}],
        }
        state.set_policy(compile_policy({"metadata": {"namespace": "x", "name": f"n{number}"}, "spec": spec}))
    state.wanted()
    looked, classify = [], PolicyState._classify
    monkeypatch.setattr(PolicyState, "_classify", lambda state, pod: looked.append(pod.key) or classify(state, pod))
    obj["metadata"]["labels"] = {"app": "a7"}
    state.set_pod(read_pod({**obj, "spec": {**obj["spec"], "nodeName": "node-1"}}))
    state.wanted()
    assert looked == ["x/p999"]


async def test_policies_hold_in_the_second_family_too():
    async with World(dual_stack=True) as world:
        state, table = PolicyState("here"), PolicyTable("knt-policy", netns=world.node.path, on_isolate=world.network.direct.isolate)
        state.set_namespace("x", {"ns": "x"})
        places = {}
        for name in "abc":
            places[name] = place = await world.pod(name)
            place.serve("x", 80, family=socket.AF_INET6)
            state.set_pod(read_pod(pod_object(place, "x", name)))
        inside = [{"podSelector": {"matchLabels": {"pod": "b"}}}, {"ipBlock": {"cidr": f"{world.client.ips[1]}/128"}}]
        spec = {
            "podSelector": {"matchLabels": {"pod": "a"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": inside, "ports": [{"port": "web"}]}],
        }
        state.set_policy(compile_policy({"metadata": {"namespace": "x", "name": "p"}, "spec": spec}))
        table.load(state.wanted())
        target = places["a"].ips[1]
        ask = lambda place: asyncio.to_thread(lambda: place.ask(target, 80, seconds=0.4))
        assert (await ask(places["b"]))[0] == "x"
        assert (await ask(world.node))[0] == "x"
        assert (await ask(world.client))[0] == "x"
        with pytest.raises(TimeoutError):
            await ask(places["c"])
        table.remove()
        table.close()
