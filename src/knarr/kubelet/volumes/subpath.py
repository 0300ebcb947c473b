"""Paths inside volumes, taken apart without ever following a link out of the volume.

Callers: containers (subPath), server (the host's logs). A container may write its volume at any moment, so every step opens one
name below an open directory with O_NOFOLLOW, or lets the kernel do it (openat2 RESOLVE_IN_ROOT-like semantics are not used:
a link must stay inside and is resolved here, step by step). What was checked is what is mounted: the result is bind-mounted
through /proc/self/fd. Source: pkg/volume/util/subpath.
"""

from __future__ import annotations

import errno
import os
import stat

_MAX_LINKS = 40


def open_beneath(root: str, path: str, flags: int) -> int:
    """Open `path` below `root`; links are followed only inside of root.

    Returns: a file descriptor that the caller closes.

    Raises:
      OSError: missing (ENOENT), leaves the root (EXDEV), too many links (ELOOP).
    """
    links = 0
    stack = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    todo = [p for p in reversed(path.split("/")) if p not in ("", ".")]
    try:
        while todo:
            name = todo.pop()
            if name == "..":
                if len(stack) == 1:
                    raise OSError(errno.EXDEV, "path leaves the volume", path)
                os.close(stack.pop())
                continue
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1])
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                stack.append(fd)
                continue
            try:
                target = os.readlink("", dir_fd=fd)  # of this very link: the name may stand for another by now
            finally:
                os.close(fd)
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, "too many links", path)
            if target.startswith("/"):
                target = _inside(root, target, path)
                while len(stack) > 1:
                    os.close(stack.pop())
            todo += [p for p in reversed(target.split("/")) if p not in ("", ".")]
        if flags & os.O_PATH:
            return os.dup(stack[-1])
        return os.open(f"/proc/self/fd/{stack[-1]}", (flags & ~os.O_NOFOLLOW) | os.O_CLOEXEC)
    finally:
        for fd in stack:
            os.close(fd)


def _inside(root: str, target: str, path: str) -> str:
    """An absolute link is allowed when it points into the volume itself."""
    real = os.path.realpath(root)
    if target == real or target.startswith(real + "/"):
        return target[len(real) :]
    raise OSError(errno.EXDEV, "path leaves the volume", path)


def make_directories(root: str, path: str, mode: int) -> None:
    """Make the missing directories of `path` below `root` with this mode, never through a link that leaves root.

    Raises:
      OSError: as `open_beneath`, or a part is no directory.
    """
    parts = [p for p in path.split("/") if p not in ("", ".")]
    for index in range(len(parts)):
        head = "/".join(parts[: index + 1])
        try:
            os.close(open_beneath(root, head, os.O_PATH))
        except FileNotFoundError:
            parent = open_beneath(root, "/".join(parts[:index]), os.O_PATH)
            try:
                os.mkdir(parts[index], 0o700, dir_fd=parent)
                fd = os.open(parts[index], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                try:
                    info = os.stat(root)
                    os.fchown(fd, -1, info.st_gid)
                    os.fchmod(fd, mode)
                finally:
                    os.close(fd)
            finally:
                os.close(parent)


def check_text(sub_path: str) -> None:
    """Refuse what is no path inside a volume at all.

    Raises:
      ValueError: with the message that the container's state shows.
    """
    if sub_path.startswith("/"):
        raise ValueError(f"error SubPath `{sub_path}` must not be an absolute path")
    if ".." in sub_path.split("/"):
        raise ValueError(f"unable to provision SubPath `{sub_path}`: must not contain '..'")
