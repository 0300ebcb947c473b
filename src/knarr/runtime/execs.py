"""Exec: further processes in a running container, with pipes or a terminal.

Role: exec and exec_sync of the runtime. The OCI runtime stays in the foreground, so its exit status is the process's; unlike
the container itself, an exec need not outlive us. Callers: embedded.py.
A process that could not be started is an error (RuntimeFault with the OCI runtime's words), not an exit code: it is told apart
by the pid file, which is written only once the process runs.
Source: containerd internal/cri/server/container_execsync.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

from knarr.runtime import process
from knarr.runtime.container import Containers
from knarr.runtime.container_model import Container
from knarr.runtime.cri import DeadlineExceeded, ExecResult, RuntimeFault
from knarr.runtime.pipes import Merged, write_all
from knarr.runtime.runc import last_words

_OUTPUT_LIMIT = 16 << 20


class Exec:
    """One exec; implements cri.Stream. Made by `Execs.start`."""

    def __init__(self, child: subprocess.Popen[bytes], files: str, output: Merged, stdin: int | None, master: int | None) -> None:
        self._child, self._files, self._output, self._stdin, self._master = child, files, output, stdin, master
        self._waiting: asyncio.Future[int] | None = None

    def read(self) -> AsyncIterator[tuple[int, bytes]]:
        return self._output.read()

    async def write_stdin(self, data: bytes) -> None:
        """Write to the process; data for one that has ended or closed its input is dropped."""
        if self._stdin is None:
            return
        try:
            await write_all(self._stdin, data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                raise
            await self.close_stdin()

    async def close_stdin(self) -> None:
        """End of input. A terminal has none: its input ends with the terminal."""
        if self._stdin is not None and self._stdin != self._master:
            os.close(self._stdin)
            self._stdin = None

    async def resize(self, width: int, height: int) -> None:
        if self._master is None or not (0 < width < 65536 and 0 < height < 65536):
            return
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
            # The OCI runtime carries the size over to the terminal inside.
            self._child.send_signal(signal.SIGWINCH)

    async def wait(self) -> int:
        """Exit code; 128 + signal for a process that a signal ended. Raises RuntimeFault when it could not be started."""
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(process.wait_child(self._child))
        code = await asyncio.shield(self._waiting)
        if not os.path.exists(f"{self._files}.pid") and os.path.exists(f"{self._files}.json"):
            said = last_words(f"{self._files}.log")
            raise RuntimeFault(f"OCI runtime exec failed: {said or f'exit status {code}'}")
        return code if code >= 0 else 128 - code

    async def close(self) -> None:
        """Drop the streams and kill the process if it still runs. Idempotent."""
        if self._child.returncode is None:
            kill_tree(_read_pid(f"{self._files}.pid"))
            # The runtime ends by itself when its process does; it gets a moment to pass the exit code on.
            with contextlib.suppress(TimeoutError, RuntimeFault):
                async with asyncio.timeout(0.5):
                    await self.wait()
            if self._child.returncode is None:
                self._child.kill()
                with contextlib.suppress(RuntimeFault):
                    await self.wait()
        await self.close_stdin()
        await self._output.close()
        if self._master is not None:
            os.close(self._master)
            self._master = self._stdin = None
        for suffix in (".json", ".pid", ".log"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._files + suffix)


class Execs:
    """Starts execs; see the module."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    def start(self, container: Container, command: Sequence[str], *, tty: bool, stdin: bool) -> Exec:
        """Start a process; failures to start come out of `wait`."""
        if not command:
            raise RuntimeFault("exec needs a command")
        files = os.path.join(self._containers.bundle(container.id), f"exec-{os.urandom(6).hex()}")
        with open(f"{files}.json", "wb") as file:
            file.write(orjson.dumps(self._process(container, command, tty)))
        argv = self._containers.runc_of(container).exec_argv(container.id, f"{files}.json", f"{files}.pid", f"{files}.log")
        return self._with_terminal(argv, files) if tty else self._with_pipes(argv, files, stdin)

    def _process(self, container: Container, command: Sequence[str], tty: bool) -> dict[str, Any]:
        document = {**container.spec_process, "terminal": tty, "args": list(command)}
        if tty and not any(item.startswith("TERM=") for item in document["env"]):
            document["env"] = [*document["env"], "TERM=xterm"]
        return document

    def _with_pipes(self, argv: list[str], files: str, stdin: bool) -> Exec:
        opened: list[int] = []

        def pipe() -> tuple[int, int]:
            pair = os.pipe2(os.O_CLOEXEC)
            opened.extend(pair)
            return pair

        try:
            out_read, out_write = pipe()
            err_read, err_write = pipe()
            in_read, in_write = pipe() if stdin else (subprocess.DEVNULL, None)
            child = process.spawn(argv, stdin=in_read, stdout=out_write, stderr=err_write)
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        for fd in (out_write, err_write, *([in_read] if stdin else [])):
            os.close(fd)
        if in_write is not None:
            os.set_blocking(in_write, False)
        return Exec(child, files, Merged([(1, out_read), (2, err_read)]), in_write, None)

    def _with_terminal(self, argv: list[str], files: str) -> Exec:
        master, slave = os.openpty()
        try:
            child = process.spawn(argv, stdin=slave, stdout=slave, stderr=slave)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        return Exec(child, files, Merged([(1, os.dup(master))]), master, master)

    async def run(self, container: Container, command: Sequence[str], timeout_seconds: float) -> ExecResult:
        """Run to the end. Raises DeadlineExceeded after killing the process and its children, RuntimeFault if it cannot start."""
        stream = self.start(container, command, tty=False, stdin=False)
        parts: dict[int, list[bytes]] = {1: [], 2: []}
        size = 0
        try:
            async with asyncio.timeout(timeout_seconds or None):
                async for channel, data in stream.read():
                    if size < _OUTPUT_LIMIT:
                        parts[channel].append(data)
                        size += len(data)
                code = await stream.wait()
        except TimeoutError as error:
            seconds = f"{timeout_seconds:g}s"
            raise DeadlineExceeded(f'command "{" ".join(command)}" timed out: context deadline exceeded: timeout {seconds} exceeded') from error
        finally:
            await asyncio.shield(stream.close())
        return ExecResult(b"".join(parts[1]), b"".join(parts[2]), code)


def _read_pid(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, parents first so that they cannot make new ones."""
    if pid <= 1:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children += [int(child) for child in file.read().split()]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_tree(child)
