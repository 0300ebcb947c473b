"""Firewalls of the machine beside our tables: traffic goes on where they allow it, and where they do not they are named."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.network.firewalls import PODS_WAY, FirewallWatch, blockers, look

from .test_service_proxy import Recorder
from .world import World

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

FIREWALLD = """
table inet firewalld {
  chain zones { iifname "lan0" accept; iifname "knp-*" accept; }
  chain filter_INPUT { type filter hook input priority filter + 10; policy accept;
    ct state { established, related } accept; ct state invalid drop; iifname "lo" accept; jump zones; reject with icmpx admin-prohibited; }
  chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept; ct state invalid drop; iifname "lo" accept; jump zones; counter reject with icmpx admin-prohibited; }
}"""
HARMLESS = """
table ip plain {
  chain FORWARD { type filter hook forward priority filter; policy accept; ip saddr 198.51.100.0/24 drop; }
  chain own { drop; }
  chain out { type filter hook output priority filter; policy accept; ip daddr 198.51.100.7 reject; }
}"""


@pytest.fixture
async def world():
    async with World() as made:
        yield made


def inside(world: World, command: str) -> str:
    return subprocess.run(["ip", "netns", "exec", Path(world.node.path).name, "sh", "-c", command], capture_output=True, text=True, check=True).stdout


def found(world: World) -> list[tuple[str, str]]:
    return [(blocker.hook, blocker.chain) for blocker in blockers(("knt",), world.node.path)]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("iptables -P FORWARD DROP", [("forward", "ip filter FORWARD")]),
        ("iptables -A INPUT -p tcp --dport 22 -j ACCEPT; iptables -A INPUT -j REJECT", [("input", "ip filter INPUT")]),
        ("iptables -A FORWARD -j DROP", [("forward", "ip filter FORWARD")]),
        (f"nft '{FIREWALLD}'", [("input", "inet firewalld filter_INPUT"), ("forward", "inet firewalld filter_FORWARD")]),
        (f"nft '{HARMLESS}'", []),
    ],
)
async def test_what_drops_by_default_is_named_and_nothing_else(world: World, command: str, expected: list[tuple[str, str]]) -> None:
    inside(world, command)
    assert found(world) == expected


async def test_policies_of_the_older_tables_are_seen(world: World) -> None:
    has_them = inside(world, "iptables-legacy -P FORWARD DROP && ip6tables-legacy -P INPUT DROP && echo yes || true")
    # A kernel without ip_tables has no such rules.
    assert found(world) == ([("forward", "ip filter FORWARD"), ("input", "ip6 filter INPUT")] if has_them else [])


async def test_a_firewall_that_comes_later_is_told_and_so_is_its_opening(world: World) -> None:
    watch = FirewallWatch(None, "here", own=("knt",), netns=world.node.path)  # type: ignore[arg-type]
    watch._recorder = recorder = Recorder()  # type: ignore[assignment]
    async with Tasks() as tasks:
        tasks.spawn(watch.run(), "firewalls")
        await asyncio.sleep(0.1)
        await asyncio.to_thread(inside, world, "iptables -P FORWARD DROP")
        async with asyncio.timeout(10):
            while not watch.known:
                await asyncio.sleep(0.02)
        assert recorder.events[-1][0] == "here"
        assert "ip filter FORWARD" in recorder.events[-1][1]
        await asyncio.to_thread(inside, world, "iptables -P FORWARD ACCEPT")
        async with asyncio.timeout(10):
            while watch.known:
                await asyncio.sleep(0.02)
        assert "no longer" in recorder.events[-1][1]


async def test_pods_talk_through_a_firewall_that_lets_them_and_its_rules_stay(world: World) -> None:
    """As Docker, firewalld and a user's own rules do: all three at once, before and after our start."""
    inside(world, f"iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; nft '{FIREWALLD}'")
    a, b = await world.pod("a"), await world.pod("b")
    a.serve("a", 8080)
    # As a node does: what others look at must pass them.
    assert any(hooks & PODS_WAY for hooks in look(("knt",), world.node.path)[1].values())
    world.network.direct.hold("firewalls")
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(lambda: b.ask(a.ip, 8080, seconds=0.4))
    # What the documentation tells the owner of such a firewall.
    inside(world, "iptables -A DOCKER-USER -s 10.77.0.0/16 -j ACCEPT; iptables -A DOCKER-USER -d 10.77.0.0/16 -j ACCEPT")
    assert (await asyncio.to_thread(b.ask, a.ip, 8080))[0] == "a"
    before = inside(world, "nft -s list table ip filter; nft -s list table inet firewalld")
    await world.network.start()
    world.client.serve("outside", 9000)
    assert await asyncio.to_thread(b.ask, world.client.ip, 9000) == ("outside", world.node.ip)
    await world.network.cleanup()
    assert inside(world, "nft -s list table ip filter; nft -s list table inet firewalld") == before
