"""Ends helper processes of a container's start that is taken back. Caller: container.py."""

from __future__ import annotations

import contextlib
import os
import select
import signal

_STRAY_MILLISECONDS = 2000


def kill_strays(container_id: str) -> None:
    """Kill conmon and runc processes that name this container on their command line, and wait for their end. Blocks.

    Only for starts that are taken back: a runc that is still at work would make again what is removed meanwhile.
    """
    needle = container_id.encode()
    found: list[int] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
            if needle in words and os.path.basename(words[0]) in (b"conmon", b"runc", b"crun"):
                found.append(os.pidfd_open(int(entry)))
                signal.pidfd_send_signal(found[-1], signal.SIGKILL)
    for pidfd in found:
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        waiting.poll(_STRAY_MILLISECONDS)
        os.close(pidfd)
