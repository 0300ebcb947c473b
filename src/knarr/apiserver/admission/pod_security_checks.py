"""The Pod Security Standards as pure functions of a pod's metadata and spec.

Each check gives None, or (reason, detail) of what is forbidden. `checks_for(level, minor)` picks the checks of a policy
version, in upstream's order.

Source: pod-security-admission policy/check_*.go, registry.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from knarr.api.errors import go_quote
from knarr.api.types import Object

Result = tuple[str, str] | None
Check = Callable[[Object, Object], Result]
LATEST = 34
"""Minor version of the newest change to any check; later policy versions are equal to it."""


def _containers(spec: Object) -> Iterator[Object]:
    for field in ("initContainers", "containers", "ephemeralContainers"):
        yield from spec.get(field) or ()


def _context(holder: Object) -> Object:
    return holder.get("securityContext") or {}


def _quoted(items: Iterable[str]) -> str:
    return ", ".join(f'"{item}"' for item in items)


def _plural(word: str, count: int, plural: str = "") -> str:
    return word if count == 1 else plural or word + "s"


def _named(names: list[str]) -> str:
    return f"{_plural('container', len(names))} {_quoted(names)}"


def _windows(spec: Object) -> bool:
    return (spec.get("os") or {}).get("name") == "windows"


def _allow_privilege_escalation(metadata: Object, spec: Object) -> Result:
    bad = [c["name"] for c in _containers(spec) if _context(c).get("allowPrivilegeEscalation") is not False]
    return ("allowPrivilegeEscalation != false", f"{_named(bad)} must set securityContext.allowPrivilegeEscalation=false") if bad else None


def _unless_windows(check: Check) -> Check:
    return lambda metadata, spec: None if _windows(spec) else check(metadata, spec)


_APPARMOR_PREFIX = "container.apparmor.security.beta.kubernetes.io/"


def _app_armor(metadata: Object, spec: Object) -> Result:
    setters: list[str] = []
    values: set[str] = set()

    def bad(holder: Object) -> bool:
        profile = _context(holder).get("appArmorProfile")
        if profile is None or profile.get("type") in ("RuntimeDefault", "Localhost"):
            return False
        values.add(profile.get("type", ""))
        return True

    if bad(spec):
        setters.append("pod")
    names = [c["name"] for c in _containers(spec) if bad(c)]
    if names:
        setters.append(_named(names))
    annotations = sorted(
        f"{key}={go_quote(value)}" for key, value in (metadata.get("annotations") or {}).items()
        if key.startswith(_APPARMOR_PREFIX) and value not in ("", "runtime/default") and not value.startswith("localhost/")
    )  # fmt: skip
    shown = sorted(values)
    if annotations:
        shown += annotations
        setters.append(_plural("annotation", len(annotations)))
    if not setters:
        return None
    return _plural("forbidden AppArmor profile", len(shown)), f"{' and '.join(setters)} must not set AppArmor profile type to {_quoted(shown)}"


_DEFAULT_CAPABILITIES = frozenset({
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID",
    "SYS_CHROOT",
})  # fmt: skip


def _capabilities(container: Object, field: str) -> list[str]:
    return (_context(container).get("capabilities") or {}).get(field) or []


def _capabilities_baseline(metadata: Object, spec: Object) -> Result:
    extra = {c["name"]: [cap for cap in _capabilities(c, "add") if cap not in _DEFAULT_CAPABILITIES] for c in _containers(spec)}
    bad = [name for name, found in extra.items() if found]
    if not bad:
        return None
    shown = sorted({cap for found in extra.values() for cap in found})
    return "non-default capabilities", f"{_named(bad)} must not include {_quoted(shown)} in securityContext.capabilities.add"


def _capabilities_restricted(metadata: Object, spec: Object) -> Result:
    keeping = [c["name"] for c in _containers(spec) if "ALL" not in _capabilities(c, "drop")]
    extra = {c["name"]: [cap for cap in _capabilities(c, "add") if cap != "NET_BIND_SERVICE"] for c in _containers(spec)}
    adding = [name for name, found in extra.items() if found]
    details: list[str] = []
    if keeping:
        details.append(f'{_named(keeping)} must set securityContext.capabilities.drop=["ALL"]')
    if adding:
        shown = sorted({cap for found in extra.values() for cap in found})
        details.append(f"{_named(adding)} must not include {_quoted(shown)} in securityContext.capabilities.add")
    return ("unrestricted capabilities", "; ".join(details)) if details else None


def _host_namespaces(metadata: Object, spec: Object) -> Result:
    found = [f"{field}=true" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    return ("host namespaces", ", ".join(found)) if found else None


def _host_path_volumes(metadata: Object, spec: Object) -> Result:
    found = [volume["name"] for volume in spec.get("volumes") or () if volume.get("hostPath") is not None]
    return ("hostPath volumes", f"{_plural('volume', len(found))} {_quoted(found)}") if found else None


def _host_ports(metadata: Object, spec: Object) -> Result:
    used = {c["name"]: [str(port["hostPort"]) for port in c.get("ports") or () if port.get("hostPort")] for c in _containers(spec)}
    bad = [name for name, ports in used.items() if ports]
    if not bad:
        return None
    ports = sorted({port for found in used.values() for port in found})
    return "hostPort", f"{_named(bad)} {_plural('uses', len(bad), 'use')} {_plural('hostPort', len(ports))} {', '.join(ports)}"


def _handler_hosts(handler: Object | None) -> set[str]:
    return {host for kind in ("httpGet", "tcpSocket") if (host := ((handler or {}).get(kind) or {}).get("host"))}


def _host_probes(metadata: Object, spec: Object) -> Result:
    bad: set[str] = set()
    hosts: set[str] = set()
    for container in _containers(spec):
        handlers = [container.get(field) for field in ("livenessProbe", "readinessProbe", "startupProbe")]
        handlers += [(container.get("lifecycle") or {}).get(field) for field in ("postStart", "preStop")]
        found = set().union(*(_handler_hosts(handler) for handler in handlers))
        if found:
            bad.add(container["name"])
            hosts |= found
    if not bad:
        return None
    word = _plural("probe or lifecycle host", len(hosts))
    return "probe or lifecycle host", f"{_named(sorted(bad))} {_plural('uses', len(bad), 'use')} {word} {_quoted(sorted(hosts))}"


def _privileged(metadata: Object, spec: Object) -> Result:
    bad = [c["name"] for c in _containers(spec) if _context(c).get("privileged")]
    return ("privileged", f"{_named(bad)} must not set securityContext.privileged=true") if bad else None


def _proc_mount(metadata: Object, spec: Object) -> Result:
    used = {c["name"]: _context(c).get("procMount") for c in _containers(spec)}
    bad = {name: kind for name, kind in used.items() if kind is not None and kind != "Default"}
    if not bad:
        return None
    return "procMount", f"{_named(list(bad))} must not set securityContext.procMount to {_quoted(sorted(set(bad.values())))}"


_FREE_VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret")
_KNOWN_VOLUMES = (
    "hostPath", "gcePersistentDisk", "awsElasticBlockStore", "gitRepo", "nfs", "iscsi", "glusterfs", "rbd", "flexVolume", "cinder", "cephfs",
    "flocker", "fc", "azureFile", "vsphereVolume", "quobyte", "azureDisk", "photonPersistentDisk", "portworxVolume", "scaleIO", "storageos",
)  # fmt: skip


def _restricted_volumes(metadata: Object, spec: Object) -> Result:
    bad: list[str] = []
    kinds: set[str] = set()
    for volume in spec.get("volumes") or ():
        if not any(volume.get(kind) is not None for kind in _FREE_VOLUMES):
            bad.append(volume["name"])
            kinds.add(next((kind for kind in _KNOWN_VOLUMES if volume.get(kind) is not None), "unknown"))
    if not bad:
        return None
    word = _plural("restricted volume type", len(kinds))
    detail = f"{_plural('volume', len(bad))} {_quoted(bad)} {_plural('uses', len(bad), 'use')} {word} {_quoted(sorted(kinds))}"
    return "restricted volume types", detail


def _run_as_non_root(metadata: Object, spec: Object) -> Result:
    pod = _context(spec).get("runAsNonRoot")
    setters = ["pod"] if pod is False else []
    explicit = [c["name"] for c in _containers(spec) if _context(c).get("runAsNonRoot") is False]
    implicit = [c["name"] for c in _containers(spec) if _context(c).get("runAsNonRoot") is None and not pod]
    if explicit:
        setters.append(_named(explicit))
    if setters:
        return "runAsNonRoot != true", f"{' and '.join(setters)} must not set securityContext.runAsNonRoot=false"
    if implicit:
        return "runAsNonRoot != true", f"pod or {_named(implicit)} must set securityContext.runAsNonRoot=true"
    return None


def _run_as_user(metadata: Object, spec: Object) -> Result:
    setters = ["pod"] if _context(spec).get("runAsUser") == 0 else []
    explicit = [c["name"] for c in _containers(spec) if _context(c).get("runAsUser") == 0]
    if explicit:
        setters.append(_named(explicit))
    return ("runAsUser=0", f"{' and '.join(setters)} must not set runAsUser=0") if setters else None


_SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t")


def _selinux(allowed: tuple[str, ...]) -> Check:
    def check(metadata: Object, spec: Object) -> Result:
        types: set[str] = set()
        flags = {"user": False, "role": False}

        def bad(holder: Object) -> bool:
            chosen: dict[str, Any] = _context(holder).get("seLinuxOptions") or {}
            found = False
            if chosen.get("type", "") not in allowed:
                types.add(chosen["type"])
                found = True
            for field in flags:
                if chosen.get(field):
                    flags[field] = found = True
            return found

        setters = ["pod"] if bad(spec) else []
        names = [c["name"] for c in _containers(spec) if bad(c)]
        if names:
            setters.append(_named(names))
        if not setters:
            return None
        data = [f"{_plural('type', len(types))} {_quoted(sorted(types))}"] if types else []
        data += [f"{field} may not be set" for field, found in flags.items() if found]
        return "seLinuxOptions", f"{' and '.join(setters)} set forbidden securityContext.seLinuxOptions: {'; '.join(data)}"

    return check


_SECCOMP_ANNOTATION = "seccomp.security.alpha.kubernetes.io/pod"


def _seccomp_annotations(metadata: Object, spec: Object) -> Result:
    annotations = metadata.get("annotations") or {}
    keys = [_SECCOMP_ANNOTATION] + [f"container.seccomp.security.alpha.kubernetes.io/{c['name']}" for c in _containers(spec)]
    found = sorted({
        f"{key}={go_quote(annotations[key])}" for key in keys
        if key in annotations and annotations[key] not in ("runtime/default", "docker/default") and not annotations[key].startswith("localhost/")
    })  # fmt: skip
    return ("seccompProfile", f"forbidden {_plural('annotation', len(found))} {', '.join(found)}") if found else None


def _seccomp(*, required: bool) -> Check:
    def check(metadata: Object, spec: Object) -> Result:
        values: set[str] = set()

        def bad(holder: Object) -> bool:
            profile = _context(holder).get("seccompProfile")
            if profile is None or profile.get("type") in ("RuntimeDefault", "Localhost"):
                return False
            values.add(profile.get("type", ""))
            return True

        setters = ["pod"] if bad(spec) else []
        pod_set = _context(spec).get("seccompProfile") is not None and not setters
        explicit = [c["name"] for c in _containers(spec) if bad(c)]
        implicit = [c["name"] for c in _containers(spec) if _context(c).get("seccompProfile") is None and not pod_set]
        if explicit:
            setters.append(_named(explicit))
        if setters:
            return "seccompProfile", f"{' and '.join(setters)} must not set securityContext.seccompProfile.type to {_quoted(sorted(values))}"
        if required and implicit:
            return "seccompProfile", f'pod or {_named(implicit)} must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
        return None

    return check


_SYSCTLS = [
    (0, (
        "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
        "net.ipv4.ip_unprivileged_port_start",
    )),
    (27, ("net.ipv4.ip_local_reserved_ports",)),
    (29, ("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes")),
    (32, ("net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem")),
]  # fmt: skip


def _sysctls(minor: int) -> Check:
    allowed = frozenset(name for since, names in _SYSCTLS if since <= minor for name in names)

    def check(metadata: Object, spec: Object) -> Result:
        found = [one.get("name", "") for one in _context(spec).get("sysctls") or () if one.get("name") not in allowed]
        return ("forbidden sysctls", ", ".join(found)) if found else None

    return check


def _windows_host_process(metadata: Object, spec: Object) -> Result:
    def bad(holder: Object) -> bool:
        return bool((_context(holder).get("windowsOptions") or {}).get("hostProcess"))

    setters = ["pod"] if bad(spec) else []
    names = [c["name"] for c in _containers(spec) if bad(c)]
    if names:
        setters.append(_named(names))
    return ("hostProcess", f"{' and '.join(setters)} must not set securityContext.windowsOptions.hostProcess=true") if setters else None


class _Version(NamedTuple):
    since: int
    check: Check
    overrides: str = ""


_BASELINE: dict[str, list[_Version]] = {
    "appArmorProfile": [_Version(0, _app_armor)],
    "capabilities_baseline": [_Version(0, _capabilities_baseline)],
    "hostNamespaces": [_Version(0, _host_namespaces)],
    "hostPathVolumes": [_Version(0, _host_path_volumes)],
    "hostPorts": [_Version(0, _host_ports)],
    "hostProbesAndHostLifecycle": [_Version(34, _host_probes)],
    "privileged": [_Version(0, _privileged)],
    "procMount": [_Version(0, _proc_mount)],
    "seLinuxOptions": [_Version(0, _selinux(_SELINUX_TYPES)), _Version(31, _selinux((*_SELINUX_TYPES, "container_engine_t")))],
    "seccompProfile_baseline": [_Version(0, _seccomp_annotations), _Version(19, _seccomp(required=False))],
    "sysctls": [_Version(since, _sysctls(since)) for since, _ in _SYSCTLS],
    "windowsHostProcess": [_Version(0, _windows_host_process)],
}
_RESTRICTED: dict[str, list[_Version]] = {
    "allowPrivilegeEscalation": [_Version(8, _allow_privilege_escalation), _Version(25, _unless_windows(_allow_privilege_escalation))],
    "capabilities_restricted": [
        _Version(22, _capabilities_restricted, "capabilities_baseline"),
        _Version(25, _unless_windows(_capabilities_restricted), "capabilities_baseline"),
    ],
    "restrictedVolumes": [_Version(0, _restricted_volumes, "hostPathVolumes")],
    "runAsNonRoot": [_Version(0, _run_as_non_root)],
    "runAsUser": [_Version(23, _run_as_user)],
    "seccompProfile_restricted": [
        _Version(19, _seccomp(required=True), "seccompProfile_baseline"),
        _Version(25, _unless_windows(_seccomp(required=True)), "seccompProfile_baseline"),
    ],
}


def _at(versions: list[_Version], minor: int) -> _Version | None:
    return next((version for version in reversed(versions) if version.since <= minor), None)


@cache
def checks_for(level: str, minor: int) -> tuple[Check, ...]:
    """The checks of a level ("baseline" or "restricted") in policy version v1.<minor>."""
    minor = min(minor, LATEST)
    chosen = {name: found for name, versions in sorted(_BASELINE.items()) if (found := _at(versions, minor))}
    if level == "restricted":
        strict = {name: found for name, versions in sorted(_RESTRICTED.items()) if (found := _at(versions, minor))}
        for found in strict.values():
            chosen.pop(found.overrides, None)
        chosen.update(strict)
    return tuple(found.check for found in chosen.values())


def evaluate(level: str, minor: int, metadata: Object, spec: Object) -> list[tuple[str, str]]:
    """All (reason, detail) that a pod violates; empty means allowed."""
    if level == "privileged":
        return []
    return [found for check in checks_for(level, minor) if (found := check(metadata, spec)) is not None]
