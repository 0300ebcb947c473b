"""Publishing a Service on a port of the nodes, live: the library behind `knarr port`.

Role: called by the command line. The record is an annotation of the Service, which every node's proxy reads; so it
lasts as long as the Service does.
Invariants: a port that some process of this machine, a node port or another Service holds is refused with the holder's
name before anything changes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from knarr.api.resources import SERVICES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.network.objects import object_key
from knarr.network.proxy.model import HOST_PORTS, host_ports


class PortBusy(Exception):
    """The host port is taken; the text names the holder."""


@dataclass(frozen=True, slots=True)
class Published:
    """One published port."""

    host_port: int
    namespace: str
    service: str
    port: str


def listening_process(port: int, protocol: str = "TCP") -> str | None:
    """Who listens on a TCP or UDP port of this machine: "name (pid N)", or None. Reads /proc; a process of another user counts as "unknown"."""
    inodes = set()
    kind = protocol.lower()
    listening = "0A" if kind == "tcp" else "07"
    for table in (kind, f"{kind}6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == listening and int(words[1].rpartition(":")[2], 16) == port:
                inodes.add(words[9])
    if not inodes:
        return None
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                target = os.readlink(descriptor)
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return "unknown"


def published(services: list[Object]) -> list[Published]:
    """All published ports, by number."""
    found = [
        Published(number, obj["metadata"]["namespace"], obj["metadata"]["name"], wanted)
        for obj in services
        for number, wanted in host_ports(obj)
    ]
    return sorted(found, key=lambda item: item.host_port)


def holder(services: list[Object], port: int, *, besides: str = "", protocol: str = "TCP") -> str | None:
    """Which Service ("namespace/name") or process holds a host port; `besides` is one that does not count."""
    for obj in services:
        key = object_key(obj)
        if any(item.get("nodePort") == port for item in (obj.get("spec") or {}).get("ports") or ()):
            return f"service {key} (node port)"
        if key != besides and any(number == port for number, _wanted in host_ports(obj)):
            return f"service {key}"
    process = listening_process(port, protocol)
    return f"process {process}" if process else None


async def publish(client: Client, namespace: str, name: str, *, host_port: int, port: str) -> None:
    """Make a Service's port (name or number) reachable on a port of every node.

    Raises:
      PortBusy: somebody holds the port.
      ValueError: the Service has no such port.
      StatusError: the API server's refusal, e.g. no such Service.
    """
    services = (await client.list(SERVICES)).get("items") or []
    service = await client.get(SERVICES, name, namespace)
    ports = (service.get("spec") or {}).get("ports") or ()
    wanted = [item.get("protocol") or "TCP" for item in ports if port in (item.get("name"), str(item.get("port")))]
    if not wanted:
        raise ValueError(f"service {namespace}/{name} has no port {port}")
    for protocol in wanted:
        taken = holder(services, host_port, besides=f"{namespace}/{name}", protocol=protocol)
        if taken is not None:
            raise PortBusy(f"port {host_port} is held by {taken}")
    kept = [(number, wanted) for number, wanted in host_ports(service) if number != host_port]
    await _write(client, namespace, name, [*kept, (host_port, port)])


async def withdraw(client: Client, namespace: str, name: str, *, host_port: int) -> bool:
    """Take a published port back; False when it was not published."""
    service = await client.get(SERVICES, name, namespace)
    before = host_ports(service)
    kept = [(number, wanted) for number, wanted in before if number != host_port]
    if len(kept) == len(before):
        return False
    await _write(client, namespace, name, kept)
    return True


async def _write(client: Client, namespace: str, name: str, ports: list[tuple[int, str]]) -> None:
    text = ",".join(f"{number}:{wanted}" for number, wanted in ports) or None
    await client.patch(SERVICES, name, namespace, {"metadata": {"annotations": {HOST_PORTS: text}}}, type="merge")
