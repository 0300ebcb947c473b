"""Other people's firewalls that would stop pods: found, named, never touched.

Role: the pod network looks once at its start and logs what it finds. A packet must pass every table's chains of a hook,
so a forward chain with policy drop (as Docker sets it) stops pods whatever our own tables accept; only its owner can
open it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection

from knarr.network.netlink import NETLINK_NETFILTER, attributes, cstring
from knarr.network.netns import open_netlink

_GETCHAIN = (10 << 8) | 4
_FORWARD = 2
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}


def forward_drops(own_tables: Collection[str], netns: str | None = None) -> list[str]:
    """Foreign chains on the forward hook that drop by default, as "family table chain". Raises OSError."""
    found = []
    with open_netlink(netns, NETLINK_NETFILTER) as netlink:
        for family, name in _FAMILIES.items():
            for body in netlink.dump(_GETCHAIN, struct.pack("=BBH", family, 0, 0), "listing chains"):
                fields = dict(attributes(body, 4))
                if 4 not in fields or 5 not in fields or body[0] != family:
                    continue
                hook = dict(attributes(fields[4]))
                number = struct.unpack(">I", hook[1])[0] if 1 in hook else -1
                policy = struct.unpack(">I", fields[5])[0]
                table = cstring(fields[1])
                if number == _FORWARD and policy == 0 and table not in own_tables:
                    found.append(f"{name} {table} {cstring(fields[3])}")
    return found
