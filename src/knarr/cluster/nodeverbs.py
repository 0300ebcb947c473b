"""`knarr node ls|add|stop|start|kill|rm`: further nodes of a running cluster, each as if it were a machine of its own."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal

from knarr.cluster import host, nodes, supervisor
from knarr.cluster.config import ClusterConfig, NodeConfig
from knarr.cluster.lifecycle import CommandError, admin_client, is_running, need_control_plane
from knarr.cluster.progress import Progress

STOP_SECONDS = 15.0


def find(config: ClusterConfig, name: str) -> NodeConfig:
    """The node of that name. Raises CommandError naming those that exist."""
    for node in config.nodes:
        if node.name == name:
            return node
    raise CommandError(f"there is no node {name!r} here (known: {', '.join(node.name for node in config.nodes)})")


def show(config: ClusterConfig) -> int:
    """Print one line per node of this machine."""
    try:
        parts = {part["name"]: part for part in supervisor.ask(config, "status")["components"]}
    except ConnectionError:
        parts = {}
    for node in config.nodes:
        part = parts.get(node.name)
        state = part["state"] if part else "stopped"
        print(f"{node.name:<20} {state:<10} {nodes.node_address(config, node):<16} {node.netns or 'this machine'}")
    return 0


def add(config: ClusterConfig, name: str | None, taints: list[str], labels: list[str], progress: Progress) -> int:
    """Make a node and start it."""
    need_control_plane(config)
    _need_running(config)
    node = nodes.add_node(config, name)
    node.labels = dict(_pair(label) for label in labels)
    node.taints = [_taint(text) for text in taints]
    config.save()
    supervisor.ask(config, "start-node", node=node.name)
    progress.done(f"node {node.name} started at {node.ip}")
    return 0


def _need_running(config: ClusterConfig) -> None:
    if not is_running(config):
        raise CommandError(f"cluster {config.name!r} is not running; `knarr up` starts it")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise CommandError(f"{text!r} is not of the form key=value")
    return key, value


def _taint(text: str) -> dict[str, str]:
    rest, colon, effect = text.rpartition(":")
    if not colon or effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
        raise CommandError(f"{text!r} is not of the form key[=value]:NoSchedule|PreferNoSchedule|NoExecute")
    key, _, value = rest.partition("=")
    return {"key": key, "effect": effect, **({"value": value} if value else {})}


def stop(config: ClusterConfig, name: str, *, kill: bool, progress: Progress) -> int:
    """Switch a node off: its kubelet and its containers end, in order where that is configured; with kill as if the power had failed."""
    _need_running(config)
    node = find(config, name)
    _end_process(config, node, signal.SIGKILL if kill else signal.SIGTERM)
    host.clean_node(config, node, grace_seconds=0 if kill else host.TERM_SECONDS)
    node.stopped = True
    config.save()
    progress.done(f"node {name} is off")
    return 0


def _end_process(config: ClusterConfig, node: NodeConfig, number: int) -> None:
    part = next((part for part in supervisor.ask(config, "status")["components"] if part["name"] == node.name), None)
    if part is None:
        return
    descriptor = -1
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(part["pid"]) if part["pid"] else -1
    try:
        seconds = supervisor.ask(config, "stop", component=node.name, orderly=number != signal.SIGKILL)["seconds"]
        if descriptor >= 0:
            if number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(part["pid"], number)
            limit = STOP_SECONDS + seconds
            if not select.select([descriptor], [], [], limit)[0]:
                raise CommandError(f"node {node.name} did not stop within {limit:.0f} s; `knarr node kill {node.name}` ends it")
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def start(config: ClusterConfig, name: str, progress: Progress) -> int:
    """Switch a node on again, with its data."""
    _need_running(config)
    node = find(config, name)
    node.stopped = False
    config.save()
    supervisor.ask(config, "start-node", node=node.name)
    progress.done(f"node {name} started")
    return 0


def remove(config: ClusterConfig, name: str, progress: Progress) -> int:
    """Take a node out of the cluster: its processes, its data and its Node object; of a machine that joined, the Node object alone."""
    _need_running(config)
    if all(node.name != name for node in config.nodes):
        if not _delete_object(config, name):
            find(config, name)
        progress.done(f"node {name} is gone; `knarr delete` on its machine removes what is left there")
        return 0
    node = find(config, name)
    if not node.netns:
        raise CommandError(f"node {name} is this machine; `knarr delete` removes the whole cluster")
    _end_process(config, node, signal.SIGTERM)
    with contextlib.suppress(RuntimeError):
        supervisor.ask(config, "forget", component=node.name)
    host.clean_node(config, node)
    config.nodes.remove(node)
    config.save()
    shutil.rmtree(config.data / "nodes" / node.name, ignore_errors=True)
    _delete_object(config, name)
    progress.done(f"node {name} is gone")
    return 0


def _delete_object(config: ClusterConfig, name: str) -> bool:
    """Whether there was one."""
    import asyncio

    from knarr.api.errors import is_not_found
    from knarr.api.resources import NODES

    async def delete() -> bool:
        client = admin_client(config)
        try:
            await client.delete(NODES, name)
        except Exception as error:
            if not is_not_found(error):
                raise
            return False
        finally:
            await client.close()
        return True

    return asyncio.run(delete())
