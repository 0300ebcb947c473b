"""networking.k8s.io and discovery.k8s.io: Ingress, IngressClass, NetworkPolicy, IPAddress, ServiceCIDR, EndpointSlice.

Source: pkg/apis/networking/validation, pkg/apis/discovery/validation.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from knarr.api.addresses import sloppy_network
from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required, too_long, too_many
from knarr.api.validation.batch import domain_prefixed_path
from knarr.api.validation.containers import PROTOCOLS
from knarr.api.validation.metadata import Errors, Object, add, immutable, validate_label_selector
from knarr.api.validation.podspec import validate_legacy_ip
from knarr.api.validation.service import validate_cidr, validate_endpoint_ip
from knarr.api.validation.strings import (
    IMMUTABLE,
    Messages,
    dns_1035_label,
    dns_label,
    dns_subdomain,
    label_key_errors,
    label_value_errors,
    path_segment,
    port_name,
    port_number,
    wildcard_subdomain,
)

_BAD_SEQUENCES = ("//", "/./", "/../", "%2f", "%2F")
_BAD_ENDINGS = ("/..", "/.")
_CLASS_ANNOTATION = "kubernetes.io/ingress.class"


def _is_ip(text: str) -> bool:
    found: Errors = []
    validate_legacy_ip(text, "", found)
    return not found


def _host(host: str, path: str, errors: Errors) -> None:
    add(errors, path, host, wildcard_subdomain(host) if "*" in host else dns_subdomain(host))


# Ingress.


def _backend(backend: Object, path: str, errors: Errors) -> None:
    service, resource = backend.get("service"), backend.get("resource")
    if service is not None and resource is not None:
        errors.append(invalid_value(path, "", "cannot set both resource and service backends"))
    elif service is None and resource is None:
        errors.append(invalid_value(path, "", "resource or service backend is required"))
    elif resource is not None:
        _resource_reference(resource, f"{path}.resource", errors)
    elif service is not None:
        own, name, port = f"{path}.service", service.get("name") or "", service.get("port") or {}
        if not name:
            errors.append(required(f"{own}.name"))
        else:
            add(errors, f"{own}.name", name, dns_1035_label(name))
        by_name, number = port.get("name") or "", port.get("number") or 0
        if by_name and number:
            errors.append(invalid_value(path, "", "cannot set both port name & port number"))
        elif by_name:
            add(errors, f"{own}.port.name", by_name, port_name(by_name))
        elif number:
            add(errors, f"{own}.port.number", number, port_number(number))
        else:
            errors.append(required(path, "port name or number is required"))


def _resource_reference(reference: Object, path: str, errors: Errors) -> None:
    group = reference.get("apiGroup")
    if group is not None:
        add(errors, f"{path}.apiGroup", group, dns_subdomain(group))
    for key in ("kind", "name"):
        value = reference.get(key) or ""
        if not value:
            errors.append(required(f"{path}.{key}"))
        else:
            add(errors, f"{path}.{key}", value, path_segment(value))


def _path(entry: Object, path: str, errors: Errors) -> None:
    kind, target = entry.get("pathType"), entry.get("path") or ""
    own = f"{path}.path"
    if kind is None:
        errors.append(required(f"{path}.pathType", "pathType must be specified"))
        return
    if kind in ("Exact", "Prefix"):
        if not target.startswith("/"):
            errors.append(invalid_value(own, target, "must be an absolute path"))
        for bad in _BAD_SEQUENCES if target else ():
            if bad in target:
                errors.append(invalid_value(own, target, f"must not contain '{bad}'"))
        for bad in _BAD_ENDINGS if target else ():
            if target.endswith(bad):
                errors.append(invalid_value(own, target, f"cannot end with '{bad}'"))
    elif kind == "ImplementationSpecific":
        if target and not target.startswith("/"):
            errors.append(invalid_value(own, target, "must be an absolute path"))
    else:
        errors.append(not_supported(f"{path}.pathType", kind, ["Exact", "ImplementationSpecific", "Prefix"]))
    _backend(entry.get("backend") or {}, f"{path}.backend", errors)


def _ingress_spec(spec: Object, errors: Errors) -> None:
    rules, default = spec.get("rules") or [], spec.get("defaultBackend")
    if not rules and default is None:
        errors.append(invalid_value("spec", spec.get("rules"), "either `defaultBackend` or `rules` must be specified"))
    if default is not None:
        _backend(default, "spec.defaultBackend", errors)
    for index, rule in enumerate(rules):
        path, host = f"spec.rules[{index}]", rule.get("host") or ""
        if host:
            if _is_ip(host):
                errors.append(invalid_value(f"{path}.host", host, "must be a DNS name, not an IP address"))
            _host(host, f"{path}.host", errors)
        http = rule.get("http")
        if http is not None:
            if not http.get("paths"):
                errors.append(required(f"{path}.http.paths"))
            for position, entry in enumerate(http.get("paths") or ()):
                _path(entry, f"{path}.http.paths[{position}]", errors)
    for index, tls in enumerate(spec.get("tls") or ()):
        path = f"spec.tls[{index}]"
        for position, host in enumerate(tls.get("hosts") or ()):
            _host(host, f"{path}.hosts[{position}]", errors)
        if tls.get("secretName"):
            add(errors, f"{path}.secretName", tls["secretName"], dns_subdomain(tls["secretName"]))
    name = spec.get("ingressClassName")
    if name is not None:
        add(errors, "spec.ingressClassName", name, dns_subdomain(name))


def create_ingress(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    _ingress_spec(spec, errors)
    annotation, name = (obj["metadata"].get("annotations") or {}).get(_CLASS_ANNOTATION), spec.get("ingressClassName")
    if annotation is not None and name is not None and annotation != name:
        message = "must match `ingressClassName` when both are specified"
        errors.append(invalid_value(f"annotations.{_CLASS_ANNOTATION}", annotation, message))


def update_ingress(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource != "status":
        _ingress_spec(new.get("spec") or {}, errors)
        return
    for index, entry in enumerate(((new.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()):
        path, name = f"status.loadBalancer.ingress[{index}]", entry.get("hostname") or ""
        if entry.get("ip"):
            validate_legacy_ip(entry["ip"], f"{path}.ip", errors)
        if name:
            add(errors, f"{path}.hostname", name, dns_subdomain(name))
            if _is_ip(name):
                errors.append(invalid_value(f"{path}.hostname", name, "must be a DNS name, not an IP address"))


def _class_parameters(parameters: Object, errors: Errors) -> None:
    path, scope, namespace = "spec.parameters", parameters.get("scope"), parameters.get("namespace")
    _resource_reference(parameters, path, errors)
    if scope is None:
        errors.append(required(f"{path}.scope"))
        return
    if scope not in ("Cluster", "Namespace"):
        errors.append(not_supported(f"{path}.scope", scope, ["Cluster", "Namespace"]))
    elif scope == "Namespace":
        if not namespace:
            errors.append(required(f"{path}.namespace", "`parameters.scope` is set to 'Namespace'"))
        else:
            add(errors, f"{path}.namespace", namespace, dns_label(namespace))
    elif namespace is not None:
        errors.append(field_forbidden(f"{path}.namespace", "`parameters.scope` is set to 'Cluster'"))


def create_ingress_class(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    controller = spec.get("controller") or ""
    if len(controller) > 250:
        errors.append(too_long("spec.controller", 250))
    domain_prefixed_path(controller, "spec.controller", errors)
    if spec.get("parameters") is not None:
        _class_parameters(spec["parameters"], errors)


def update_ingress_class(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    immutable(errors, "spec.controller", spec.get("controller"), before.get("controller"))
    create_ingress_class(new, errors)


# NetworkPolicy.


def _policy_port(port: Object, path: str, errors: Errors) -> None:
    protocol, value, end = port.get("protocol"), port.get("port"), port.get("endPort")
    if protocol is not None and protocol not in PROTOCOLS:
        errors.append(not_supported(f"{path}.protocol", protocol, ["TCP", "UDP", "SCTP"]))
    if isinstance(value, int):
        add(errors, f"{path}.port", value, port_number(value))
        if end is not None:
            if end < value:
                errors.append(invalid_value(f"{path}.endPort", value, "must be greater than or equal to `port`"))
            add(errors, f"{path}.endPort", end, port_number(end))
    elif value is not None:
        if end is not None:
            errors.append(invalid_value(f"{path}.endPort", end, "may not be specified when `port` is non-numeric"))
        add(errors, f"{path}.port", value, port_name(value))
    elif end is not None:
        errors.append(invalid_value(f"{path}.endPort", end, "may not be specified when `port` is not specified"))


def _ip_block(block: Object, path: str, errors: Errors) -> None:
    cidr = block.get("cidr") or ""
    if not cidr:
        errors.append(required(f"{path}.cidr"))
        return
    validate_cidr(cidr, f"{path}.cidr", errors)
    outer = sloppy_network(cidr)
    if outer is None:
        return
    for index, text in enumerate(block.get("except") or ()):
        own = f"{path}.except[{index}]"
        validate_cidr(text, own, errors)
        inner = sloppy_network(text)
        if inner is None:
            continue
        if inner.version != outer.version or inner.network_address not in outer or outer.prefixlen >= inner.prefixlen:
            errors.append(invalid_value(own, text, "must be a strict subset of `cidr`"))


def _peer(peer: Object, path: str, errors: Errors) -> None:
    given = [key for key in ("podSelector", "namespaceSelector", "ipBlock") if peer.get(key) is not None]
    for key in given:
        if key == "ipBlock":
            _ip_block(peer[key], f"{path}.ipBlock", errors)
        else:
            validate_label_selector(peer[key], f"{path}.{key}", errors)
    if not given:
        errors.append(required(path, "must specify a peer"))
    elif len(given) > 1 and "ipBlock" in given:
        errors.append(field_forbidden(path, "may not specify both ipBlock and another peer"))


def create_network_policy(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    validate_label_selector(spec.get("podSelector"), "spec.podSelector", errors)
    for kind, peers in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(kind) or ()):
            path = f"spec.{kind}[{index}]"
            for position, port in enumerate(rule.get("ports") or ()):
                _policy_port(port, f"{path}.ports[{position}]", errors)
            for position, peer in enumerate(rule.get(peers) or ()):
                _peer(peer, f"{path}.{peers}[{position}]", errors)
    types = spec.get("policyTypes") or []
    if len(types) > 2:
        errors.append(invalid_value("spec.policyTypes", types, "may not specify more than two policyTypes"))
        return
    for index, kind in enumerate(types):
        if kind not in ("Ingress", "Egress"):
            errors.append(not_supported(f"spec.policyTypes[{index}]", kind, ["Ingress", "Egress"]))


# IPAddress and ServiceCIDR.


def ip_address_name(value: str) -> Messages:
    try:
        canonical = str(ip_address(value))
    except ValueError:
        return ("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",)
    return () if canonical == value else (f'must be in canonical form ("{canonical}")',)


def create_ip_address(obj: Object, errors: Errors) -> None:
    reference, path = (obj.get("spec") or {}).get("parentRef"), "spec.parentRef"
    if reference is None:
        errors.append(required(path))
        return
    if reference.get("group"):
        add(errors, f"{path}.group", reference["group"], dns_subdomain(reference["group"]))
    for key in ("resource", "name", "namespace"):
        value = reference.get(key) or ""
        if value:
            add(errors, f"{path}.{key}", value, path_segment(value))
        elif key != "namespace":
            errors.append(required(f"{path}.{key}"))


def update_ip_address(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_ip_address(new, errors)
    immutable(errors, "spec.parentRef", (new.get("spec") or {}).get("parentRef"), (old.get("spec") or {}).get("parentRef"))


def _strict_cidr(text: str, path: str, errors: Errors) -> None:
    try:
        network = ip_network(text, strict=False)
        if "/" not in text:
            raise ValueError
    except ValueError:
        errors.append(invalid_value(path, text, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"))
        return
    if str(network) != text:
        if ip_address(text.partition("/")[0]) != network.network_address:
            errors.append(invalid_value(path, text, "must not have bits set beyond the prefix length"))
        else:
            errors.append(invalid_value(path, text, f'must be in canonical form ("{network}")'))


def create_service_cidr(obj: Object, errors: Errors) -> None:
    ranges, path = (obj.get("spec") or {}).get("cidrs") or [], "spec.cidrs"
    if not ranges:
        errors.append(required(path, "at least one CIDR required"))
        return
    if len(ranges) > 2:
        errors.append(invalid_value(path, obj.get("spec"), "may only hold up to 2 values"))
        return
    before = len(errors)
    for index, text in enumerate(ranges):
        _strict_cidr(text, f"{path}[{index}]", errors)
    if len(errors) == before and len(ranges) > 1 and len({":" in text for text in ranges}) < 2:
        errors.append(
            invalid_value(path, ranges, "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64")
        )


def update_service_cidr(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource:
        return
    after, before, path = (new.get("spec") or {}).get("cidrs") or [], (old.get("spec") or {}).get("cidrs") or [], "spec.cidrs"
    if len(before) <= len(after):
        for index, text in enumerate(before):
            if text != after[index]:
                errors.append(invalid_value(f"{path}[{index}]", after[index], IMMUTABLE))
        if len(before) < len(after):
            create_service_cidr(new, errors)
    else:
        errors.append(invalid_value(path, after, IMMUTABLE))


# EndpointSlice.


def _fqdn(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
        return
    name = name.removesuffix(".")
    found = dns_subdomain(name)
    if found:
        errors.append(invalid_value(path, name, ",".join(found)))
    elif "." not in name:
        errors.append(invalid_value(path, name, "should be a domain with at least two segments separated by dots"))


def _slice_address(address: str, kind: str, path: str, index: int, errors: Errors) -> None:
    own, before = f"{path}[{index}]", len(errors)
    if kind == "FQDN":
        _fqdn(address, own, errors)
        return
    if kind not in ("IPv4", "IPv6"):
        return
    if kind == "IPv4":
        validate_legacy_ip(address, own, errors)
    else:
        add(errors, own, address, ip_address_name(address))
    if len(errors) > before:
        return
    if (":" in address) != (kind == "IPv6"):
        errors.append(invalid_value(path, address, f"must be an {kind} address"))
    validate_endpoint_ip(address, own, errors)


def _hints(hints: Object, path: str, errors: Errors) -> None:
    for key, rule in (("forZones", label_value_errors), ("forNodes", dns_subdomain)):
        entries = hints.get(key) or []
        if len(entries) > 8:
            errors.append(too_many(f"{path}.{key}", len(entries), 8))
            return
        seen: set[str] = set()
        for index, entry in enumerate(entries):
            own, name = f"{path}.{key}[{index}].name", entry.get("name") or ""
            if name in seen:
                errors.append(duplicate(own, name))
            seen.add(name)
            add(errors, own, name, rule(name))


def _endpoints(endpoints: list[Object], kind: str, errors: Errors) -> None:
    if len(endpoints) > 1000:
        errors.append(too_many("endpoints", len(endpoints), 1000))
        return
    for index, endpoint in enumerate(endpoints):
        path, addresses = f"endpoints[{index}]", endpoint.get("addresses") or []
        if not addresses:
            errors.append(required(f"{path}.addresses", "must contain at least 1 address"))
        elif len(addresses) > 100:
            errors.append(too_many(f"{path}.addresses", len(addresses), 100))
        for position, address in enumerate(addresses):
            _slice_address(address, kind, f"{path}.addresses", position, errors)
        node, topology, host = endpoint.get("nodeName"), endpoint.get("deprecatedTopology") or {}, endpoint.get("hostname")
        if node is not None:
            add(errors, f"{path}.nodeName", node, dns_subdomain(node))
        if len(topology) > 16:
            errors.append(too_many(f"{path}.deprecatedTopology", len(topology), 16))
        if host is not None:
            add(errors, f"{path}.hostname", host, dns_label(host))
        if endpoint.get("hints") is not None:
            _hints(endpoint["hints"], f"{path}.hints", errors)


def _slice(obj: Object, errors: Errors, *, old_endpoints: Any = None) -> None:
    kind, ports = obj.get("addressType") or "", obj.get("ports") or []
    if not kind:
        errors.append(required("addressType"))
    elif kind not in ("FQDN", "IPv4", "IPv6"):
        errors.append(not_supported("addressType", kind, ["FQDN", "IPv4", "IPv6"]))
    if len(ports) > 20000:
        errors.append(too_many("ports", len(ports), 20000))
    else:
        _slice_ports(ports, errors)
    endpoints = obj.get("endpoints") or []
    if old_endpoints is None or endpoints != old_endpoints:
        _endpoints(endpoints, kind, errors)


def _slice_ports(ports: list[Object], errors: Errors) -> None:
    seen: set[str] = set()
    for index, port in enumerate(ports):
        path, name, protocol = f"ports[{index}]", port.get("name") or "", port.get("protocol")
        if name:
            add(errors, f"{path}.name", name, dns_label(name))
        if name in seen:
            errors.append(duplicate(f"{path}.name", name))
        seen.add(name)
        if protocol is None:
            errors.append(required(f"{path}.protocol"))
        elif protocol not in PROTOCOLS:
            errors.append(not_supported(f"{path}.protocol", protocol, PROTOCOLS))
        if port.get("appProtocol") is not None:
            add(errors, f"{path}.appProtocol", port["appProtocol"], label_key_errors(port["appProtocol"]))


def create_endpoint_slice(obj: Object, errors: Errors) -> None:
    _slice(obj, errors)


def update_endpoint_slice(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _slice(new, errors, old_endpoints=old.get("endpoints") or [])
    immutable(errors, "addressType", new.get("addressType"), old.get("addressType"))
