"""A thin client of an OCI runtime (runc or crun): one method per verb, no policy.

Role: builds command lines and turns failures into `RuncFault` with the runtime's own last words. Callers: conmon.py (create),
container.py, execs.py. The command line is the one that runc and crun share.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from knarr.runtime import disk, process, syscalls
from knarr.runtime.cri import RuntimeFault

_GATE_SECONDS = 10.0


class RuncFault(RuntimeFault):
    """The OCI runtime refused; the text is its message."""


class Runc:
    """See the module.

    Args:
      binary: Absolute path, or a name to look up in PATH.
      root: The runtime's own state folder, volatile.
    """

    def __init__(self, binary: str, root: str) -> None:
        self.binary, self.root = binary, root

    @property
    def name(self) -> str:
        return os.path.basename(self.binary)

    def global_args(self, log: str = "") -> list[str]:
        """Arguments before the verb."""
        args = ["--root", self.root]
        if log:
            args += ["--log", log, "--log-format", "json"]
        return args

    async def _call(self, verb: str, *args: str, log: str = "") -> process.Completed:
        argv = [self.binary, *self.global_args(log), verb, *args]
        done = await process.run(argv, check=False)
        if done.returncode != 0:
            raise RuncFault(last_words(log, done.stderr) or f"{self.name} {verb} exited with {done.returncode}")
        return done

    async def start(self, container_id: str, log: str = "") -> None:
        """Let a created container run its process.

        A container made by runc waits until somebody reads the FIFO in its state folder; `runc start` does nothing else, and
        costs a process of its own, so it is done here. Source: runc libcontainer/container_linux.go (exec, readFromExecFifo).
        """
        if self.name != "runc" or not await self._open_gate(os.path.join(self.root, container_id, "exec.fifo")):
            await self._call("start", container_id, log=log)

    async def _open_gate(self, path: str) -> bool:
        """Read the FIFO that the first process waits at; False when it did not answer, for whatever reason."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            async with asyncio.timeout(_GATE_SECONDS):
                await process.wait_readable(fd)
            opened = len(os.read(fd, 16)) > 0
        except TimeoutError:
            return False
        finally:
            os.close(fd)
        if opened:
            # Without the FIFO the runtime knows the container as running.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return opened

    async def delete(self, container_id: str) -> None:
        """Kill what is left of a container and remove its state and groups; nothing there is success."""
        await self._call("delete", "--force", container_id)
        self.forget(container_id)

    def forget(self, container_id: str) -> None:
        """Remove the state folder of a container whose processes are gone: a runtime killed half-way leaves one that it cannot read."""
        folder = os.path.join(self.root, container_id)
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                # runc binds a read-only view of its own program here for a moment; killed then, it leaves the mount.
                if entry.name.startswith("runc."):
                    syscalls.unmount(entry.path)
        disk.remove_tree(folder)

    def known(self) -> list[str]:
        """Ids of all containers that have a state folder."""
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return []

    async def state(self, container_id: str) -> dict[str, Any] | None:
        """The runtime's view ({"status", "pid"}), None when it knows no such container."""
        try:
            done = await self._call("state", container_id)
        except RuncFault:
            return None
        document: dict[str, Any] = orjson.loads(done.stdout)
        return document

    async def update(self, container_id: str, resources: Mapping[str, Any], scratch: str) -> None:
        """Change resource limits. `scratch` is a directory for the request."""
        path = os.path.join(scratch, f"update-{os.urandom(6).hex()}.json")
        with open(path, "wb") as file:
            file.write(orjson.dumps(resources))
        try:
            await self._call("update", "--resources", path, container_id)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def exec_argv(self, container_id: str, spec_path: str, pid_file: str, log: str) -> list[str]:
        """Command line of an exec in the foreground: its exit status is the process's."""
        return [self.binary, *self.global_args(log), "exec", "--process", spec_path, "--pid-file", pid_file, container_id]


def last_words(log: str, stderr: bytes = b"") -> str:
    """The last error that the runtime logged (JSON lines in a file, or text on stderr), without decoration."""
    lines: Sequence[str] = []
    if log:
        with contextlib.suppress(OSError), open(log, errors="replace") as file:
            lines = file.read()[-65536:].splitlines()
    lines = [*lines, *stderr.decode(errors="replace").splitlines()]
    message = ""
    for line in lines:
        text = line.strip()
        if text.startswith("{"):
            with contextlib.suppress(orjson.JSONDecodeError):
                entry = orjson.loads(text)
                if entry.get("level") in ("error", "fatal"):
                    message = str(entry.get("msg", ""))
        elif text and not message:
            message = text.partition(" msg=")[2].strip('"').replace('\\"', '"') or text
    return message
