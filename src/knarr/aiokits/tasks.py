"""Owned tasks: every background task of the project has a name and an owner.

Callers hold one `Tasks` per component and close it when the component ends. Failures of
one task are logged and leave the others running; for parts that live and die together use
`asyncio.TaskGroup` instead. Invariant: after `close()` no task of the owner is running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from knarr.aiokits.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")


class Tasks:
    """A closable owner of independent named tasks."""

    __slots__ = ("_closed", "_loop", "_tasks")

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def spawn(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task; its failure is logged, others go on.

        Raises:
          RuntimeError: the owner is closed (the coroutine is closed, never run).
        """
        if self._closed:
            coro.close()
            raise RuntimeError("tasks owner is closed")
        loop = self._loop
        if loop is None:
            # Asked for once: Python 3.11 makes a system call each time, and the API server spawns a task per request.
            loop = self._loop = asyncio.get_running_loop()
        task = loop.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def spawn_eternal(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task that is not supposed to end: an ending is logged as a fault."""
        task = self.spawn(coro, name)
        task.add_done_callback(_eternal_done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task failed", task=task.get_name(), error=repr(error), exc_info=error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def wait_idle(self) -> None:
        """Wait until no task of this owner is running, including ones spawned meanwhile."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, timeout_seconds: float = 30.0) -> None:
        """Cancel all tasks and wait for their end; idempotent.

        Tasks that ignore their cancellation for longer than the timeout are reported and left.
        """
        self._closed = True
        current = asyncio.current_task()
        pending = {task for task in self._tasks if task is not current}
        for task in pending:
            task.cancel()
        if pending:
            _, stuck = await asyncio.wait(pending, timeout=timeout_seconds)
            for task in stuck:
                log.error("task ignores its cancellation", task=task.get_name())

    async def __aenter__(self) -> Tasks:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


def _eternal_done(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is None:
        log.error("eternal task ended", task=task.get_name())
