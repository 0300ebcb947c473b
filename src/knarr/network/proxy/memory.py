"""What the kernel remembers of endpoints that are gone: tracked UDP flows and clients of session affinity.

Role: `service_proxy` asks after each change what has become stale (pure functions) and has it forgotten in its worker thread.
Source: pkg/proxy/conntrack/cleanup.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from knarr.aiokits.log import get_logger
from knarr.network import conntrack
from knarr.network.netlink import NetlinkError
from knarr.network.proxy.model import Rendered, UdpFlow
from knarr.network.proxy.table import ProxyTable

log = get_logger(__name__)

Flows = dict[UdpFlow, frozenset[tuple[str, int]]]
"""UDP frontends, and the endpoints that may stay."""
Sticky = dict[tuple[str, bytes], frozenset[bytes]]
"""Frontends with affinity by map and key, and the endpoint data that may stay."""


def udp_frontends(rendered: Iterable[Rendered]) -> Flows:
    """All UDP frontends and where they may lead."""
    flows: Flows = {}
    for item in rendered:
        flows.update(item.udp)
    return flows


def changed_flows(former: dict[str, Rendered], wanted: dict[str, Rendered]) -> Flows:
    """UDP frontends that lost an endpoint, got their first, or are gone, with the endpoints that may stay."""
    flows: Flows = {}
    for key, new in wanted.items():
        old = former[key]
        for flow in old.udp.keys() | new.udp.keys():
            before, after = old.udp.get(flow, frozenset()), new.udp.get(flow, frozenset())
            if before - after or (after and not before):
                flows[flow] = after
    return flows


def changed_sticky(former: dict[str, Rendered], wanted: dict[str, Rendered]) -> Sticky:
    """Frontends with affinity that lost an endpoint, with what may still be remembered."""
    changed: Sticky = {}
    for key, new in wanted.items():
        for place, before in former[key].sticky.items():
            after = new.sticky.get(place, frozenset())
            if before - after:
                changed[place] = after
    return changed


def forget_flows(table: ProxyTable, flows: Flows) -> int:
    """Delete tracked UDP flows that lead where the frontend does not any more; returns how many."""
    ports = {port: places for (address, port), places in flows.items() if not address}

    def is_stale(flow: conntrack.Flow) -> bool:
        places = flows.get((flow.target_address, flow.target_port))
        if places is None:
            places = ports.get(flow.target_port)
            # A port number alone may also be some foreign server's: only what was translated, or aimed at this node, is ours.
            if places is None or flow.reply_address == flow.target_address:
                return False
        return (flow.reply_address, flow.reply_port) not in places

    try:
        return conntrack.forget_stale(table.socket(), is_stale)
    except NetlinkError as error:
        log.warning("stale UDP flows cannot be deleted", error=str(error))
        return 0


def forget_clients(table: ProxyTable, sticky: Sticky) -> None:
    """Make session affinity forget clients that were sent to endpoints which are gone."""
    for version in {name[-1] for name, _key in sticky}:
        length = 4 if version == "4" else 16
        stale = []
        for key, data in table.elements(f"affinity{version}"):
            frontend = key[length:]
            allowed = sticky.get((f"sticky{version}", frontend))
            if allowed is None and (f"service{version}", frontend) not in table.rendered_keys():
                allowed = sticky.get((f"port_sticky{version}", frontend[length:]))
            if allowed is not None and data not in allowed:
                stale.append(key)
        table.delete_elements(f"affinity{version}", stale)
