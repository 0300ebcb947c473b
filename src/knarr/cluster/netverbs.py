"""`knarr why` and `knarr port`: the network's library functions as commands.

Role: called by the command line; prints, returns the exit code. `why` exits 1 when the packet does not arrive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from knarr.api.resources import SERVICES
from knarr.client.rest import Client
from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError, with_client
from knarr.network import publishing
from knarr.network.firewalls import blockers
from knarr.network.why import BadQuestion, Step, why

_SIGNS = {True: "✓", False: "✗", None: "·"}


def explain(config: ClusterConfig, source: str, target: str, *, namespace: str, protocol: str) -> int:
    """Print the walk of a packet from `source` to `target`."""

    async def work(client: Client) -> int:
        try:
            steps = await why(client, source, target, namespace=namespace, protocol=protocol.upper())
        except BadQuestion as error:
            raise CommandError(str(error)) from error
        return print_steps([*steps, *_firewalls()])

    return with_client(config, work)


def print_steps(steps: Iterable[Step]) -> int:
    """Print steps with a sign each; returns 1 when one of them says no."""
    stopped = 0
    for step in steps:
        print(f"{_SIGNS[step.ok]} {step.text}")
        stopped |= step.ok is False
    return int(stopped)


def _firewalls() -> list[Step]:
    """Remarks about firewalls of this machine; none for those who may not read its rules."""
    try:
        return [Step(None, str(blocker)) for blocker in blockers()]
    except OSError:
        return []


def show_ports(config: ClusterConfig) -> int:
    """Print what is published on the nodes' ports."""

    async def work(client: Client) -> int:
        services = (await client.list(SERVICES)).get("items") or []
        for item in publishing.published(services):
            print(f"{item.host_port}\t{item.namespace}/{item.service}:{item.port}")
        return 0

    return with_client(config, work)


def _parse(text: str, namespace: str) -> tuple[int, str, str, str]:
    """"8080:web:80" or "8080:ns/web:http" to (host port, namespace, service, port)."""
    host, _colon, rest = text.partition(":")
    service, _colon, port = rest.rpartition(":")
    if not host.isdigit() or not service or not port:
        raise CommandError(f"{text!r}: expected HOSTPORT:SERVICE:PORT, for example 8080:web:80")
    owner, slash, name = service.partition("/")
    return int(host), owner if slash else namespace, name if slash else service, port


def add_port(config: ClusterConfig, text: str, *, namespace: str) -> int:
    """Publish a Service's port on every node."""
    host_port, where, service, port = _parse(text, namespace)

    async def work(client: Client) -> int:
        try:
            await publishing.publish(client, where, service, host_port=host_port, port=port)
        except (publishing.PortBusy, ValueError) as error:
            raise CommandError(str(error)) from error
        print(f"http://localhost:{host_port} leads to service {where}/{service} port {port}", file=sys.stdout)
        return 0

    return with_client(config, work)


def remove_port(config: ClusterConfig, host_port: int) -> int:
    """Take a published port back."""

    async def work(client: Client) -> int:
        services = (await client.list(SERVICES)).get("items") or []
        found = next((item for item in publishing.published(services) if item.host_port == host_port), None)
        if found is None:
            raise CommandError(f"port {host_port} is not published")
        await publishing.withdraw(client, found.namespace, found.service, host_port=host_port)
        return 0

    return with_client(config, work)
