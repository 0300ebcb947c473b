"""A picture of the host that a test takes before and after: what knarr may never leave behind."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class HostState:
    """Names only, no counters or times, so that two pictures of the same host are equal."""

    processes: frozenset[str]
    links: frozenset[str]
    namespaces: frozenset[str]
    ruleset: str
    mounts: frozenset[str]
    cgroups: frozenset[str]
    ports: frozenset[str]
    sysctls: frozenset[str]
    routes: frozenset[str]

    @staticmethod
    def take() -> HostState:
        return HostState(
            processes=frozenset(_processes()),
            links=frozenset(os.listdir("/sys/class/net")),
            namespaces=frozenset(os.listdir("/run/netns") if os.path.isdir("/run/netns") else ()),
            ruleset=_output("nft", "-s", "list", "ruleset"),
            mounts=frozenset(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
            cgroups=frozenset(_cgroups()),
            ports=frozenset(_ports()),
            sysctls=frozenset(_sysctls()),
            routes=frozenset(_output("ip", "route", "show", "table", "all").splitlines()),
        )

    def difference(self, before: HostState) -> dict[str, list[str]]:
        """What is here and was not there before, and what is missing; empty when the host is as it was."""
        found: dict[str, list[str]] = {}
        for field in fields(self):
            now, then = getattr(self, field.name), getattr(before, field.name)
            if isinstance(now, str):
                now, then = frozenset(now.splitlines()), frozenset(then.splitlines())
            if extra := sorted(now - then):
                found["+" + field.name] = extra
            if missing := sorted(then - now):
                found["-" + field.name] = missing
        return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _processes() -> list[str]:
    """Processes that are ours by name or by the folders in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ").strip()
            name = (entry / "comm").read_text().strip()
            if (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                continue  # it has ended; only the machine's init has yet to take note
        except OSError:
            continue
        if name.startswith("knarr") or name == "conmon" or "/var/lib/knarr" in command or "/run/knarr" in command:
            found.append(f"{entry.name} {name} {command[:120]}")
    return found


def _cgroups() -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").glob("**/") if "knarr" in path.name or "kubepods" in path.name]


def _ports() -> list[str]:
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if table.startswith("udp") or parts[3] == "0A":
                port = int(parts[1].rsplit(":", 1)[1], 16)
                if port < 32768:
                    found.append(f"{table} {port}")
    return found


def _sysctls() -> list[str]:
    found = []
    for name in ("net/ipv4/ip_forward", "net/ipv4/conf/all/forwarding", "net/ipv4/conf/all/route_localnet", "net/ipv6/conf/all/forwarding", "net/bridge/bridge-nf-call-iptables"):
        path = Path("/proc/sys") / name
        if path.exists():
            found.append(f"{name}={path.read_text().strip()}")
    return found
