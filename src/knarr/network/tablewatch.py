"""Notices when somebody else deletes our nf_tables tables, as `nft flush ruleset` and restarts of firewall services do.

Role: proxy, policy and pod network each watch their table and write it anew at once, instead of with the next change
that happens to come. The kernel announces every ruleset generation; a socket filter lets only these announcements
through, and after one (however many come together) the watched table is looked for.
Invariants: costs nothing while nobody changes rules; a lost announcement is followed by another look, never by a wrong
conclusion.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable

from knarr.aiokits.log import get_logger
from knarr.network.kernelwatch import KernelWatch
from knarr.network.netlink import NETLINK_NETFILTER, NetlinkSocket
from knarr.network.netns import open_netlink
from knarr.network.nftables import table_exists

log = get_logger(__name__)

_GROUP_NFTABLES = 7
_NEWGEN = (10 << 8) | 15
_SO_ATTACH_FILTER = 26
_SETTLE_SECONDS = 0.05


class RulesetWatch(KernelWatch):
    """Calls `on_change` (a plain function, in the event loop) a moment after anybody changed any rule; a burst is one call."""

    def __init__(self, on_change: Callable[[], None], *, netns: str | None = None, settle_seconds: float = _SETTLE_SECONDS) -> None:
        super().__init__("the ruleset", NETLINK_NETFILTER, (_GROUP_NFTABLES,), on_change, netns=netns, settle_seconds=settle_seconds)

    def _prepare(self, listener: NetlinkSocket) -> None:
        _only_messages(listener, _NEWGEN)


class TableWatch:
    """Calls `on_lost` (a plain function, in the event loop) when the table is gone.

    Args:
      wanted: Whether the table ought to be there now; asked before each look.
    """

    def __init__(self, table: str, on_lost: Callable[[], None], *, wanted: Callable[[], bool], netns: str | None = None) -> None:
        self._table = table
        self._on_lost = on_lost
        self._wanted = wanted
        self._netns = netns
        self._asker: NetlinkSocket | None = None
        self._changes = RulesetWatch(self._look, netns=netns)

    def start(self) -> None:
        """Begin to watch; needs the running loop. A kernel that refuses costs only the watch, which is logged."""
        if self._asker is not None:
            return
        try:
            self._asker = open_netlink(self._netns, NETLINK_NETFILTER)
        except OSError as error:
            log.warning("the ruleset cannot be looked at", table=self._table, error=str(error))
            return
        self._changes.start()

    def close(self) -> None:
        """Stop watching; idempotent."""
        self._changes.close()
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    def _look(self) -> None:
        if self._asker is None or not self._wanted():
            return
        if not table_exists(self._asker, self._table):
            log.warning("somebody deleted our table, writing it anew", table=self._table)
            self._on_lost()


def _only_messages(netlink: NetlinkSocket, kind: int) -> None:
    """Let a socket receive only datagrams that begin with a message of this type (a classic BPF program of three instructions)."""
    wanted = socket.htons(kind)
    program = struct.pack("=HBBI", 0x28, 0, 0, 4) + struct.pack("=HBBI", 0x15, 0, 1, wanted) + struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF)
    program += struct.pack("=HBBI", 0x06, 0, 0, 0)
    buffer = ctypes.create_string_buffer(program, len(program))
    netlink.set_option(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(buffer)))
