"""Pod networks by other people's plugins: any CNI configuration, executed by the specification.

Role: `CNINetwork` implements the runtime's PodNetwork with the configuration that sorts first in the standard folder;
`installed` tells cluster whether there is one. Chained plugins run in order with the former result, deletion in
reverse; what ADD returned is kept beside the lease so that DEL, CHECK and GC have it after a restart.
Invariants: plugins run with a deadline and their own process group; a failing ADD is followed by DEL of the whole
chain; DEL never fails because something is gone. The folder is read again for every ADD, so a changed configuration
counts for new pods at once.
Source: CNI specification 1.1.0 (containernetworking/cni SPEC.md); libcni behaviour for capabilities (CONVENTIONS.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.network.bandwidth import EGRESS, INGRESS, limit_bits
from knarr.network.netlink import NETLINK_ROUTE, NetlinkError
from knarr.network.netns import open_netlink
from knarr.network.rtnl import set_up
from knarr.runtime.cri import NetworkResult, RuntimeFault, SandboxNetwork

log = get_logger(__name__)

CONFIG_FOLDER = Path("/etc/cni/net.d")
PLUGIN_FOLDERS = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
SUPPORTED = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
_SECONDS = 60.0
_TRY_LATER = 11
_NOT_AVAILABLE = (50, 51)


class CNIError(RuntimeFault):
    """A plugin refused, or the configuration cannot be used. `code` is the specification's number, 0 when there is none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """A configuration list."""

    name: str
    version: str
    plugins: tuple[dict[str, Any], ...]
    check: bool
    gc: bool


def parse(text: str, *, single: bool) -> NetworkConfig:
    """Read a .conflist, or a .conf (`single`). Raises CNIError."""
    try:
        raw = json.loads(text)
        plugins = [raw] if single else raw["plugins"]
        versions = raw.get("cniVersions") or [raw.get("cniVersion") or "0.2.0"]
        usable = [version for version in versions if version in SUPPORTED]
        if not usable:
            raise CNIError(f"CNI version {', '.join(versions)} is not supported", 1)
        if not plugins or not all(isinstance(plugin, dict) and plugin.get("type") for plugin in plugins):
            raise CNIError("configuration has no plugins")
        version = max(usable, key=lambda item: [int(part) for part in item.split(".")])
        return NetworkConfig(raw["name"], version, tuple(plugins), not _true(raw.get("disableCheck")), not _true(raw.get("disableGC")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CNIError(f"configuration cannot be read: {error!r}") from error


def _true(value: object) -> bool:
    return value is True or value == "true"


def installed(folder: Path = CONFIG_FOLDER) -> NetworkConfig | None:
    """The configuration that sorts first in the folder and can be used; None when there is none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".conf", ".conflist", ".json"))
    except OSError:
        return None
    for path in files:
        try:
            return parse(path.read_text(), single=path.suffix != ".conflist")
        except (CNIError, OSError) as error:
            log.warning("CNI configuration skipped", file=str(path), error=str(error))
    return None


def find_plugin(kind: str, folders: Sequence[Path]) -> Path:
    """The program of a plugin type. Raises CNIError."""
    if "/" in kind or kind in ("", ".", ".."):
        raise CNIError(f"invalid plugin type {kind!r}", 7)
    for folder in folders:
        path = folder / kind
        if os.access(path, os.X_OK):
            return path
    raise CNIError(f"plugin {kind} is in none of {', '.join(map(str, folders))}")


def capability_arguments(plugin: Mapping[str, Any], sandbox: SandboxNetwork) -> dict[str, Any]:
    """runtimeConfig: what this plugin says it can take, of what the pod asks for."""
    can = plugin.get("capabilities") or {}
    out: dict[str, Any] = {}
    if can.get("portMappings"):
        out["portMappings"] = [
            {
                "hostPort": m.host_port,
                "containerPort": m.container_port,
                "protocol": m.protocol.lower(),
                **({"hostIP": m.host_ip} if m.host_ip else {}),
            }
            for m in sandbox.port_mappings
            if m.host_port > 0
        ]
    if can.get("bandwidth"):
        incoming, outgoing = limit_bits(sandbox.annotations, INGRESS), limit_bits(sandbox.annotations, EGRESS)
        limits: dict[str, int] = {}
        for name, rate in (("ingress", incoming), ("egress", outgoing)):
            if rate is not None:
                limits |= {f"{name}Rate": rate, f"{name}Burst": max(rate // 250, 160_000)}
        if limits:
            out["bandwidth"] = limits
    if can.get("io.kubernetes.cri.pod-annotations"):
        out["io.kubernetes.cri.pod-annotations"] = dict(sandbox.annotations)
    return out


class CNINetwork:
    """See the module.

    Args:
      state_dir: Where results are kept, on a tmpfs.
      config_dir, plugin_dirs: The standard folders by default.
      netns: Namespace in which plugins run (the node's); None is the process's.
    """

    def __init__(
        self,
        *,
        state_dir: str | Path,
        config_dir: str | Path = CONFIG_FOLDER,
        plugin_dirs: Sequence[str | Path] = PLUGIN_FOLDERS,
        netns: str | None = None,
    ) -> None:
        self._state = Path(state_dir) / "cni"
        self._config_dir = Path(config_dir)
        self._plugin_dirs = [Path(folder) for folder in plugin_dirs]
        self._netns = netns
        self._locks: dict[str, asyncio.Lock] = {}

    async def ready(self) -> str | None:
        """See PodNetwork.ready: whether a configuration is there and (from 1.1 on) every plugin says it can work."""
        config = installed(self._config_dir)
        if config is None:
            return f"no CNI configuration in {self._config_dir}"
        try:
            for plugin in config.plugins:
                find_plugin(plugin["type"], self._plugin_dirs)
            if config.version >= "1.1.0":
                for plugin in config.plugins:
                    await self._run("STATUS", plugin, config, None, None, None)
        except CNIError as error:
            if error.code in _NOT_AVAILABLE or error.code == 0:
                return str(error)
        return None

    async def setup(self, sandbox: SandboxNetwork) -> NetworkResult:
        """See PodNetwork.setup."""
        async with self._lock(sandbox.sandbox_id):
            known = self._load(sandbox.sandbox_id)
            if known is not None:
                return _result(known["result"])
            config = installed(self._config_dir)
            if config is None:
                raise CNIError(f"network is not ready: no CNI configuration in {self._config_dir}")
            await asyncio.to_thread(_loopback_up, sandbox.netns_path)
            result: dict[str, Any] | None = None
            try:
                for plugin in config.plugins:
                    result = await self._run("ADD", plugin, config, sandbox, result, sandbox.netns_path)
                assert result is not None
                found = _result(result)
            except BaseException:
                # The record lets a DEL that is cut short be repeated; the chain is taken down under its own deadline.
                self._save(sandbox, config, result or {})
                await asyncio.shield(self._delete(sandbox))
                raise
            self._save(sandbox, config, result)
            return found

    async def teardown(self, sandbox: SandboxNetwork) -> None:
        """See PodNetwork.teardown."""
        async with self._lock(sandbox.sandbox_id):
            await self._delete(sandbox)
        self._locks.pop(sandbox.sandbox_id, None)

    async def check(self, sandbox: SandboxNetwork) -> None:
        """CHECK the whole chain. Raises CNIError when the network is not as ADD left it."""
        known = self._load(sandbox.sandbox_id)
        if known is None:
            raise CNIError("the sandbox has no network", 3)
        config = _stored_config(known)
        if not config.check or config.version < "0.4.0":
            return
        for plugin in config.plugins:
            await self._run("CHECK", plugin, config, sandbox, known["result"], sandbox.netns_path)

    async def recover(self, living: Collection[str]) -> list[str]:
        """Free what sandboxes that are not among `living` hold, by DEL and (from 1.1 on) GC; returns their ids."""
        gone = []
        attachments = []
        for path in sorted(self._state.glob("*.json")):
            known = self._load(path.stem)
            if known is None:
                continue
            if path.stem in living:
                attachments.append({"containerID": path.stem, "ifname": "eth0"})
                continue
            gone.append(path.stem)
            try:
                await self._delete(SandboxNetwork(path.stem, known.get("netns", ""), known["namespace"], known["pod"], known["uid"]))
            except CNIError as error:
                # The record stays, so that it is tried again; the others must not suffer.
                log.warning("CNI attachment of a sandbox that is gone was not taken down", pod=known["pod"], error=str(error))
        config = installed(self._config_dir)
        if config is not None and config.gc and config.version >= "1.1.0":
            for plugin in config.plugins:
                try:
                    await self._run("GC", {**plugin, "cni.dev/valid-attachments": attachments}, config, None, None, None)
                except CNIError as error:
                    log.warning("CNI garbage collection failed", plugin=plugin["type"], error=str(error))
        return gone

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    async def _delete(self, sandbox: SandboxNetwork) -> None:
        known = self._load(sandbox.sandbox_id)
        if known is None:
            return
        config = _stored_config(known)
        # A namespace that is gone already is told to plugins by an empty path; they then free what lies outside of it.
        netns = sandbox.netns_path if sandbox.netns_path and os.path.exists(sandbox.netns_path) else ""
        restored = SandboxNetwork(
            sandbox.sandbox_id, netns, known["namespace"], known["pod"], known["uid"], sandbox.port_mappings, sandbox.annotations
        )
        for plugin, arguments in reversed(list(zip(config.plugins, known["arguments"], strict=True))):
            previous = known["result"] or None
            await self._run("DEL", plugin, config, restored, previous if config.version >= "0.4.0" else None, netns, arguments)
        (self._state / f"{sandbox.sandbox_id}.json").unlink(missing_ok=True)

    def _load(self, sandbox_id: str) -> dict[str, Any] | None:
        try:
            loaded: dict[str, Any] = json.loads((self._state / f"{sandbox_id}.json").read_text())
        except (OSError, ValueError):
            return None
        return loaded

    def _save(self, sandbox: SandboxNetwork, config: NetworkConfig, result: dict[str, Any]) -> None:
        self._state.mkdir(parents=True, exist_ok=True)
        record = {
            "namespace": sandbox.namespace,
            "pod": sandbox.name,
            "uid": sandbox.uid,
            # Some plugins learn from the namespace what they have to take back (the bridge plugin its masquerading).
            "netns": sandbox.netns_path,
            "config": {"name": config.name, "cniVersion": config.version, "plugins": config.plugins, "disableCheck": not config.check},
            "arguments": [capability_arguments(plugin, sandbox) for plugin in config.plugins],
            "result": result,
        }
        temporary = self._state / f".{sandbox.sandbox_id}"
        temporary.write_text(json.dumps(record))
        os.replace(temporary, self._state / f"{sandbox.sandbox_id}.json")

    async def _run(
        self,
        verb: str,
        plugin: dict[str, Any],
        config: NetworkConfig,
        sandbox: SandboxNetwork | None,
        previous: dict[str, Any] | None,
        netns: str | None,
        arguments: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        stdin = {key: value for key, value in plugin.items() if key not in ("cniVersions", "disableCheck", "disableGC")}
        stdin |= {"cniVersion": config.version, "name": config.name}
        if previous is not None:
            stdin["prevResult"] = previous
        if sandbox is not None:
            runtime_config = arguments if arguments is not None else capability_arguments(plugin, sandbox)
            if runtime_config:
                stdin["runtimeConfig"] = runtime_config
        stdin.pop("capabilities", None)
        environment = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "CNI_COMMAND": verb}
        environment["CNI_PATH"] = ":".join(map(str, self._plugin_dirs))
        if sandbox is not None:
            environment |= {
                "CNI_CONTAINERID": sandbox.sandbox_id,
                "CNI_NETNS": netns or "",
                "CNI_IFNAME": "eth0",
                "CNI_ARGS": ";".join(
                    (
                        "IgnoreUnknown=1",
                        f"K8S_POD_NAMESPACE={sandbox.namespace}",
                        f"K8S_POD_NAME={sandbox.name}",
                        f"K8S_POD_INFRA_CONTAINER_ID={sandbox.sandbox_id}",
                        f"K8S_POD_UID={sandbox.uid}",
                    )
                ),
            }
        program = find_plugin(plugin["type"], self._plugin_dirs)
        code, output, noise = await self._execute(program, json.dumps(stdin).encode(), environment)
        if code != 0:
            raise _plugin_error(verb, plugin["type"], code, output, noise)
        if verb != "ADD":
            return {}
        try:
            parsed: dict[str, Any] = json.loads(output)
        except ValueError as error:
            raise CNIError(f"plugin {plugin['type']}: result is not JSON: {output[:200]!r}") from error
        return parsed

    async def _execute(self, program: Path, stdin: bytes, environment: dict[str, str]) -> tuple[int, bytes, bytes]:
        command = [str(program)] if self._netns is None else ["nsenter", f"--net={self._netns}", str(program)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_SECONDS):
                output, noise = await process.communicate(stdin)
        except BaseException as error:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                log.debug("plugin ended by itself", plugin=program.name)
            await process.wait()
            if isinstance(error, TimeoutError):
                raise CNIError(f"plugin {program.name} took longer than {_SECONDS:.0f} s", _TRY_LATER) from error
            raise
        return process.returncode or 0, output, noise


def _plugin_error(verb: str, kind: str, exit_code: int, output: bytes, noise: bytes) -> CNIError:
    try:
        told = json.loads(output)
        message, code = told.get("msg") or "failed", int(told.get("code") or 0)
        details = told.get("details")
        text = f"{message}; {details}" if details else message
    except (ValueError, AttributeError, TypeError):
        text, code = (noise or output).decode(errors="replace").strip()[-500:] or f"exit code {exit_code}", 0
    return CNIError(f"plugin type={kind!r} failed ({verb.lower()}): {text}", code)


def _stored_config(known: dict[str, Any]) -> NetworkConfig:
    raw = known["config"]
    return NetworkConfig(raw["name"], raw["cniVersion"], tuple(raw["plugins"]), not raw.get("disableCheck"), True)


def _result(result: dict[str, Any]) -> NetworkResult:
    """Addresses of the pod's own interface, IPv4 first as listed. Raises CNIError when there is none."""
    interfaces = result.get("interfaces") or []
    ips = []
    for item in result.get("ips") or ():
        index = item.get("interface")
        # Addresses of host-side interfaces are not the pod's.
        if index is not None and 0 <= index < len(interfaces) and not interfaces[index].get("sandbox"):
            continue
        ips.append(str(item["address"]).split("/")[0])
    if not ips:
        raise CNIError("the plugins gave the pod no address")
    mac = next((item.get("mac", "") for item in interfaces if item.get("sandbox") and item.get("name") == "eth0"), "")
    return NetworkResult(ips=ips, mac=mac)


def _loopback_up(netns: str) -> None:
    try:
        with open_netlink(netns, NETLINK_ROUTE) as inside:
            inside.send(set_up(1))
    except (NetlinkError, OSError) as error:
        raise CNIError(f"loopback of the pod: {error}") from error
