"""Services: cluster addresses, node ports, IP families; and the kinds behind them, IPAddress and ServiceCIDR.

Claims happen before validation, as upstream's, and are given back when the write does not come about.

Source: pkg/registry/core/service/{strategy.go,storage/storage.go,storage/alloc.go}.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from knarr.api import errors
from knarr.api.types import Object
from knarr.api.validation import service as service_rules
from knarr.apiserver.registry.allocators import AddressAllocator, AllocationError, PortAllocator, node_ports_of
from knarr.apiserver.registry.base import Strategy
from knarr.apiserver.registry.sharedports import SharedPortAllocator
from knarr.apiserver.registry.simple import KeepsMostOnStatus, Plain
from knarr.apiserver.store import ResourceStore

if TYPE_CHECKING:
    from knarr.apiserver.call import Call

OTHER = {"IPv4": "IPv6", "IPv6": "IPv4"}


def family_of(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def _invalid(service: Object, field: str, value: object, detail: str) -> errors.StatusError:
    return errors.invalid("Service", service["metadata"].get("name") or "", [errors.invalid_value(field, value, detail)])


def normalize_cluster_ips(service: Object, old: Object | None) -> None:
    """Keep clusterIP and clusterIPs in step: clients that know only the one must not lose the other."""
    spec = service["spec"]
    one, many = spec.get("clusterIP") or "", spec.get("clusterIPs") or []
    if old is None:
        if one and not many:
            spec["clusterIPs"] = [one]
        return
    before = old["spec"]
    old_one, old_many = before.get("clusterIP") or "", before.get("clusterIPs") or []
    same_one, same_many = one == old_one, many == old_many
    if not same_one and same_many:
        if one:
            spec["clusterIPs"] = [one, *many[1:]] if old_one else [one]
        elif many:
            spec.pop("clusterIPs", None)
    elif same_one and not many and one and old_many:
        spec["clusterIPs"] = [one]


class Service(Strategy):
    """See the module's docstring."""

    create_on_update = True
    returns_deleted = True
    field_names = ("spec.clusterIP", "spec.type")

    def __init__(self) -> None:
        self._ports: PortAllocator | None = None
        self._families: dict[str, AddressAllocator] = {}
        self._default_family = "IPv4"

    def fields(self, obj: Object) -> tuple[str, ...]:
        spec = obj.get("spec") or {}
        return (spec.get("clusterIP") or "", spec.get("type") or "")

    # -- the allocators, made when first needed: stores must be loaded ---------------------------------------------------
    @property
    def ports(self) -> PortAllocator:
        if self._ports is None:
            first, last = self.services.config.node_port_range
            store: ResourceStore = self.services.store("", "services")  # type: ignore[assignment]
            shared = store.storage.shared
            self._ports = SharedPortAllocator(first, last, store, self.services.tasks) if shared else PortAllocator(first, last, store)
        return self._ports

    @property
    def families(self) -> dict[str, AddressAllocator]:
        if not self._families:
            networks = [ipaddress.ip_network(cidr, strict=False) for cidr in self.services.config.service_cidrs]
            store = self.services.store("networking.k8s.io", "ipaddresses")
            for network in networks:
                family = "IPv6" if network.version == 6 else "IPv4"
                if family not in self._families:
                    own = [n for n in networks if n.version == network.version]
                    self._families[family] = AddressAllocator(family, store, own)  # type: ignore[arg-type]
            self._default_family = "IPv6" if networks[0].version == 6 else "IPv4"
        return self._families

    # -- create and update -------------------------------------------------------------------------------------------------
    async def begin_create(self, call: Call, obj: Object) -> Callable[[bool], None]:
        spec = obj.setdefault("spec", {})
        normalize_cluster_ips(obj, None)
        claims = _Claims(self)
        try:
            self.init_families(obj, None)
            if spec.get("type") != "ExternalName" and (spec.get("clusterIPs") or [""])[0] != "None":
                await self._claim_addresses(call, obj, claims)
            await self._claim_ports(obj, None, claims, dry_run=call.dry_run)
        except BaseException:
            claims.finish(False)
            raise
        if call.dry_run:
            return lambda stored: claims.finish(False)
        return claims.finish

    async def begin_update(self, call: Call, obj: Object, old: Object) -> Callable[[bool], None]:
        spec, before = obj.setdefault("spec", {}), old["spec"]
        # What clients that know less leave out, stays.
        if spec.get("type") not in (None, "ExternalName"):
            if before.get("type") != "ExternalName":
                if not spec.get("clusterIP") and before.get("clusterIP"):
                    spec["clusterIP"] = before["clusterIP"]
                if not spec.get("clusterIPs") and before.get("clusterIPs") and spec.get("clusterIP") == before.get("clusterIP"):
                    spec["clusterIPs"] = before["clusterIPs"]
            if spec.get("type") in ("NodePort", "LoadBalancer") and before.get("type") in ("NodePort", "LoadBalancer"):
                _keep_node_ports(spec, before)
            if _needs_health_port(spec) and _needs_health_port(before) and not spec.get("healthCheckNodePort"):
                spec["healthCheckNodePort"] = before.get("healthCheckNodePort", 0)
        self._drop_dependent(obj, old)
        normalize_cluster_ips(obj, old)
        claims = _Claims(self)
        try:
            self.init_families(obj, old)
            await self._move_addresses(call, obj, old, claims)
            await self._claim_ports(obj, old, claims, dry_run=call.dry_run)
        except BaseException:
            claims.finish(False)
            raise
        if call.dry_run:
            return lambda stored: claims.finish(False)
        return claims.finish

    def after_delete(self, obj: Object) -> None:
        claims = _Claims(self)
        spec = obj["spec"]
        if spec.get("type") != "ExternalName":
            claims.release_addresses = [ip for ip in spec.get("clusterIPs") or [] if ip and ip != "None"]
        claims.release_ports = sorted(node_ports_of(obj))
        claims.finish(True)

    def init_families(self, service: Object, old: Object | None) -> None:
        """Fill in ipFamilyPolicy and ipFamilies. Raises 422."""
        spec = service["spec"]
        if spec.get("type") == "ExternalName":
            return
        families = self.families
        addresses = spec.get("clusterIPs") or []
        headless = spec.get("clusterIP") == "None" or (bool(addresses) and addresses[0] == "None")
        policy = spec.get("ipFamilyPolicy")
        if not policy:
            if old is not None and old["spec"].get("ipFamilyPolicy"):
                policy = old["spec"]["ipFamilyPolicy"]
            elif headless and not spec.get("selector"):
                policy = "RequireDualStack"
            else:
                policy = "SingleStack"
            spec["ipFamilyPolicy"] = policy
        found: list[errors.FieldError] = []
        service_rules.cluster_addresses(spec, found)
        _raise(service, found)
        addresses, wanted = _families_of_addresses(spec, old, families, found)
        _raise(service, found)
        if headless and not spec.get("selector"):
            wanted = wanted or [self._default_family]
            if len(wanted) < 2 and policy != "SingleStack":
                wanted.append(OTHER[wanted[0]])
            spec["ipFamilies"] = wanted
            return
        if policy == "RequireDualStack" and len(families) < 2:
            found.append(errors.invalid_value("spec.ipFamilyPolicy", policy, "this cluster is not configured for dual-stack services"))
        for index, family in enumerate(wanted):
            if family not in families:
                found.append(errors.invalid_value(f"spec.ipFamilies[{index}]", family, "not configured on this cluster"))
        _raise(service, found)
        wanted = wanted or [self._default_family]
        if policy != "SingleStack" and len(wanted) == 1 and len(families) == 2:
            wanted.append(OTHER[wanted[0]])
        spec["ipFamilies"] = wanted

    async def _claim_addresses(self, call: Call, service: Object, claims: _Claims, start: int = 0) -> None:
        spec = service["spec"]
        given = list(spec.get("clusterIPs") or [])
        out = given[:start]
        cidrs = self.services.store("networking.k8s.io", "servicecidrs")
        for index, family in enumerate(spec["ipFamilies"][start:], start):
            allocator = self.families[family]
            ranges = allocator.ranges(cidrs)  # type: ignore[arg-type]
            wanted = given[index] if index < len(given) else ""
            try:
                if wanted:
                    await allocator.claim(wanted, service, ranges, dry_run=call.dry_run)
                    address = wanted
                else:
                    address = await allocator.claim_next(service, ranges, dry_run=call.dry_run)
            except AllocationError as error:
                if wanted:
                    raise _invalid(service, "spec.clusterIPs", given, f"failed to allocate IP {wanted}: {error}") from error
                raise errors.internal(f"failed to allocate a serviceIP: {error}") from error
            except ValueError as error:
                raise errors.internal(f'failed to parse service IP "{wanted}"') from error
            if not call.dry_run:
                claims.addresses.append(address)
            out.append(address)
        spec["clusterIPs"] = out
        spec["clusterIP"] = out[0]

    async def _move_addresses(self, call: Call, service: Object, old: Object, claims: _Claims) -> None:
        spec, before = service["spec"], old["spec"]
        was_external, is_external = before.get("type") == "ExternalName", spec.get("type") == "ExternalName"
        old_addresses = before.get("clusterIPs") or []
        if was_external and not is_external:
            if (spec.get("clusterIPs") or [""])[0] != "None":
                await self._claim_addresses(call, service, claims)
            return
        if old_addresses and old_addresses[0] == "None":
            return
        if not was_external and is_external:
            claims.release_addresses = list(old_addresses)
            return
        if is_external:
            return
        families, old_families = spec.get("ipFamilies") or [], before.get("ipFamilies") or []
        if len(old_families) == 1 and len(families) == 2:
            await self._claim_addresses(call, service, claims, start=1)
        elif len(old_families) == 2 and len(families) == 1:
            claims.release_addresses = list(old_addresses[1:])

    async def _claim_ports(self, service: Object, old: Object | None, claims: _Claims, *, dry_run: bool) -> None:
        spec = service["spec"]
        held = node_ports_of(old) if old is not None else set()
        kept: set[int] = set()
        allocate = spec.get("type") == "NodePort" or (spec.get("type") == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is not False)
        if spec.get("type") in ("NodePort", "LoadBalancer"):
            by_port: dict[int, int] = {}
            for index, port in enumerate(spec.get("ports") or []):
                number = port.get("nodePort") or 0
                if not number and not allocate:
                    continue
                if not number:
                    # The same port under two protocols shares one node port; a later entry may name it.
                    number = by_port.get(port["port"]) or next(
                        (p["nodePort"] for p in spec["ports"][index:] if p.get("port") == port["port"] and p.get("nodePort")), 0)
                if number and (by_port.get(port["port"]) == number or (number in held and number not in kept)):
                    pass
                elif number:
                    try:
                        await self.ports.claim(number, dry_run=dry_run)
                    except AllocationError as error:
                        raise _invalid(service, f"spec.ports[{index}].nodePort", number, str(error)) from error
                    claims.ports.append(number)
                else:
                    try:
                        number = await self.ports.claim_next(dry_run=dry_run)
                    except AllocationError as error:
                        raise errors.internal(f"failed to allocate a nodePort: {error}") from error
                    claims.ports.append(number)
                port["nodePort"] = number
                kept.add(number)
                by_port.setdefault(port["port"], number)
        if _needs_health_port(spec):
            number = spec.get("healthCheckNodePort") or 0
            try:
                if number and number not in held:
                    await self.ports.claim(number, dry_run=dry_run)
                    claims.ports.append(number)
                elif not number:
                    number = await self.ports.claim_next(dry_run=dry_run)
                    claims.ports.append(number)
            except AllocationError as error:
                raise errors.internal(f"failed to allocate requested HealthCheck NodePort {number}: {error}") from error
            spec["healthCheckNodePort"] = number
            kept.add(number)
        claims.release_ports = sorted(held - kept)

    def _drop_dependent(self, obj: Object, old: Object) -> None:
        """Fields that the new type does not use go, if the client did not touch them."""
        spec, before = obj["spec"], old["spec"]
        kind, was = spec.get("type"), before.get("type")
        if kind == "ExternalName" and was != "ExternalName":
            if spec.get("clusterIP") == before.get("clusterIP") and spec.get("clusterIPs") == before.get("clusterIPs"):
                spec.pop("clusterIP", None)
                spec.pop("clusterIPs", None)
            for key in ("ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"):
                if spec.get(key) == before.get(key):
                    spec.pop(key, None)
        uses_ports = ("NodePort", "LoadBalancer")
        if was in uses_ports and kind not in uses_ports:
            old_ports = {p.get("nodePort") for p in before.get("ports") or []}
            if all(p.get("nodePort") in old_ports or not p.get("nodePort") for p in spec.get("ports") or []):
                for port in spec.get("ports") or []:
                    port.pop("nodePort", None)
        if _needs_health_port(before) and not _needs_health_port(spec) and spec.get("healthCheckNodePort") == before.get("healthCheckNodePort"):
            spec.pop("healthCheckNodePort", None)
        if was == "LoadBalancer" and kind != "LoadBalancer":
            for key in ("allocateLoadBalancerNodePorts", "loadBalancerClass"):
                if spec.get(key) == before.get(key):
                    spec.pop(key, None)
        if _external(before) and not _external(spec) and spec.get("externalTrafficPolicy") == before.get("externalTrafficPolicy"):
            spec.pop("externalTrafficPolicy", None)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        if obj["spec"].get("type") != "LoadBalancer" and (obj.get("status") or {}).get("loadBalancer"):
            obj["status"] = {**obj["status"], "loadBalancer": {}}


def _raise(service: Object, found: list[errors.FieldError]) -> None:
    if found:
        raise errors.invalid("Service", service["metadata"].get("name") or "", found)


def _families_of_addresses(
    spec: Object, old: Object | None, families: Container[str], found: list[errors.FieldError]
) -> tuple[list[str], list[str]]:
    """Return the addresses and families that are asked for; what contradicts the policy, or the cluster, goes to `found`."""
    policy, addresses, wanted = spec["ipFamilyPolicy"], spec.get("clusterIPs") or [], list(spec.get("ipFamilies") or [])
    before = old["spec"] if old is not None else {}
    old_addresses, old_families = before.get("clusterIPs") or [], before.get("ipFamilies") or []
    path = "spec.ipFamilyPolicy"
    if old is not None and policy == "SingleStack":
        if addresses == old_addresses and len(addresses) > 1:
            spec["clusterIPs"] = addresses = addresses[:1]
        if wanted == old_families and len(wanted) > 1:
            wanted = wanted[:1]
    elif len(old_addresses) == 2 and len(addresses) == 1:
        found.append(errors.invalid_value(path, policy, "must be 'SingleStack' to release the secondary cluster IP"))
    if policy != "SingleStack" and len(old_families) == 2 and len(wanted) == 1:
        found.append(errors.invalid_value(path, policy, "must be 'SingleStack' to release the secondary IP family"))
    if policy == "SingleStack":
        for what, given in (("cluster IPs", addresses), ("IP families", wanted)):
            if len(given) == 2:
                message = f"must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"
                found.append(errors.invalid_value(path, policy, message))
    for index, address in enumerate(addresses):
        if address == "None":
            break
        if index < len(wanted):
            continue
        family = family_of(address)
        if family in families:
            wanted.append(family)
        else:
            found.append(errors.invalid_value(f"spec.clusterIPs[{index}]", addresses, f"{family} is not configured on this cluster"))
    return addresses, wanted


def _keep_node_ports(spec: Object, before: Object) -> None:
    """Ports that a client sends without their node port keep it."""
    known = {(p.get("protocol"), p.get("port")): p.get("nodePort") for p in before.get("ports") or [] if p.get("nodePort")}
    used = {p.get("nodePort") for p in spec.get("ports") or []}
    for port in spec.get("ports") or []:
        if not port.get("nodePort"):
            number = known.get((port.get("protocol"), port.get("port")))
            if number and number not in used:
                port["nodePort"] = number


def _external(spec: Object) -> bool:
    return spec.get("type") in ("NodePort", "LoadBalancer") or (bool(spec.get("externalIPs")) and spec.get("type") == "ClusterIP")


def _needs_health_port(spec: Object) -> bool:
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


class _Claims:
    """What one write has claimed and what it will give back."""

    def __init__(self, strategy: Service) -> None:
        self._strategy = strategy
        self.addresses: list[str] = []
        self.ports: list[int] = []
        self.release_addresses: list[str] = []
        self.release_ports: list[int] = []

    def finish(self, stored: bool) -> None:
        """Keep the claims and give back what the old object held, or the other way round."""
        strategy = self._strategy
        for port in self.release_ports if stored else ():
            strategy.ports.release(port)
        for port in () if stored else self.ports:
            strategy.ports.undo(port)
        addresses = [a for a in (self.release_addresses if stored else self.addresses) if a and a != "None"]
        if addresses:
            strategy.services.tasks.spawn(_release(strategy, addresses), "release-service-addresses")


async def _release(strategy: Service, addresses: list[str]) -> None:
    for address in addresses:
        allocator = strategy.families.get(family_of(address))
        if allocator is not None:
            await allocator.release(address)


class IPAddress(Plain):
    """One claimed address; it is the name, which nothing can make up."""

    makes_names = False
    field_names = ()


class ServiceCIDR(KeepsMostOnStatus):
    """A range of service addresses; a status brought along on creation is taken."""

    has_generation = False

    def prepare_create(self, call: Call, obj: Object) -> None:
        return None
