"""System calls that Python 3.11 does not wrap: mounts, namespaces, path resolution inside a root.

Role: the only place of the runtime that uses ctypes. Every function blocks, raises OSError and keeps no state; callers run
them in worker threads (`workers.py`). Namespace calls change the calling *thread* only, which is why they never run in the
event loop's thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 16384, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_FS, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x200, 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
RESOLVE_IN_ROOT, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS = 0x10, 0x08, 0x04, 0x02
# These numbers are the same on every architecture (all were added after the tables were unified).
_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_OPENAT2, _NR_MOUNT_SETATTR = 428, 429, 437, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_MOUNT_F_EMPTY_PATH = 1, os.O_CLOEXEC, 4
_MOUNT_ATTR_IDMAP, _MOUNT_ATTR_RDONLY = 0x100000, 1
MACHINE = platform.machine()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount; see mount(2). Raises OSError naming the target."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags), os.fsencode(data) or None
    )
    _check(result, f"mount {source} on {target}")


def bind(source: str, target: str, *, recursive: bool = False) -> None:
    """Bind-mount a file or directory on an existing target."""
    mount(source, target, flags=MS_BIND | (MS_REC if recursive else 0))


def unmount(target: str, *, lazy: bool = True) -> bool:
    """Unmount; False when nothing was mounted there or the path is gone. Never follows a final symbolic link."""
    if _libc.umount2(os.fsencode(target), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (22, 2, 20):  # EINVAL: not a mount point; ENOENT, ENOTDIR: no such path
        return False
    raise OSError(number, f"unmount {target}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int = 0) -> None:
    """Move the calling thread into the namespace that fd refers to."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def loopback_up() -> None:
    """Set lo up in the calling thread's network namespace."""
    siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = bytearray(struct.pack("16sh22x", b"lo", 0))
        fcntl.ioctl(sock, siocgifflags, request)
        flags = struct.unpack_from("h", request, 16)[0]
        fcntl.ioctl(sock, siocsifflags, struct.pack("16sh22x", b"lo", flags | iff_up))


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_in_root(root: str, path: str, flags: int = os.O_RDONLY) -> int:
    """Open a path as if root were "/": links, absolute or with "..", stay inside. Returns a file descriptor."""
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _open_at(base, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    finally:
        os.close(base)


def open_without_links(base: int, path: str, flags: int = os.O_RDONLY) -> int:
    """Open a path below an open directory; OSError (ELOOP) when any part of it is a link. Returns a file descriptor."""
    return _open_at(base, path, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)


def _open_at(base: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    fd = _libc.syscall(_NR_OPENAT2, base, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    return _check(fd, f"open {path}")


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def bind_idmapped(source: str, target: str, userns_fd: int, *, recursive: bool = False) -> None:
    """Bind-mount source on target with owners shifted through a user namespace (Linux 5.12; overlay layers 5.19).

    Raises OSError (EINVAL, EPERM, ENOSYS) where kernel or file system cannot.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    tree = _check(_libc.syscall(_NR_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags), f"open_tree {source}")
    try:
        attr = _MountAttr(_MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
        how = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
        result = _libc.syscall(_NR_MOUNT_SETATTR, tree, b"", how, ctypes.byref(attr), ctypes.sizeof(attr))
        _check(result, f"map owners of {source}")
        result = _libc.syscall(_NR_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        _check(result, f"mount {source} on {target}")
    finally:
        os.close(tree)


def recursive_read_only(path: str) -> None:
    """Make a mount and all mounts below it read-only (Linux 5.12)."""
    attr = _MountAttr(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _libc.syscall(_NR_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, ctypes.byref(attr), ctypes.sizeof(attr))
    _check(result, f"make {path} read-only")
