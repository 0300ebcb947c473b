"""The dataclasses of cri.py to CRI messages and back.

Role: pure functions below client.py. CRI leaves units to comments (timeouts in seconds, times in nanoseconds) and wraps numbers
whose absence matters in messages of their own; both are dealt with here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from knarr.runtime.cri import (
    AuthConfig,
    ContainerConfig,
    ContainerMetadata,
    ContainerState,
    ContainerStats,
    ContainerStatus,
    FilesystemUsage,
    Image,
    InterfaceStats,
    LinuxResources,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PodSandboxConfig,
    PodSandboxMetadata,
    PodSandboxStatus,
    SandboxState,
    SandboxStats,
    SeccompProfile,
)
from knarr.runtime.security import MASKED_PATHS, READONLY_PATHS

Message = dict[str, Any]


def _wrapped(value: int | None) -> Message | None:
    return None if value is None else {"value": value}


def _number(message: Message | None) -> int:
    return int((message or {}).get("value", 0))


# Requests


def resources(given: LinuxResources | None) -> Message | None:
    if given is None:
        return None
    return {
        "cpu_period": given.cpu_period_us,
        "cpu_quota": given.cpu_quota_us,
        "cpu_shares": given.cpu_shares,
        "memory_limit_in_bytes": given.memory_limit_bytes,
        "memory_swap_limit_in_bytes": given.memory_swap_limit_bytes,
        "oom_score_adj": given.oom_score_adj or 0,
        "cpuset_cpus": given.cpuset_cpus,
        "cpuset_mems": given.cpuset_mems,
        "hugepage_limits": [{"page_size": size, "limit": limit} for size, limit in given.hugepage_limits.items()],
        "unified": given.unified,
    }


def _namespaces(given: NamespaceOptions) -> Message:
    message: Message = {"network": given.network, "pid": given.pid, "ipc": given.ipc, "target_id": given.target_id}
    if given.user_mappings is not None:
        maps = [{"host_id": item.host_id, "container_id": item.container_id, "length": item.length} for item in given.user_mappings]
        message["userns_options"] = {"mode": "POD", "uids": maps, "gids": maps}
    return message


def _seccomp(given: SeccompProfile) -> Message:
    return {"profile_type": given.type, "localhost_ref": given.localhost_path}


def sandbox_config(given: PodSandboxConfig) -> Message:
    metadata = given.metadata
    message: Message = {
        "metadata": {"name": metadata.name, "uid": metadata.uid, "namespace": metadata.namespace, "attempt": metadata.attempt},
        "hostname": given.hostname,
        "log_directory": given.log_directory,
        "labels": given.labels,
        "annotations": given.annotations,
        "port_mappings": [
            {"protocol": item.protocol or "TCP", "container_port": item.container_port, "host_port": item.host_port, "host_ip": item.host_ip}
            for item in given.port_mappings
        ],
        "linux": {
            "cgroup_parent": given.cgroup_parent,
            "sysctls": given.sysctls,
            "overhead": resources(given.overhead),
            "resources": resources(given.resources),
            "security_context": {
                "namespace_options": _namespaces(given.namespaces),
                "privileged": given.privileged,
                "seccomp": _seccomp(given.seccomp),
                "run_as_user": _wrapped(given.run_as_user),
                "run_as_group": _wrapped(given.run_as_group) if given.run_as_user is not None else None,
                "supplemental_groups": given.supplemental_groups,
            },
        },
    }
    if given.dns is not None:
        message["dns_config"] = {"servers": given.dns.servers, "searches": given.dns.searches, "options": given.dns.options}
    return message


def _mount(given: Mount) -> Message:
    message: Message = {
        "container_path": given.container_path,
        "host_path": given.host_path,
        "readonly": given.readonly,
        "selinux_relabel": given.selinux_relabel,
        "propagation": f"PROPAGATION_{given.propagation}",
        "recursive_read_only": given.recursive_read_only,
    }
    if given.image:
        message["image"] = {"image": given.image}
        message["image_sub_path"] = given.image_sub_path
    return message


def _paths(given: list[str] | None, default: Sequence[str], privileged: bool) -> list[str]:
    """CRI has no "default": the list is always sent."""
    if privileged:
        return []
    return list(default) if given is None else given


def container_config(given: ContainerConfig) -> Message:
    security = given.security
    return {
        "metadata": {"name": given.metadata.name, "attempt": given.metadata.attempt},
        "image": {"image": given.image},
        "command": given.command,
        "args": given.args,
        "working_dir": given.working_dir,
        "envs": [{"key": key, "value": value} for key, value in given.env],
        "mounts": [_mount(item) for item in given.mounts],
        "devices": [{"container_path": i.container_path, "host_path": i.host_path, "permissions": i.permissions} for i in given.devices],
        "labels": given.labels,
        "annotations": given.annotations,
        "log_path": given.log_path,
        "stdin": given.stdin,
        "stdin_once": given.stdin_once,
        "tty": given.tty,
        "stop_signal": f"SIG{given.stop_signal.upper().removeprefix('SIG')}" if given.stop_signal else None,
        "CDI_devices": [{"name": name} for name in given.cdi_devices],
        "linux": {
            "resources": resources(given.resources),
            "security_context": {
                "capabilities": {"add_capabilities": security.add_capabilities, "drop_capabilities": security.drop_capabilities},
                "privileged": security.privileged,
                "namespace_options": _namespaces(security.namespaces),
                "run_as_user": _wrapped(security.run_as_user),
                "run_as_username": security.run_as_username,
                "run_as_group": _wrapped(security.run_as_group),
                "readonly_rootfs": security.readonly_rootfs,
                "supplemental_groups": security.supplemental_groups,
                "supplemental_groups_policy": security.supplemental_groups_policy,
                "no_new_privs": security.no_new_privs,
                "masked_paths": _paths(security.masked_paths, MASKED_PATHS, security.privileged),
                "readonly_paths": _paths(security.readonly_paths, READONLY_PATHS, security.privileged),
                "seccomp": _seccomp(security.seccomp),
            },
        },
    }


def auth(given: AuthConfig) -> Message:
    return {name: getattr(given, name) for name in ("username", "password", "auth", "server_address", "identity_token", "registry_token")}


# Answers


def _sandbox_metadata(message: Message) -> PodSandboxMetadata:
    return PodSandboxMetadata(message.get("name", ""), message.get("uid", ""), message.get("namespace", ""), message.get("attempt", 0))


def _mode(message: Message, name: str) -> NamespaceMode:
    mode: NamespaceMode = message.get(name, "POD")
    return mode


def sandbox_status(message: Message) -> PodSandboxStatus:
    """From PodSandboxStatus, or from PodSandbox of a list (which knows no addresses)."""
    network = message.get("network", {})
    first = network.get("ip", "")
    options = message.get("linux", {}).get("namespaces", {}).get("options", {})
    return PodSandboxStatus(
        message.get("id", ""), _sandbox_metadata(message.get("metadata", {})),
        SandboxState.NOTREADY if message.get("state") == "SANDBOX_NOTREADY" else SandboxState.READY,
        message.get("created_at", 0),
        ([first] if first else []) + [item.get("ip", "") for item in network.get("additional_ips", [])],
        NamespaceOptions(_mode(options, "network"), _mode(options, "pid"), _mode(options, "ipc")),
        message.get("labels", {}), message.get("annotations", {}), message.get("runtime_handler", ""),
    )  # fmt: skip


_STATES = {
    "CONTAINER_CREATED": ContainerState.CREATED,
    "CONTAINER_RUNNING": ContainerState.RUNNING,
    "CONTAINER_EXITED": ContainerState.EXITED,
    "CONTAINER_UNKNOWN": ContainerState.UNKNOWN,
}


def container_status(message: Message, sandbox_id: str, *, repo_digest: str = "") -> ContainerStatus:
    metadata = message.get("metadata", {})
    image_ref = message.get("image_ref", "")
    user = message.get("user", {}).get("linux")
    code = message.get("exit_code", 0)
    return ContainerStatus(
        id=message.get("id", ""),
        sandbox_id=sandbox_id,
        metadata=ContainerMetadata(metadata.get("name", ""), metadata.get("attempt", 0)),
        state=_STATES.get(message.get("state", "CONTAINER_CREATED"), ContainerState.UNKNOWN),
        created_at_ns=message.get("created_at", 0),
        started_at_ns=message.get("started_at", 0),
        finished_at_ns=message.get("finished_at", 0),
        exit_code=code,
        image=message.get("image", {}).get("user_specified_image") or message.get("image", {}).get("image", ""),
        image_id=message.get("image_id") or image_ref,
        image_ref=image_ref,
        reason=message.get("reason", ""),
        message=message.get("message", ""),
        signal=code - 128 if 128 < code < 160 else 0,
        labels=message.get("labels", {}),
        annotations=message.get("annotations", {}),
        mounts=[_from_mount(item) for item in message.get("mounts", [])],
        log_path=message.get("log_path", ""),
        resources=_from_resources(message.get("resources", {}).get("linux")),
        user=(user.get("uid", 0), user.get("gid", 0), list(user.get("supplemental_groups", []))) if user is not None else None,
        stop_signal="" if message.get("stop_signal", "RUNTIME_DEFAULT") == "RUNTIME_DEFAULT" else message["stop_signal"],
    )


def _from_mount(message: Message) -> Mount:
    return Mount(
        message.get("container_path", ""),
        message.get("host_path", ""),
        message.get("readonly", False),
        message.get("recursive_read_only", False),
        message.get("selinux_relabel", False),
        message.get("propagation", "PROPAGATION_PRIVATE").removeprefix("PROPAGATION_"),
    )


def _from_resources(message: Message | None) -> LinuxResources | None:
    if message is None:
        return None
    return LinuxResources(
        message.get("cpu_period", 0), message.get("cpu_quota", 0), message.get("cpu_shares", 0), message.get("memory_limit_in_bytes", 0),
        message.get("memory_swap_limit_in_bytes", 0), message.get("oom_score_adj"), message.get("cpuset_cpus", ""), message.get("cpuset_mems", ""),
        {item.get("page_size", ""): item.get("limit", 0) for item in message.get("hugepage_limits", [])}, 0, message.get("unified", {}),
    )  # fmt: skip


def image(message: Message) -> Image:
    uid = message.get("uid")
    return Image(
        message.get("id", ""),
        message.get("repo_tags", []),
        message.get("repo_digests", []),
        message.get("size", 0),
        None if uid is None else _number(uid),
        message.get("username", ""),
        message.get("pinned", False),
    )


def container_stats(message: Message, sandbox_id: str) -> ContainerStats:
    attributes, cpu, memory, layer = (message.get(name, {}) for name in ("attributes", "cpu", "memory", "writable_layer"))
    metadata = attributes.get("metadata", {})
    return ContainerStats(
        attributes.get("id", ""), sandbox_id, ContainerMetadata(metadata.get("name", ""), metadata.get("attempt", 0)),
        attributes.get("labels", {}), cpu.get("timestamp", 0), _number(cpu.get("usage_core_nano_seconds")),
        _number(memory.get("usage_bytes")) or _number(memory.get("working_set_bytes")), _number(memory.get("working_set_bytes")),
        _number(memory.get("rss_bytes")), _number(memory.get("page_faults")), _number(memory.get("major_page_faults")),
        _number(layer.get("used_bytes")), _number(layer.get("inodes_used")),
    )  # fmt: skip


def sandbox_stats(message: Message) -> SandboxStats:
    attributes, linux = message.get("attributes", {}), message.get("linux", {})
    network = linux.get("network", {})
    default = network.get("default_interface")
    found = [_interface(item) for item in ([default] if default else []) + network.get("interfaces", [])]
    unique = {item.name: item for item in reversed(found)}
    return SandboxStats(
        attributes.get("id", ""),
        _sandbox_metadata(attributes.get("metadata", {})),
        network.get("timestamp", 0),
        list(reversed(unique.values())),
        _number(linux.get("process", {}).get("process_count")),
    )


def _interface(message: Message) -> InterfaceStats:
    return InterfaceStats(
        message.get("name", ""),
        _number(message.get("rx_bytes")),
        _number(message.get("rx_errors")),
        _number(message.get("tx_bytes")),
        _number(message.get("tx_errors")),
    )


def filesystem(message: Message) -> FilesystemUsage:
    return FilesystemUsage(
        message.get("fs_id", {}).get("mountpoint", ""), message.get("timestamp", 0), _number(message.get("used_bytes")), _number(message.get("inodes_used"))
    )
