"""The pod network of a node whose CNI configuration is somebody else's: what cluster wires in place of `BridgeNetwork`.

Role: same face towards the node's process (start with the pod CIDRs, recover, gateways, cleanup), the work done by
`CNINetwork`. Routes between nodes and masquerading are the plugins' own business then; Services, policies and DNS stay
ours, and DNS listens on the node's address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path

from knarr.aiokits.log import get_logger
from knarr.network.cni import CONFIG_FOLDER, PLUGIN_FOLDERS, CNINetwork
from knarr.network.netns import run_inside
from knarr.network.sysctl import SysctlRecord
from knarr.runtime.cri import NetworkResult, RuntimeFault, SandboxNetwork

log = get_logger(__name__)


class PluginNetwork:
    """See the module.

    Args:
      node_address: The node's own address, where pods reach node services.
    """

    own_routes = False
    """Whether ways to other nodes are ours to make."""

    def __init__(
        self,
        *,
        node_address: str,
        state_dir: str | Path,
        config_dir: str | Path = CONFIG_FOLDER,
        plugin_dirs: Sequence[str | Path] = PLUGIN_FOLDERS,
        netns: str | None = None,
    ) -> None:
        self.gateways = [node_address]
        self.pod_cidrs: list[str] = []
        self.on_attach: Callable[[str, str, Sequence[str]], Awaitable[None]] | None = None
        self._netns = netns
        self._cni = CNINetwork(state_dir=state_dir, config_dir=config_dir, plugin_dirs=plugin_dirs, netns=netns)
        self._sysctls = SysctlRecord(Path(state_dir) / "sysctls.json")

    async def start(self) -> None:
        """Let the node forward packets, and see those that a plugin's bridge switches; the rest is done per pod by the plugins."""
        run_inside(self._netns, self._ensure_sysctls)

    def _ensure_sysctls(self) -> None:
        # Without the latter, answers and policies between pods on one bridge pass Services and policies by.
        for name in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"):
            self._sysctls.ensure(name, "1")
        self._sysctls.ensure_tracking()

    async def set_pod_cidrs(self, pod_cidrs: Sequence[str]) -> None:
        """Note the node's pod CIDRs: plugins have addresses of their own configuration."""
        self.pod_cidrs = list(pod_cidrs)
        await self.start()

    async def ready(self) -> str | None:
        """See PodNetwork.ready."""
        return await self._cni.ready()

    async def setup(self, sandbox: SandboxNetwork) -> NetworkResult:
        """See PodNetwork.setup."""
        result = await self._cni.setup(sandbox)
        if self.on_attach is not None:
            await self.on_attach(sandbox.namespace, sandbox.name, result.ips)
        return result

    async def teardown(self, sandbox: SandboxNetwork) -> None:
        """See PodNetwork.teardown."""
        await self._cni.teardown(sandbox)

    async def recover(self, living: Collection[str]) -> list[str]:
        """Free what sandboxes that are not among `living` hold; returns their ids."""
        return await self._cni.recover(living)

    async def cleanup(self) -> None:
        """Take every attachment down and put sysctls back."""
        await self._cni.recover(())
        run_inside(self._netns, self._sysctls.restore)

    async def close(self) -> None:
        """Nothing is held open."""


def take_down(state_dir: str | Path, netns: str | None = None, plugin_dirs: Sequence[str | Path] = PLUGIN_FOLDERS) -> None:
    """Have the plugins free what the pods of a stopped node still hold: addresses, links, rules. Nothing to do without plugins.

    Blocks for some milliseconds per pod. A plugin that fails keeps its own; that is logged.
    """
    if (Path(state_dir) / "cni").is_dir():
        network = PluginNetwork(node_address="", state_dir=state_dir, netns=netns, plugin_dirs=plugin_dirs)
        try:
            asyncio.run(network.cleanup())
        except (RuntimeFault, OSError) as error:
            log.warning("a CNI plugin did not give back everything", error=str(error))
