"""Notices when the host's own addresses or default routes change, as when a laptop moves to another network.

Role: the announcer and the node's process each watch one namespace. The kernel tells every change; those of pods' links
and routes are passed over, and what comes together is told once.
"""

from __future__ import annotations

from collections.abc import Callable

from knarr.network.kernelwatch import KernelWatch
from knarr.network.netlink import NETLINK_ROUTE

_GROUPS = (5, 7, 9, 11)
"""IPv4 addresses and routes, IPv6 addresses and routes."""
_ADDRESS, _ROUTE = (20, 21), (24, 25)
_SCOPE_GLOBAL = 0
_SETTLE_SECONDS = 0.1


class HostWatch(KernelWatch):
    """Calls `on_change` (a plain function, in the event loop) when an address of global scope or a default route came or went.

    Args:
      netns: Path of the namespace; None is the process's.
    """

    def __init__(self, on_change: Callable[[], None], *, netns: str | None = None) -> None:
        super().__init__("the host's addresses", NETLINK_ROUTE, _GROUPS, on_change, netns=netns, settle_seconds=_SETTLE_SECONDS)

    def _matters(self, kind: int, body: memoryview) -> bool:
        """Whether a message tells of an address of global scope, or of a default route."""
        if kind in _ADDRESS:
            return len(body) >= 8 and body[3] == _SCOPE_GLOBAL
        return kind in _ROUTE and len(body) >= 12 and body[1] == 0
