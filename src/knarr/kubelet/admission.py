"""Whether a pod may run on this node at all, checked once when it arrives. Pure.

Caller: pods. The scheduler has checked this before; pods with a nodeName of their own, and races, come through here.
Source: pkg/kubelet/lifecycle/predicate.go, pkg/kubelet/sysctl, pkg/kubelet/kubelet_pods.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil, resources, security

SAFE_SYSCTLS = (
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
)
_IPC_PREFIXES = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")

Refusal = tuple[str, str]


def admit(
    pod: Object,
    others: Iterable[Object],
    *,
    allocatable: Mapping[str, str],
    node: Object | None,
    allowed_unsafe_sysctls: Iterable[str] = (),
) -> Refusal | None:
    """None when the pod may run here, else (reason, message)."""
    return (
        _check_os(pod)
        or _check_groups_policy(pod, node)
        or _check_apparmor(pod)
        or _check_sysctls(pod, tuple(allowed_unsafe_sysctls))
        or _check_node(pod, node)
        or _check_ports(pod, others)
        or _check_resources(pod, others, allocatable)
    )


def _check_os(pod: Object) -> Refusal | None:
    system = (pod["spec"].get("os") or {}).get("name")
    if system and system != "linux":
        return "PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"
    wanted = (pod["spec"].get("nodeSelector") or {}).get("kubernetes.io/os")
    if wanted and wanted != "linux":
        return "PodOSSelectorNodeLabelDoesNotMatch", "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label"
    return None


def _check_groups_policy(pod: Object, node: Object | None) -> Refusal | None:
    wanted = (pod["spec"].get("securityContext") or {}).get("supplementalGroupsPolicy")
    features = ((node or {}).get("status") or {}).get("features")
    if wanted != "Strict" or features is None or features.get("supplementalGroupsPolicy"):
        return None  # without features the node has not been reported yet
    return "SupplementalGroupsPolicyNotSupported", "SupplementalGroupsPolicy=Strict is not supported in this node"


def _check_apparmor(pod: Object) -> Refusal | None:
    profiles = [(pod["spec"].get("securityContext") or {}).get("appArmorProfile")]
    profiles += [(c.get("securityContext") or {}).get("appArmorProfile") for c in podutil.all_containers(pod)]
    if any(p and p.get("type") in ("Localhost", "RuntimeDefault") for p in profiles) and not security.host_has_apparmor():
        return "AppArmor", "Cannot enforce AppArmor: AppArmor is not enabled on the host"
    return None


def _check_sysctls(pod: Object, allowed: tuple[str, ...]) -> Refusal | None:
    spec = pod["spec"]
    for entry in (spec.get("securityContext") or {}).get("sysctls") or []:
        name = entry["name"].replace("/", ".")
        listed = any(name == a or (a.endswith("*") and name.startswith(a[:-1])) for a in allowed)
        if name not in SAFE_SYSCTLS and not listed:
            return "SysctlForbidden", f'forbidden sysctl: "{name}" not allowlisted'
        if name.startswith(_IPC_PREFIXES) and spec.get("hostIPC"):
            return "SysctlForbidden", f'forbidden sysctl: "{name}" not allowed with host ipc enabled'
        if name.startswith("net.") and spec.get("hostNetwork"):
            return "SysctlForbidden", f'forbidden sysctl: "{name}" not allowed with host net enabled'
    return None


def _check_node(pod: Object, node: Object | None) -> Refusal | None:
    if node is None:
        return None
    message = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"
    if not matches_node(pod, node):
        return "NodeAffinity", message
    if podutil.is_static(pod):
        return None
    for taint in (node.get("spec") or {}).get("taints") or []:
        if taint.get("effect") == "NoExecute" and not tolerates(pod, taint):
            return "TaintToleration", "Predicate TaintToleration failed: node(s) had untolerated taints"
    return None


def tolerates(pod: Object, taint: Object) -> bool:
    """Whether a pod may be on a node in spite of a taint."""
    for t in pod["spec"].get("tolerations") or []:
        if t.get("effect") not in (None, "", taint.get("effect")):
            continue
        if t.get("key") not in (None, "", taint["key"]):
            continue
        operator = t.get("operator") or "Equal"
        if operator == "Exists" or (operator == "Equal" and (t.get("value") or "") == (taint.get("value") or "")):
            return True
    return False


def matches_node(pod: Object, node: Object) -> bool:
    """Node selector and required node affinity."""
    labels = node["metadata"].get("labels") or {}
    for key, value in (pod["spec"].get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            return False
    required = ((pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    fields = {"metadata.name": node["metadata"]["name"]}
    for term in required.get("nodeSelectorTerms") or []:
        expressions, by_field = term.get("matchExpressions") or [], term.get("matchFields") or []
        if (expressions or by_field) and all(_holds(e, labels) for e in expressions) and all(_holds(e, fields) for e in by_field):
            return True
    return False


def _holds(expression: Object, values: Mapping[str, str]) -> bool:
    key, operator, wanted = expression["key"], expression["operator"], expression.get("values") or []
    value = values.get(key)
    if operator == "In":
        return value in wanted
    if operator == "NotIn":
        return value not in wanted
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    try:
        number = int(value or "")
        limit = int(wanted[0])
    except (ValueError, IndexError):
        return False
    return number > limit if operator == "Gt" else number < limit


def _ports(pod: Object) -> list[tuple[str, str, int]]:
    out = []
    for container in (*podutil.containers(pod), *(c for c in podutil.init_containers(pod) if podutil.is_sidecar(c))):
        for port in container.get("ports") or []:
            if port.get("hostPort"):
                out.append((port.get("hostIP") or "0.0.0.0", port.get("protocol") or "TCP", port["hostPort"]))
    return out


def _check_ports(pod: Object, others: Iterable[Object]) -> Refusal | None:
    wanted = _ports(pod)
    if not wanted:
        return None
    for other in others:
        for ip, protocol, port in _ports(other):
            for own_ip, own_protocol, own_port in wanted:
                if (protocol, port) == (own_protocol, own_port) and (ip == own_ip or "0.0.0.0" in (ip, own_ip)):
                    return "NodePorts", "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"
    return None


def _requests(pod: Object) -> dict[str, int]:
    requests, _ = resources.pod_totals(pod)
    return {**requests, **resources.extended_requests(pod)}


def _check_resources(pod: Object, others: Iterable[Object], allocatable: Mapping[str, str]) -> Refusal | None:
    other_pods = [p for p in others if not podutil.is_terminal_phase(podutil.phase(p))]
    room = int(quantity.value(allocatable.get("pods", "110")))
    if len(other_pods) + 1 > room:
        return "OutOfpods", f"Node didn't have enough resource: pods, requested: 1, used: {len(other_pods)}, capacity: {room}"
    wanted = {n: v for n, v in _requests(pod).items() if v}
    if not wanted:
        return None
    used = resources.total_usage([_requests(p) for p in other_pods])
    for name, amount in wanted.items():
        if name not in allocatable and "/" in name:
            # An extended resource that this node does not know is somebody else's to check.
            continue
        raw = allocatable.get(name, "0")
        total = quantity.cpu_millicores(raw) if name == "cpu" else quantity.value(raw)
        if used.get(name, 0) + amount > total:
            return (
                f"OutOf{name}",
                f"Node didn't have enough resource: {name}, requested: {amount}, used: {used.get(name, 0)}, capacity: {total}",
            )
    return None
