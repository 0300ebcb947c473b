"""Search paths walked in the server instead of the client: one question where a pod's resolver would ask four or five.

Role: optional part of `server`. A pod that looks for "example.com" asks first for "example.com.NAMESPACE.svc.DOMAIN"; for
that question, from a pod of that namespace, `names` says what its resolver would ask next. The server tries these and
answers with a CNAME to the first that exists.
Invariants: who is not a pod of the namespace in the name, or has another DNS policy, gets plain answers, as do names that
exist; search domains of the pod's own settings are tried in their turn. So nothing resolves otherwise than it would by the
client's own search.
Source: coredns plugin/autopath with plugin/kubernetes.
"""

from __future__ import annotations

from pathlib import Path

from knarr.api.types import Object
from knarr.client.informer import Informer

_RESOLV_CONF = Path("/etc/resolv.conf")
_MOST_SEARCHED = 6
"""More search domains than resolvers take."""


def pod_addresses(obj: Object) -> list[str]:
    """Index function: addresses of a Pod that has a network of its own."""
    if (obj.get("spec") or {}).get("hostNetwork"):
        return []
    status = obj.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return []
    return [item["ip"] for item in status.get("podIPs") or () if item.get("ip")]


def read_search(path: Path) -> list[str]:
    """The search domains of a resolv.conf, which pods have behind the cluster's; empty when it cannot be read."""
    found: list[str] = []
    try:
        for line in path.read_text(errors="replace").splitlines():
            words = line.split()
            if words and words[0] in ("search", "domain"):
                # Of several lines the last counts.
                found = [word.strip(".").lower() for word in words[1:]]
    except OSError:
        return []
    return [domain for domain in found if domain][:_MOST_SEARCHED]


class Autopath:
    """See the module.

    Args:
      pods: Informer of Pods; gets the index "address" (pod_addresses).
      domain: The cluster domain.
      resolv_conf: The host's, whose search domains pods have as well.
    """

    def __init__(self, pods: Informer, domain: str, resolv_conf: Path = _RESOLV_CONF) -> None:
        self._pods = pods
        pods.add_index("address", pod_addresses)
        self._domain = domain
        self._suffix = f".svc.{domain}"
        self._resolv_conf = resolv_conf

    def searchable(self, name: str) -> bool:
        """Whether a name may be the first of a search, so that a plain answer to it is not everybody's."""
        return name.endswith(self._suffix)

    def names(self, name: str, client: str) -> list[str]:
        """What a client's resolver would ask after `name`, in turn; empty when that is not the first question of a search of it."""
        if not name.endswith(self._suffix):
            return []
        base, _dot, namespace = name[: -len(self._suffix)].rpartition(".")
        pods = [pod for pod in self._pods.by_index("address", client) if pod["metadata"].get("namespace") == namespace]
        if not base or not pods:
            return []
        spec = pods[0].get("spec") or {}
        if spec.get("dnsPolicy") not in (None, "ClusterFirst"):
            return []
        own = [domain.strip(".").lower() for domain in (spec.get("dnsConfig") or {}).get("searches") or ()]
        path = dict.fromkeys([f"svc.{self._domain}", self._domain, *read_search(self._resolv_conf), *own])
        return [f"{base}.{domain}" if domain else base for domain in path] + [base]
