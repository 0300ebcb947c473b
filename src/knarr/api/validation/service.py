"""Services and Endpoints.

Source: pkg/apis/core/validation validateService, ValidateServiceUpdate, ValidateEndpoints.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from knarr.api.addresses import sloppy_ip, sloppy_network
from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.containers import PROTOCOLS, validate_port_or_name
from knarr.api.validation.metadata import Errors, Object, add, validate_labels
from knarr.api.validation.podspec import validate_legacy_ip
from knarr.api.validation.strings import dns_label, dns_subdomain, label_key_errors, port_number

TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
HINTS, MODE = "service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode"
SOURCE_RANGES = "service.beta.kubernetes.io/load-balancer-source-ranges"
_FAMILIES = ("IPv4", "IPv6")
_FAMILY_POLICIES = ("PreferDualStack", "RequireDualStack", "SingleStack")
MAXIMUM_AFFINITY_SECONDS = 86400


def is_headless(spec: Object) -> bool:
    return (spec.get("clusterIPs") or []) == ["None"]


def _is_valid_ip(value: str) -> bool:
    found: Errors = []
    validate_legacy_ip(value, "", found)
    return not found


def _is_ipv6(value: str) -> bool:
    return ":" in value


def validate_endpoint_ip(value: str, path: str, errors: Errors) -> None:
    """Addresses that no endpoint can have."""
    try:
        address = ip_address(value)
    except ValueError:
        return
    if address.is_unspecified:
        errors.append(invalid_value(path, value, f"may not be unspecified ({value})"))
    if address.is_loopback:
        errors.append(invalid_value(path, value, "may not be in the loopback range (127.0.0.0/8, ::1/128)"))
    if address.is_link_local:
        errors.append(invalid_value(path, value, "may not be in the link-local range (169.254.0.0/16, fe80::/10)"))
    link_multicast = ip_network("224.0.0.0/24") if address.version == 4 else ip_network("ff02::/10", strict=False)
    if address in link_multicast and address.is_multicast:
        errors.append(invalid_value(path, value, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"))


def validate_cidr(value: str, path: str, errors: Errors) -> None:
    if sloppy_network(value) is None:
        errors.append(invalid_value(path, value, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"))


def _port(port: Object, needs_name: bool, names: set[str], path: str, errors: Errors) -> None:
    name = port.get("name") or ""
    if needs_name and not name:
        errors.append(required(f"{path}.name"))
    elif name:
        add(errors, f"{path}.name", name, dns_label(name))
        if name in names:
            errors.append(duplicate(f"{path}.name", name))
        names.add(name)
    number = port.get("port") or 0
    add(errors, f"{path}.port", number, port_number(number))
    protocol = port.get("protocol") or ""
    if not protocol:
        errors.append(required(f"{path}.protocol"))
    elif protocol not in PROTOCOLS:
        errors.append(not_supported(f"{path}.protocol", protocol, PROTOCOLS))
    validate_port_or_name(port.get("targetPort", 0), f"{path}.targetPort", errors)
    if port.get("appProtocol") is not None:
        add(errors, f"{path}.appProtocol", port["appProtocol"], label_key_errors(port["appProtocol"]))


def _affinity(spec: Object, errors: Errors) -> None:
    affinity, config, path = spec.get("sessionAffinity") or "", spec.get("sessionAffinityConfig"), "spec.sessionAffinityConfig"
    if not affinity:
        errors.append(required("spec.sessionAffinity"))
    elif affinity not in ("ClientIP", "None"):
        errors.append(not_supported("spec.sessionAffinity", affinity, ["ClientIP", "None"]))
    if affinity == "ClientIP":
        words = "when session affinity type is ClientIP"
        client = (config or {}).get("clientIP")
        if config is None:
            errors.append(required(path, words))
        elif client is None:
            errors.append(required(f"{path}.clientIP", words))
        elif client.get("timeoutSeconds") is None:
            errors.append(required(f"{path}.clientIP.timeoutSeconds", words))
        elif not 0 < client["timeoutSeconds"] <= MAXIMUM_AFFINITY_SECONDS:
            message = f"must be greater than 0 and less than {MAXIMUM_AFFINITY_SECONDS}"
            errors.append(invalid_value(f"{path}.clientIP.timeoutSeconds", client["timeoutSeconds"], message))
    elif affinity == "None" and config is not None:
        errors.append(field_forbidden(path, "must not be set when session affinity is None"))


def cluster_addresses(spec: Object, errors: Errors) -> None:
    """Whether addresses, families and their policy fit together; asked again before addresses are claimed."""
    ips, path = spec.get("clusterIPs") or [], "spec.clusterIPs"
    single = spec.get("clusterIP") or ""
    if single:
        if not ips:
            errors.append(required(path))
        elif ips[0] != single:
            errors.append(invalid_value(path, ips, "first value must match `clusterIP`"))
    elif ips:
        errors.append(invalid_value(path, ips, "must be empty when `clusterIP` is not specified"))
    families = spec.get("ipFamilies") or []
    for index, family in enumerate(families):
        if family not in _FAMILIES:
            errors.append(not_supported(f"spec.ipFamilies[{index}]", family, _FAMILIES))
        if family in families[:index]:
            errors.append(duplicate(f"spec.ipFamilies[{index}]", family))
    policy = spec.get("ipFamilyPolicy")
    if policy is not None and policy not in _FAMILY_POLICIES:
        errors.append(not_supported("spec.ipFamilyPolicy", policy, _FAMILY_POLICIES))
    broken = False
    for index, ip in enumerate(ips):
        if index == 0 and ip == "None":
            if len(ips) > 1:
                broken = True
                errors.append(invalid_value(path, ips, "'None' must be the first and only value"))
            continue
        before = len(errors)
        validate_legacy_ip(ip, f"{path}[{index}]", errors)
        broken = broken or len(errors) > before
    if len(ips) > 2:
        errors.append(invalid_value(path, ips, "may only hold up to 2 values"))
    if broken:
        return
    if len(ips) > 1 and len({_is_ipv6(ip) for ip in ips}) < 2:
        errors.append(invalid_value(path, ips, "may specify no more than one IP for each IP family"))
    if not is_headless(spec):
        for index, (ip, family) in enumerate(zip(ips, families, strict=False)):
            if (family == "IPv4" and _is_ipv6(ip)) or (family == "IPv6" and not _is_ipv6(ip)):
                message = f"expected an {family} value as indicated by `ipFamilies[{index}]`"
                errors.append(invalid_value(f"{path}[{index}]", ip, message))


def _ports_again(spec: Object, errors: Errors) -> None:
    ports = spec.get("ports") or []
    if spec.get("type") == "ClusterIP":
        for index, port in enumerate(ports):
            if port.get("nodePort"):
                errors.append(field_forbidden(f"spec.ports[{index}].nodePort", "may not be used when `type` is 'ClusterIP'"))
    seen: set[tuple[str, int]] = set()
    for index, port in enumerate(ports):
        key = (port.get("protocol") or "", port.get("nodePort") or 0)
        if key[1] and key in seen:
            errors.append(duplicate(f"spec.ports[{index}].nodePort", key[1]))
        seen.add(key)
    seen.clear()
    for index, port in enumerate(ports):
        key = (port.get("protocol") or "", port.get("port") or 0)
        if key in seen:
            errors.append(duplicate(f"spec.ports[{index}]", {"protocol": key[0], "port": key[1], "targetPort": 0}))
        seen.add(key)


def _load_balancer(obj: Object, spec: Object, errors: Errors) -> None:
    is_balancer = spec.get("type") == "LoadBalancer"
    only = "may only be used when `type` is 'LoadBalancer'"
    ranges, annotation = spec.get("loadBalancerSourceRanges") or [], (obj["metadata"].get("annotations") or {}).get(SOURCE_RANGES)
    if ranges:
        if not is_balancer:
            errors.append(field_forbidden("spec.LoadBalancerSourceRanges", only))
        for index, value in enumerate(ranges):
            validate_cidr(value.strip(), f"spec.LoadBalancerSourceRanges[{index}]", errors)
    elif annotation is not None:
        path = f"metadata.annotations[{SOURCE_RANGES}]"
        if not is_balancer:
            errors.append(field_forbidden(path, only))
        for value in annotation.strip().split(",") if annotation.strip() else ():
            validate_cidr(value.strip(), path, errors)
    allocate = spec.get("allocateLoadBalancerNodePorts")
    if allocate is not None and not is_balancer:
        errors.append(field_forbidden("spec.allocateLoadBalancerNodePorts", only))
    if is_balancer and allocate is None:
        errors.append(required("allocateLoadBalancerNodePorts"))
    name = spec.get("loadBalancerClass")
    if name is not None:
        if is_balancer:
            add(errors, "spec.loadBalancerClass", name, label_key_errors(name))
        else:
            errors.append(field_forbidden("spec.loadBalancerClass", only))


def needs_health_check(spec: Object) -> bool:
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def _traffic(spec: Object, errors: Errors) -> None:
    kind, external = spec.get("type"), spec.get("externalTrafficPolicy") or ""
    reachable = kind in ("LoadBalancer", "NodePort") or (kind == "ClusterIP" and bool(spec.get("externalIPs")))
    if not reachable:
        if external:
            errors.append(invalid_value("spec.externalTrafficPolicy", external, "may only be set for externally-accessible services"))
    elif not external:
        errors.append(required("spec.externalTrafficPolicy"))
    elif external not in ("Cluster", "Local"):
        errors.append(not_supported("spec.externalTrafficPolicy", external, ["Cluster", "Local"]))
    port = spec.get("healthCheckNodePort") or 0
    if not needs_health_check(spec):
        if port:
            message = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
            errors.append(invalid_value("spec.healthCheckNodePort", port, message))
    elif not port:
        errors.append(required("spec.healthCheckNodePort"))
    else:
        add(errors, "spec.healthCheckNodePort", port, port_number(port))
    internal = spec.get("internalTrafficPolicy")
    if internal is None:
        if kind in ("NodePort", "LoadBalancer", "ClusterIP"):
            errors.append(required("spec.internalTrafficPolicy"))
    elif internal not in ("Cluster", "Local"):
        errors.append(not_supported("spec.internalTrafficPolicy", internal, ["Cluster", "Local"]))
    distribution = spec.get("trafficDistribution")
    values = ["PreferClose", "PreferSameZone", "PreferSameNode"]
    if distribution is not None and distribution not in values:
        errors.append(not_supported("spec.trafficDistribution", distribution, values))


def _kind_rules(spec: Object, errors: Errors) -> None:
    kind = spec.get("type")
    if kind in ("LoadBalancer", "NodePort"):
        if is_headless(spec):
            errors.append(invalid_value("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {kind} services"))
    elif kind == "ExternalName":
        for key in ("clusterIPs", "ipFamilies"):
            if spec.get(key):
                errors.append(field_forbidden(f"spec.{key}", "may not be set for ExternalName services"))
        if spec.get("ipFamilyPolicy") is not None:
            errors.append(field_forbidden("spec.ipFamilyPolicy", "may not be set for ExternalName services"))
        name = (spec.get("externalName") or "").removesuffix(".")
        if name:
            add(errors, "spec.externalName", name, dns_subdomain(name))
        else:
            errors.append(required("spec.externalName"))


def create_service(obj: Object, errors: Errors) -> None:
    spec, annotations = obj.get("spec") or {}, obj["metadata"].get("annotations") or {}
    if MODE in annotations and HINTS in annotations and annotations[MODE] != annotations[HINTS]:
        message = f"must match annotations[{HINTS}] when both are specified"
        errors.append(invalid_value(f"metadata.annotations[{MODE}]", annotations[MODE], message))
    kind, ports = spec.get("type") or "", spec.get("ports") or []
    if not ports and not is_headless(spec) and kind != "ExternalName":
        errors.append(required("spec.ports"))
    _kind_rules(spec, errors)
    names: set[str] = set()
    for index, port in enumerate(ports):
        _port(port, len(ports) > 1, names, f"spec.ports[{index}]", errors)
    validate_labels(spec.get("selector"), "spec.selector", errors)
    _affinity(spec, errors)
    if kind != "ExternalName":
        cluster_addresses(spec, errors)
    for index, ip in enumerate(spec.get("externalIPs") or ()):
        before = len(errors)
        validate_legacy_ip(ip, f"spec.externalIPs[{index}]", errors)
        if len(errors) == before:
            validate_endpoint_ip(ip, f"spec.externalIPs[{index}]", errors)
    if not kind:
        errors.append(required("spec.type"))
    elif kind not in TYPES:
        errors.append(not_supported("spec.type", kind, TYPES))
    _ports_again(spec, errors)
    _load_balancer(obj, spec, errors)
    _traffic(spec, errors)


def _released(new: Object, old: Object, key: str, single: str, errors: Errors) -> None:
    """Primary addresses and families stay; the secondary one may come, and go with the policy."""
    after, before, path = new.get(key) or [], old.get(key) or [], f"spec.{key}"
    ips = new.get("clusterIPs") or []
    shown = after if key == "clusterIPs" else ips
    if len(before) == len(after):
        for index, (left, right) in enumerate(zip(before, after, strict=True)):
            if left != right:
                where = index if key == "clusterIPs" else 0
                errors.append(invalid_value(f"{path}[{where}]", after, "may not change once set"))
    elif len(before) > len(after):
        if not ips:
            errors.append(invalid_value(f"{path}[0]", after, f"primary {single} can not be unset"))
        if after and after[0] != before[0]:
            errors.append(invalid_value(f"{path}[0]", shown, "may not change once set"))
        if len(after) == 1 and new.get("ipFamilyPolicy") != "SingleStack":
            message = f"must be set to 'SingleStack' when releasing the secondary {single}"
            errors.append(invalid_value("spec.ipFamilyPolicy", new.get("ipFamilyPolicy"), message))
    elif before and after and after[0] != before[0]:
        errors.append(invalid_value(f"{path}[0]", shown, "may not change once set"))


def update_service(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        _status(new, errors)
        return
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    if "ExternalName" not in (spec.get("type"), before.get("type")):
        headless, was_headless = is_headless(spec), is_headless(before)
        if not (headless and was_headless):
            _released(spec, before, "clusterIPs", "clusterIP", errors)
        if headless == was_headless and not headless:
            _released(spec, before, "ipFamilies", "ipFamily", errors)
    name, old_name = spec.get("loadBalancerClass"), before.get("loadBalancerClass")
    if spec.get("type") == before.get("type") == "LoadBalancer" and name != old_name:
        errors.append(invalid_value("spec.loadBalancerClass", name, "may not change once set"))
    if name is not None:
        if spec.get("type") == "LoadBalancer":
            add(errors, "spec.loadBalancerClass", name, label_key_errors(name))
        else:
            errors.append(field_forbidden("spec.loadBalancerClass", "may only be used when `type` is 'LoadBalancer'"))
    if needs_health_check(before) and needs_health_check(spec) and spec.get("healthCheckNodePort") != before.get("healthCheckNodePort"):
        errors.append(field_forbidden("spec.healthCheckNodePort", "field is immutable"))
    create_service(new, errors)


def _status(obj: Object, errors: Errors) -> None:
    ingress = ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    path = "status.loadBalancer.ingress"
    if ingress and (obj.get("spec") or {}).get("type") != "LoadBalancer":
        errors.append(field_forbidden(path, "may only be used when `spec.type` is 'LoadBalancer'"))
        return
    for index, entry in enumerate(ingress):
        own, ip, mode, name = f"{path}[{index}]", entry.get("ip") or "", entry.get("ipMode"), entry.get("hostname") or ""
        if ip:
            validate_legacy_ip(ip, f"{own}.ip", errors)
        if mode is None:
            if ip:
                errors.append(required(f"{own}.ipMode", "must be specified when `ip` is set"))
        elif not ip:
            errors.append(field_forbidden(f"{own}.ipMode", "may not be specified when `ip` is not set"))
        elif mode not in ("Proxy", "VIP"):
            errors.append(not_supported(f"{own}.ipMode", mode, ["Proxy", "VIP"]))
        if name:
            add(errors, f"{own}.hostname", name, dns_subdomain(name))
            if _is_valid_ip(name):
                errors.append(invalid_value(f"{own}.hostname", name, "must be a DNS name, not an IP address"))


def _endpoint_address(address: Object, path: str, errors: Errors) -> None:
    ip = address.get("ip") or ""
    validate_legacy_ip(ip, f"{path}.ip", errors)
    if address.get("hostname"):
        add(errors, f"{path}.hostname", address["hostname"], dns_label(address["hostname"]))
    node = address.get("nodeName")
    if node is not None:
        add(errors, f"{path}.nodeName", node, dns_subdomain(node))
    if sloppy_ip(ip) is not None:
        validate_endpoint_ip(ip, f"{path}.ip", errors)
    else:
        errors.append(invalid_value(f"{path}.ip", ip, "must be a valid IP address"))


def create_endpoints(obj: Object, errors: Errors) -> None:
    for index, subset in enumerate(obj.get("subsets") or ()):
        path = f"subsets[{index}]"
        ready, waiting, ports = subset.get("addresses") or [], subset.get("notReadyAddresses") or [], subset.get("ports") or []
        if not ready and not waiting:
            errors.append(required(path, "must specify `addresses` or `notReadyAddresses`"))
        for key, addresses in (("addresses", ready), ("notReadyAddresses", waiting)):
            for position, address in enumerate(addresses):
                _endpoint_address(address, f"{path}.{key}[{position}]", errors)
        for position, port in enumerate(ports):
            own, name = f"{path}.ports[{position}]", port.get("name") or ""
            if len(ports) > 1 and not name:
                errors.append(required(f"{own}.name"))
            elif name:
                add(errors, f"{own}.name", name, dns_label(name))
            number, protocol = port.get("port") or 0, port.get("protocol") or ""
            add(errors, f"{own}.port", number, port_number(number))
            if not protocol:
                errors.append(required(f"{own}.protocol"))
            elif protocol not in PROTOCOLS:
                errors.append(not_supported(f"{own}.protocol", protocol, PROTOCOLS))
            if port.get("appProtocol") is not None:
                add(errors, f"{own}.appProtocol", port["appProtocol"], label_key_errors(port["appProtocol"]))
