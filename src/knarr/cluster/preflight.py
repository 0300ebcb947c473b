"""Checks before anything is started: each failure names what is missing and how to get it.

Role: `knarr up` runs `check` and prints the findings; `knarr preflight` prints them alone. Nothing here changes the machine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from knarr.cluster.config import ClusterConfig

CGROUP_ROOT = Path("/sys/fs/cgroup")
NEEDED_CONTROLLERS = ("cpu", "memory", "pids")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that stops `up`."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def check(config: ClusterConfig) -> list[Finding]:
    """Everything that would keep the cluster from starting, most basic first; empty when all is well."""
    findings = [*_privilege(), *_programs(config), *_kernel(), *_cgroups()]
    if not findings:
        findings += _ports(config)
    return findings


def _privilege() -> list[Finding]:
    if os.geteuid() == 0:
        return []
    return [Finding("not root: a cluster makes namespaces, mounts and network interfaces", "run it as root, e.g. with sudo")]


def _programs(config: ClusterConfig) -> list[Finding]:
    if config.oci_runtime.startswith("unix://"):
        return _foreign_runtime(config)
    packages = {config.oci_runtime: config.oci_runtime, "conmon": "conmon", "nft": "nftables"}
    missing = [
        Finding(f"the program {program} is missing", f"install it: apt-get install {package}")
        for program, package in packages.items()
        if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None
    ]
    return missing or _runtime_works(config)


def _runtime_works(config: ClusterConfig) -> list[Finding]:
    """Runc takes every layout of cgroups; of others one hears only when a container is made."""
    if os.path.basename(config.oci_runtime) == "runc" or os.geteuid() != 0:
        return []
    from knarr.runtime.probe import probe

    objection = probe(config.oci_runtime)
    return [Finding(f"{config.oci_runtime} cannot make containers on this machine: {objection}", "use runc (--oci-runtime runc) or another release of it")] if objection else []


def _foreign_runtime(config: ClusterConfig) -> list[Finding]:
    """What containerd or CRI-O needs: its socket, grpcio here, and one node, since it knows only one kubelet."""
    findings = []
    path = config.oci_runtime.removeprefix("unix://")
    if not Path(path).is_socket():
        findings.append(Finding(f"there is no socket {path}", "start containerd or CRI-O, or name another socket"))
    if importlib.util.find_spec("grpc") is None:
        findings.append(Finding("the Python package grpcio is missing", "install it: pip install 'knarr[cri]'"))
    if len(config.nodes) > 1:
        findings.append(Finding("one containerd or CRI-O serves one node", "use the embedded runtime for several nodes on one machine"))
    if shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        findings.append(Finding("the program nft is missing", "install it: apt-get install nftables"))
    return findings


def _kernel() -> list[Finding]:
    findings = []
    filesystems = Path("/proc/filesystems").read_text().split()
    if "overlay" not in filesystems and not Path("/sys/module/overlay").exists():
        findings.append(Finding("the kernel offers no overlay file system", "load it: modprobe overlay"))
    for namespace in ("net", "ipc", "uts", "mnt", "pid"):
        if not Path(f"/proc/self/ns/{namespace}").exists():
            findings.append(Finding(f"the kernel offers no {namespace} namespaces", "use a kernel built with namespaces"))
    if not any(line.split()[4] == "/" for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        findings.append(Finding("/ is not a mount point (a plain chroot), and runc refuses that", "use ./run, which gives it a mount namespace of its own"))
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    if os.geteuid() == 0 and not os.access(forward, os.W_OK):
        findings.append(Finding(f"{forward} cannot be written", "run outside an unprivileged container, or mount /proc writable"))
    return findings


def cgroup_controllers() -> tuple[str, set[str]]:
    """The cgroup version in use ("v1", "v2" or "none") and the controllers that it offers."""
    unified = CGROUP_ROOT / "cgroup.controllers"
    if unified.is_file():
        return "v2", set(unified.read_text().split())
    if not CGROUP_ROOT.is_dir():
        return "none", set()
    found: set[str] = set()
    for entry in CGROUP_ROOT.iterdir():
        if (entry / "cgroup.procs").exists():
            found.update(entry.name.split(","))
    return ("v1", found) if found else ("none", found)


def _cgroups() -> list[Finding]:
    version, controllers = cgroup_controllers()
    if version == "none":
        return [Finding(f"no cgroups are mounted at {CGROUP_ROOT}", f"mount them: mount -t cgroup2 none {CGROUP_ROOT}")]
    missing = [name for name in NEEDED_CONTROLLERS if name not in controllers]
    if not missing:
        return []
    remedy = "enable them on the kernel command line: cgroup_enable=memory" if "memory" in missing else "enable them in the kernel"
    return [Finding(f"cgroup controllers missing ({version}): {', '.join(missing)}", remedy)]


def _ports(config: ClusterConfig) -> list[Finding]:
    findings = []
    wanted = [(config.kubelet_port, "the kubelet")] if config.joined else [(config.api_port, "the API server"), (config.kubelet_port, "the kubelet")]
    for port, use in wanted:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                holder = port_holder(port)
                findings.append(Finding(f"port {port} ({use}) is taken by {holder}", "stop that process, or start another cluster with --name"))
    return findings


def port_holder(port: int) -> str:
    """ "NAME (pid N)" of the process that listens on a TCP port, or "another process" when it cannot be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.readlink(link) in inodes for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return "another process"
