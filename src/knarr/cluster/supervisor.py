"""The supervisor: forks the components, restarts what dies, and answers `knarr status`.

Role: one process per cluster, started by `up`, ended by `down`. It imports what all components share and then forks them, so
that start costs one import and memory pages are shared. It runs no event loop and no thread, because both would not survive
a fork: one selector waits for exits (pidfd), messages of the components (pipes), the control socket and timers.

Invariants: a component dies with the supervisor (PR_SET_PDEATHSIG); containers do not. The API server's listening socket is
the supervisor's, so that clients wait in its backlog while the API server restarts.

Loops: the selector loop; owner: the process itself; input: exits, pipes, control requests (one JSON line each, at most 64 KiB);
when full: the kernel's pipe and socket buffers hold the writer back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knarr.cluster.config import ClusterConfig

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
RESTART_FIRST_SECONDS = 0.1
RESTART_MAXIMUM_SECONDS = 10.0
RESTART_RESET_SECONDS = 60.0
STOP_SECONDS = 8.0
ORDERLY_SIGNAL = signal.SIGUSR1
"""Asks a component that can to go down in order."""
LOG_LIMIT_BYTES = 16 << 20
LOG_CHECK_SECONDS = 60.0
REQUEST_LIMIT_BYTES = 64 << 10

Announce = Callable[[str], None]
"""What a component calls to report that something is ready, e.g. announce("node Ready")."""


@dataclass(slots=True)
class Component:
    """One supervised process and what is known about it."""

    name: str
    main: Callable[[Announce], None]
    pid: int = 0
    pidfd: int = -1
    pipe: int = -1
    started_at: float = 0.0
    restarts: int = 0
    failures: int = 0
    """Deaths in a row, each within RESTART_RESET_SECONDS of its start: decides the back-off."""
    restart_at: float = 0.0
    last_exit: str = ""
    ready: dict[str, float] = field(default_factory=dict)
    wanted: bool = True
    orderly_seconds: Callable[[], float] = lambda: 0.0
    """How long it may take to go down in order; 0 when it does not."""
    buffer: bytes = b""

    def describe(self) -> dict[str, Any]:
        state = "running" if self.pid else ("waiting to restart" if self.wanted else "stopped")
        return {
            "name": self.name,
            "state": state,
            "pid": self.pid,
            "started": self.started_at,
            "restarts": self.restarts,
            "lastExit": self.last_exit,
            "ready": sorted(self.ready),
        }


def name_process(name: str) -> None:
    """Set the name that ps shows, and die with the parent."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def die_with_parent(parent: int) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died between fork and prctl
        os._exit(1)


class Supervisor:
    """Owns the component processes of one cluster until it is told to stop.

    Args:
      announce_fd: a pipe to the `up` command; each ready message is written as one line; -1 for none.

    `handlers` maps a control request's verb to what answers it; the owner may add verbs.
    """

    def __init__(self, config: ClusterConfig, announce_fd: int = -1) -> None:
        self.config = config
        self.announce_fd = announce_fd
        self.components: dict[str, Component] = {}
        self.selector = selectors.DefaultSelector()
        self.stopping = False
        self._in_order = False
        """Stopped by a signal, as a machine that goes down does, and not by `down`, which ends the containers itself."""
        self.started_at = time.time()
        self.handlers: dict[str, Callable[[dict[str, Any]], Any]] = {"status": lambda _: self.describe(), "stop": self._stop_request, "restart": self._restart_request}
        self._log_checked = time.monotonic()
        self._control = self._listen()
        self._wakeup, wakeup_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_writer)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.selector.register(self._wakeup, selectors.EVENT_READ, self._drain_wakeup)

    def _listen(self) -> socket.socket:
        self.config.state.mkdir(parents=True, exist_ok=True)
        path = self.config.state / "control.sock"
        path.unlink(missing_ok=True)
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        control.bind(str(path))
        os.chmod(path, 0o600)
        control.listen(16)
        self.selector.register(control, selectors.EVENT_READ, self._on_control)
        return control

    def _on_signal(self, number: int, frame: object) -> None:
        self.stopping = self._in_order = True

    def _drain_wakeup(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wakeup, 512):
                pass

    def add(self, name: str, main: Callable[[Announce], None], orderly_seconds: Callable[[], float] = lambda: 0.0) -> Component:
        """Take a component into care; it starts at once."""
        component = self.components[name] = Component(name, main, orderly_seconds=orderly_seconds)
        self._start(component)
        return component

    def _start(self, component: Component) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        component.restart_at = 0.0
        pid = os.fork()
        if pid == 0:
            self._become(component, parent, writer)
        os.close(writer)
        os.set_blocking(reader, False)
        component.pid, component.pipe, component.started_at, component.ready = pid, reader, time.time(), {}
        component.pidfd = os.pidfd_open(pid)
        self.selector.register(component.pidfd, selectors.EVENT_READ, lambda: self._on_exit(component))
        self.selector.register(reader, selectors.EVENT_READ, lambda: self._on_message(component))

    def _become(self, component: Component, parent: int, writer: int) -> None:
        """The child's half of the fork; never returns."""
        code = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            name_process(f"knarr-{component.name}")
            self.selector.close()
            self._control.close()
            if self.announce_fd >= 0:
                os.close(self.announce_fd)
            log = os.open(self.log_path(component.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
            os.dup2(log, 1)
            os.dup2(log, 2)
            component.main(lambda text: (os.write(writer, text.encode() + b"\n"), None)[1])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # the last line of a process: everything goes into its log
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def log_path(self, name: str) -> Path:
        return self.config.logs / f"{name}.log"

    def _on_message(self, component: Component) -> None:
        try:
            data = os.read(component.pipe, 4096)
        except BlockingIOError:
            return
        if not data:
            self._close_pipe(component)
            return
        *lines, component.buffer = (component.buffer + data).split(b"\n")
        for line in lines:
            component.ready[line.decode(errors="replace")] = time.time()
            self._announce(line)

    def _announce(self, line: bytes) -> None:
        if self.announce_fd < 0:
            return
        try:
            os.write(self.announce_fd, line + b"\n")
        except OSError:  # `up` has gone: nobody waits any more
            os.close(self.announce_fd)
            self.announce_fd = -1

    def _close_pipe(self, component: Component) -> None:
        if component.pipe >= 0:
            self.selector.unregister(component.pipe)
            os.close(component.pipe)
            component.pipe = -1

    def _on_exit(self, component: Component) -> None:
        _, status = os.waitpid(component.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.selector.unregister(component.pidfd)
        os.close(component.pidfd)
        self._close_pipe(component)
        component.last_exit = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lived = time.time() - component.started_at
        component.pid = 0
        if self.stopping or not component.wanted:
            return
        component.failures = 0 if lived > RESTART_RESET_SECONDS else component.failures + 1
        delay = min(RESTART_FIRST_SECONDS * 2 ** max(component.failures - 1, 0), RESTART_MAXIMUM_SECONDS)
        component.restart_at = time.monotonic() + delay
        component.restarts += 1
        print(f"{component.name} ended ({component.last_exit}) after {lived:.1f} s, restart in {delay:.1f} s", file=sys.stderr, flush=True)

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "started": self.started_at, "components": [component.describe() for component in self.components.values()]}

    def _stop_request(self, arguments: dict[str, Any]) -> dict[str, Any]:
        name = arguments.get("component")
        if not name:
            self.stopping = True
            return {}
        seconds = self.components[str(name)].orderly_seconds() if arguments.get("orderly") else 0.0
        self.stop_component(str(name), ORDERLY_SIGNAL if seconds else signal.SIGTERM)
        return {"seconds": seconds}

    def _restart_request(self, arguments: dict[str, Any]) -> dict[str, Any]:
        component = self.components[str(arguments["component"])]
        if component.pid:
            os.kill(component.pid, signal.SIGTERM)
        return {}

    def stop_component(self, name: str, number: int = signal.SIGTERM) -> None:
        """Tell a component to end and leave it ended until `start_component`."""
        component = self.components[name]
        component.wanted = False
        component.restart_at = 0.0
        if component.pid:
            os.kill(component.pid, number)

    def start_component(self, name: str) -> None:
        component = self.components[name]
        component.wanted = True
        component.failures = 0
        if not component.pid:
            self._start(component)

    def forget(self, name: str) -> None:
        """Drop a component; it is killed if it still runs."""
        self.stop_component(name, signal.SIGKILL)
        del self.components[name]

    def _on_control(self) -> None:
        try:
            connection, _ = self._control.accept()
        except BlockingIOError:
            return
        with connection:
            connection.settimeout(2.0)
            try:
                request = b""
                while not request.endswith(b"\n") and len(request) < REQUEST_LIMIT_BYTES:
                    data = connection.recv(4096)
                    if not data:
                        break
                    request += data
                message = json.loads(request)
                answer = self.handlers[message.pop("verb")](message)
                reply = {"ok": True, "result": answer}
            except (OSError, ValueError, KeyError) as error:
                reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(reply).encode() + b"\n")

    def run(self) -> None:
        """Until stopped by a signal or the control socket; then every component has ended."""
        gc.freeze()
        while not self.stopping:
            self._once(self._timeout())
            now = time.monotonic()
            for component in list(self.components.values()):
                if component.restart_at and component.restart_at <= now and component.wanted:
                    self._start(component)
            if now - self._log_checked >= LOG_CHECK_SECONDS:
                self._log_checked = now
                self._trim_logs()
        self._stop_all()
        self._control.close()
        (self.config.state / "control.sock").unlink(missing_ok=True)

    def _once(self, timeout: float | None) -> None:
        for key, _ in self.selector.select(timeout):
            if key.fileobj in self.selector.get_map():  # an earlier callback may have closed it
                key.data()

    def _timeout(self) -> float:
        waits = [component.restart_at - time.monotonic() for component in self.components.values() if component.restart_at]
        return max(0.0, min([*waits, LOG_CHECK_SECONDS]))

    def _trim_logs(self) -> None:
        """Keep each log under its limit by keeping one older file; the writers append, so truncation is safe."""
        for name in [*self.components, "supervisor"]:
            path = self.log_path(name)
            try:
                if path.stat().st_size > LOG_LIMIT_BYTES:
                    path.with_suffix(".log.1").write_bytes(path.read_bytes())
                    os.truncate(path, 0)
            except OSError as error:
                print(f"cannot rotate {path}: {error}", file=sys.stderr, flush=True)

    def _stop_all(self) -> None:
        # The API server goes last, so that the others can still write what they must while they end.
        if self._in_order:
            longest = {name: component.orderly_seconds() for name, component in self.components.items()}
            nodes = [self.components[name] for name, seconds in longest.items() if seconds]
            self._stop_wave(nodes, ORDERLY_SIGNAL, max(longest.values(), default=0.0) + STOP_SECONDS)
        for wave in ([name for name in self.components if name != "apiserver"], ["apiserver"]):
            self._stop_wave([self.components[name] for name in wave if name in self.components])

    def _stop_wave(self, wave: list[Component], number: int = signal.SIGTERM, limit_seconds: float = STOP_SECONDS) -> None:
        for component in wave:
            if component.pid:
                os.kill(component.pid, number)
        deadline = time.monotonic() + limit_seconds
        while any(component.pid for component in wave):
            left = deadline - time.monotonic()
            if left <= 0:
                for component in wave:
                    if component.pid:
                        os.kill(component.pid, signal.SIGKILL)
                left = 1.0
            self._once(left)


def ask(config: ClusterConfig, verb: str, timeout_seconds: float = 5.0, **arguments: Any) -> Any:
    """Send one control request to a cluster's supervisor.

    Returns:
      The answer's result.

    Raises:
      ConnectionError: no supervisor runs.
      RuntimeError: it refused, with its words.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(str(config.state / "control.sock"))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise ConnectionError(f"cluster {config.name!r} is not running") from error
        connection.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        with connection.makefile("rb") as file:
            reply = json.loads(file.readline() or b'{"ok": false, "error": "no answer"}')
    if not reply["ok"]:
        raise RuntimeError(reply["error"])
    return reply["result"]
