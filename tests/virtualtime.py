"""An event loop whose time stands still while anything is to be done and leaps when nothing is.

API server, clients, controllers and hollow kubelets that share one such loop run days in seconds, and the load of the
machine cannot change what they do: a timer comes only after all that was to come before it. For that, connections
between parts of one loop go over socket pairs, which deliver at once (TLS included). `clock.now()` follows it.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from knarr.aiokits import clock

_T = TypeVar("_T")
# Real seconds without an advance of time after which something is taken to spin.
_STUCK_SECONDS = 60.0


class _Selector(selectors.EpollSelector):
    """Looks for events and, when there are none, moves time to the next timer instead of waiting for it."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if time.monotonic() - self.loop.advanced_at > _STUCK_SECONDS:
            raise RuntimeError("virtual time stands still: something spins, or waits for what will never come")
        if events or timeout == 0:
            return events
        if timeout is None or self.loop.threads:
            # Real work elsewhere: nothing but its end may happen next.
            return super().select(1.0)
        self.loop.advance(timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module. Processes are not waited for: what depends on a child process does not belong here."""

    def __init__(self) -> None:
        self._present = 0.0
        self._serving: dict[int, tuple[Callable[[], asyncio.BaseProtocol], dict[str, Any]]] = {}
        self.threads = 0
        self.advanced_at = time.monotonic()
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self._present

    def advance(self, seconds: float) -> None:
        self._present += seconds
        self.advanced_at = time.monotonic()

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        self.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _: object) -> None:
        self.threads -= 1

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        server = await super().create_server(protocol_factory, host, port, **options)
        kept = {name: options[name] for name in ("ssl", "ssl_handshake_timeout") if options.get(name) is not None}
        for listening in server.sockets:
            self._serving[listening.getsockname()[1]] = (protocol_factory, kept)
        return server

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        if port not in self._serving:
            return await super().create_connection(protocol_factory, host, port, **options)
        serve, serving_options = self._serving[port]
        ours, theirs = socket.socketpair()
        accepted = self.create_task(self.connect_accepted_socket(serve, theirs, **serving_options))
        try:
            return await super().create_connection(protocol_factory, sock=ours, **options)
        finally:
            await asyncio.gather(accepted, return_exceptions=True)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in virtual time that begins now."""

    async def within() -> _T:
        clock.follow_loop()
        try:
            return await main
        finally:
            clock.follow_system()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(within())
