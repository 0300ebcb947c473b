"""Living TCP connections of a pod, and who began each: what connection tracking has to be told of before it must know.

Source: linux/Documentation/networking/proc_net_tcp.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from knarr.network.netns import run_inside

_LISTENING = "0A"
_LIVING = {"01", "03", "04", "05", "08", "09", "0B"}
"""Established, half open as seen by the server, and closing but for the last wait."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection as its first segment said: who asked whom."""

    source: str
    source_port: int
    target: str
    target_port: int


def living(netns: str, addresses: Collection[str]) -> list[Connection]:
    """Connections of a pod with these addresses. Raises OSError: the namespace cannot be entered."""
    rows = run_inside(netns, lambda: [row for name in ("tcp", "tcp6") for row in _rows(name)])
    listening = {port for (_address, port), _peer, state in rows if state == _LISTENING}
    found = []
    for (address, port), (peer, peer_port), state in rows:
        if state in _LIVING and address in addresses:
            asked = Connection(peer, peer_port, address, port)
            found.append(asked if port in listening else Connection(address, port, peer, peer_port))
    return found


_Place = tuple[str, int]


def _rows(name: str) -> Iterator[tuple[_Place, _Place, str]]:
    for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
        _number, local, peer, state, *_rest = line.split()
        yield _place(local), _place(peer), state


def _place(text: str) -> _Place:
    digits, _colon, port = text.partition(":")
    # Words of four bytes in the machine's order.
    raw = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    if len(raw) == 16 and raw.startswith(bytes(10) + b"\xff\xff"):
        raw = raw[12:]
    return str(ip_address(raw)), int(port, 16)
