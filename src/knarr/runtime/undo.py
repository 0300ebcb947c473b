"""Steps that take themselves back: every step of a start registers its undo, and a failure runs them in reverse.

The undo runs under its own deadline and even when the caller was cancelled: what a cancelled start leaves behind would be
found by nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks

log = get_logger(__name__)


class Undo:
    """Use as `async with Undo(tasks, "what") as undo: ...; undo.add(step)`; leaving without an exception keeps everything."""

    def __init__(self, tasks: Tasks, what: str, *, deadline_seconds: float = 60.0) -> None:
        self._tasks, self._what, self._deadline = tasks, what, deadline_seconds
        self._steps: list[Callable[[], Awaitable[object]]] = []

    def add(self, step: Callable[[], Awaitable[object]]) -> None:
        self._steps.append(step)

    async def __aenter__(self) -> Undo:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not self._steps:
            return
        try:
            task = self._tasks.spawn(self._run(), f"undo {self._what}")
        except RuntimeError:
            return  # the runtime is closed; its next start takes back what is half made
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as again:
                if task.cancelled():
                    break
                # A second cancellation must not abandon the undo half-way; it is delivered afterwards.
                cancelled = again
        if cancelled is not None and not isinstance(error, asyncio.CancelledError):
            raise cancelled

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                for step in reversed(self._steps):
                    try:
                        await step()
                    except Exception as error:
                        log.warning("an undo step failed", what=self._what, error=error)
        except TimeoutError:
            log.error("undo ran out of time", what=self._what)
