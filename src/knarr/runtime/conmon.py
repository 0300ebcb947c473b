"""conmon: the small process that holds a container's streams and exit code while we come and go.

Role: starts conmon (which runs `runc create`), talks to it over its control pipe and attach socket, reads its exit file.
Callers: container.py, attach.py. Invariants: a container is known by conmon's pid *and* start time; conmon ends after it wrote
the exit file, so its pidfd is the event to wait for. Files in the bundle: pid, conmon.pid, attach, ctl, runc.log.
Source: containers/conmon src/cli.c, src/conmon.c, src/ctr_exit.c, src/ctrl.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from knarr.runtime import process
from knarr.runtime.cri import RuntimeFault
from knarr.runtime.runc import Runc, last_words

_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ConmonOptions:
    """One container for conmon. `log_path` "" writes no log."""

    container_id: str
    name: str
    bundle: str
    runtime: str = ""
    """Program that makes the container; empty is the default one."""
    log_path: str = ""
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False


@dataclass(frozen=True, slots=True)
class Process:
    """A process and when it started; see process.start_time."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class Held:
    """A created container and the conmon that holds it."""

    container: Process
    conmon: Process


class CreateFault(RuntimeFault):
    """The OCI runtime could not create the container; nothing of it runs."""


class Conmon:
    """See the module."""

    def __init__(self, runc: Runc, exit_dir: str, binary: str = "conmon") -> None:
        self._runc, self.exit_dir = runc, exit_dir
        self._binary = shutil.which(binary) or binary
        self._runtime = shutil.which(runc.binary) or runc.binary

    def _argv(self, options: ConmonOptions) -> list[str]:
        bundle = options.bundle
        argv = [self._binary, "--api-version", "1", "-c", options.container_id, "-u", options.container_id, "-n", options.name]
        argv += ["-r", options.runtime or self._runtime, "-b", bundle, "-p", f"{bundle}/pid", "-P", f"{bundle}/conmon.pid", "--exit-dir", self.exit_dir]
        argv += ["--full-attach", "--no-sync-log", "--log-level", "error"]
        argv += ["-l", f"k8s-file:{options.log_path}" if options.log_path else "off"]
        for argument in self._runc.global_args(f"{bundle}/runc.log"):
            argv += ["--runtime-arg", argument]
        if options.tty:
            argv.append("-t")
        if options.stdin:
            argv.append("-i")
            if not options.stdin_once:
                argv.append("--leave-stdin-open")
        return argv

    async def create(self, options: ConmonOptions) -> Held:
        """Start conmon and let it create the container, which then waits for `runc start`.

        Raises CreateFault with the OCI runtime's message. Cancellation kills conmon; the caller deletes the container.
        """
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        environment = {"PATH": os.environ.get("PATH", ""), "_OCI_SYNCPIPE": str(write_end), "XDG_RUNTIME_DIR": "/run"}
        try:
            child = process.spawn(self._argv(options), env=environment, pass_fds=(write_end,), cwd=options.bundle)  # where it tells of out of memory
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        reading = asyncio.ensure_future(process.read_all(read_end, 1 << 20, until=b"\n"))
        try:
            async with asyncio.timeout(_START_SECONDS):
                # The first process ends as soon as it has forked the lasting one, which reports one line and keeps the pipe open.
                await process.wait_child(child)
                report = await reading
        except BaseException as error:
            reading.cancel()
            self._abort(child.pid, options.bundle)
            child.poll()
            if isinstance(error, TimeoutError):
                raise CreateFault(f"conmon did not report within {_START_SECONDS:g} s") from error
            raise
        return self._held(options, report)

    def _held(self, options: ConmonOptions, report: bytes) -> Held:
        pid, message = 0, ""
        with contextlib.suppress(orjson.JSONDecodeError, AttributeError, ValueError, IndexError):
            document = orjson.loads(report.strip().splitlines()[0])
            pid = int(document.get("data", document.get("pid", 0)) or 0)
            message = str(document.get("message", ""))
        log = last_words(f"{options.bundle}/runc.log", message.encode())
        if pid <= 0:
            raise CreateFault(log or "conmon failed before the container was created")
        conmon_pid = _read_number(f"{options.bundle}/conmon.pid")
        held = Held(Process(pid, process.start_time(pid)), Process(conmon_pid, process.start_time(conmon_pid)))
        if not held.conmon.started:
            raise CreateFault(log or "conmon ended while the container was created")
        return held

    def _abort(self, first_pid: int, bundle: str) -> None:
        for pid in (first_pid, _read_number(f"{bundle}/conmon.pid")):
            if pid > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def wait(self, conmon: Process) -> None:
        """Return when this conmon has ended."""
        await process.wait_gone(conmon.pid, conmon.started)

    def exit_file(self, container_id: str) -> tuple[int, int] | None:
        """(exit code, epoch nanoseconds of the end) as conmon left it; None without one."""
        path = os.path.join(self.exit_dir, container_id)
        try:
            with open(path) as file:
                text = file.read().strip()
                return int(text), os.fstat(file.fileno()).st_mtime_ns
        except (OSError, ValueError):
            return None

    def forget(self, container_id: str) -> None:
        """Remove the exit file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.exit_dir, container_id))


def _read_number(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read().strip() or 0)
    except (OSError, ValueError):
        return 0


def control(bundle: str, kind: int, first: int = 0, second: int = 0) -> bool:
    """Write one message to conmon's control pipe: kind 1 resizes (height, width), 2 reopens the log. False: no conmon there."""
    try:
        fd = os.open(f"{bundle}/ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, f"{kind} {first} {second}\n".encode())
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def same(processes: Sequence[Process]) -> bool:
    """Whether all these processes still run."""
    return all(process.alive(item.pid, item.started) for item in processes)
