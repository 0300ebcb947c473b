"""NetworkPolicies compiled, pods as policies see them, and the decision in plain Python.

Role: `state` computes kernel tables from these; `why` and tests ask `decide` the same question without a kernel.
Invariants: pure. Pods on the host's network, without address or ended are not part of the pod network and appear nowhere here.
Source: NetworkPolicy API (networking/v1 types.go), KEP-2079 (endPort).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple

from knarr.api.addresses import Network, sloppy_network
from knarr.api.selectors import LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.network.objects import is_address

Direction = Literal["ingress", "egress"]
PROTOCOL_NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}


@dataclass(frozen=True, slots=True)
class PolicyPod:
    """A pod of the pod network."""

    namespace: str
    name: str
    labels: Mapping[str, str]
    ips: tuple[str, ...]
    node: str
    ports: tuple[tuple[str, str, int], ...]
    """Named container ports: (name, protocol, number)."""

    @property
    def key(self) -> str:
        """ "namespace/name"."""
        return f"{self.namespace}/{self.name}"

    def named_port(self, name: str, protocol: str) -> int | None:
        """The number of a named port."""
        return next((number for known, kind, number in self.ports if known == name and kind == protocol), None)


def read_pod(obj: Object) -> PolicyPod | None:
    """A Pod as policies see it; None for one that is not part of the pod network (now)."""
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    if spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    listed = [item.get("ip") for item in status.get("podIPs") or ()] or [status.get("podIP")]
    ips = tuple(address for address in listed if address and is_address(address))
    if not ips:
        return None
    containers = [*(spec.get("containers") or ()), *(c for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always")]
    ports = tuple(
        (port["name"], port.get("protocol") or "TCP", int(port["containerPort"]))
        for container in containers
        for port in container.get("ports") or ()
        if port.get("name")
    )
    meta = obj["metadata"]
    return PolicyPod(meta["namespace"], meta["name"], meta.get("labels") or {}, ips, spec.get("nodeName", ""), ports)


class Port(NamedTuple):
    """One port condition: numbers first to last, or a name (resolved at the destination pod), or all of a protocol (0 to 65535)."""

    protocol: str
    first: int
    last: int
    name: str = ""


@dataclass(frozen=True)
class Peers:
    """Pods by namespace and pod labels. `namespace` is set when only the policy's own namespace counts."""

    id: str
    namespace: str
    namespaces: LabelSelector | None
    pods: LabelSelector

    def matches(self, pod: PolicyPod, namespace_labels: Mapping[str, str] | None) -> bool:
        """Whether a pod belongs; namespace_labels is None while its namespace is unknown."""
        if self.namespaces is None:
            if pod.namespace != self.namespace:
                return False
        elif namespace_labels is None or not self.namespaces.matches(namespace_labels):
            return False
        return self.pods.matches(pod.labels)


class Block(NamedTuple):
    """An ipBlock as disjoint ranges of one family, exceptions taken out."""

    id: str
    version: int
    ranges: tuple[tuple[int, int], ...]

    def holds(self, address: str) -> bool:
        """Whether an address lies in it."""
        parsed = ip_address(address)
        return parsed.version == self.version and any(first <= int(parsed) <= last for first, last in self.ranges)


@dataclass(frozen=True)
class Rule:
    """One rule: peers None means everybody, ports None means everything (other protocols, too)."""

    peers: tuple[Peers | Block, ...] | None
    ports: tuple[Port, ...] | None


@dataclass(frozen=True)
class Policy:
    """A compiled NetworkPolicy. Rules are None for a direction that it does not isolate."""

    namespace: str
    name: str
    pods: LabelSelector
    ingress: tuple[Rule, ...] | None
    egress: tuple[Rule, ...] | None
    problems: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        """ "namespace/name"."""
        return f"{self.namespace}/{self.name}"

    def rules(self, direction: Direction) -> tuple[Rule, ...] | None:
        """Rules of one direction."""
        return self.ingress if direction == "ingress" else self.egress


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, disjoint, non-adjacent ranges covering the same numbers."""
    merged: list[list[int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return tuple((first, last) for first, last in merged)


def _subtract(ranges: Iterable[tuple[int, int]], hole: tuple[int, int]) -> list[tuple[int, int]]:
    out = []
    for first, last in ranges:
        if hole[1] < first or hole[0] > last:
            out.append((first, last))
            continue
        if first < hole[0]:
            out.append((first, hole[0] - 1))
        if last > hole[1]:
            out.append((hole[1] + 1, last))
    return out


def _network(text: str) -> Network:
    network = sloppy_network(text)
    if network is None:
        raise ValueError(f"{text!r} does not appear to be an IPv4 or IPv6 network")
    return network


def compile_block(block: Mapping[str, Any]) -> Block:
    """Raises ValueError for text that is no network."""
    network = _network(block["cidr"])
    ranges = [(int(network.network_address), int(network.broadcast_address))]
    for text in block.get("except") or ():
        hole = _network(text)
        if hole.version == network.version:
            ranges = _subtract(ranges, (int(hole.network_address), int(hole.broadcast_address)))
    identity = json.dumps([str(network), sorted(block.get("except") or ())])
    return Block(identity, network.version, merge_ranges(ranges))


def _compile_peer(peer: Mapping[str, Any], namespace: str) -> Peers | Block:
    if peer.get("ipBlock") is not None:
        return compile_block(peer["ipBlock"])
    namespaces = peer.get("namespaceSelector")
    pods = peer.get("podSelector") or {}
    own = namespace if namespaces is None else ""
    identity = json.dumps([own, namespaces, pods], sort_keys=True)
    return Peers(identity, own, from_label_selector(namespaces) if namespaces is not None else None, from_label_selector(pods))


def _compile_port(port: Mapping[str, Any]) -> Port:
    protocol = port.get("protocol") or "TCP"
    if protocol not in PROTOCOL_NUMBERS:
        raise ValueError(f"protocol {protocol} is not supported")
    number = port.get("port")
    if number is None:
        return Port(protocol, 0, 65535)
    if isinstance(number, str):
        return Port(protocol, 0, 0, number)
    return Port(protocol, number, port.get("endPort") or number)


def _compile_rules(rules: Iterable[Mapping[str, Any]], side: str, namespace: str, problems: list[str]) -> tuple[Rule, ...]:
    out = []
    for rule in rules:
        try:
            peers = tuple(_compile_peer(peer, namespace) for peer in rule.get(side) or ())
            ports = tuple(_compile_port(port) for port in rule.get("ports") or ())
        except (ValueError, KeyError, TypeError) as error:
            # A rule that cannot be understood allows nothing; the others of the policy still do.
            problems.append(str(error))
            continue
        out.append(Rule(peers or None, ports or None))
    return tuple(out)


def compile_policy(obj: Object) -> Policy:
    """Compile a NetworkPolicy; what cannot be understood is named in `problems` and allows nothing."""
    meta, spec = obj["metadata"], obj.get("spec") or {}
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    problems: list[str] = []
    namespace = meta["namespace"]
    ingress = _compile_rules(spec.get("ingress") or (), "from", namespace, problems) if "Ingress" in types else None
    egress = _compile_rules(spec.get("egress") or (), "to", namespace, problems) if "Egress" in types else None
    return Policy(namespace, meta["name"], from_label_selector(spec.get("podSelector") or {}), ingress, egress, tuple(problems))


class Verdict(NamedTuple):
    """A decision for one direction: whether allowed, and the policies that decided (those that allow, or all that isolate)."""

    allowed: bool
    policies: tuple[str, ...]


def decide(
    direction: Direction,
    pod: PolicyPod,
    other: PolicyPod | str,
    protocol: str,
    port: int,
    policies: Iterable[Policy],
    namespace_labels: Mapping[str, Mapping[str, str]],
) -> Verdict:
    """Decide for one pod (the isolated side), the other side (a pod or an address), and a destination port."""
    isolating = [p for p in policies if p.namespace == pod.namespace and p.rules(direction) is not None and p.pods.matches(pod.labels)]
    if not isolating:
        return Verdict(True, ())
    target = pod if direction == "ingress" else other
    allowing = []
    for policy in isolating:
        for rule in policy.rules(direction) or ():
            if _peers_match(rule, other, namespace_labels) and _ports_match(rule, target, protocol, port):
                allowing.append(policy.key)
                break
    return Verdict(bool(allowing), tuple(allowing or (policy.key for policy in isolating)))


def _peers_match(rule: Rule, other: PolicyPod | str, namespace_labels: Mapping[str, Mapping[str, str]]) -> bool:
    if rule.peers is None:
        return True
    addresses = [other] if isinstance(other, str) else list(other.ips)
    for peer in rule.peers:
        if isinstance(peer, Peers):
            if isinstance(other, PolicyPod) and peer.matches(other, namespace_labels.get(other.namespace)):
                return True
        elif any(map(peer.holds, addresses)):
            return True
    return False


def _ports_match(rule: Rule, target: PolicyPod | str, protocol: str, port: int) -> bool:
    if rule.ports is None:
        return True
    for condition in rule.ports:
        if condition.protocol != protocol:
            continue
        if condition.name:
            if isinstance(target, PolicyPod) and target.named_port(condition.name, protocol) == port:
                return True
        elif condition.first <= port <= condition.last:
            return True
    return False
