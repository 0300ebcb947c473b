"""Listening to one kind of netlink announcements in the event loop, many of which are told as one.

Role: what hostwatch.py and tablewatch.py have in common; they say which announcements, and which of them matter.
Invariants: costs nothing while nothing is announced; a lost message is followed by a call too many, never by one too few.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable

from knarr.aiokits.log import get_logger
from knarr.network.netlink import NetlinkSocket
from knarr.network.netns import open_netlink

log = get_logger(__name__)


class KernelWatch:
    """Calls `on_change` (a plain function, in the event loop) a moment after an announcement that matters.

    Args:
      what: Name in the log, as "the ruleset".
      protocol: NETLINK_ROUTE or NETLINK_NETFILTER.
      groups: Multicast groups to listen to.
      netns: Path of the namespace; None is the process's.
      settle_seconds: What comes within this time of the first is told with it.
    """

    def __init__(
        self, what: str, protocol: int, groups: Iterable[int], on_change: Callable[[], None], *, netns: str | None, settle_seconds: float
    ) -> None:
        self._what = what
        self._protocol = protocol
        self._groups = tuple(groups)
        self._on_change = on_change
        self._netns = netns
        self._settle_seconds = settle_seconds
        self._listener: NetlinkSocket | None = None
        self._pending: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch; needs the running loop; idempotent. A kernel that refuses costs only the watch, which is logged."""
        if self._listener is not None:
            return
        try:
            self._listener = open_netlink(self._netns, self._protocol)
            self._prepare(self._listener)
            for group in self._groups:
                self._listener.subscribe(group)
            self._listener.set_blocking(False)
        except OSError as error:
            log.warning("announcements of the kernel cannot be heard", of=self._what, error=str(error))
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

    def _prepare(self, listener: NetlinkSocket) -> None:
        """Whatever the socket needs before it subscribes."""

    def _matters(self, kind: int, body: memoryview) -> bool:
        """Whether this announcement is worth a call."""
        return True

    def _readable(self) -> None:
        assert self._listener is not None
        matters = False
        try:
            while True:
                for kind, _flags, _sequence, body in self._listener.receive():
                    matters = matters or self._matters(kind, body)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                matters = True  # nobody knows what was lost
            elif error.errno != errno.EAGAIN:
                log.warning("listening to the kernel's announcements failed", of=self._what, error=str(error))
                self.close()
                return
        if matters and self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(self._settle_seconds, self._tell)

    def _tell(self) -> None:
        self._pending = None
        self._on_change()
