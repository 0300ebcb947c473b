"""The OCI runtime specification (config.json) of a container.

Role: one pure function, `build`, from the CRI's container configuration, the image's configuration and the sandbox to the
document that runc or crun executes. Callers: container.py. Touches the host only to read device nodes and mount tables that
the CRI refers to. The order of mounts matters: the runtime executes them in sequence, parents before children.
Source: OCI runtime-spec config.md and config-linux.md; containerd internal/cri/server/container_create_linux.go.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knarr.runtime import security as sec
from knarr.runtime.cri import ContainerConfig, Device, IDMapping, LinuxResources, Mount, NamespaceOptions, RuntimeFault
from knarr.runtime.users import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NS_TYPES = {"net": "network", "ipc": "ipc", "uts": "uts", "user": "user", "pid": "pid"}


@dataclass(frozen=True, slots=True)
class SpecInput:
    """Everything that the document depends on."""

    id: str
    config: ContainerConfig
    image: Mapping[str, Any]
    """The "config" part of the image's configuration."""
    rootfs: str
    user: User
    hostname: str
    namespace_paths: Mapping[str, str]
    """Kind (net, ipc, uts, user, pid) to the path to join; a kind that is absent is the host's, but pid is then a new one."""
    shm_path: str = ""
    resolv_conf: str = ""
    hostname_file: str = ""
    cgroups_path: str = ""
    cgroup_version: int = 1
    user_mappings: Sequence[IDMapping] | None = None
    sandbox_annotations: Mapping[str, str] = field(default_factory=dict)
    image_mounts: Mapping[str, str] = field(default_factory=dict)
    """Container path of an image volume to the directory where the image is mounted."""
    mapped_mounts: Mapping[str, str] = field(default_factory=dict)
    """Container path to the owner-shifted stand-in of its host path, in a user namespace."""
    volume_dirs: Mapping[str, str] = field(default_factory=dict)
    """Container path of a VOLUME of the image to its directory on the host."""
    oom_score_floor: int = 0


def build(given: SpecInput) -> dict[str, Any]:
    """Build the document. Raises RuntimeFault where the configuration contradicts itself or the host lacks something."""
    security = given.config.security
    granted = sec.capabilities(security)
    linux: dict[str, Any] = {
        "namespaces": _namespaces(given),
        "resources": resources(given.config.resources, given.cgroup_version),
        "cgroupsPath": given.cgroups_path,
        "maskedPaths": [] if security.privileged else _default(security.masked_paths, sec.MASKED_PATHS),
        "readonlyPaths": [] if security.privileged else _default(security.readonly_paths, sec.READONLY_PATHS),
    }
    devices, rules = _devices(given.config.devices, security.privileged)
    linux["devices"] = devices
    linux["resources"]["devices"] = rules
    if given.user_mappings:
        maps = [{"containerID": item.container_id, "hostID": item.host_id, "size": item.length} for item in given.user_mappings]
        linux["uidMappings"] = linux["gidMappings"] = maps
    if not security.privileged and (profile := sec.seccomp(security.seccomp, granted)) is not None:
        linux["seccomp"] = profile
    if security.selinux_label:
        linux["mountLabel"] = security.selinux_label
    propagation = {mount.propagation for mount in given.config.mounts}
    if "BIDIRECTIONAL" in propagation:
        linux["rootfsPropagation"] = "rshared"
    elif "HOST_TO_CONTAINER" in propagation:
        linux["rootfsPropagation"] = "rslave"
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": process(given, granted),
        "root": {"path": given.rootfs, "readonly": security.readonly_rootfs},
        "mounts": mounts(given),
        "annotations": dict(given.config.annotations),
        "linux": linux,
    }
    if given.hostname and "uts" in given.namespace_paths:
        document["hostname"] = given.hostname
    return document


def _default(value: list[str] | None, default: Sequence[str]) -> list[str]:
    return list(default) if value is None else list(value)


# The process


def arguments(config: ContainerConfig, image: Mapping[str, Any]) -> list[str]:
    """Command line: a command of the pod drops both the image's entry point and its arguments; args replace only the latter."""
    entrypoint, arguments_ = list(config.command), list(config.args)
    if not entrypoint:
        entrypoint = list(image.get("Entrypoint") or [])
        if not arguments_:
            arguments_ = list(image.get("Cmd") or [])
    if not entrypoint and not arguments_:
        raise RuntimeFault("failed to generate container spec: no command specified")
    return entrypoint + arguments_


def environment(config: ContainerConfig, image: Mapping[str, Any], user: User, hostname: str) -> list[str]:
    """The environment, image first, each name once."""
    values = {"PATH": DEFAULT_PATH}
    if config.tty:
        values["TERM"] = "xterm"
    if hostname:
        values["HOSTNAME"] = hostname
    for item in image.get("Env") or []:
        name, _, value = str(item).partition("=")
        values[name] = value
    values.update(config.env)
    values.setdefault("HOME", user.home)
    return [f"{name}={value}" for name, value in values.items() if name and "\0" not in name + value]


def process(given: SpecInput, granted: Sequence[str]) -> dict[str, Any]:
    """The "process" part, also the template for exec."""
    config, security = given.config, given.config.security
    document: dict[str, Any] = {
        "terminal": config.tty,
        "user": {"uid": given.user.uid, "gid": given.user.gid, "additionalGids": list(given.user.groups)},
        "args": arguments(config, given.image),
        "env": environment(config, given.image, given.user, given.hostname),
        "cwd": config.working_dir or given.image.get("WorkingDir") or "/",
        "capabilities": {kind: list(granted) for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": security.no_new_privs,
    }
    if not document["cwd"].startswith("/"):
        document["cwd"] = "/" + document["cwd"]
    if security.apparmor_profile and os.path.exists("/sys/kernel/security/apparmor"):
        document["apparmorProfile"] = security.apparmor_profile.removeprefix("localhost/")
    if security.selinux_label:
        document["selinuxLabel"] = security.selinux_label
    score = config.resources.oom_score_adj
    if score is not None:
        # Without CAP_SYS_RESOURCE the kernel refuses a score below our own; the nearest allowed one keeps the order of victims.
        document["oomScoreAdj"] = max(score, given.oom_score_floor)
    return document


# Namespaces


def _namespaces(given: SpecInput) -> list[dict[str, str]]:
    wanted: list[dict[str, str]] = [{"type": "mount"}]
    for kind, path in given.namespace_paths.items():
        if kind != "pid":
            wanted.append({"type": _NS_TYPES[kind], "path": path} if path else {"type": _NS_TYPES[kind]})
    pid = given.namespace_paths.get("pid", "")
    if given.config.security.namespaces.pid != "NODE":
        wanted.append({"type": "pid", "path": pid} if pid else {"type": "pid"})
    if given.cgroup_version == 2 and not given.config.security.privileged:
        wanted.append({"type": "cgroup"})
    return wanted


# Mounts


def mounts(given: SpecInput) -> list[dict[str, Any]]:
    """All mounts in the order of execution; one that the pod asks for replaces a default at the same place."""
    privileged = given.config.security.privileged
    namespaces = given.config.security.namespaces
    everything = _default_mounts(given, privileged, namespaces)
    for path, directory in given.volume_dirs.items():
        everything.append(_bind(path, directory, ["rbind", "rprivate", "rw"]))
    custom = [_mount(item, given) for item in given.config.mounts]
    places = {posixpath.normpath(item["destination"]) for item in custom}
    chosen = [item for item in everything if posixpath.normpath(item["destination"]) not in places]
    custom.sort(key=lambda item: posixpath.normpath(item["destination"]).count("/"))
    return chosen + custom


def _bind(destination: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def _default_mounts(given: SpecInput, privileged: bool, namespaces: NamespaceOptions) -> list[dict[str, Any]]:
    def kernel(destination: str, kind: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": kind, "source": kind, "options": list(options)}

    writable = "rw" if privileged else "ro"
    user_ns = given.user_mappings is not None
    found = [
        kernel("/proc", "proc", "nosuid", "noexec", "nodev"),
        kernel("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        kernel("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        kernel("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    ]
    if user_ns and "net" not in given.namespace_paths:
        # sysfs cannot be mounted in a user namespace that does not own the network namespace.
        found.append(_bind("/sys", "/sys", ["rbind", "nosuid", "noexec", "nodev", "ro"]))
    else:
        found.append(kernel("/sys", "sysfs", "nosuid", "noexec", "nodev", writable))
        found.append(kernel("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", writable))
    if namespaces.ipc == "NODE":
        found.append(_bind("/dev/shm", "/dev/shm", ["rbind", "nosuid", "noexec", "nodev", "rw"]))
    elif given.shm_path:
        found.append(_bind("/dev/shm", given.shm_path, ["rbind", "nosuid", "noexec", "nodev", "rw"]))
    root_mode = "ro" if given.config.security.readonly_rootfs else "rw"
    if given.resolv_conf:
        found.append(_bind("/etc/resolv.conf", given.resolv_conf, ["rbind", "rprivate", root_mode]))
    if given.hostname_file:
        found.append(_bind("/etc/hostname", given.hostname_file, ["rbind", "rprivate", root_mode]))
    return found


def _mount(item: Mount, given: SpecInput) -> dict[str, Any]:
    destination = item.container_path if item.container_path.startswith("/") else "/" + item.container_path
    if item.image:
        return _bind(destination, given.image_mounts[item.container_path], ["rbind", "rprivate", "ro", "nosuid", "nodev"])
    _ensure_source(item.host_path)
    options = ["rbind"]
    if item.propagation == "PRIVATE":
        options.append("rprivate")
    elif item.propagation == "HOST_TO_CONTAINER":
        _check_propagation(item.host_path, ("shared:", "master:"), "shared or slave")
        options.append("rslave")
    else:
        _check_propagation(item.host_path, ("shared:",), "shared")
        options.append("rshared")
    if item.recursive_read_only:
        if not item.readonly or item.propagation != "PRIVATE":
            raise RuntimeFault(f"recursive read-only mount of {item.container_path} must be read-only and private")
        options.append("rro")
    else:
        options.append("ro" if item.readonly else "rw")
    return _bind(destination, given.mapped_mounts.get(item.container_path, item.host_path), options)


def _ensure_source(path: str) -> None:
    """Make a directory of the host that is to be mounted and is not there, as containerd and CRI-O do. Raises RuntimeFault."""
    try:
        os.stat(path)
    except FileNotFoundError:
        try:
            os.makedirs(path, 0o755, exist_ok=True)
        except OSError as error:
            raise RuntimeFault(f'failed to mkdir "{path}": {error.strerror}') from error
    except OSError as error:
        raise RuntimeFault(f'failed to stat "{path}": {error.strerror}') from error


def _check_propagation(path: str, wanted: tuple[str, ...], name: str) -> None:
    """Refuse early, in the words of containerd, what the kernel would silently not propagate."""
    real, best, optional = os.path.realpath(path), "", ""
    try:
        with open("/proc/self/mountinfo") as file:
            for line in file:
                left = line.partition(" - ")[0].split()
                point = left[4].encode().decode("unicode_escape")
                if len(point) >= len(best) and (real == point or real.startswith(point.rstrip("/") + "/")):
                    best, optional = point, " ".join(left[6:])
    except OSError as error:
        raise RuntimeFault(f"cannot read the mount table: {error.strerror}") from error
    if not any(word in optional for word in wanted):
        raise RuntimeFault(f'path "{path}" is mounted on "{best}" but it is not a {name} mount')


# Devices and resources


def _devices(devices: Sequence[Device], privileged: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    nodes: dict[str, dict[str, Any]] = {}
    rules: list[dict[str, Any]] = [{"allow": privileged, "access": "rwm"}]
    if privileged:
        for path in _host_devices("/dev"):
            if (node := _node(path, path)) is not None:
                nodes[path] = node
    for device in devices:
        entries, allowed = device_entries(device)
        nodes.update({entry["path"]: entry for entry in entries})
        rules += allowed
    return list(nodes.values()), rules


def device_entries(device: Device) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(device nodes, rules of the devices controller) for one device, or all in a folder. Raises RuntimeFault."""
    nodes, rules = [], []
    for path, inside in _expand(device):
        node = _node(path, inside)
        if node is None:
            raise RuntimeFault(f'error gathering device information while adding custom device "{device.host_path}": not a device node')
        nodes.append(node)
        rules.append({"allow": True, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": device.permissions})
    return nodes, rules


def _expand(device: Device) -> list[tuple[str, str]]:
    """A directory stands for the devices in it."""
    if not os.path.isdir(device.host_path):
        return [(device.host_path, device.container_path)]
    return [(path, device.container_path + path[len(device.host_path) :]) for path in _host_devices(device.host_path)]


def _host_devices(base: str) -> list[str]:
    skipped = {"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console"}
    found: list[str] = []
    for entry in os.scandir(base):
        if entry.name in skipped or entry.is_symlink():
            continue
        if entry.is_dir(follow_symlinks=False):
            found += _host_devices(entry.path)
        elif stat.S_ISCHR(mode := entry.stat(follow_symlinks=False).st_mode) or stat.S_ISBLK(mode):
            found.append(entry.path)
    return found


def _node(path: str, inside: str) -> dict[str, Any] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    if not kind:
        return None
    return {
        "path": inside,
        "type": kind,
        "major": os.major(info.st_rdev),
        "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
    }


def resources(wanted: LinuxResources, version: int) -> dict[str, Any]:
    """The "resources" part, for create and for update; what is not set is left out."""
    cpu = {
        "shares": wanted.cpu_shares,
        "quota": wanted.cpu_quota_us,
        "period": wanted.cpu_period_us,
        "cpus": wanted.cpuset_cpus,
        "mems": wanted.cpuset_mems,
    }
    memory: dict[str, Any] = {}
    if wanted.memory_limit_bytes:
        memory["limit"] = wanted.memory_limit_bytes
    if wanted.memory_swap_limit_bytes and _swap_accounting(version):
        memory["swap"] = wanted.memory_swap_limit_bytes
    document: dict[str, Any] = {"cpu": {key: value for key, value in cpu.items() if value}}
    if memory:
        document["memory"] = memory
    if wanted.pids_limit:
        document["pids"] = {"limit": wanted.pids_limit}
    if wanted.hugepage_limits and _hugetlb(version):
        document["hugepageLimits"] = [{"pageSize": size, "limit": limit} for size, limit in sorted(wanted.hugepage_limits.items())]
    if wanted.unified and version == 2:
        document["unified"] = dict(wanted.unified)
    return document


def _swap_accounting(version: int) -> bool:
    return version == 2 or os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")


def _hugetlb(version: int) -> bool:
    if version == 1:
        return os.path.isdir("/sys/fs/cgroup/hugetlb")
    try:
        with open("/sys/fs/cgroup/cgroup.controllers") as file:
            return "hugetlb" in file.read().split()
    except OSError:
        return False
