"""Threads for calls that block: mounts, file trees, namespaces.

Role: keeps the event loop free. `Workers.run` uses a small pool whose threads have a working directory of their own, so that
an overlay can be mounted with short relative paths; `run_in_thread` makes a thread for one call and lets it die, for calls
that change the thread's namespaces and must never be followed by other work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from knarr.runtime import syscalls

T = TypeVar("T")


def _own_working_directory() -> None:
    syscalls.unshare(syscalls.CLONE_FS)


class Workers:
    """A pool of threads; see the module. Cancelling a waiter does not stop the call: it runs to its end unseen."""

    def __init__(self, threads: int = 4) -> None:
        self._pool = ThreadPoolExecutor(threads, "knarr-runtime", initializer=_own_working_directory)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a blocking function; its exception is raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


async def run_in_thread(function: Callable[[], T], name: str) -> T:
    """Run a function in a thread of its own, which ends afterwards and takes its namespaces along."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        try:
            result = function()
        except BaseException as error:
            loop.call_soon_threadsafe(deliver, None, error)
        else:
            loop.call_soon_threadsafe(deliver, result, None)

    threading.Thread(target=body, name=name, daemon=True).start()
    return await asyncio.shield(future)
