"""The cluster's names: from Services, EndpointSlices and Namespaces to DNS records, by the specification.

Role: `ClusterZone.resolve` is called by the server for names of the cluster domain and for reverse names. Pure reading
from informers; `on_change` tells the server when cached answers are out of date. Names are taken apart and looked up;
no table of all names is kept, except addresses for PTR.
Invariants: a name that exists without records of the asked type is NODATA, every other name NXDOMAIN; both carry the
SOA.
Source: kubernetes/dns docs/specification.md 1.1; coredns plugin/kubernetes (parse.go, kubernetes.go).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Protocol

from knarr.aiokits.clock import now
from knarr.api.types import Object
from knarr.network.dns.wire import (
    AAAA,
    ANY,
    CNAME,
    NOERROR,
    NS,
    NXDOMAIN,
    PTR,
    SOA,
    SRV,
    TXT,
    A,
    Record,
    WireError,
    encode_name,
    soa_data,
    srv_data,
    text_data,
)

VERSION = "1.1.0"
NAMESPACE, NAME = "kube-system", "kube-dns"
"""The Service that leads to DNS servers."""


class Store(Protocol):
    """What the zone reads of an informer."""

    def get(self, namespace: str | None, name: str) -> Object | None: ...
    def by_index(self, index: str, value: str) -> list[Object]: ...


@dataclass(slots=True)
class Resolved:
    """What the zone says: code, records, and a name outside that the answer continues with (ExternalName)."""

    code: int = NOERROR
    answers: list[Record] = field(default_factory=list)
    additionals: list[Record] = field(default_factory=list)
    follow: str = ""

    @property
    def negative(self) -> bool:
        """Whether the SOA belongs into the answer."""
        return not self.answers


def service_addresses(obj: Object) -> list[str]:
    """Index function: cluster IPs of a Service."""
    spec = obj.get("spec") or {}
    found = spec.get("clusterIPs") or [spec.get("clusterIP", "")]
    return [address for address in found if address and address != "None"]


def slice_addresses(obj: Object) -> list[str]:
    """Index function: addresses in an EndpointSlice."""
    return [address for endpoint in obj.get("endpoints") or () for address in endpoint.get("addresses") or ()]


class ClusterZone:
    """See the module.

    Args:
      services: Informer of Services with the index "address" (service_addresses).
      slices: Informer of EndpointSlices with the indexes "service" ("namespace/name") and "address" (slice_addresses).
      namespaces: Informer of Namespaces.
      domain: The cluster domain, e.g. "cluster.local".
    """

    def __init__(self, services: Store, slices: Store, namespaces: Store, *, domain: str = "cluster.local", ttl_seconds: int = 5) -> None:
        self._services = services
        self._slices = slices
        self._namespaces = namespaces
        self.domain = domain.strip(".").lower()
        self.ttl = ttl_seconds
        self._suffix = "." + self.domain

    def owns(self, name: str) -> bool:
        """Whether a name lies in the cluster domain."""
        return name == self.domain or name.endswith(self._suffix)

    def soa(self) -> Record:
        """The zone's start of authority."""
        data = soa_data(f"ns.dns.{self.domain}", f"hostmaster.{self.domain}", int(now()) & 0xFFFFFFFF, self.ttl)
        return Record(self.domain, SOA, self.ttl, data)

    def resolve(self, name: str, kind: int) -> Resolved:
        """Answer for a name of the cluster domain (see `owns`)."""
        try:
            return self._resolve(name, kind)
        except WireError:
            # Some stored name does not fit into DNS; for DNS it does not exist.
            return Resolved(NXDOMAIN)

    def _resolve(self, name: str, kind: int) -> Resolved:
        if name == self.domain:
            return self._apex(kind)
        labels = name[: -len(self._suffix)].split(".")
        root = labels[-1]
        if root == "svc":
            return self._in_services(name, labels[:-1], kind)
        if root == "pod":
            return self._in_pods(name, labels[:-1], kind)
        if labels == ["dns-version"]:
            return self._pack(kind, [Record(name, TXT, self.ttl, text_data(VERSION))])
        if labels == ["ns", "dns"]:
            return self._pack(kind, [self._address(name, address) for address in self._server_addresses()])
        if labels == ["dns"]:
            return self._pack(kind, [])
        return Resolved(NXDOMAIN)

    def _apex(self, kind: int) -> Resolved:
        target = f"{NAME}.{NAMESPACE}.svc.{self.domain}"
        glue = [self._address(target, address) for address in self._server_addresses()]
        server = Record(self.domain, NS, self.ttl, encode_name(target if glue else f"ns.dns.{self.domain}"))
        return self._pack(kind, [self.soa(), server], glue if kind in (NS, ANY) else ())

    def _server_addresses(self) -> list[str]:
        service = self._services.get(NAMESPACE, NAME)
        return service_addresses(service) if service is not None else []

    @staticmethod
    def _pack(kind: int, records: Iterable[Record], additionals: Iterable[Record] = ()) -> Resolved:
        """Of a name that exists: the records of the asked type (none is NODATA)."""
        chosen = [record for record in records if kind in (record.type, ANY)]
        return Resolved(NOERROR, chosen, list(additionals) if chosen else [])

    def _address(self, name: str, address: str) -> Record:
        parsed = ip_address(address)
        return Record(name, A if parsed.version == 4 else AAAA, self.ttl, parsed.packed)

    def _in_pods(self, name: str, labels: list[str], kind: int) -> Resolved:
        if not labels:
            return self._pack(kind, [])
        namespace = labels[-1]
        if self._namespaces.get(None, namespace) is None:
            return Resolved(NXDOMAIN)
        if len(labels) == 1:
            return self._pack(kind, [])
        if len(labels) != 2:
            return Resolved(NXDOMAIN)
        dashed = labels[0]
        for candidate, parse in ((dashed.replace("-", "."), IPv4Address), (dashed.replace("-", ":"), IPv6Address)):
            try:
                return self._pack(kind, [self._address(name, str(parse(candidate)))])
            except ValueError:
                continue
        return Resolved(NXDOMAIN)

    def _in_services(self, name: str, labels: list[str], kind: int) -> Resolved:
        if not labels:
            return self._pack(kind, [])
        namespace = labels[-1]
        if len(labels) == 1:
            exists = self._namespaces.get(None, namespace) is not None
            return self._pack(kind, []) if exists else Resolved(NXDOMAIN)
        service = self._services.get(namespace, labels[-2])
        if service is None:
            return Resolved(NXDOMAIN)
        rest = labels[:-2]
        spec = service.get("spec") or {}
        if spec.get("type") == "ExternalName":
            return self._external(name, spec, rest, kind)
        base = f"{labels[-2]}.{namespace}.svc.{self.domain}"
        if not rest:
            return self._service(base, service, kind)
        if rest[-1].startswith("_") and len(rest) <= 2:
            return self._ports(name, base, service, rest, kind)
        if len(rest) == 1:
            return self._host(name, service, rest[0], kind)
        return Resolved(NXDOMAIN)

    def _external(self, name: str, spec: dict[str, Any], rest: list[str], kind: int) -> Resolved:
        target = (spec.get("externalName") or "").rstrip(".").lower()
        if rest or not target:
            return Resolved(NXDOMAIN)
        record = Record(name, CNAME, self.ttl, encode_name(target))
        return Resolved(NOERROR, [record], [], "" if kind in (CNAME, ANY) else target)

    def _service(self, base: str, service: Object, kind: int) -> Resolved:
        addresses = service_addresses(service)
        if addresses:
            records = [self._address(base, address) for address in addresses]
        else:
            endpoints = self._endpoints(service)
            if not endpoints:
                # A headless Service without ready endpoints has no records at all, not even for its name.
                return Resolved(NXDOMAIN)
            records = [self._address(base, address) for address in dict.fromkeys(address for address, _host, _ports in endpoints)]
        if kind in (SRV, ANY):
            ports = self._srv(base, base, service, None, None)
            return self._pack(kind, [*records, *ports.answers], ports.additionals)
        return self._pack(kind, records)

    def _endpoints(self, service: Object) -> list[tuple[str, str, list[dict[str, Any]]]]:
        """Usable endpoints as (address, host name label, ports)."""
        meta = service["metadata"]
        everybody = bool((service.get("spec") or {}).get("publishNotReadyAddresses"))
        found = []
        for part in self._slices.by_index("service", f"{meta['namespace']}/{meta['name']}"):
            if part.get("addressType") == "FQDN":
                continue
            for endpoint in part.get("endpoints") or ():
                ready = (endpoint.get("conditions") or {}).get("ready")
                if ready is False and not everybody:
                    continue
                for address in endpoint.get("addresses") or ():
                    host = endpoint.get("hostname") or address.replace(".", "-").replace(":", "-")
                    found.append((address, host, part.get("ports") or []))
        return found

    def _host(self, name: str, service: Object, host: str, kind: int) -> Resolved:
        found = [(address, ports) for address, label, ports in self._endpoints(service) if label.lower() == host]
        if not found:
            return Resolved(NXDOMAIN)
        # Two slices name an address when its ports differ.
        addresses = [self._address(name, address) for address in dict.fromkeys(address for address, _ports in found)]
        if kind not in (SRV, ANY):
            return self._pack(kind, addresses)
        numbers = dict.fromkeys(int(port["port"]) for _address, ports in found for port in ports if port.get("port"))
        targets = [Record(name, SRV, self.ttl, srv_data(0, max(1, 100 // len(numbers)), number, name)) for number in numbers]
        return self._pack(kind, [*addresses, *targets], addresses)

    def _ports(self, name: str, base: str, service: Object, rest: list[str], kind: int) -> Resolved:
        protocol = rest[-1][1:]
        if len(rest) == 1:
            # "_tcp" alone exists between the name and its ports.
            exists = any((port.get("protocol") or "TCP").lower() == protocol for port in service["spec"].get("ports") or ())
            return self._pack(kind, []) if exists else Resolved(NXDOMAIN)
        if not rest[0].startswith("_"):
            return Resolved(NXDOMAIN)
        found = self._srv(name, base, service, rest[0][1:], protocol)
        if not found.answers:
            return Resolved(NXDOMAIN)
        return self._pack(kind, found.answers, found.additionals)

    def _srv(self, name: str, base: str, service: Object, port_name: str | None, protocol: str | None) -> Resolved:
        def fits(port: dict[str, Any]) -> bool:
            if port_name is None:
                return True
            return (port.get("name") or "").lower() == port_name and (port.get("protocol") or "TCP").lower() == protocol

        targets: list[tuple[int, str, str]] = []
        addresses = service_addresses(service)
        if addresses:
            for port in filter(fits, service["spec"].get("ports") or ()):
                targets.extend((int(port["port"]), base, address) for address in addresses)
        else:
            for address, host, ports in self._endpoints(service):
                targets.extend((int(port["port"]), f"{host}.{base}", address) for port in filter(fits, ports) if port.get("port"))
        unique = list(dict.fromkeys((port, target) for port, target, _address in targets))
        weight = max(1, 100 // len(unique)) if unique else 0
        answers = [Record(name, SRV, self.ttl, srv_data(0, weight, port, target)) for port, target in unique]
        extra = dict.fromkeys((target, address) for _port, target, address in targets)
        return Resolved(NOERROR, answers, [self._address(target, address) for target, address in extra])

    def reverse(self, name: str, kind: int) -> Resolved | None:
        """Answer for an in-addr.arpa or ip6.arpa name; None when the address is nothing of ours."""
        address = reverse_address(name)
        if address is None:
            return None
        names: list[str] = []
        for service in self._services.by_index("address", address):
            meta = service["metadata"]
            names.append(f"{meta['name']}.{meta['namespace']}.svc.{self.domain}")
        if not names:
            names = self._reverse_endpoints(address)
        if not names:
            return None
        return self._pack(kind, [Record(name, PTR, self.ttl, encode_name(target)) for target in dict.fromkeys(names)])

    def _reverse_endpoints(self, address: str) -> list[str]:
        names: list[str] = []
        for part in self._slices.by_index("address", address):
            meta = part["metadata"]
            owner = (meta.get("labels") or {}).get("kubernetes.io/service-name", "")
            service = self._services.get(meta["namespace"], owner)
            if service is None or (service.get("spec") or {}).get("clusterIP") != "None":
                continue
            names.extend(
                f"{host}.{owner}.{meta['namespace']}.svc.{self.domain}"
                for found, host, _ports in self._endpoints(service)
                if found == address
            )
        return names


def reverse_address(name: str) -> str | None:
    """The address that a complete reverse name means, in canonical text."""
    if name.endswith(".in-addr.arpa"):
        parts = name[: -len(".in-addr.arpa")].split(".")
        try:
            return str(IPv4Address(".".join(reversed(parts)))) if len(parts) == 4 else None
        except ValueError:
            return None
    if name.endswith(".ip6.arpa"):
        digits = name[: -len(".ip6.arpa")].split(".")
        if len(digits) != 32 or any(len(digit) != 1 for digit in digits):
            return None
        try:
            return str(IPv6Address(int("".join(reversed(digits)), 16)))
        except ValueError:
            return None
    return None
