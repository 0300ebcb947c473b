"""Child processes of the runtime: started with vfork, reaped through a pidfd, never by a signal handler.

Role: the one place that starts and waits for programs (runc, conmon, unshare, zstd). A pidfd per child sits in the event loop,
so waiting for one child can never steal the exit of another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from knarr.runtime.cri import DeadlineExceeded, RuntimeFault

Pipe = int | IO[bytes] | None


@dataclass(slots=True)
class Completed:
    """How a program ended: exit status (negative: the signal) and what it wrote."""

    returncode: int
    stdout: bytes
    stderr: bytes


class ProgramFault(RuntimeFault):
    """A program of ours failed; argv and output are kept."""

    def __init__(self, argv: Sequence[str], completed: Completed) -> None:
        self.argv = list(argv)
        self.completed = completed
        said = (completed.stderr or completed.stdout).decode(errors="replace").strip()
        super().__init__(f"{' '.join(argv[:3])} exited with {completed.returncode}: {said[-2000:]}")


def resolve(future: asyncio.Future[None]) -> None:
    """Complete a future unless it is already; for descriptor callbacks, which may come twice."""
    if not future.done():
        future.set_result(None)


async def wait_readable(fd: int) -> None:
    """Return when fd can be read (for a pidfd: when its process has ended). Cancellation leaves nothing registered."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def wait_child(child: subprocess.Popen[bytes]) -> int:
    """Wait for a child that we started and reap it; returns its exit status, negative for a signal."""
    if child.returncode is None:
        try:
            pidfd = os.pidfd_open(child.pid)
        except ProcessLookupError:
            return child.wait()
        try:
            await wait_readable(pidfd)
        finally:
            os.close(pidfd)
    return child.wait()


def spawn(
    argv: Sequence[str],
    *,
    stdin: Pipe = subprocess.DEVNULL,
    stdout: Pipe = subprocess.DEVNULL,
    stderr: Pipe = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own (a terminal's Ctrl-C must not reach runc)."""
    try:
        return subprocess.Popen(
            list(argv), stdin=stdin, stdout=stdout, stderr=stderr, env=env, pass_fds=tuple(pass_fds), cwd=cwd, start_new_session=True
        )
    except OSError as error:
        raise RuntimeFault(f"cannot run {argv[0]}: {error.strerror}") from error


async def read_all(fd: int, limit: int = 16 << 20, *, until: bytes = b"") -> bytes:
    """Read a pipe to its end, or to the first chunk that holds `until`, and close it; at most limit bytes are kept."""
    parts: list[bytes] = []
    size = 0
    os.set_blocking(fd, False)
    try:
        while True:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                await wait_readable(fd)
                continue
            if not data:
                return b"".join(parts)
            if size < limit:
                parts.append(data[: limit - size])
                size += len(data)
            if until and until in data:
                return b"".join(parts)
    finally:
        os.close(fd)


async def run(argv: Sequence[str], *, check: bool = True, timeout_seconds: float = 60.0, env: Mapping[str, str] | None = None) -> Completed:
    """Run a program to its end.

    Raises:
      ProgramFault: it failed and check is set.
      DeadlineExceeded: it ran too long; it was killed.

    Cancellation kills the program.
    """
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    try:
        child = spawn(argv, stdout=out_write, stderr=err_write, env=env)
    except BaseException:
        os.close(out_read)
        os.close(err_read)
        raise
    finally:
        os.close(out_write)
        os.close(err_write)
    reads = [asyncio.ensure_future(read_all(out_read)), asyncio.ensure_future(read_all(err_read))]
    try:
        async with asyncio.timeout(timeout_seconds):
            returncode = await wait_child(child)
            # A daemon that the program left behind may hold the pipes; what came until now is enough then.
            done, _ = await asyncio.wait(reads, timeout=1.0)
    except TimeoutError as error:
        raise DeadlineExceeded(f"{' '.join(argv[:3])} did not end within {timeout_seconds:g} s") from error
    finally:
        for task in reads:
            task.cancel()
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGKILL)
            child.wait()
    out, err = (task.result() if task in done and not task.cancelled() else b"" for task in reads)
    completed = Completed(returncode, out, err)
    if check and returncode != 0:
        raise ProgramFault(argv, completed)
    return completed


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot, 0 when there is none: with the pid it names a process for ever."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return 0
    fields = stat[stat.rindex(b")") + 2 :].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(pid: int, started: int) -> bool:
    """Whether the process that had this pid at this start time still runs."""
    return pid > 0 and started > 0 and start_time(pid) == started


async def wait_gone(pid: int, started: int) -> None:
    """Return when this process, which need not be our child, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if alive(pid, started):
            await wait_readable(pidfd)
    finally:
        os.close(pidfd)


def kill(pid: int, started: int, number: int) -> bool:
    """Signal exactly this process; False when it is gone."""
    if pid <= 0:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Checked after the pidfd exists, so a reused pid cannot be hit.
        if not alive(pid, started):
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
