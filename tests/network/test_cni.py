"""CNI configurations executed with the distribution's plugins, and with one of our own that misbehaves."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from knarr.network import netns
from knarr.network.cni import CNIError, CNINetwork, installed, parse
from knarr.network.plugins import PluginNetwork
from knarr.runtime.cri import PortMapping, SandboxNetwork

from .world import Place, World

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]
BRIDGE = {
    "cniVersion": "1.0.0",
    "name": "knt",
    "plugins": [
        {"type": "bridge", "bridge": "kntcni0", "isGateway": True, "ipMasq": False, "hairpinMode": True,
         "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd88::/112"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
        {"type": "tuning", "mtu": 1300},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
    ],
}  # fmt: skip


@pytest.fixture
async def world(tmp_path):
    async with World() as made:
        (tmp_path / "conf").mkdir()
        BRIDGE["plugins"][0]["ipam"]["dataDir"] = str(tmp_path / "ipam")
        yield made


def network(world: World, folder: Path, **more: object) -> CNINetwork:
    return CNINetwork(state_dir=folder / "state", config_dir=folder / "conf", netns=world.node.path, **more)  # type: ignore[arg-type]


def sandbox(world: World, number: int, **more: object) -> tuple[Place, SandboxNetwork]:
    path = netns.create_named(f"{world.label}-c{number}")
    place = Place(str(path), [])
    made = SandboxNetwork(f"{number:064x}", str(path), "default", f"p{number}", f"uid{number}", **more)  # type: ignore[arg-type]
    world.pods.append((place, made))
    return place, made


async def test_a_chain_of_plugins_gives_addresses_limits_and_is_taken_down(world, tmp_path):
    (tmp_path / "conf/10-knt.conflist").write_text(json.dumps(BRIDGE))
    (tmp_path / "conf/99-later.conf").write_text("{}")
    cni = network(world, tmp_path)
    assert await cni.ready() is None
    annotations = {"kubernetes.io/ingress-bandwidth": "10M"}
    (one, first), (two, second) = sandbox(world, 1, annotations=annotations), sandbox(world, 2)
    result, other = await asyncio.gather(cni.setup(first), cni.setup(second))
    assert len(result.ips) == 2
    assert result.mac
    assert (await cni.setup(first)).ips == result.ips
    one.serve("one", 80)
    assert await asyncio.to_thread(two.ask, result.ips[0], 80) == ("one", other.ips[0])
    show = subprocess.run(["ip", "-n", Path(one.path).name, "link", "show", "eth0"], capture_output=True, text=True, check=True).stdout
    assert "mtu 1300" in show
    await cni.check(first)
    subprocess.run(["ip", "-n", Path(one.path).name, "addr", "flush", "dev", "eth0"], check=True)
    with pytest.raises(CNIError):
        await cni.check(first)
    # Another process, the namespace already gone: deletion works from the record alone.
    again = network(world, tmp_path)
    netns.delete_named(two.path)
    assert set(await again.recover([first.sandbox_id])) == {second.sandbox_id}
    await again.teardown(first)
    await again.teardown(first)
    leases = [path.name for path in (tmp_path / "ipam/knt").iterdir() if path.name[0].isdigit() or path.name.startswith("fd")]
    assert leases == []


async def test_host_ports_through_the_portmap_plugin(world, tmp_path):
    config = {**BRIDGE, "plugins": [*BRIDGE["plugins"][:1], {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}]}
    (tmp_path / "conf/10-knt.conflist").write_text(json.dumps(config))
    cni = network(world, tmp_path)
    place, made = sandbox(world, 1, port_mappings=[PortMapping("TCP", 8080, 7070)])
    await cni.setup(made)
    place.serve("one", 8080)
    assert (await asyncio.to_thread(world.client.ask, world.node.ip, 7070))[0] == "one"
    await cni.teardown(made)


async def test_a_failing_plugin_is_told_in_its_own_words_and_leaves_nothing(world, tmp_path):
    plugin = tmp_path / "bin/bad"
    plugin.parent.mkdir()
    calls = tmp_path / "calls"
    answer = '{"cniVersion":"1.1.0","code":7,"msg":"no good","details":"because"}'
    plugin.write_text(
        f'#!/bin/sh\necho "$CNI_COMMAND $CNI_CONTAINERID" >> {calls}\n[ "$CNI_COMMAND" = ADD ] && echo \'{answer}\' && exit 1\nexit 0\n'
    )
    os.chmod(plugin, 0o755)
    (tmp_path / "conf/1.conf").write_text(json.dumps({"cniVersion": "1.1.0", "name": "bad", "type": "bad"}))
    cni = network(world, tmp_path, plugin_dirs=[tmp_path / "bin"])
    assert await cni.ready() is None
    _place, made = sandbox(world, 1)
    with pytest.raises(CNIError, match=r"failed \(add\): no good; because") as caught:
        await cni.setup(made)
    assert caught.value.code == 7
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["STATUS", "ADD", "DEL"]
    await cni.recover([])
    assert calls.read_text().splitlines()[-1].strip() == "GC"
    assert not list((tmp_path / "state/cni").glob("*"))


async def test_without_configuration_or_plugin_the_node_is_not_ready(world, tmp_path):
    cni = network(world, tmp_path)
    assert "no CNI configuration" in (await cni.ready() or "")
    (tmp_path / "conf/1.conflist").write_text(json.dumps({**BRIDGE, "plugins": [{"type": "missing"}]}))
    assert "plugin missing is in none of" in (await cni.ready() or "")


def test_configurations_are_read_by_the_specification(tmp_path):
    assert parse(json.dumps({**BRIDGE, "cniVersions": ["0.4.0", "1.1.0", "9.0.0"]}), single=False).version == "1.1.0"
    with pytest.raises(CNIError, match="not supported"):
        parse('{"cniVersion": "7.0.0", "name": "x", "type": "y"}', single=True)
    with pytest.raises(CNIError):
        parse("[]", single=False)
    assert installed(tmp_path / "nowhere") is None


async def test_the_node_is_wired_alike_with_plugins_and_without(world, tmp_path):
    (tmp_path / "conf/10-knt.conflist").write_text(json.dumps(BRIDGE))
    attached: list[str] = []

    async def note(_namespace: str, name: str, _ips: object) -> None:
        attached.append(name)

    network = PluginNetwork(node_address=world.node.ip, state_dir=tmp_path / "state", config_dir=tmp_path / "conf", netns=world.node.path)
    network.on_attach = note
    await network.set_pod_cidrs(["10.88.0.0/24"])
    assert network.gateways == [world.node.ip]
    (one, first), (two, second) = sandbox(world, 1), sandbox(world, 2)
    addresses = [(await network.setup(made)).ips[0] for made in (first, second)]
    one.serve("one", 80)
    assert (await asyncio.to_thread(two.ask, addresses[0], 80))[0] == "one"
    assert attached == ["p1", "p2"]
    await network.cleanup()
    assert await network.recover(()) == []
    await network.close()
