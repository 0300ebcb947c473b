"""Tells of successful bindings, after those that wait to be written.

An event costs the API server as much as the binding that it tells of. In a burst the bindings go first: events are sent in small
batches while no other call is under way, or when they have waited long enough, or when too many wait. Caller: the scheduler.

Loop: `run`; input: `note`; bound: PATIENT_EVENTS that wait for quiet, beyond which they are sent as fast as the API takes them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from knarr.client.events import EventRecorder
from knarr.scheduler.dispatcher import Dispatcher
from knarr.scheduler.podinfo import PodInfo

PATIENT_EVENTS = 20_000
_BATCH = 32
_LONGEST_WAIT_SECONDS = 0.5


class Announcer:
    """See the module.

    Args:
      recorder: of a scheduler's name, None when there is none.
    """

    def __init__(self, recorder: Callable[[str], EventRecorder | None], dispatcher: Dispatcher) -> None:
        self._recorder = recorder
        self._dispatcher = dispatcher
        self._line: deque[tuple[PodInfo, str]] = deque()
        self._something = asyncio.Event()

    def note(self, info: PodInfo, node_name: str) -> None:
        """A pod is bound."""
        self._line.append((info, node_name))
        self._something.set()

    async def run(self) -> None:
        """Send what is noted. Eternal; what is not sent when cancelled is lost."""
        while True:
            await self._something.wait()
            while self._line:
                if len(self._line) < PATIENT_EVENTS:
                    await self._quiet()
                await self._send()
            self._something.clear()

    async def _quiet(self) -> None:
        try:
            async with asyncio.timeout(_LONGEST_WAIT_SECONDS):
                await self._dispatcher.idle.wait()
        except TimeoutError:
            return

    async def _send(self) -> None:
        used: dict[int, EventRecorder] = {}
        for _ in range(min(_BATCH, len(self._line))):
            info, node_name = self._line.popleft()
            recorder = self._recorder(info.shape.scheduler_name)
            if recorder is not None:
                message = f"Successfully assigned {info.key} to {node_name}"
                recorder.event(info.pod, "Normal", "Scheduled", message, action="Binding")
                used[id(recorder)] = recorder
        for recorder in used.values():
            await recorder.flush()
