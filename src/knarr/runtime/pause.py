"""The first process of a pod whose containers share one PID namespace.

Role: the kernel ends a PID namespace with its first process, so such a pod needs one that lives as long as the sandbox. It is
a program of a few machine instructions written out here (no compiler and no foreign image needed): ignore SIGCHLD, which makes
the kernel reap orphans, then sleep for ever. It runs under the OCI runtime without conmon, takes one page of memory, and
ignores every signal but KILL, as pid 1 does without handlers.
Callers: sandbox.py. Other pods have no such process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Mapping
from typing import Any

import orjson

from knarr.runtime import disk, process
from knarr.runtime.conmon import Process
from knarr.runtime.cri import PodSandboxConfig, RuntimeFault
from knarr.runtime.runc import Runc
from knarr.runtime.syscalls import MACHINE
from knarr.runtime.workers import Workers

# rt_sigaction(SIGCHLD, &ignore, NULL, 8); for (;;) pause();   and after the code the struct: handler SIG_IGN, then zeros.
_CODE = {
    "x86_64": bytes.fromhex(
        "b80d000000"  # mov eax, 13 (rt_sigaction)
        "bf11000000"  # mov edi, 17 (SIGCHLD)
        "488d3519000000"  # lea rsi, [rip + 25] (the struct)
        "31d2"  # xor edx, edx
        "41ba08000000"  # mov r10d, 8
        "0f05"  # syscall
        "b822000000"  # mov eax, 34 (pause)
        "0f05"  # syscall
        "ebf7"  # jmp to the pause
        "909090909090"
    ),
    # rt_sigaction is 134, ppoll(NULL, 0, NULL, NULL) is 73
    "aarch64": b"".join(
        struct.pack("<I", word)
        for word in (
            0xD2800220,  # mov x0, #17
            0x100001A1,  # adr x1, +52 (the struct)
            0xD2800002,  # mov x2, #0
            0xD2800103,  # mov x3, #8
            0xD28010C8,  # mov x8, #134
            0xD4000001,  # svc #0
            0xD2800000,  # mov x0, #0
            0xD2800001,  # mov x1, #0
            0xD2800002,  # mov x2, #0
            0xD2800003,  # mov x3, #0
            0xD2800928,  # mov x8, #73
            0xD4000001,  # svc #0
            0x17FFFFFA,  # b -24
            0xD503201F,  # nop
        )
    ),
}
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}
_BASE = 0x400000


def program(machine: str = MACHINE) -> bytes:
    """The whole executable file. Raises RuntimeFault for a machine without one."""
    if machine not in _CODE:
        raise RuntimeFault(f"pods that share a PID namespace are not supported on {machine}")
    code = _CODE[machine] + struct.pack("<Q", 1) + bytes(32)
    size = 64 + 56 + len(code)
    entry = _BASE + 64 + 56
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, _ELF_MACHINE[machine], 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code


class Pause:
    """Starts and stops pause processes. `state` is the volatile folder."""

    def __init__(self, runc: Runc, state: str, workers: Workers) -> None:
        self._runc, self._workers = runc, workers
        self._root = os.path.join(state, "pause")

    async def start(self, sandbox_id: str, paths: Mapping[str, str], cgroup_parent: str, config: PodSandboxConfig) -> Process:
        """Run the process in the sandbox's namespaces and a PID namespace of its own. Raises RuntimeFault."""
        bundle = os.path.join(self._root, sandbox_id)
        document = self._document(paths, f"{cgroup_parent}/{sandbox_id}", config)
        await self._workers.run(lambda: self._prepare(bundle, document))
        pid_file = f"{bundle}/pid"
        argv = [self._runc.binary, *self._runc.global_args(), "run", "--detach", "--bundle", bundle, "--pid-file", pid_file, sandbox_id]
        await process.run(argv)
        with open(pid_file) as file:
            pid = int(file.read())
        return Process(pid, process.start_time(pid))

    def _prepare(self, bundle: str, document: dict[str, Any]) -> None:
        root = os.path.join(self._root, "rootfs")
        path = os.path.join(root, "pause")
        if not os.path.exists(path):
            for name in ("proc", "dev", "sys"):
                os.makedirs(os.path.join(root, name), exist_ok=True)
            temporary = f"{path}.{os.urandom(4).hex()}"
            with open(temporary, "wb") as file:
                file.write(program())
                os.fchmod(file.fileno(), 0o755)
            os.replace(temporary, path)
            os.chmod(root, 0o755)
            os.chmod(self._root, 0o711)
        os.makedirs(bundle, 0o711)
        with open(f"{bundle}/config.json", "wb") as out:
            out.write(orjson.dumps(document))

    def _document(self, paths: Mapping[str, str], cgroup: str, config: PodSandboxConfig) -> dict[str, Any]:
        types = {"net": "network", "ipc": "ipc", "uts": "uts", "user": "user"}
        joined = [{"type": types[kind], "path": path} for kind, path in paths.items() if kind in types]
        linux: dict[str, Any] = {"namespaces": [{"type": "mount"}, {"type": "pid"}, *joined], "cgroupsPath": cgroup}
        if config.namespaces.user_mappings is not None:
            maps = [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in config.namespaces.user_mappings]
            linux["uidMappings"] = linux["gidMappings"] = maps
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 65535, "gid": 65535},
                "args": ["/pause"],
                "env": ["PATH=/"],
                "cwd": "/",
                "noNewPrivileges": True,
            },
            "root": {"path": os.path.join(self._root, "rootfs"), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=64k"]},
            ],
            "linux": linux,
        }

    async def stop(self, sandbox_id: str, pause: Process | None) -> None:
        """End the process and everything in its PID namespace; idempotent."""
        bundle = os.path.join(self._root, sandbox_id)
        if pause is None and not os.path.exists(bundle):
            return
        if pause is not None and process.kill(pause.pid, pause.started, signal.SIGKILL):
            # Killed first: the OCI runtime would kill it too, but then sleeps before it looks again.
            await process.wait_gone(pause.pid, pause.started)
        await self._runc.delete(sandbox_id)
        with contextlib.suppress(FileNotFoundError):
            await self._workers.run(lambda: disk.remove_tree(bundle))
