"""Notices when the host's own addresses or default routes change, as when a laptop moves to another network.

Role: the announcer and the node's process each watch one namespace. The kernel tells every change; those of pods' links
and routes are passed over, and what comes together is told once.
Invariants: costs nothing while nothing changes; a lost message is followed by a call too many, never by one too few.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from knarr.aiokits.log import get_logger
from knarr.network.netlink import NETLINK_ROUTE, NetlinkSocket
from knarr.network.netns import open_netlink

log = get_logger(__name__)

_GROUPS = (5, 7, 9, 11)
"""IPv4 addresses and routes, IPv6 addresses and routes."""
_ADDRESS, _ROUTE = (20, 21), (24, 25)
_SCOPE_GLOBAL = 0
_SETTLE_SECONDS = 0.1


class HostWatch:
    """Calls `on_change` (a plain function, in the event loop) when an address of global scope or a default route came or went.

    Args:
      netns: Path of the namespace; None is the process's.
    """

    def __init__(self, on_change: Callable[[], None], *, netns: str | None = None) -> None:
        self._on_change = on_change
        self._netns = netns
        self._listener: NetlinkSocket | None = None
        self._pending: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch; needs the running loop. A kernel that refuses costs only the watch, which is logged."""
        try:
            self._listener = open_netlink(self._netns, NETLINK_ROUTE)
            for group in _GROUPS:
                self._listener.subscribe(group)
            self._listener.set_blocking(False)
        except OSError as error:
            log.warning("changes of the host's addresses cannot be watched", error=str(error))
            self.close()
            return
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._readable)

    def close(self) -> None:
        """Stop watching; idempotent."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        if self._listener is not None:
            if self._listener.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _readable(self) -> None:
        assert self._listener is not None
        matters = False
        try:
            while True:
                matters = any([_matters(kind, body) for kind, _flags, _sequence, body in self._listener.receive()]) or matters
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                matters = True
            elif error.errno != errno.EAGAIN:
                log.warning("watching the host's addresses failed", error=str(error))
                self.close()
                return
        if matters and self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._tell)

    def _tell(self) -> None:
        self._pending = None
        self._on_change()


def _matters(kind: int, body: memoryview) -> bool:
    """Whether a message tells of an address of global scope, or of a default route."""
    if kind in _ADDRESS:
        return len(body) >= 8 and body[3] == _SCOPE_GLOBAL
    return kind in _ROUTE and len(body) >= 12 and body[1] == 0
