"""`knarr why pod/NAME`: one line per node, the nearest fit first, with the smallest change that would make it fit.

The facts are the scheduler's own: its last decision about the pod, and its filters asked again as things stand now.
"""

from __future__ import annotations

from typing import Any

from knarr.cluster import localapi
from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError


def explain_pod(config: ClusterConfig, text: str, namespace: str) -> int:
    """Print why a pod is where it is, or nowhere; returns 1 when it waits."""
    kind, slash, rest = text.partition("/")
    if kind not in ("pod", "pods", "po") or not slash or not rest:
        raise CommandError(f"{text!r}: expected pod/NAME or pod/NAMESPACE/NAME, or a target as well: knarr why pod/a pod/b:80")
    owner, slash, name = rest.partition("/")
    if not slash:
        owner, name = namespace, rest
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
