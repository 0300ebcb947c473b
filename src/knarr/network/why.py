"""Why a packet does or does not arrive: the walk from a pod to a pod, Service or address, step by step.

Role: the library behind `knarr why pod/a pod/b:80`. It asks the API only and judges with the same functions that proxy
and policy use, so what it says is what the nodes do. Each step names what stops the packet: the policy, the selector,
the missing endpoint.
Invariants: pure over a `Snapshot`; nothing is changed, nothing is sent to pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from knarr.api.resources import ENDPOINT_SLICES, NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICES
from knarr.api.selectors import from_map
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.network.objects import object_key, slice_service
from knarr.network.policy.model import Direction, Policy, PolicyPod, compile_policy, decide, read_pod
from knarr.network.proxy.topology import Endpoint, NodeView, categorise, collect


class BadQuestion(ValueError):
    """The question cannot be understood; the text says what is expected."""


@dataclass(frozen=True, slots=True)
class Step:
    """One station of the walk. ok is None for a remark that decides nothing."""

    ok: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Place:
    """One end: kind is "pod", "svc", "node" or "ip"."""

    kind: str
    namespace: str
    name: str
    port: str = ""


@dataclass
class Snapshot:
    """The objects that matter, as lists from the API."""

    pods: list[Object] = field(default_factory=list)
    services: list[Object] = field(default_factory=list)
    slices: list[Object] = field(default_factory=list)
    policies: list[Object] = field(default_factory=list)
    namespaces: list[Object] = field(default_factory=list)
    nodes: list[Object] = field(default_factory=list)


def parse_place(text: str, namespace: str = "default", *, port: bool = False) -> Place:
    """Read "pod/a", "pod/ns/a", "svc/web:80", "web.ns:http", "10.0.0.1:80". Raises BadQuestion."""
    rest, wanted = text, ""
    if port:
        rest, colon, wanted = text.rpartition(":")
        if not colon or not wanted:
            raise BadQuestion(f"{text!r}: a destination needs a port, for example pod/b:80")
    parts = rest.split("/")
    kind = {"pod": "pod", "po": "pod", "pods": "pod", "svc": "svc", "service": "svc", "services": "svc", "node": "node"}.get(parts[0])
    if len(parts) > 1:
        if kind is None or len(parts) > 3:
            raise BadQuestion(f"{text!r}: expected pod/NAME, pod/NAMESPACE/NAME, svc/NAME or an address")
        return Place(kind, parts[1] if len(parts) == 3 else namespace, parts[-1], wanted)
    try:
        return Place("ip", "", str(ip_address(rest.strip("[]"))), wanted)
    except ValueError:
        labels = rest.split(".")
    return Place("svc", labels[1] if len(labels) > 1 else namespace, labels[0], wanted)


async def take_snapshot(client: Client) -> Snapshot:
    """Read what the walk needs from the API. Raises StatusError."""
    found = []
    for resource in (PODS, SERVICES, ENDPOINT_SLICES, NETWORK_POLICIES, NAMESPACES, NODES):
        found.append((await client.list(resource, resource_version="0")).get("items") or [])
    return Snapshot(*found)


async def why(client: Client, source: str, target: str, *, namespace: str = "default", protocol: str = "TCP") -> list[Step]:
    """Walk from `source` to `target` as the API has them now. Raises BadQuestion, StatusError."""
    return walk(await take_snapshot(client), parse_place(source, namespace), parse_place(target, namespace, port=True), protocol)


def walk(snapshot: Snapshot, source: Place, target: Place, protocol: str = "TCP") -> list[Step]:
    """The steps; the walk ends at the first that stops the packet for good."""
    walker = _Walker(snapshot, protocol)
    walker.start(source)
    if not walker.stopped:
        walker.arrive(target)
    return walker.steps


def find_object(objects: Iterable[Object], namespace: str, name: str) -> Object | None:
    key = f"{namespace}/{name}"
    return next((obj for obj in objects if object_key(obj) == key), None)


def service_endpoints(snapshot: Snapshot, target: Place, protocol: str = "TCP") -> tuple[list[Step], list[Object]]:
    """(steps, pods behind it) of a Service's port for whoever asks, without judging policies and ways."""
    walker = _Walker(snapshot, protocol)
    found = walker.service_port(target)
    usable = walker.usable_endpoints(*found) if found is not None else []
    return walker.steps, [pod for endpoint in usable if (pod := walker.pod_at(endpoint.ip)) is not None]


class _Walker:
    def __init__(self, snapshot: Snapshot, protocol: str) -> None:
        self._snapshot = snapshot
        self._protocol = protocol
        self.steps: list[Step] = []
        self._from: Object | None = None
        self._from_pod: PolicyPod | None = None
        self._from_node = ""
        self._policies: list[Policy] = [compile_policy(obj) for obj in snapshot.policies]
        self._labels: dict[str, Mapping[str, str]] = {
            obj["metadata"]["name"]: obj["metadata"].get("labels") or {} for obj in snapshot.namespaces
        }

    @property
    def stopped(self) -> bool:
        return any(step.ok is False for step in self.steps)

    def _yes(self, text: str) -> None:
        self.steps.append(Step(True, text))

    def _no(self, text: str) -> None:
        self.steps.append(Step(False, text))

    def _note(self, text: str) -> None:
        self.steps.append(Step(None, text))

    def start(self, source: Place) -> None:
        if source.kind == "node":
            self._from_node = source.name
            self._yes(f"node {source.name} sends; policies do not hold for a node and its own pods")
            return
        if source.kind != "pod":
            self._note(f"{source.name} is outside of the cluster")
            return
        pod = find_object(self._snapshot.pods, source.namespace, source.name)
        if pod is None:
            self._no(f"pod {source.namespace}/{source.name} does not exist")
            return
        self._from, self._from_pod = pod, read_pod(pod)
        self._from_node = (pod.get("spec") or {}).get("nodeName", "")
        self._pod_lives(pod, "sends from")

    def _pod_lives(self, pod: Object, verb: str) -> bool:
        key, status = object_key(pod), pod.get("status") or {}
        if status.get("phase") != "Running":
            waiting = [
                ((container.get("state") or {}).get("waiting") or {}).get("reason") for container in status.get("containerStatuses") or ()
            ]
            reasons = ", ".join(reason for reason in waiting if reason)
            self._no(f"pod {key} is {status.get('phase') or 'Pending'}, not running{': ' + reasons if reasons else ''}")
            return False
        if not status.get("podIP"):
            self._no(f"pod {key} has no address yet")
            return False
        self._yes(f"pod {key} {verb} {status['podIP']} on node {(pod.get('spec') or {}).get('nodeName')}")
        return True

    def arrive(self, target: Place) -> None:
        if target.kind == "pod":
            pod = find_object(self._snapshot.pods, target.namespace, target.name)
            if pod is None:
                self._no(f"pod {target.namespace}/{target.name} does not exist")
                return
            if self._pod_lives(pod, "receives at"):
                self._to_pod(pod, self._pod_port(pod, target.port))
        elif target.kind == "svc":
            self._to_service(target)
        elif target.kind == "node":
            self._yes(f"node {target.name} receives; the node a pod runs on is always allowed")
        else:
            self._to_address(target)

    def _pod_port(self, pod: Object, port: str) -> int:
        if port.isdigit():
            return int(port)
        for container in (pod.get("spec") or {}).get("containers") or ():
            for item in container.get("ports") or ():
                if item.get("name") == port:
                    return int(item["containerPort"])
        self._no(f"pod {object_key(pod)} has no port named {port}")
        return 0

    def _to_address(self, target: Place) -> None:
        pod = self.pod_at(target.name)
        if pod is not None:
            self._note(f"{target.name} is pod {object_key(pod)}")
            self._to_pod(pod, int(target.port))
            return
        for service in self._snapshot.services:
            if target.name in ((service.get("spec") or {}).get("clusterIPs") or ()):
                self._note(f"{target.name} is service {object_key(service)}")
                meta = service["metadata"]
                self._to_service(Place("svc", meta["namespace"], meta["name"], target.port))
                return
        if self._from_pod is not None:
            self._judge("egress", self._from_pod, target.name, int(target.port))
            if not self.stopped:
                self._yes(f"the packet leaves node {self._from_node} with the node's address")

    def _to_pod(self, pod: Object, port: int) -> None:
        if self.stopped:
            return
        receiver = read_pod(pod)
        if self._from is pod:
            self._yes("a pod always reaches itself")
        else:
            if self._from_pod is not None:
                self._judge("egress", self._from_pod, receiver or pod["status"]["podIP"], port)
            if receiver is not None and not self.stopped:
                node = (pod.get("spec") or {}).get("nodeName", "")
                if self._from is None and node == self._from_node:
                    self._yes("the node reaches its own pods whatever the policies")
                else:
                    self._judge("ingress", receiver, self._from_pod or "0.0.0.0", port)
        if not self.stopped:
            self._between_nodes((pod.get("spec") or {}).get("nodeName", ""))
            self._listening(pod, port)

    def _judge(self, direction: Direction, pod: PolicyPod, other: PolicyPod | str, port: int) -> None:
        verdict = decide(direction, pod, other, self._protocol, port, self._policies, self._labels)
        side = "leave" if direction == "egress" else "enter"
        if not verdict.policies:
            self._yes(f"no {direction} policy selects pod {pod.key}: everything may {side} it")
        elif verdict.allowed:
            self._yes(f"{direction} of pod {pod.key} is allowed by policy {', '.join(verdict.policies)}")
        else:
            peer = other.key if isinstance(other, PolicyPod) else other
            self._no(
                f"{direction} of pod {pod.key} is denied: selected by policy {', '.join(verdict.policies)}, and no rule of them allows "
                f"{peer} on {self._protocol} port {port}"
            )

    def _between_nodes(self, node: str) -> None:
        if not node or not self._from_node or node == self._from_node:
            return
        for name in (self._from_node, node):
            found = next((obj for obj in self._snapshot.nodes if obj["metadata"]["name"] == name), None)
            if found is None:
                self._no(f"node {name} does not exist any more")
                return
            if not (found.get("spec") or {}).get("podCIDR"):
                self._no(f"node {name} has no pod CIDR")
                return
            conditions = (found.get("status") or {}).get("conditions") or ()
            if not any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions):
                self._note(f"node {name} is not ready")
        self._yes(f"node {self._from_node} has a route to the pods of node {node}")

    def _listening(self, pod: Object, port: int) -> None:
        ports = [item for container in (pod.get("spec") or {}).get("containers") or () for item in container.get("ports") or ()]
        if ports and not any(item.get("containerPort") == port and (item.get("protocol") or "TCP") == self._protocol for item in ports):
            declared = ", ".join(f"{item.get('containerPort')}/{item.get('protocol') or 'TCP'}" for item in ports)
            self._note(
                f"pod {object_key(pod)} declares {declared}, not {port}/{self._protocol}; a connection is refused if nothing listens there"
            )

    # Services

    def service_port(self, target: Place) -> tuple[Object, dict[str, Any]] | None:
        """The Service and its port that the packet is for; None when it goes no further, or past the Service."""
        service = find_object(self._snapshot.services, target.namespace, target.name)
        key = f"{target.namespace}/{target.name}"
        if service is None:
            near = sorted(object_key(obj) for obj in self._snapshot.services if obj["metadata"]["name"] == target.name)
            self._no(f"service {key} does not exist{'; there is ' + ', '.join(near) if near else ''}")
            return None
        spec = service.get("spec") or {}
        if spec.get("type") == "ExternalName":
            self._yes(f"service {key} is the external name {spec.get('externalName')}: the packet goes there directly")
            return None
        port = next((item for item in spec.get("ports") or () if target.port in (item.get("name"), str(item.get("port")))), None)
        if port is None or (port.get("protocol") or "TCP") != self._protocol:
            offered = ", ".join(f"{item.get('port')}/{item.get('protocol') or 'TCP'}" for item in spec.get("ports") or ())
            self._no(f"service {key} has no port {target.port}/{self._protocol}; it has {offered or 'none'}")
            return None
        if spec.get("clusterIP") == "None":
            self._yes(f"service {key} is headless: its name leads to its pods themselves")
        else:
            self._yes(f"service {key} answers at {spec.get('clusterIP')} port {port['port']}")
        return service, port

    def usable_endpoints(self, service: Object, port: dict[str, Any]) -> list[Endpoint]:
        """The endpoints that a packet from here may be sent to; says why when there are none."""
        key, spec = object_key(service), service["spec"]
        family = "IPv6" if ":" in str(spec.get("clusterIP")) else "IPv4"
        parts = [part for part in self._snapshot.slices if key in slice_service(part)]
        node = NodeView(self._from_node, self._zone())
        protocol = port.get("protocol") or "TCP"
        found = collect(parts, port.get("name") or "", protocol, family, node, bool(spec.get("publishNotReadyAddresses")))
        local = spec.get("internalTrafficPolicy") == "Local" and bool(self._from_node)
        backends = categorise(found, node, uses_cluster=not local, uses_local=local)
        usable = list(backends.local if local else backends.cluster)
        if not usable:
            self._explain_no_endpoints(service, port, parts, bool(found), local and backends.any_endpoints)
            return []
        self._yes(f"{len(usable)} of {len(found)} endpoints are used from here: {', '.join(f'{e.ip}:{e.port}' for e in usable[:5])}")
        return usable

    def pod_at(self, address: str) -> Object | None:
        """The pod with this address in the pod network."""
        addressed = ((pod, item.get("ip")) for pod in self._snapshot.pods for item in (pod.get("status") or {}).get("podIPs") or ())
        return next((pod for pod, ip in addressed if ip == address and read_pod(pod) is not None), None)

    def _to_service(self, target: Place) -> None:
        found = self.service_port(target)
        usable = self.usable_endpoints(*found) if found is not None else []
        if not usable:
            return
        outcomes = []
        base = list(self.steps)
        for endpoint in usable:
            pod = self.pod_at(endpoint.ip)
            self.steps = list(base)
            if pod is not None:
                self._to_pod(pod, endpoint.port)
            elif self._from_pod is not None:
                self._judge("egress", self._from_pod, endpoint.ip, endpoint.port)
            outcomes.append(self.steps[len(base) :])
        # All endpoints fare alike in nearly every cluster; the one that fails is the one to show.
        failing = [steps for steps in outcomes if any(step.ok is False for step in steps)]
        if failing and len(failing) < len(outcomes):
            base.append(Step(None, f"only {len(failing)} of {len(outcomes)} endpoints cannot be reached, so some connections fail"))
        self.steps = base + (failing or outcomes)[0]

    def _zone(self) -> str:
        node = next((obj for obj in self._snapshot.nodes if obj["metadata"]["name"] == self._from_node), None)
        labels = (node["metadata"].get("labels") or {}) if node is not None else {}
        return str(labels.get("topology.kubernetes.io/zone", ""))

    def _explain_no_endpoints(self, service: Object, port: dict[str, Any], parts: list[Object], any_found: bool, elsewhere: bool) -> None:
        key, spec = object_key(service), service["spec"]
        if elsewhere:
            self._no(f"service {key} has internalTrafficPolicy Local and no endpoint on node {self._from_node}: the packet is dropped")
            return
        selector = spec.get("selector") or {}
        if not selector:
            self._no(
                f"service {key} has no selector and {'only unready' if any_found else 'no'} endpoints in its {len(parts)} EndpointSlices"
            )
            return
        words = ",".join(f"{name}={text}" for name, text in sorted(selector.items()))
        namespace = service["metadata"]["namespace"]
        pods = [pod for pod in self._snapshot.pods if pod["metadata"]["namespace"] == namespace]
        matching = [pod for pod in pods if from_map(selector).matches(pod["metadata"].get("labels") or {})]
        if not matching:
            partly = [
                object_key(pod)
                for pod in pods
                if any((pod["metadata"].get("labels") or {}).get(name) == text for name, text in selector.items())
            ]
            hint = f"; nearest: {', '.join(sorted(partly)[:3])}" if partly else ""
            self._no(f"the selector {words} of service {key} matches none of the {len(pods)} pods in namespace {namespace}{hint}")
            return
        named = port.get("targetPort")
        if isinstance(named, str) and not any_found and not any(_has_port(pod, named) for pod in matching):
            self._no(f"service {key} sends to the port named {named!r}, which none of its {len(matching)} pods has")
            return
        states = ", ".join(f"{pod['metadata']['name']} ({_state(pod)})" for pod in matching[:5])
        self._no(f"service {key} selects {len(matching)} pods, but none is ready: {states}")


def _has_port(pod: Object, name: str) -> bool:
    containers = (pod.get("spec") or {}).get("containers") or ()
    return any(item.get("name") == name for container in containers for item in container.get("ports") or ())


def _state(pod: Object) -> str:
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return "terminating"
    for container in status.get("containerStatuses") or ():
        waiting = (container.get("state") or {}).get("waiting")
        if waiting:
            return str(waiting.get("reason"))
    if status.get("phase") == "Running":
        return "running, not ready"
    return str(status.get("phase") or "Pending")
