"""Containers of pods: ports, environment, mounts, probes, hooks, security context.

Source: pkg/apis/core/validation validateContainers, validateInitContainers, validateEphemeralContainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knarr.api.errors import duplicate, field_forbidden, field_not_found, invalid_value, not_supported, required, too_long
from knarr.api.validation.fieldrefs import ENV_FIELDS, validate_field_ref, validate_resource_field_ref
from knarr.api.validation.metadata import Errors, Object, add, nonnegative
from knarr.api.validation.quantities import validate_requirements
from knarr.api.validation.security import validate_container_security
from knarr.api.validation.strings import (
    POSITIVE,
    config_key,
    dns_label,
    dns_subdomain,
    env_name,
    http_header_name,
    mask_trailing_dash,
    port_name,
    port_number,
)
from knarr.api.validation.volumes import local_descending_path, no_backsteps, validate_pull_policy

PROTOCOLS = ("SCTP", "TCP", "UDP")
_LINUX_SIGNALS = frozenset(
    "SIGABRT SIGALRM SIGBUS SIGCHLD SIGCLD SIGCONT SIGFPE SIGHUP SIGILL SIGINT SIGIO SIGIOT SIGKILL SIGPIPE SIGPOLL SIGPROF SIGPWR "
    "SIGQUIT SIGSEGV SIGSTKFLT SIGSTOP SIGSYS SIGTERM SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH "
    "SIGXCPU SIGXFSZ SIGRTMIN SIGRTMAX".split()
    + [f"SIGRTMIN+{n}" for n in range(1, 16)]
    + [f"SIGRTMAX-{n}" for n in range(1, 15)]
)
_SIGNALS = {"linux": _LINUX_SIGNALS, "windows": frozenset({"SIGKILL", "SIGTERM"})}
_EPHEMERAL_FORBIDDEN = (
    "ports",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
    "resizePolicy",
    "restartPolicy",
    "resources",
)


@dataclass(slots=True)
class PodContext:
    """What of the pod its containers are checked against."""

    volumes: dict[str, Object]
    claims: frozenset[str]
    grace_seconds: int | None
    restart_policy: str
    host_users: bool
    os_name: str | None
    is_pod: bool = True


def validate_ports(ports: list[Object], path: str, errors: Errors) -> None:
    names: set[str] = set()
    for index, port in enumerate(ports):
        own = f"{path}[{index}]"
        name = port.get("name")
        if name:
            found = port_name(name)
            if found:
                # Upstream's loop variable is overwritten there: the path has the index of the message.
                for number, message in enumerate(found):
                    errors.append(invalid_value(f"{own}.name", name, message))
                    _ = number
            elif name in names:
                errors.append(duplicate(f"{own}.name", name))
            else:
                names.add(name)
        number = port.get("containerPort") or 0
        if not number:
            errors.append(required(f"{own}.containerPort"))
        else:
            add(errors, f"{own}.containerPort", number, port_number(number))
        host = port.get("hostPort")
        if host:
            add(errors, f"{own}.hostPort", host, port_number(host))
        protocol = port.get("protocol")
        if not protocol:
            errors.append(required(f"{own}.protocol"))
        elif protocol not in PROTOCOLS:
            errors.append(not_supported(f"{own}.protocol", protocol, PROTOCOLS))


def _key_ref(reference: Object, path: str, errors: Errors) -> None:
    name, key = reference.get("name") or "", reference.get("key") or ""
    add(errors, f"{path}.name", name, dns_subdomain(name))
    if not key:
        errors.append(required(f"{path}.key"))
    else:
        add(errors, f"{path}.key", key, config_key(key))


def _file_key_ref(reference: Object, path: str, errors: Errors) -> None:
    for key, rule in (("key", env_name), ("volumeName", dns_label)):
        value = reference.get(key)
        if not value:
            errors.append(required(f"{path}.{key}"))
        else:
            add(errors, f"{path}.{key}", value, rule(value))
    if not reference.get("path"):
        errors.append(required(f"{path}.path"))
    else:
        no_backsteps(reference["path"], f"{path}.path", errors)


def _value_from(source: Object, value: str, path: str, errors: Errors) -> None:
    number = 0
    if source.get("fieldRef") is not None:
        number += 1
        validate_field_ref(source["fieldRef"], ENV_FIELDS, f"{path}.fieldRef", errors)
    if source.get("resourceFieldRef") is not None:
        number += 1
        validate_resource_field_ref(source["resourceFieldRef"], f"{path}.resourceFieldRef", errors, in_volume=False)
    for key in ("configMapKeyRef", "secretKeyRef"):
        if source.get(key) is not None:
            number += 1
            _key_ref(source[key], f"{path}.{key}", errors)
    if source.get("fileKeyRef") is not None:
        number += 1
        _file_key_ref(source["fileKeyRef"], f"{path}.fileKeyRef", errors)
    if not number:
        message = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`"
        errors.append(invalid_value(path, "", message))
    elif value:
        errors.append(invalid_value(path, "", "may not be specified when `value` is not empty"))
    elif number > 1:
        errors.append(invalid_value(path, "", "may not have more than one field specified at a time"))


def validate_env(variables: list[Object], path: str, errors: Errors) -> None:
    for index, variable in enumerate(variables):
        name = variable.get("name") or ""
        if not name:
            errors.append(required(f"{path}[{index}].name"))
        else:
            found = env_name(name)
            if found:
                add(errors, f"{path}[{index}].name", name, found)
        source = variable.get("valueFrom")
        if source is not None:
            _value_from(source, variable.get("value") or "", f"{path}[{index}].valueFrom", errors)


def _env_from(sources: list[Object], path: str, errors: Errors) -> None:
    for index, source in enumerate(sources):
        own = f"{path}[{index}]"
        prefix = source.get("prefix")
        if prefix:
            add(errors, f"{own}.prefix", prefix, env_name(prefix))
        number = 0
        for key in ("configMapRef", "secretRef"):
            reference = source.get(key)
            if reference is not None:
                number += 1
                name = reference.get("name") or ""
                if not name:
                    errors.append(required(f"{own}.{key}.name"))
                else:
                    add(errors, f"{own}.{key}.name", name, dns_subdomain(mask_trailing_dash(name)))
        if not number:
            errors.append(invalid_value(path, "", "must specify one of: `configMapRef` or `secretRef`"))
        elif number > 1:
            errors.append(invalid_value(path, "", "may not have more than one field specified at a time"))


def _mount_options(mount: Object, container: Object, path: str, errors: Errors) -> None:
    sub_path, expression = mount.get("subPath") or "", mount.get("subPathExpr") or ""
    parent = path.rpartition("[")[0]
    if sub_path:
        local_descending_path(sub_path, f"{parent}.subPath", errors)
    if expression:
        if sub_path:
            errors.append(invalid_value(f"{path}.subPathExpr", expression, "subPathExpr and subPath are mutually exclusive"))
        local_descending_path(expression, f"{parent}.subPathExpr", errors)
    propagation = mount.get("mountPropagation")
    if propagation is not None:
        if propagation not in ("Bidirectional", "HostToContainer", "None"):
            errors.append(not_supported(f"{parent}.mountPropagation", propagation, ["Bidirectional", "HostToContainer", "None"]))
        if propagation == "Bidirectional" and not (container.get("securityContext") or {}).get("privileged"):
            message = "Bidirectional mount propagation is available only to privileged containers"
            errors.append(field_forbidden(f"{parent}.mountPropagation", message))
    recursive = mount.get("recursiveReadOnly")
    if recursive is None or recursive == "Disabled":
        return
    own = f"{parent}.recursiveReadOnly"
    if recursive not in ("Enabled", "IfPossible"):
        errors.append(not_supported(own, recursive, ["Disabled", "Enabled", "IfPossible"]))
        return
    if not mount.get("readOnly"):
        errors.append(field_forbidden(own, "may only be specified when readOnly is true"))
    if propagation not in (None, "None"):
        errors.append(field_forbidden(own, "may only be specified when mountPropagation is None or not specified"))


def _mounts(container: Object, volumes: dict[str, Object], path: str, errors: Errors) -> None:
    devices = {d.get("name"): d.get("devicePath") for d in container.get("volumeDevices") or ()}
    points: set[str] = set()
    for index, mount in enumerate(container["volumeMounts"]):
        own = f"{path}[{index}]"
        name, target = mount.get("name") or "", mount.get("mountPath") or ""
        if not name:
            errors.append(required(f"{own}.name"))
        if name not in volumes:
            errors.append(field_not_found(f"{own}.name", name))
        if not target:
            errors.append(required(f"{own}.mountPath"))
        if target in points:
            errors.append(invalid_value(f"{own}.mountPath", target, "must be unique"))
        points.add(target)
        if name in devices:
            errors.append(invalid_value(f"{own}.name", name, "must not already exist in volumeDevices"))
        if devices and target in devices.values():
            errors.append(invalid_value(f"{own}.mountPath", target, "must not already exist as a path in volumeDevices"))
        if len(mount) > 2:
            _mount_options(mount, container, own, errors)


def _devices(container: Object, volumes: dict[str, Object], path: str, errors: Errors) -> None:
    mounts = {m.get("name"): m.get("mountPath") for m in container.get("volumeMounts") or ()}
    names: set[str] = set()
    paths: set[str] = set()
    for index, device in enumerate(container["volumeDevices"]):
        own = f"{path}[{index}]"
        name, target = device.get("name") or "", device.get("devicePath") or ""
        volume = volumes.get(name)
        if not name:
            errors.append(required(f"{own}.name"))
        if name in names:
            errors.append(invalid_value(f"{own}.name", name, "must be unique"))
        if volume is None:
            errors.append(field_not_found(f"{own}.name", name))
        elif volume.get("persistentVolumeClaim") is None and volume.get("ephemeral") is None:
            message = "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode"
            errors.append(invalid_value(f"{own}.name", name, message))
        if not target:
            errors.append(required(f"{own}.devicePath"))
        if target in paths:
            errors.append(invalid_value(f"{own}.devicePath", target, "must be unique"))
        if ".." in target.split("/"):
            errors.append(invalid_value(f"{own}.devicePath", target, "can not contain backsteps ('..')"))
        else:
            paths.add(target)
        if name in mounts:
            errors.append(invalid_value(f"{own}.name", name, "must not already exist in volumeMounts"))
        if target in mounts.values():
            errors.append(invalid_value(f"{own}.devicePath", target, "must not already exist as a path in volumeMounts"))
        if name:
            names.add(name)


def validate_port_or_name(port: Any, path: str, errors: Errors) -> None:
    if isinstance(port, int):
        add(errors, path, port, port_number(port))
    else:
        add(errors, path, port or "", port_name(port or ""))


def _http_get(action: Object, path: str, errors: Errors) -> None:
    if not action.get("path"):
        errors.append(required(f"{path}.path"))
    validate_port_or_name(action.get("port", 0), f"{path}.port", errors)
    scheme = action.get("scheme") or ""
    if scheme not in ("HTTP", "HTTPS"):
        errors.append(not_supported(f"{path}.scheme", scheme, ["HTTP", "HTTPS"]))
    for header in action.get("httpHeaders") or ():
        add(errors, f"{path}.httpHeaders", header.get("name") or "", http_header_name(header.get("name") or ""))


def _sleep(action: Object, grace_seconds: int | None, path: str, errors: Errors) -> None:
    seconds = action.get("seconds") or 0
    if grace_seconds is not None and not 0 <= seconds <= grace_seconds:
        message = f"must be non-negative and less than terminationGracePeriodSeconds ({grace_seconds})"
        errors.append(invalid_value(path, seconds, message))


def _handler(handler: Object, kinds: tuple[str, ...], grace_seconds: int | None, path: str, errors: Errors) -> None:
    found = ""
    for kind in kinds:
        action = handler.get(kind)
        if action is None:
            continue
        own = f"{path}.{kind}"
        if found:
            errors.append(field_forbidden(own, "may not specify more than 1 handler type"))
            continue
        found = kind
        if kind == "exec":
            if not action.get("command"):
                errors.append(required(f"{own}.command"))
        elif kind == "httpGet":
            _http_get(action, own, errors)
        elif kind == "sleep":
            _sleep(action, grace_seconds, own, errors)
        else:
            validate_port_or_name(action.get("port", 0), f"{own}.port", errors)
    if not found:
        errors.append(required(path, "must specify a handler type"))


_PROBE_KINDS = ("exec", "httpGet", "tcpSocket", "grpc")
_HOOK_KINDS = ("exec", "httpGet", "tcpSocket", "sleep")


def _probe(probe: Object | None, kind: str, path: str, errors: Errors) -> None:
    if probe is None:
        return
    own = f"{path}.{kind}"
    _handler(probe, _PROBE_KINDS, None, own, errors)
    for key in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        nonnegative(errors, f"{own}.{key}", probe.get(key))
    grace = probe.get("terminationGracePeriodSeconds")
    if grace is not None and grace <= 0:
        errors.append(invalid_value(f"{own}.terminationGracePeriodSeconds", grace, POSITIVE))
    if kind == "readinessProbe":
        if grace is not None:
            errors.append(invalid_value(f"{own}.terminationGracePeriodSeconds", grace, "must not be set for readinessProbes"))
    elif (probe.get("successThreshold") or 0) != 1:
        errors.append(invalid_value(f"{own}.successThreshold", probe.get("successThreshold") or 0, "must be 1"))


def _probes(container: Object, path: str, errors: Errors) -> None:
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        if kind in container:
            _probe(container[kind], kind, path, errors)


def _lifecycle(lifecycle: Object, context: PodContext, path: str, errors: Errors) -> None:
    for hook in ("postStart", "preStop"):
        if lifecycle.get(hook) is not None:
            _handler(lifecycle[hook], _HOOK_KINDS, context.grace_seconds, f"{path}.{hook}", errors)
    signal = lifecycle.get("stopSignal")
    if signal is not None:
        own = f"{path}.stopSignal"
        if context.os_name is None:
            errors.append(field_forbidden(own, "may not be set for containers with empty `spec.os.name`"))
        elif context.os_name in _SIGNALS and signal not in _SIGNALS[context.os_name]:
            errors.append(not_supported(own, signal, sorted(_SIGNALS[context.os_name])))


def _resize_policy(policies: list[Object], restart_policy: str, path: str, errors: Errors) -> None:
    seen: set[str] = set()
    for index, policy in enumerate(policies):
        resource, restart = policy.get("resourceName") or "", policy.get("restartPolicy") or ""
        if resource in seen:
            errors.append(duplicate(f"{path}[{index}]", resource))
        seen.add(resource)
        if not resource:
            errors.append(required(path))
        elif resource not in ("cpu", "memory"):
            errors.append(not_supported(path, resource, ["cpu", "memory"]))
        if not restart:
            errors.append(required(path))
        elif restart not in ("NotRequired", "RestartContainer"):
            errors.append(not_supported(path, restart, ["NotRequired", "RestartContainer"]))
        if restart_policy == "Never" and restart != "NotRequired":
            errors.append(invalid_value(path, restart, "must be 'NotRequired' when `restartPolicy` is 'Never'"))


def _common(container: Object, context: PodContext, path: str, errors: Errors) -> None:
    name = container.get("name") or ""
    if not name:
        errors.append(required(f"{path}.name"))
    else:
        found = dns_label(name)
        if found:
            add(errors, f"{path}.name", name, found)
    if not container.get("image"):
        errors.append(required(f"{path}.image"))
    policy = container.get("terminationMessagePolicy") or ""
    if not policy:
        errors.append(required(f"{path}.terminationMessagePolicy"))
    elif policy not in ("File", "FallbackToLogsOnError"):
        errors.append(not_supported(f"{path}.terminationMessagePolicy", policy, ["File", "FallbackToLogsOnError"]))
    if container.get("ports"):
        validate_ports(container["ports"], f"{path}.ports", errors)
    if container.get("env"):
        validate_env(container["env"], f"{path}.env", errors)
    if container.get("envFrom"):
        _env_from(container["envFrom"], f"{path}.envFrom", errors)
    if container.get("volumeMounts"):
        _mounts(container, context.volumes, f"{path}.volumeMounts", errors)
    if container.get("volumeDevices"):
        _devices(container, context.volumes, f"{path}.volumeDevices", errors)
    validate_pull_policy(container.get("imagePullPolicy") or "", f"{path}.imagePullPolicy", errors)
    if container.get("resources"):
        validate_requirements(container["resources"], context.claims, f"{path}.resources", errors)
    if container.get("resizePolicy"):
        _resize_policy(container["resizePolicy"], context.restart_policy, f"{path}.resizePolicy", errors)
    if container.get("securityContext"):
        validate_container_security(container["securityContext"], f"{path}.securityContext", context.host_users, errors)


def _host_ports(containers: list[Object], path: str, errors: Errors, *, single: bool = False) -> None:
    taken: set[str] = set()
    for index, container in enumerate(containers):
        for position, port in enumerate(container.get("ports") or ()):
            if not port.get("hostPort"):
                continue
            key = f"{port.get('protocol', '')}/{port.get('hostIP', '')}/{port['hostPort']}"
            if key in taken:
                errors.append(duplicate(f"{path}[{index}].ports[{position}].hostPort", key))
            taken.add(key)


def _restart_rules(container: Object, path: str, errors: Errors) -> None:
    """restartPolicy of a main container and its rules (KEP-5307, beta)."""
    policy, rules = container.get("restartPolicy"), container.get("restartPolicyRules") or ()
    if policy is None:
        if not rules:
            return
        errors.append(required(f"{path}.restartPolicy", "must specify restartPolicy when restart rules are used"))
    elif policy not in ("Always", "Never", "OnFailure"):
        errors.append(not_supported(f"{path}.restartPolicy", policy, ["Always", "Never", "OnFailure"]))
    if len(rules) > 20:
        errors.append(too_long(f"{path}.restartPolicyRules", 20))
    for index, rule in enumerate(rules):
        own = f"{path}.restartPolicyRules[{index}]"
        if rule.get("action") != "Restart":
            errors.append(not_supported(f"{own}.action", rule.get("action") or "", ["Restart"]))
        codes = rule.get("exitCodes")
        if codes is None:
            errors.append(required(f"{own}.exitCodes", "must be specified"))
            continue
        if codes.get("operator") not in ("In", "NotIn"):
            errors.append(not_supported(f"{own}.exitCodes.operator", codes.get("operator") or "", ["In", "NotIn"]))
        if len(codes.get("values") or ()) > 255:
            errors.append(too_long(f"{own}.exitCodes.values", 255))


def validate_containers(containers: list[Object], context: PodContext, path: str, errors: Errors) -> None:
    """spec.containers."""
    if not containers:
        errors.append(required(path))
        return
    names: set[str] = set()
    for index, container in enumerate(containers):
        own = f"{path}[{index}]"
        _common(container, context, own, errors)
        name = container.get("name") or ""
        if name in names:
            errors.append(duplicate(f"{own}.name", name))
        names.add(name)
        if container.get("lifecycle") is not None:
            _lifecycle(container["lifecycle"], context, f"{own}.lifecycle", errors)
        _probes(container, own, errors)
        _restart_rules(container, own, errors)
    _host_ports(containers, path, errors)


def validate_init_containers(containers: list[Object], main: list[Object], context: PodContext, path: str, errors: Errors) -> None:
    """spec.initContainers."""
    names = {c.get("name") for c in main}
    for index, container in enumerate(containers):
        own = f"{path}[{index}]"
        _common(container, context, own, errors)
        policy = container.get("restartPolicy")
        if policy == "Always":
            if container.get("restartPolicyRules"):
                message = "restartPolicyRules are not allowed for init containers with restart policy Always"
                errors.append(field_forbidden(f"{own}.restartPolicyRules", message))
        elif policy is not None:
            _restart_rules(container, own, errors)
        name = container.get("name") or ""
        if name in names:
            errors.append(duplicate(f"{own}.name", name))
        elif name:
            names.add(name)
        _host_ports([container], path, errors)
        if policy == "Always":
            if container.get("lifecycle") is not None:
                _lifecycle(container["lifecycle"], context, f"{own}.lifecycle", errors)
            _probes(container, own, errors)
        else:
            for key in ("lifecycle", "livenessProbe", "readinessProbe", "startupProbe"):
                if container.get(key) is not None:
                    message = "may not be set for init containers without restartPolicy=Always"
                    errors.append(field_forbidden(f"{own}.{key}", message))


def validate_ephemeral_containers(containers: list[Object], others: list[Object], context: PodContext, path: str, errors: Errors) -> None:
    """spec.ephemeralContainers."""
    other_names = {c.get("name") for c in others}
    names = set(other_names)
    for index, container in enumerate(containers):
        own = f"{path}[{index}]"
        _common(container, context, own, errors)
        image_whitespace(container, own, errors)
        name = container.get("name") or ""
        if name in names:
            errors.append(duplicate(f"{own}.name", name))
        names.add(name)
        target = container.get("targetContainerName")
        if target and target not in other_names:
            errors.append(field_not_found(f"{own}.targetContainerName", target))
        for key in _EPHEMERAL_FORBIDDEN:
            if container.get(key):
                errors.append(field_forbidden(f"{own}.{key}", "cannot be set for an Ephemeral Container"))
        for position, mount in enumerate(container.get("volumeMounts") or ()):
            for key in ("subPath", "subPathExpr"):
                if mount.get(key):
                    errors.append(field_forbidden(f"{own}.volumeMounts[{position}].{key}", "cannot be set for an Ephemeral Container"))


def image_whitespace(container: Object, path: str, errors: Errors) -> None:
    image = container.get("image") or ""
    if image != image.strip():
        errors.append(invalid_value(f"{path}.image", image, "must not have leading or trailing whitespace"))
