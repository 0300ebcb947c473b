"""Another machine, played by a network namespace behind a router: nothing of this machine is directly attached to it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from knarr.network import netns
from tests.e2e.cluster import Cluster

ROUTER, MACHINE = "knarrtest-router", "knarrtest-machine"
UPLINK = "knarrtest0"
NEAR, FAR = "172.31.201", "172.31.202"


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@dataclass
class Machine:
    """Make it with `start`, end it with `stop`."""

    name: str
    """The cluster's name on that machine."""
    cluster: Cluster

    address: str = f"{FAR}.2"

    def start(self) -> None:
        self.stop()
        for name in (ROUTER, MACHINE):
            netns.create_named(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", UPLINK, "type", "veth", "peer", "name", "up0", "netns", ROUTER)
        _ip("address", "add", f"{NEAR}.1/24", "dev", UPLINK)
        _ip("link", "set", UPLINK, "up")
        _ip("-n", ROUTER, "address", "add", f"{NEAR}.2/24", "dev", "up0")
        _ip("-n", ROUTER, "link", "set", "up0", "up")
        _ip("-n", ROUTER, "link", "add", "down0", "type", "veth", "peer", "name", "eth0", "netns", MACHINE)
        _ip("-n", ROUTER, "address", "add", f"{FAR}.1/24", "dev", "down0")
        _ip("-n", ROUTER, "link", "set", "down0", "up")
        _ip("-n", ROUTER, "route", "add", "default", "via", f"{NEAR}.1")
        subprocess.run([*self._inside(ROUTER), "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"], check=True)
        _ip("-n", MACHINE, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", MACHINE, "link", "set", "eth0", "up")
        _ip("-n", MACHINE, "route", "add", "default", "via", f"{FAR}.1")
        _ip("route", "add", f"{FAR}.0/24", "via", f"{NEAR}.2")

    def move(self, host: int) -> str:
        """Give the machine another address of its network and take the old one; its default route goes with it. Returns the new one."""
        old, self.address = self.address, f"{FAR}.{host}"
        _ip("-n", MACHINE, "address", "delete", f"{old}/24", "dev", "eth0")
        _ip("-n", MACHINE, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", MACHINE, "route", "add", "default", "via", f"{FAR}.1")
        return self.address

    def run(self, *command: str, check: bool = True) -> str:
        """Run a program there; returns its output."""
        result = subprocess.run([*self._inside(MACHINE), *command], capture_output=True, text=True, env=self.cluster.environment, timeout=120)
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}\n{Cluster(self.name, self.cluster.folder).logs()}")
        return result.stdout

    @staticmethod
    def outside(*command: str) -> str:
        """Run a program on this machine, which the other one knows as a client; returns its output, "" when it fails."""
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return result.stdout if result.returncode == 0 else ""

    def unplug(self) -> None:
        """Cut the cable between the machine and its router."""
        _ip("-n", ROUTER, "link", "set", "down0", "down")

    def plug(self) -> None:
        _ip("-n", ROUTER, "link", "set", "down0", "up")

    def stop(self) -> None:
        """Leave and take the networks away; also what a run that was killed left."""
        if not (netns.NETNS_DIR / MACHINE).exists():
            # A cluster that a killed run left is deleted from wherever it can be.
            netns.create_named(MACHINE)
        self.knarr("delete", check=False)
        _ip("link", "delete", UPLINK, check=False)
        for name in (MACHINE, ROUTER):
            netns.delete_named(netns.NETNS_DIR / name)

    @staticmethod
    def _inside(name: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{name}"]

    def knarr(self, verb: str, *arguments: str, check: bool = True, name: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a knarr command there."""
        named = ["--name", self.name] if name else []
        first = [verb] if verb != "image" else [verb, arguments[0]]
        rest = arguments if verb != "image" else arguments[1:]
        command = [*self._inside(MACHINE), sys.executable, "-m", "knarr", *first, *named, *rest]
        result = subprocess.run(command, capture_output=True, text=True, env=self.cluster.environment, timeout=120)
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}\n{Cluster(self.name, self.cluster.folder).logs()}")
        return result
