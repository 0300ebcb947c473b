"""mount(2) and umount2(2) by ctypes: no subprocess on the way of a pod's start.

Callers: the volume modules and the node's clean-up. All calls are synchronous; none of them waits for a network except
where a plugin says so. Errors are OSError with the path.
"""

from __future__ import annotations

import ctypes
import os

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount; raises OSError."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode() or None, flags, options.encode() or None)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def unmount(target: str, *, lazy: bool = True) -> bool:
    """Unmount one layer; False when nothing is mounted there."""
    if _libc.umount2(os.fsencode(target), (MNT_DETACH if lazy else 0) | UMOUNT_NOFOLLOW) == 0:
        return True
    code = ctypes.get_errno()
    if code in (22, 2):  # EINVAL: no mount point, ENOENT: no such path
        return False
    raise OSError(code, os.strerror(code), target)


def bind(source: str, target: str, *, read_only: bool = False, recursive: bool = True) -> None:
    """Bind-mount source on target; raises OSError and leaves nothing."""
    mount(source, target, "", MS_BIND | (MS_REC if recursive else 0))
    if read_only:
        try:
            mount("", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
        except OSError:
            unmount(target)
            raise


def tmpfs(target: str, *, size_bytes: int = 0, mode: int = 0o777, huge: str = "") -> None:
    """Mount a tmpfs, limited to size_bytes (0: the kernel's default of half the memory)."""
    options = [f"mode={mode:o}"]
    if size_bytes:
        options.append(f"size={size_bytes}")
    mount("tmpfs", target, "tmpfs", 0, ",".join(options))


def mount_points(below: str) -> list[str]:
    """Mount points at or below a path, deepest and newest first."""
    prefix = below.rstrip("/")
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            path = _unescape(line.split(b" ", 5)[4])
            if path == prefix or path.startswith(prefix + "/"):
                found.append(path)
    return found[::-1]


def source_of(path: str) -> str:
    """The device of the newest mount at a path, "" when nothing is mounted there."""
    found = ""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            if _unescape(line.split(b" ", 5)[4]) == path:
                found = _unescape(line.partition(b" - ")[2].split(b" ")[1])
    return found


def is_mount_point(path: str) -> bool:
    return path in mount_points(path)


def _unescape(field: bytes) -> str:
    if b"\\" in field:
        for code, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
            field = field.replace(code, byte)
    return os.fsdecode(field)
