"""Network namespaces: open sockets inside one, run a function inside one, make named ones.

Role: lets the pod network and tests reach another namespace without a subprocess. A socket belongs for ever to the
namespace it was opened in, so a thread only visits for the moment of opening.
Invariant: whoever enters a namespace comes back on every path; a thread that cannot come back must not be used again,
so a failed return ends the process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from knarr.network.netlink import NETLINK_ROUTE, NetlinkSocket

CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 4096, 16384, 1 << 20, 2
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")

NETNS_DIR = Path("/run/netns")
# Beside it, and not in it, where every file is taken for a namespace: we made the folder a mount point, and take that back.
_MADE = Path("/run/knarr-netns")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


@contextmanager
def entered(path: str | os.PathLike[str] | int | None) -> Iterator[None]:
    """Be in another network namespace for the length of the block; affects only the calling thread.

    Args:
      path: A bind-mounted namespace, /proc/<pid>/ns/net, an open descriptor, or None to stay.
    """
    if path is None:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(target, CLONE_NEWNET), f"entering network namespace {path}")
        finally:
            if not isinstance(path, int):
                os.close(target)
        try:
            yield
        finally:
            if _libc.setns(home, CLONE_NEWNET) != 0:
                os.abort()
    finally:
        os.close(home)


def open_netlink(path: str | os.PathLike[str] | int | None = None, family: int = NETLINK_ROUTE) -> NetlinkSocket:
    """Open a netlink socket that lives in the given namespace."""
    with entered(path):
        return NetlinkSocket(family)


def run_inside(path: str | os.PathLike[str] | None, function: Callable[[], T]) -> T:
    """Call a quick, synchronous function inside a namespace."""
    with entered(path):
        return function()


def create_named(name: str, directory: Path = NETNS_DIR) -> Path:
    """Make a namespace that stays (as `ip netns add` does) and set its loopback up; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    # Shared propagation lets every mount namespace of the host see and release the pins made here; only a mount point can have it,
    # and whether the folder is one is best found out by asking for it.
    folder = os.fsencode(directory)
    if _libc.mount(b"none", folder, b"none", _MS_SHARED | _MS_REC, None) != 0:
        if directory == NETNS_DIR:
            _MADE.touch()
        _check(_libc.mount(folder, folder, b"none", _MS_BIND | _MS_REC, None), "pinning the namespace directory")
        _check(_libc.mount(b"none", folder, b"none", _MS_SHARED | _MS_REC, None), "sharing the namespace directory")
    path = directory / name
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o444))
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(CLONE_NEWNET), "making a network namespace")
        try:
            source = f"/proc/self/task/{_libc.gettid()}/ns/net".encode()
            _check(_libc.mount(source, os.fsencode(path), b"none", _MS_BIND, None), "pinning the namespace")
            _set_loopback_up()
        finally:
            if _libc.setns(home, CLONE_NEWNET) != 0:
                os.abort()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(home)
    return path


def delete_named(path: str | os.PathLike[str]) -> None:
    """Unpin a namespace; idempotent. The kernel frees it once its last process and socket are gone.

    With the last one the folder is what it was before `create_named` made it a mount point.
    """
    _libc.umount2(os.fsencode(path), _MNT_DETACH)
    Path(path).unlink(missing_ok=True)
    if Path(path).parent == NETNS_DIR and _MADE.exists() and not any(NETNS_DIR.iterdir()):
        _libc.umount2(os.fsencode(NETNS_DIR), _MNT_DETACH)
        _MADE.unlink(missing_ok=True)


def _set_loopback_up() -> None:
    from knarr.network.rtnl import set_up

    with NetlinkSocket(NETLINK_ROUTE) as netlink:
        netlink.send(set_up(1))
