"""Bandwidth annotations of a pod as token buckets.

Role: `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth` (bits per second as a quantity) shape what
a pod receives and sends. Each side of its veth shapes what it sends; the pod's own side is out of reach for a pod
without NET_ADMIN. Used by `podnet` from its worker thread.
Invariant: a kernel without the discipline costs the pod its limit, not its network: that is logged once.
Source: cni-plugins bandwidth; kubelet's bandwidth annotations (pkg/util/bandwidth).
"""

from __future__ import annotations

from collections.abc import Mapping

from knarr.aiokits.log import get_logger
from knarr.api.quantity import value
from knarr.network import rtnl
from knarr.network.netlink import NetlinkError, NetlinkSocket
from knarr.network.netns import open_netlink

log = get_logger(__name__)

INGRESS = "kubernetes.io/ingress-bandwidth"
EGRESS = "kubernetes.io/egress-bandwidth"
_MINIMUM_BITS, _MAXIMUM_BITS = 1_000, 10**15


def limit_bits(annotations: Mapping[str, str], name: str) -> int | None:
    """The limit in bits per second, or None when not asked for or out of the accepted range (1k to 1P)."""
    text = annotations.get(name)
    if not text:
        return None
    try:
        bits = value(text)
    except ValueError:
        return None
    return bits if _MINIMUM_BITS <= bits <= _MAXIMUM_BITS else None


def shape(netlink: NetlinkSocket, link_name: str, netns_path: str, annotations: Mapping[str, str], mtu: int) -> None:
    """Apply both limits to a pod whose node-side link is `link_name` and whose namespace has eth0."""
    incoming, outgoing = limit_bits(annotations, INGRESS), limit_bits(annotations, EGRESS)
    try:
        if incoming is not None:
            _limit(netlink, link_name, incoming, mtu)
        if outgoing is not None:
            with open_netlink(netns_path) as inside:
                _limit(inside, "eth0", outgoing, mtu)
    except NetlinkError as error:
        log.warning("the kernel cannot limit this pod's bandwidth", link=link_name, error=str(error))


def _limit(netlink: NetlinkSocket, link_name: str, bits: int, mtu: int) -> None:
    # A burst of 4 ms of traffic, and never less than a few frames, or the bucket could pass none at all.
    burst = max(bits // 8 // 250, 10 * (mtu + 14))
    index = rtnl.link(netlink, link_name).index
    netlink.send(rtnl.add_tbf(index, rate_bytes=max(1, bits // 8), burst_bytes=burst))
