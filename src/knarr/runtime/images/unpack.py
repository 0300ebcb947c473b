"""Unpack one image layer into a directory; a program of its own, run as a child process.

Usage: unpack.py DIRECTORY FILE OFFSET LENGTH MAX_BYTES; one JSON object on stdout: {"digest", "diff_id", "bytes", "inodes"}.
The child changes its root to the directory first, so that no name in a hostile layer (absolute, with "..", through a link made
earlier) can reach anything outside. Whiteouts become overlayfs ones: a character device 0/0, or an opaque attribute on the
directory. Attributes of the trusted name space are dropped: they would steer overlayfs itself.
Must import nothing of knarr: it starts with `python -I -S` to be quick.
Source: OCI image-spec layer.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
import resource
import stat
import subprocess
import sys
import tarfile
import zlib
from typing import IO, Any

_WHITEOUT, _OPAQUE, _AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."
_CHUNK = 1 << 18


class LayerError(Exception):
    """The layer is malformed or larger than allowed."""


class _Slice(io.RawIOBase):
    """A part of a file, hashed while it is read."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file, self._left, self.hash = file, length, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(self._left, size if size >= 0 else self._left))
        self._left -= len(data)
        self.hash.update(data)
        return data


class _Plain:
    """The uncompressed stream: hashed, counted, limited."""

    def __init__(self, source: _Slice, head: bytes, limit: int) -> None:
        self._source, self._limit = source, limit
        self.hash, self.size = hashlib.sha256(), 0
        self._pending = b""
        self._head = head
        self._zlib: Any = zlib.decompressobj(31) if head[:2] == b"\x1f\x8b" else None

    def _raw(self) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._source.read(_CHUNK)

    def _more(self) -> bytes:
        if self._zlib is None:
            return self._raw()
        while True:
            data = self._zlib.unconsumed_tail
            if self._zlib.eof:
                # Several gzip members may follow each other (pigz, stargz); zero padding may come last.
                data = self._zlib.unused_data or self._raw()
                data = data.lstrip(b"\0")
                if not data:
                    return b""
                self._zlib = zlib.decompressobj(31)
            elif not data:
                data = self._raw()
                if not data:
                    raise LayerError("unexpected end of the compressed layer")
            plain: bytes = self._zlib.decompress(data, _CHUNK * 4)
            if plain:
                return plain

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._pending) < size:
            data = self._more()
            if not data:
                break
            self.hash.update(data)
            self.size += len(data)
            if self._limit and self.size > self._limit:
                raise LayerError(f"the layer is larger than {self._limit} bytes when unpacked")
            self._pending += data
        if size < 0:
            size = len(self._pending)
        result, self._pending = self._pending[:size], self._pending[size:]
        return result


def _zstd(source: _Slice, head: bytes) -> IO[bytes]:
    """Decompress zstd with the zstd program; the returned stream ends with an error if the data is damaged."""
    child = subprocess.Popen(["zstd", "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    import threading

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), child.stdin:  # type: ignore[union-attr]
            child.stdin.write(head)  # type: ignore[union-attr]
            while data := source.read(_CHUNK):
                child.stdin.write(data)  # type: ignore[union-attr]

    threading.Thread(target=feed, daemon=True).start()
    return child.stdout


class _Piped(_Slice):
    """Adapter: a zstd stream in the place of the raw source."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, 1 << 62)


class Unpacker:
    """Writes the members of one layer below the current root directory."""

    def __init__(self) -> None:
        self._directories: list[tuple[str, int]] = []
        self.inodes = 0

    def member(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Write one member."""
        path = posixpath.normpath("/" + info.name.lstrip("/"))
        if path == "/":
            if info.isdir():
                self._attributes(path, info)
            return
        parent, name = posixpath.split(path)
        self._parents(parent)
        if name.startswith(_WHITEOUT):
            self._whiteout(parent, name)
            return
        opaque = self._clear(path, info)
        if info.isdir():
            if not os.path.isdir(path) or os.path.islink(path):
                os.mkdir(path)
            if opaque:
                os.setxattr(path, "trusted.overlay.opaque", b"y")
        elif info.isreg():
            self._file(tar, info, path)
        elif info.issym():
            os.symlink(info.linkname, path)
        elif info.islnk():
            target = posixpath.normpath("/" + info.linkname.lstrip("/"))
            os.link(target, path, follow_symlinks=False)
            return
        elif info.ischr() or info.isblk():
            kind = stat.S_IFCHR if info.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(info.devmajor, info.devminor))
        elif info.isfifo():
            os.mkfifo(path)
        else:
            return  # e.g. a GNU volume label; nothing to unpack
        self.inodes += 1
        self._attributes(path, info)

    def _parents(self, parent: str) -> None:
        if os.path.isdir(parent):
            return
        # A link to a directory that is not there (yet) is followed, inside this root.
        os.makedirs(os.path.realpath(parent), 0o755, exist_ok=True)
        self.inodes += 1

    def _whiteout(self, parent: str, name: str) -> None:
        if name == _OPAQUE:
            os.setxattr(parent, "trusted.overlay.opaque", b"y")
        elif not name.startswith(_AUFS) and name != _WHITEOUT:
            path = posixpath.join(parent, name[len(_WHITEOUT) :])
            if posixpath.basename(path) in (".", ".."):
                raise LayerError(f"whiteout of {path}")
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(0, 0))
                self.inodes += 1
            except FileExistsError:
                # The same layer also has the file: what it hides lies below, so only a directory needs a mark.
                if os.path.isdir(path) and not os.path.islink(path):
                    os.setxattr(path, "trusted.overlay.opaque", b"y")

    def _clear(self, path: str, info: tarfile.TarInfo) -> bool:
        """Remove what an earlier member left at this path; True when that was a whiteout."""
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(there.st_mode):
            if not info.isdir():
                import shutil

                shutil.rmtree(path)
            return False
        os.unlink(path)
        return stat.S_ISCHR(there.st_mode) and there.st_rdev == 0

    def _file(self, tar: tarfile.TarFile, info: tarfile.TarInfo, path: str) -> None:
        source = tar.extractfile(info)
        assert source is not None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb", buffering=0) as target:
            if info.sparse is not None:
                # tarfile yields holes as zeros; seeking over them keeps a hostile sparse file from filling the disk.
                while data := source.read(_CHUNK):
                    if data.count(0) == len(data):
                        target.seek(len(data), os.SEEK_CUR)
                    else:
                        target.write(data)
                target.truncate(info.size)
            else:
                while data := source.read(_CHUNK):
                    target.write(data)

    def _attributes(self, path: str, info: tarfile.TarInfo) -> None:
        os.chown(path, info.uid, info.gid, follow_symlinks=False)
        if not info.issym():
            os.chmod(path, info.mode & 0o7777)
        for key, value in info.pax_headers.items():
            name = key.removeprefix("SCHILY.xattr.")
            if name != key and not name.startswith("trusted."):
                with contextlib.suppress(OSError):  # a file system or name space that refuses it loses only the attribute
                    os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        time = min(max(int(info.mtime), 0), 0xFFFFFFFF)
        if info.isdir():
            self._directories.append((path, time))
        else:
            os.utime(path, (time, time), follow_symlinks=False)

    def finish(self) -> None:
        """Set the times of directories, which their files have changed."""
        for path, time in reversed(self._directories):
            with contextlib.suppress(OSError):
                os.utime(path, (time, time), follow_symlinks=False)


def unpack(directory: str, path: str, offset: int, length: int, limit: int) -> dict[str, Any]:
    """Unpack a layer; changes this process's root for good."""
    with open(path, "rb") as file:
        file.seek(offset)
        source = _Slice(file, length)
        head = source.read(4)
        if head == b"\x28\xb5\x2f\xfd":
            plain = _Plain(_Piped(_zstd(source, head)), b"", limit)
        else:
            plain = _Plain(source, head, limit)
        os.umask(0)
        # tarfile and codecs import lazily; nothing may be needed from the file system after the change of root.
        "x".encode("idna" if False else "utf-8")
        import shutil  # noqa: F401

        os.chroot(directory)
        os.chdir("/")
        unpacker = Unpacker()
        with tarfile.open(fileobj=plain, mode="r|", errorlevel=2, bufsize=_CHUNK) as tar:  # type: ignore[call-overload]
            for info in tar:
                unpacker.member(tar, info)
                tar.members = []  # a layer may have a million members; stream mode needs none of them
        unpacker.finish()
        while plain.read(_CHUNK):
            pass
        while source.read(_CHUNK):
            pass
    return {
        "digest": "sha256:" + source.hash.hexdigest(),
        "diff_id": "sha256:" + plain.hash.hexdigest(),
        "bytes": plain.size,
        "inodes": unpacker.inodes,
    }


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    try:
        directory, path, offset, length, limit = sys.argv[1:6]
        result = unpack(directory, path, int(offset), int(length), int(limit))
    except (OSError, LayerError, tarfile.TarError, zlib.error, EOFError, ValueError, MemoryError, RecursionError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
