"""What the kernel has to hold for the policies of one node: sets of peers, chains per class of pods, and who belongs where.

Role: `PolicyState` takes pods, namespaces and policies one by one and keeps, without ever going through everything, a
`Wanted` table; `table` brings the kernel there.
Shape: pods that are isolated by the same policies form a class and share a chain; a verdict map leads from a pod's
address to its chain. A chain has one rule per peer set and port, returning on a match and dropping at its end. Peer
sets are shared by all rules that select the same. Names of chains and sets are hashes of their content's definition, so
a chain never changes: pods move to another one.
Invariants: only this node's pods have chains. The cost of a pod's event is the number of distinct peer selectors plus
its namespace's policies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NamedTuple

from knarr.api.selectors import LabelSelector
from knarr.network.policy.model import PROTOCOL_NUMBERS, Block, Direction, Peers, Policy, PolicyPod, Port, Rule

DIRECTIONS: tuple[Direction, ...] = ("ingress", "egress")


class Match(NamedTuple):
    """One rule of a chain: the set the other side must be in ("" is everybody), and the port condition (None is everything).

    With `ports_in_set` the set holds address, protocol and port together.
    """

    set_name: str
    port: tuple[str, int, int] | None
    ports_in_set: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """An immutable chain."""

    name: str
    version: int
    direction: Direction
    matches: tuple[Match, ...]


@dataclass(slots=True)
class PeerSet:
    """A set of one family: addresses, address with port, or ranges."""

    name: str
    version: int
    kind: str
    """"hosts", "ports" or "ranges"."""
    elements: set[bytes]
    ranges: tuple[tuple[int, int], ...] = ()


def _name(prefix: str, *parts: object) -> str:
    return prefix + hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=8).hexdigest()


def host_element(address: str) -> bytes:
    """An address as key."""
    return ip_address(address).packed


def port_element(address: str, protocol: int, port: int) -> bytes:
    """Address, protocol and port as key."""
    return ip_address(address).packed + bytes((protocol, 0, 0, 0)) + port.to_bytes(2, "big") + b"\0\0"


EVERYBODY = Peers("everybody", "", LabelSelector(), LabelSelector())
"""All pods of all namespaces: where a rule without peers names a port."""


@dataclass(slots=True)
class Wanted:
    """The whole table: chains and sets by name, verdict map elements, and isolated addresses."""

    chains: dict[str, Chain]
    sets: dict[str, PeerSet]
    members: dict[tuple[str, bytes], str]
    """(map name, address) to chain name."""
    isolated: set[tuple[int, bytes]]


class PolicyState:
    """See the module. `node` is the name of the node whose pods are protected."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.pods: dict[str, PolicyPod] = {}
        self.policies: dict[str, Policy] = {}
        self.namespaces: dict[str, Mapping[str, str]] = {}
        self._by_namespace: dict[str, dict[str, Policy]] = {}
        self._peers: dict[str, Peers] = {}
        self._uses: dict[str, int] = {}
        self._members: dict[str, set[str]] = {}
        self._definitions: dict[str, tuple[Peers | Block, Port | None, int]] = {}
        self._built: dict[str, PeerSet] = {}
        self._dirty_peers: set[str] = set()
        self._classes: dict[str, dict[tuple[Direction, int], Chain]] = {}
        self._stale: set[str] = set()

    # Input

    def set_namespace(self, name: str, labels: Mapping[str, str]) -> None:
        """A namespace and its labels."""
        if self.namespaces.get(name) == labels:
            return
        self.namespaces[name] = labels
        for pod in self.pods.values():
            if pod.namespace == name:
                self._place(pod)

    def drop_namespace(self, name: str) -> None:
        """A namespace is gone."""
        self.namespaces.pop(name, None)

    def set_pod(self, pod: PolicyPod) -> None:
        """A pod came or changed."""
        before = self.pods.get(pod.key)
        if before == pod:
            return
        self.pods[pod.key] = pod
        self._place(pod)
        if pod.node == self._node:
            self._stale.add(pod.key)

    def drop_pod(self, key: str) -> None:
        """A pod is gone, or no longer part of the pod network."""
        if self.pods.pop(key, None) is None:
            return
        for identity, members in self._members.items():
            if key in members:
                members.discard(key)
                self._dirty_peers.add(identity)
        self._classes.pop(key, None)
        self._stale.discard(key)

    def set_policy(self, policy: Policy) -> None:
        """A policy came or changed."""
        before = self.policies.get(policy.key)
        self.policies[policy.key] = policy
        self._by_namespace.setdefault(policy.namespace, {})[policy.key] = policy
        self._count(policy, 1)
        if before is not None:
            self._count(before, -1)
            self._touch_selected(before)
        self._touch_selected(policy)

    def drop_policy(self, key: str) -> None:
        """A policy is gone."""
        policy = self.policies.pop(key, None)
        if policy is None:
            return
        del self._by_namespace[policy.namespace][key]
        self._count(policy, -1)
        self._touch_selected(policy)

    def _touch_selected(self, policy: Policy) -> None:
        """Have the classes computed anew of this node's pods that a policy selects."""
        for pod in self.pods.values():
            if pod.node == self._node and pod.namespace == policy.namespace and policy.pods.matches(pod.labels):
                self._stale.add(pod.key)

    def _count(self, policy: Policy, difference: int) -> None:
        """Keep member sets for exactly the peer selectors that some policy uses."""
        for direction in DIRECTIONS:
            for rule in policy.rules(direction) or ():
                for peer in rule.peers or ():
                    if isinstance(peer, Peers):
                        self._use(peer, difference)
                named = direction == "egress" and any(port.name for port in rule.ports or ())
                if named and (rule.peers is None or any(isinstance(peer, Block) for peer in rule.peers)):
                    self._use(EVERYBODY, difference)

    def _use(self, peer: Peers, difference: int) -> None:
        count = self._uses.get(peer.id, 0) + difference
        if count > 0:
            self._uses[peer.id] = count
            if peer.id not in self._peers:
                self._peers[peer.id] = peer
                namespaces = self.namespaces
                self._dirty_peers.add(peer.id)
                self._members[peer.id] = {pod.key for pod in self.pods.values() if self._belongs(peer, pod, namespaces.get(pod.namespace))}
        else:
            self._uses.pop(peer.id, None)
            self._peers.pop(peer.id, None)
            self._members.pop(peer.id, None)

    @staticmethod
    def _belongs(peer: Peers, pod: PolicyPod, labels: Mapping[str, str] | None) -> bool:
        return peer is EVERYBODY or peer.matches(pod, labels)

    def _place(self, pod: PolicyPod) -> None:
        labels = self.namespaces.get(pod.namespace)
        key = pod.key
        for identity, peer in self._peers.items():
            members = self._members[identity]
            if self._belongs(peer, pod, labels):
                members.add(key)
            elif key in members:
                members.discard(key)
            else:
                continue
            # Also a pod that stays a member may have other addresses or ports now.
            self._dirty_peers.add(identity)

    def isolated(self, key: str) -> bool:
        """Whether some policy selects a pod."""
        pod = self.pods.get(key)
        return pod is not None and any(policy.pods.matches(pod.labels) for policy in self._by_namespace.get(pod.namespace, {}).values())

    # Output

    def wanted(self) -> Wanted:
        """The table as it should be now."""
        for key in self._stale:
            pod = self.pods.get(key)
            chains = self._classify(pod) if pod is not None and pod.node == self._node else {}
            if chains:
                self._classes[key] = chains
            else:
                self._classes.pop(key, None)
        self._stale = set()
        out = Wanted({}, {}, {}, set())
        for key, chains in self._classes.items():
            pod = self.pods[key]
            for address in pod.ips:
                version = 6 if ":" in address else 4
                packed = host_element(address)
                for direction in DIRECTIONS:
                    chain = chains.get((direction, version))
                    if chain is not None:
                        out.chains[chain.name] = chain
                        out.members[f"{direction}{version}", packed] = chain.name
                        out.isolated.add((version, packed))
        for chain in out.chains.values():
            for match in chain.matches:
                if match.set_name and match.set_name not in out.sets:
                    out.sets[match.set_name] = self._set(match.set_name)
        self._built = out.sets
        self._definitions = {name: self._definitions[name] for name in out.sets}
        self._dirty_peers = set()
        return out

    def _classify(self, pod: PolicyPod) -> dict[tuple[Direction, int], Chain]:
        chains: dict[tuple[Direction, int], Chain] = {}
        selecting = [policy for policy in self._by_namespace.get(pod.namespace, {}).values() if policy.pods.matches(pod.labels)]
        for direction in DIRECTIONS:
            isolating = [policy for policy in selecting if policy.rules(direction) is not None]
            if not isolating:
                continue
            for version in {6 if ":" in address else 4 for address in pod.ips}:
                matches: dict[Match, None] = {}
                for policy in isolating:
                    for rule in policy.rules(direction) or ():
                        matches.update(dict.fromkeys(self._matches(rule, direction, version, pod)))
                ordered = tuple(sorted(matches, key=str))
                name = _name(f"{direction}{version}-", ordered)
                chains[direction, version] = Chain(name, version, direction, ordered)
        return chains

    def _matches(self, rule: Rule, direction: Direction, version: int, pod: PolicyPod) -> Iterable[Match]:
        conditions: list[tuple[str, int, int] | None] = []
        named: list[Port] = []
        if rule.ports is None:
            conditions.append(None)
        for port in rule.ports or ():
            if not port.name:
                conditions.append((port.protocol, port.first, port.last))
            elif direction == "egress":
                named.append(port)
            else:
                number = pod.named_port(port.name, port.protocol)
                if number is not None:
                    conditions.append((port.protocol, number, number))
        for peer in rule.peers if rule.peers is not None else (None,):
            set_name = self._set_name(peer, version)
            if set_name is not None:
                for condition in conditions:
                    yield Match(set_name, condition)
            # A name means a port of the pod that is reached, so it needs the peers' own numbers; in a block, those of the pods in it.
            for port in named:
                if not isinstance(peer, Block) or peer.version == version:
                    yield Match(self._define_ports(peer or EVERYBODY, port, version), None, True)

    def _set_name(self, peer: Peers | Block | None, version: int) -> str | None:
        if peer is None:
            return ""
        if isinstance(peer, Block) and peer.version != version:
            return None
        name = _name(f"{'block' if isinstance(peer, Block) else 'peers'}{version}-", peer.id)
        self._definitions[name] = (peer, None, version)
        return name

    def _define_ports(self, peer: Peers | Block, port: Port, version: int) -> str:
        name = _name(f"ports{version}-", peer.id, port.name, port.protocol)
        self._definitions[name] = (peer, port, version)
        return name

    def _set(self, name: str) -> PeerSet:
        peer, port, version = self._definitions[name]
        known = self._built.get(name)
        members = EVERYBODY.id if isinstance(peer, Block) else peer.id
        if known is not None and members not in self._dirty_peers:
            return known
        if isinstance(peer, Block) and port is None:
            return PeerSet(name, version, "ranges", set(), peer.ranges)
        elements: set[bytes] = set()
        for key in self._members.get(members, ()):
            pod = self.pods[key]
            number = pod.named_port(port.name, port.protocol) if port is not None else None
            for address in pod.ips:
                if (":" in address) != (version == 6) or (isinstance(peer, Block) and not peer.holds(address)):
                    continue
                if port is None:
                    elements.add(host_element(address))
                elif number is not None:
                    elements.add(port_element(address, PROTOCOL_NUMBERS[port.protocol], number))
        return PeerSet(name, version, "ports" if port is not None else "hosts", elements)
