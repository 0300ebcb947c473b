"""PodSpec: what pods and the templates of workloads have in common.

Source: pkg/apis/core/validation ValidatePodSpec.
"""

from __future__ import annotations

from fractions import Fraction
from ipaddress import ip_address

from knarr.api import quantity
from knarr.api.errors import duplicate, field_forbidden, field_not_found, invalid_value, not_supported, required, too_long
from knarr.api.validation.containers import (
    PodContext,
    validate_containers,
    validate_ephemeral_containers,
    validate_init_containers,
)
from knarr.api.validation.metadata import Errors, Object, add, validate_labels
from knarr.api.validation.quantities import validate_container_resource_name, validate_requirements, validate_resource_amount
from knarr.api.validation.scheduling import validate_affinity, validate_spread_constraints, validate_tolerations
from knarr.api.validation.security import validate_os, validate_pod_security
from knarr.api.validation.strings import (
    dns_label,
    dns_subdomain,
    dns_subdomain_with_underscore,
    label_key_errors,
    range_message,
)
from knarr.api.validation.volumes import validate_volumes

MAXIMUM_INT32 = 2**31 - 1
RESTART_POLICIES = ("Always", "OnFailure", "Never")
DNS_POLICIES = ("ClusterFirstWithHostNet", "ClusterFirst", "Default", "None")


def validate_legacy_ip(value: str, path: str, errors: Errors) -> None:
    """An IP address as older fields take it: leading zeros are let through, as Go's old parser did."""
    try:
        ip_address(value)
    except ValueError:
        parts = value.split(".")
        lenient = len(parts) == 4 and all(p.isdigit() and int(p) < 256 and len(p) <= 4 for p in parts)
        if not lenient:
            errors.append(invalid_value(path, value, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"))


def _choice(spec: Object, key: str, values: tuple[str, ...], path: str, errors: Errors) -> None:
    value = spec.get(key) or ""
    if not value:
        errors.append(required(f"{path}.{key}"))
    elif value not in values:
        errors.append(not_supported(f"{path}.{key}", value, values))


def _dns_config(spec: Object, path: str, errors: Errors) -> None:
    config, own = spec.get("dnsConfig"), f"{path}.dnsConfig"
    if spec.get("dnsPolicy") == "None":
        if config is None:
            errors.append(required(own, "must provide `dnsConfig` when `dnsPolicy` is None"))
            return
        if not config.get("nameservers"):
            message = "must provide at least one DNS nameserver when `dnsPolicy` is None"
            errors.append(required(f"{own}.nameservers", message))
            return
    if config is None:
        return
    servers, searches = config.get("nameservers") or [], config.get("searches") or []
    if len(servers) > 3:
        errors.append(invalid_value(f"{own}.nameservers", servers, "must not have more than 3 nameservers"))
    for index, server in enumerate(servers):
        validate_legacy_ip(server, f"{own}.nameservers[{index}]", errors)
    if len(searches) > 32:
        errors.append(invalid_value(f"{own}.searches", searches, "must not have more than 32 search paths"))
    if len(" ".join(searches)) > 2048:
        message = "must not have more than 2048 characters (including spaces) in the search list"
        errors.append(invalid_value(f"{own}.searches", searches, message))
    for index, search in enumerate(searches):
        if search != ".":
            search = search.removesuffix(".")
            add(errors, f"{own}.searches[{index}]", search, dns_subdomain_with_underscore(search))
    for index, option in enumerate(config.get("options") or ()):
        if not option.get("name"):
            errors.append(required(f"{own}.options[{index}]", "must not be empty"))


def _claims(spec: Object, path: str, errors: Errors) -> None:
    names: set[str] = set()
    for index, claim in enumerate(spec["resourceClaims"]):
        own, name = f"{path}[{index}]", claim.get("name") or ""
        if not name:
            errors.append(required(f"{own}.name"))
        elif name in names:
            errors.append(duplicate(f"{own}.name", name))
        else:
            add(errors, f"{own}.name", name, dns_label(name))
            names.add(name)
        direct, template = claim.get("resourceClaimName"), claim.get("resourceClaimTemplateName")
        if direct is not None and template is not None:
            message = "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified"
            errors.append(invalid_value(own, claim, message))
        if direct is None and template is None:
            message = "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`"
            errors.append(invalid_value(own, claim, message))
        if direct is not None:
            add(errors, f"{own}.resourceClaimName", direct, dns_subdomain(direct))
        if template is not None:
            add(errors, f"{own}.resourceClaimTemplateName", template, dns_subdomain(template))


def _aggregate(spec: Object, kind: str) -> dict[str, Fraction]:
    """What the containers together ask for: main and sidecars summed, init containers as peak."""
    total: dict[str, Fraction] = {}
    for container in spec.get("containers") or ():
        for name, text in ((container.get("resources") or {}).get(kind) or {}).items():
            total[name] = total.get(name, Fraction(0)) + quantity.parse(text)
    sidecars: dict[str, Fraction] = {}
    peak: dict[str, Fraction] = {}
    for container in spec.get("initContainers") or ():
        own = {name: quantity.parse(text) for name, text in ((container.get("resources") or {}).get(kind) or {}).items()}
        if container.get("restartPolicy") == "Always":
            for name, amount in own.items():
                total[name] = total.get(name, Fraction(0)) + amount
                sidecars[name] = sidecars.get(name, Fraction(0)) + amount
            own = sidecars
        else:
            own = {name: amount + sidecars.get(name, Fraction(0)) for name, amount in own.items()}
        for name, amount in own.items():
            peak[name] = max(peak.get(name, Fraction(0)), amount)
    for name, amount in peak.items():
        total[name] = max(total.get(name, Fraction(0)), amount)
    return total


def _pod_resources(spec: Object, path: str, errors: Errors) -> None:
    resources, own = spec["resources"], f"{path}.resources"
    if (spec.get("os") or {}).get("name") == "windows":
        errors.append(field_forbidden(own, "may not be set for a windows pod"))
        return
    if resources.get("claims"):
        errors.append(field_forbidden(f"{own}.claims", "claims may not be set for Resources at pod-level"))
    validate_requirements(resources, frozenset(), own, errors, of_pod=True)
    for name, amount in _aggregate(spec, "requests").items():
        text = (resources.get("requests") or {}).get(name)
        if text is not None and amount > quantity.parse(text):
            message = f"must be greater than or equal to aggregate container requests of {quantity.format(amount)}"
            errors.append(invalid_value(f"{own}.requests[{name}]", text, message))
    limits = resources.get("limits") or {}
    for name, amount in _aggregate(spec, "limits").items():
        if name.startswith("hugepages-") and name in limits and amount > quantity.parse(limits[name]):
            message = f"must be greater than or equal to aggregate container limits of {quantity.format(amount)}"
            errors.append(invalid_value(f"{own}.limits[{name}]", limits[name], message))
    for index, container in enumerate(spec.get("containers") or ()):
        for name, text in ((container.get("resources") or {}).get("limits") or {}).items():
            if name in limits and quantity.compare(text, limits[name]) > 0:
                message = f"must be less than or equal to pod limits of {limits[name]}"
                errors.append(invalid_value(f"{own}.containers[{index}][{name}].limits", text, message))


def _host_network_ports(spec: Object, path: str, errors: Errors, is_pod: bool) -> None:
    for index, container in enumerate(spec.get("containers") or ()):
        for position, port in enumerate(container.get("ports") or ()):
            host = port.get("hostPort") or 0
            if (is_pod or host) and host != port.get("containerPort"):
                own = f"{path}.containers[{index}].ports[{position}].hostPort"
                errors.append(invalid_value(own, host, "must match `containerPort` when `hostNetwork` is true"))


def _host_users(spec: Object, path: str, errors: Errors) -> None:
    for key, shown in (("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")):
        if spec.get(key):
            errors.append(field_forbidden(f"{path}.{shown}", "when `hostUsers` is false"))


def _host_name(spec: Object, path: str, errors: Errors) -> None:
    name, own = spec["hostnameOverride"], f"{path}.hostnameOverride"
    if spec.get("setHostnameAsFQDN"):
        errors.append(field_forbidden(own, "may not be specified when setHostnameAsFQDN is true"))
    if spec.get("hostNetwork"):
        errors.append(field_forbidden(own, "may not be specified when hostNetwork is true"))
    if len(name) > 64:
        errors.append(too_long(own, 64))
    add(errors, own, name, dns_subdomain(name))


def _gates(spec: Object, path: str, errors: Errors) -> None:
    for index, gate in enumerate(spec.get("readinessGates") or ()):
        kind = gate.get("conditionType") or ""
        add(errors, f"{path}.readinessGates[{index}].conditionType", kind, label_key_errors(kind))
    seen: set[str] = set()
    for index, gate in enumerate(spec.get("schedulingGates") or ()):
        own, name = f"{path}.schedulingGates[{index}]", gate.get("name") or ""
        add(errors, own, name, label_key_errors(name))
        if name in seen:
            errors.append(duplicate(own, name))
        seen.add(name)


def _names(spec: Object, path: str, errors: Errors) -> None:
    for key, rule in (
        ("serviceAccountName", dns_subdomain),
        ("nodeName", dns_subdomain),
        ("hostname", dns_label),
        ("subdomain", dns_label),
        ("priorityClassName", dns_subdomain),
    ):
        value = spec.get(key)
        if value:
            found = rule(value)
            if found:
                add(errors, f"{path}.{key}", value, found)
    deadline = spec.get("activeDeadlineSeconds")
    if deadline is not None and not 1 <= deadline <= MAXIMUM_INT32:
        errors.append(invalid_value(f"{path}.activeDeadlineSeconds", deadline, range_message(1, MAXIMUM_INT32)))
    if spec.get("runtimeClassName") is not None:
        name = spec["runtimeClassName"]
        add(errors, f"{path}.runtimeClassName", name, dns_subdomain(name))
    policy = spec.get("preemptionPolicy")
    if policy is not None:
        if not policy:
            errors.append(required(f"{path}.preemptionPolicy"))
        elif policy not in ("PreemptLowerPriority", "Never"):
            errors.append(not_supported(f"{path}.preemptionPolicy", policy, ["PreemptLowerPriority", "Never"]))


def _rare(spec: Object, path: str, errors: Errors) -> None:
    """Fields few pods have."""
    if spec.get("hostAliases"):
        for index, alias in enumerate(spec["hostAliases"]):
            own = f"{path}.hostAliases[{index}]"
            validate_legacy_ip(alias.get("ip") or "", f"{own}.ip", errors)
            for position, name in enumerate(alias.get("hostnames") or ()):
                add(errors, f"{own}.hostnames[{position}]", name, dns_subdomain(name))
    for name, text in (spec.get("overhead") or {}).items():
        own = f"{path}.overhead.limits[{name}]"
        validate_container_resource_name(name, own, errors)
        validate_resource_amount(name, text, own, errors)


def _file_key_refs(spec: Object, path: str, errors: Errors) -> None:
    sources = {v.get("name"): v for v in spec.get("volumes") or ()}
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(kind) or ()):
            for position, variable in enumerate(container.get("env") or ()):
                reference = (variable.get("valueFrom") or {}).get("fileKeyRef")
                if reference is None:
                    continue
                own = f"{path}.{kind}[{index}].env[{position}].valueFrom.fileKeyRef.volumeName"
                name = reference.get("volumeName") or ""
                if name not in sources:
                    errors.append(field_not_found(own, name))
                elif sources[name].get("emptyDir") is None:
                    errors.append(invalid_value(own, name, "referenced volume must be of type emptyDir"))


def validate_pod_spec(spec: Object, path: str, errors: Errors, *, pod_name: str = "", is_pod: bool = False) -> None:
    """Check a PodSpec.

    Args:
      pod_name: of a real pod (claims of its ephemeral volumes are named after it).
      is_pod: False for templates, which are checked a little less.
    """
    if spec.get("terminationGracePeriodSeconds") is None:
        errors.append(required(f"{path}.terminationGracePeriodSeconds"))
    volumes = validate_volumes(spec["volumes"], pod_name, f"{path}.volumes", errors, is_pod=is_pod) if spec.get("volumes") else {}
    claims: frozenset[str] = frozenset()
    if spec.get("resourceClaims"):
        claims = frozenset(c["name"] for c in spec["resourceClaims"] if c.get("name"))
        _claims(spec, f"{path}.resourceClaims", errors)
    context = PodContext(
        volumes,
        claims,
        spec.get("terminationGracePeriodSeconds"),
        spec.get("restartPolicy") or "",
        spec.get("hostUsers") is not False,
        (spec["os"].get("name") or "") if spec.get("os") is not None else None,
        is_pod,
    )
    main, init = spec.get("containers") or [], spec.get("initContainers") or []
    validate_containers(main, context, f"{path}.containers", errors)
    if init:
        validate_init_containers(init, main, context, f"{path}.initContainers", errors)
    if spec.get("ephemeralContainers"):
        validate_ephemeral_containers(spec["ephemeralContainers"], [*main, *init], context, f"{path}.ephemeralContainers", errors)
    if spec.get("resources") is not None:
        _pod_resources(spec, path, errors)
    if spec.get("hostNetwork"):
        _host_network_ports(spec, path, errors, is_pod)
    _choice(spec, "restartPolicy", RESTART_POLICIES, path, errors)
    _choice(spec, "dnsPolicy", DNS_POLICIES, path, errors)
    validate_labels(spec.get("nodeSelector"), f"{path}.nodeSelector", errors)
    validate_pod_security(spec.get("securityContext") or {}, spec, f"{path}.securityContext", errors)
    if spec.get("affinity"):
        validate_affinity(spec["affinity"], f"{path}.affinity", errors)
    if spec.get("dnsConfig") is not None or spec.get("dnsPolicy") == "None":
        _dns_config(spec, path, errors)
    if "readinessGates" in spec or "schedulingGates" in spec:
        _gates(spec, path, errors)
    if spec.get("topologySpreadConstraints"):
        validate_spread_constraints(spec["topologySpreadConstraints"], f"{path}.topologySpreadConstraints", errors)
    if not context.host_users:
        _host_users(spec, path, errors)
    if spec.get("hostnameOverride") is not None:
        _host_name(spec, path, errors)
    _names(spec, path, errors)
    if spec.get("tolerations"):
        validate_tolerations(spec["tolerations"], f"{path}.tolerations", errors)
    _rare(spec, path, errors)
    if spec.get("os") is not None:
        validate_os(spec, path, errors)
    _file_key_refs(spec, path, errors)
