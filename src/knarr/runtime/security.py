"""Capabilities and seccomp filters of a container.

Role: pure functions below spec.py. What this process itself lacks cannot be given away, so "all capabilities" means all of
ours: a node without CAP_SYS_RESOURCE still runs privileged pods.
Source: containerd pkg/oci and contrib/seccomp, CRI-O's capability handling.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import orjson

from knarr.runtime.cri import ContainerSecurity, RuntimeFault, SeccompProfile
from knarr.runtime.syscalls import MACHINE

NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST "
    "NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE "
    "SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM "
    "BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
"""In the kernel's order: the index is the capability's number."""

DEFAULT = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE"
).split()
"""What containers get unless they add or drop."""

MASKED_PATHS = (
    "/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats /proc/sched_debug "
    "/proc/scsi /sys/firmware /sys/devices/virtual/powercap"
).split()
READONLY_PATHS = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()


@cache
def own_capabilities() -> frozenset[str]:
    """Names (without CAP_) of the capabilities this process may give."""
    with open("/proc/self/status") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd"))
    return frozenset(name for number, name in enumerate(NAMES) if mask >> number & 1)


@cache
def may_lower_oom_score() -> bool:
    """Whether this process may make others less likely to be killed than itself."""
    return "SYS_RESOURCE" in own_capabilities()


def capabilities(security: ContainerSecurity) -> list[str]:
    """The container's capabilities with the CAP_ prefix, in kernel order.

    Adding ALL and dropping some leaves the rest; dropping ALL leaves only those added by name. Unknown names are an error.
    """
    add = [name.upper().removeprefix("CAP_") for name in security.add_capabilities]
    drop = [name.upper().removeprefix("CAP_") for name in security.drop_capabilities]
    for name in (*add, *drop):
        if name != "ALL" and name not in NAMES:
            raise RuntimeFault(f'unknown capability "CAP_{name}"')
    if security.privileged:
        chosen = set(NAMES)
    else:
        chosen = set(NAMES) if "ALL" in add else set(DEFAULT)
        if "ALL" in drop:
            chosen = set()
        chosen |= set(add) - {"ALL"}
        chosen -= set(drop) - {"ALL"}
    if "ALL" in add or security.privileged:
        chosen &= own_capabilities()
    return ["CAP_" + name for name in NAMES if name in chosen]


@cache
def _facts() -> dict[str, Any]:
    with open(os.path.join(os.path.dirname(__file__), "seccomp.json"), "rb") as file:
        facts: dict[str, Any] = orjson.loads(file.read())
    return facts


def _rule(names: Iterable[str], args: list[dict[str, Any]] | None = None, errno: int | None = None) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": sorted(names), "action": "SCMP_ACT_ALLOW" if errno is None else "SCMP_ACT_ERRNO"}
    if args:
        rule["args"] = args
    if errno is not None:
        rule["errnoRet"] = errno
    return rule


def default_profile(granted: Iterable[str]) -> dict[str, Any]:
    """The RuntimeDefault filter for a container with these capabilities (CAP_ names), as the OCI runtime wants it."""
    facts, have = _facts(), set(granted)
    allowed = set(facts["allow"]) | set(facts["machine"].get(MACHINE, ()))
    for capability, names in facts["capability"].items():
        if capability in have:
            allowed.update(names)
    rules = [_rule(allowed)]
    # AF_VSOCK would reach the hypervisor around every network rule.
    rules.append(_rule(["socket"], [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]))
    for persona in (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF):
        rules.append(_rule(["personality"], [{"index": 0, "value": persona, "op": "SCMP_CMP_EQ"}]))
    if "CAP_SYS_ADMIN" not in have:
        # clone without any CLONE_NEW* flag; clone3's flags lie behind a pointer, so it must look absent.
        position = 1 if MACHINE == "s390x" else 0
        rules.append(_rule(["clone"], [{"index": position, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]))
        rules.append(_rule(["clone3"], errno=38))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": facts["subarchitectures"].get(MACHINE, []),
        "syscalls": rules,
    }


def seccomp(profile: SeccompProfile, granted: Iterable[str]) -> dict[str, Any] | None:
    """The filter for a container, None for none. Blocks (reads a Localhost file). Raises RuntimeFault."""
    if profile.type == "RuntimeDefault":
        return default_profile(granted)
    if profile.type != "Localhost":
        return None
    try:
        with open(profile.localhost_path, "rb") as file:
            loaded = orjson.loads(file.read())
    except (OSError, orjson.JSONDecodeError) as error:
        raise RuntimeFault(f'cannot load seccomp profile "{profile.localhost_path}": {error}') from error
    if not isinstance(loaded, dict) or "defaultAction" not in loaded:
        raise RuntimeFault(f'cannot load seccomp profile "{profile.localhost_path}": decoding seccomp profile failed')
    return loaded
