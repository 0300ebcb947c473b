"""Makes a plain chroot the root of a mount namespace of its own, so that containers can be run in it.

Role: `./run` calls this file as a script, with the Python of the system, where / is no mount point. runc refuses to work
there, the kernel refuses user namespaces, and what joins a container would find itself outside of the chroot, because
setns(2) gives the root of the namespace. The namespace stays pinned to a file until that is unmounted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, flags: int) -> None:
    _check(_libc.mount(source.encode(), target.encode(), None, flags, None), f"mount {target}")


def become_root(folder: str) -> None:
    """Give this process a mount namespace whose root is what its root was.

    Args:
      folder: an empty folder, needed on the way.

    Raises:
      OSError: the kernel refused, e.g. for want of CAP_SYS_ADMIN.
    """
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount("/", folder, MS_BIND | MS_REC)
    _mount("none", folder, MS_PRIVATE | MS_REC)
    new = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    _check(_libc.setns(own, CLONE_NEWNS), "setns")  # out of the chroot, to the root of the namespace
    old = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(new)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    os.fchdir(old)
    _mount("none", ".", MS_PRIVATE | MS_REC)
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def _pinned(path: str, folder: str, processor: int) -> bool:
    """Try it with a namespace made on one processor; False when the kernel takes the namespace for an older one than ours.

    A namespace may be mounted only in an older one. Since Linux 6.18 their numbers tell the age, and each processor
    gives numbers from a block of its own: where ours was made, a new one has a higher number for certain.
    """
    ready_reader, ready_writer = os.pipe()
    pinned_reader, pinned_writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(pinned_writer)
            os.sched_setaffinity(0, {processor})
            become_root(folder)
            os.write(ready_writer, b"1")
            os.read(pinned_reader, 1)
            code = 0
        except OSError as error:
            print(error.strerror, file=sys.stderr)
        finally:
            os._exit(code)
    os.close(ready_writer)
    os.close(pinned_reader)
    try:
        if not os.read(ready_reader, 1):
            return False
        _mount(f"/proc/{child}/ns/mnt", path, MS_BIND)
        return True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(pinned_writer)
        os.close(ready_reader)
        os.waitpid(child, 0)


def pin(path: str) -> bool:
    """Keep such a namespace at a file, for `nsenter --mount=PATH`. False, and no file, when the kernel refuses."""
    folder = f"{path}.folder"
    os.makedirs(folder, exist_ok=True)
    with open(path, "a"):
        pass
    try:
        if any(_pinned(path, folder, processor) for processor in sorted(os.sched_getaffinity(0))):
            return True
        os.unlink(path)
        return False
    finally:
        os.rmdir(folder)


if __name__ == "__main__":
    sys.exit(not pin(sys.argv[1]))
