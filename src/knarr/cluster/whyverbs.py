"""`knarr why`: why a pod waits, a packet or Service does not arrive, a claim, namespace, rollout or request is stuck.

Role: called by the command line; finds which library answers (knarr.cluster.why, knarr.network.why, the scheduler's report), prints,
returns the exit code: 1 when something stops what was asked about.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from knarr.api.resources import (
    DAEMON_SETS,
    DEPLOYMENTS,
    JOBS,
    NAMESPACES,
    PERSISTENT_VOLUME_CLAIMS,
    PODS,
    REPLICA_SETS,
    SERVICES,
    STATEFUL_SETS,
)
from knarr.api.scheme import Resource
from knarr.client.rest import Client
from knarr.cluster import localapi
from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError, with_client
from knarr.cluster.netverbs import print_steps
from knarr.cluster.why import access, claim, namespace, rollout
from knarr.network.dns.lookup import lookup
from knarr.network.servicewhy import why_service
from knarr.network.why import BadQuestion, Step

_WORKLOADS = (DEPLOYMENTS, REPLICA_SETS, STATEFUL_SETS, DAEMON_SETS, JOBS)
_KINDS = (PODS, SERVICES, PERSISTENT_VOLUME_CLAIMS, NAMESPACES, *_WORKLOADS)
_EXPECTED = "expected pod/NAME, svc/NAME[:PORT], pvc/NAME, ns/NAME, deploy/NAME, sts/NAME, ds/NAME, rs/NAME or job/NAME"


def _kind(text: str) -> Resource | None:
    wanted = text.lower()
    return next((item for item in _KINDS if wanted in (item.plural, item.singular, item.kind.lower(), *item.short_names)), None)


def explain_object(config: ClusterConfig, text: str, owner: str) -> int:
    """Print what stops one object; `text` is KIND/NAME or KIND/NAMESPACE/NAME."""
    kind, _, rest = text.partition("/")
    resource = _kind(kind)
    if resource is None or not rest:
        raise CommandError(f"{text!r}: {_EXPECTED}, or a target as well: knarr why pod/a pod/b:80")
    first, slash, name = rest.partition("/")
    if slash:
        owner = first
    else:
        name = rest
    if resource is PODS:
        return explain_pod(config, owner, name)
    if resource is SERVICES:
        service, _, port = name.partition(":")
        ask_dns = partial(lookup, config.dns_ip)
        return _print(config, lambda client: why_service(client, owner, service, port, domain=config.cluster_domain, lookup=ask_dns))
    if resource is PERSISTENT_VOLUME_CLAIMS:
        return _print(config, lambda client: claim.why(client, owner, name))
    if resource is NAMESPACES:
        return _print(config, lambda client: namespace.why(client, name))
    return _print(config, lambda client: rollout.why(client, resource, owner, name))


def explain_request(config: ClusterConfig, words: list[str], owner: str, user: str, groups: list[str]) -> int:
    """Print whether a request is allowed; `words` are its verb, resource and perhaps the object's name."""
    if len(words) not in (2, 3):
        raise CommandError("expected knarr why can-i [--as USER] VERB RESOURCE [NAME], for example knarr why can-i --as jane create pods")
    request = access.Request(words[0], words[1], words[2] if len(words) == 3 else "", owner, user, tuple(groups))
    return _print(config, lambda client: access.why(client, request))


def _print(config: ClusterConfig, ask: Callable[[Client], Awaitable[list[Step]]]) -> int:
    async def work(client: Client) -> int:
        try:
            return print_steps(await ask(client))
        except BadQuestion as error:
            raise CommandError(str(error)) from error

    return with_client(config, work)


def explain_pod(config: ClusterConfig, owner: str, name: str) -> int:
    """Print why a pod is where it is, or nowhere: one line per node, the nearest fit first, with the smallest change that would help.

    The facts are the scheduler's own: its last decision about the pod, and its filters asked again as things stand now.
    """
    try:
        report = next(localapi.ask(config, "control", "why/pod", namespace=owner, name=name))["report"]
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    for line in lines(report):
        print(line)
    return 0 if report["node"] else 1


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    if report["node"]:
        return [f"{report['pod']} is on node {report['node']}"]
    out = [f"{report['pod']} waits" + (f" ({report['queue']}, tried {report['attempts']} times)" if report["queue"] else "")]
    if report["gate"]:
        out.append(f"  held back: {report['gate']}")
    if report["last"]:
        out.append(f"  last decision at {report['last']['at']}: {report['last']['message']}")
    for entry in report["nodes"]:
        where = entry["node"] or "any node"
        if entry["fits"]:
            out.append(f"  {where}: fits now")
        else:
            out.append(f"  {where}: {'; '.join(entry['reasons'])}; to fit: {', '.join(dict.fromkeys(entry['changes']))}")
    return out
