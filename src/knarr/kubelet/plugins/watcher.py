"""Finds plugins by the sockets that they put into the registration folder, and tells them whether they were taken.

Caller: kubelet (`run` eternal). The folder is watched with inotify; a socket that goes away deregisters its plugin.
Source: pkg/kubelet/pluginmanager, kubelet/pkg/apis/pluginregistration/v1.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import dataclass
from typing import Protocol

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.kubelet.inotify import IN_CREATE, IN_DELETE, IN_MOVED_FROM, IN_MOVED_TO, Inotify
from knarr.kubelet.plugins.wire import Plugin, PluginError
from knarr.kubelet.volumes import wellknown

log = get_logger(__name__)

_CALL_SECONDS = 5.0
_TRIES = 6


class Handler(Protocol):
    """Takes plugins of one type."""

    async def register(self, name: str, endpoint: str, versions: list[str], *, known_root: bool = False) -> None:
        """Start using a plugin; `known_root`: it knows the kubelet's folder as /var/lib/kubelet. Raises PluginError when it cannot be used."""

    async def deregister(self, name: str, endpoint: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class _Known:
    kind: str
    name: str
    endpoint: str


class PluginWatcher:
    """The registration folder."""

    def __init__(self, folder: str, handlers: dict[str, Handler], root: str) -> None:
        """`handlers` by plugin type: "CSIPlugin", "DevicePlugin", "DRAPlugin". `root` is the kubelet's folder."""
        self._folder = folder
        self._root = root
        self._handlers = handlers
        self._known: dict[str, _Known] = {}
        self._tasks = Tasks()

    async def run(self) -> None:
        """Follow the folder. Eternal; closes its tasks when cancelled."""
        os.makedirs(self._folder, 0o755, exist_ok=True)
        watch = Inotify()
        try:
            watch.add(self._folder, IN_CREATE | IN_DELETE | IN_MOVED_TO | IN_MOVED_FROM)
            for name in os.listdir(self._folder):
                self._appeared(os.path.join(self._folder, name))
            while True:
                for change in await watch.wait():
                    path = os.path.join(self._folder, change.name)
                    if change.mask & (IN_CREATE | IN_MOVED_TO):
                        self._appeared(path)
                    else:
                        self._tasks.spawn(self._gone(path), f"plugin-gone-{change.name}")
        finally:
            watch.close()
            await self._tasks.close()

    def _appeared(self, path: str) -> None:
        try:
            is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
        except OSError:
            return
        if is_socket and not os.path.basename(path).startswith("."):
            self._tasks.spawn(self._register(path), f"plugin-{os.path.basename(path)}")

    async def _register(self, path: str) -> None:
        delay = 0.1
        for _ in range(_TRIES):
            try:
                await self._register_once(path)
                return
            except PluginError as e:
                log.warning("plugin not registered", socket=path, error=str(e))
                await asyncio.sleep(delay)
                delay *= 3

    async def _register_once(self, path: str) -> None:
        plugin = Plugin(path)
        try:
            info = await plugin.call("/pluginregistration.Registration/GetInfo", "Empty", {}, "PluginInfo", _CALL_SECONDS)
            kind, name = info.get("type", ""), info.get("name", "")
            error = ""
            handler = self._handlers.get(kind)
            if handler is None:
                error = f"no handler registered for plugin type: {kind} at socket {path}"
            else:
                try:
                    spelled = info.get("endpoint") or path
                    endpoint = wellknown.own(self._root, spelled)
                    await handler.register(name, endpoint, info.get("supported_versions") or [], known_root=wellknown.is_known(spelled))
                    self._known[path] = _Known(kind, name, endpoint)
                    log.info("plugin registered", type=kind, name=name)
                except PluginError as e:
                    error = str(e)
            status = {"plugin_registered": not error, "error": error}
            method = "/pluginregistration.Registration/NotifyRegistrationStatus"
            await plugin.call(method, "RegistrationStatus", status, "Empty", _CALL_SECONDS)
            if error:
                raise PluginError(error)
        finally:
            await plugin.close()

    async def _gone(self, path: str) -> None:
        known = self._known.pop(path, None)
        if known is not None:
            log.info("plugin gone", type=known.kind, name=known.name)
            await self._handlers[known.kind].deregister(known.name, known.endpoint)
