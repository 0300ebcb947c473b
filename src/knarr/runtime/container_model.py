"""A container as it is recorded, and what is kept of it in memory only. Used by container.py and those that it serves."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field
from typing import Any

from knarr.runtime import users
from knarr.runtime.conmon import Held
from knarr.runtime.cri import ContainerConfig, ContainerState, LinuxResources


@dataclass(slots=True)
class Container:
    """One container as it is recorded."""

    id: str
    sandbox_id: str
    config: ContainerConfig
    image_id: str
    image_ref: str
    chain: list[str]
    created_at_ns: int
    log_path: str = ""
    cgroup: str = ""
    stop_signal: str = ""
    user: users.User | None = None
    complete: bool = False
    held: Held | None = None
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    cleaned: bool = False
    """The OCI runtime's state, groups and mount are gone."""
    handler: str = ""
    """The sandbox's runtime handler."""
    hooks: bool = False
    """The specification has hooks, of which the OCI runtime runs some when it deletes."""
    spec_process: dict[str, Any] = field(default_factory=dict)
    """Template for exec: user, environment, directory, capabilities."""

    @property
    def state(self) -> ContainerState:
        if self.finished_at_ns:
            return ContainerState.EXITED
        return ContainerState.RUNNING if self.started_at_ns else ContainerState.CREATED


@dataclass(slots=True)
class Live:
    """What a container needs in memory only."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the end is recorded."""
    dropped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing of a run is left in the kernel."""
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """A container may end while its start is being recorded: one record at a time, the newest last."""
    announced: bool = False
    """STARTED has been told (or was, by an earlier process of ours)."""
    removed: bool = False
    """The record is gone or going; nothing may write it again."""


def signal_number(name: str) -> int:
    """TERM, SIGTERM, 15 or RTMIN+3; unknown names mean TERM."""
    text = name.upper().removeprefix("SIG")
    if text.isdigit():
        return int(text)
    base, sign, offset = text.partition("+") if "+" in text else text.partition("-")
    number = getattr(signal, f"SIG{base}", None)
    if number is None:
        return int(signal.SIGTERM)
    return int(number) + (int(offset) if sign == "+" and offset.isdigit() else -int(offset) if offset.isdigit() else 0)


def merge_resources(current: LinuxResources, wanted: LinuxResources) -> None:
    """Take over what an update sets; what it leaves at zero stays."""
    for name in LinuxResources.__slots__:
        value = getattr(wanted, name)
        if value:
            setattr(current, name, value)
