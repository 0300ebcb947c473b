"""The bpf system call: maps, programs, attaching to the cgroup tree.

Role: the wire floor of the direct path, as `netlink` is that of the rest. A library for it (libbpf, bcc) would bring
a compiler of a hundred megabytes; our programs are some hundred instructions, assembled by `assembler`.
Invariants: every descriptor belongs to one object and is closed with it; a program and its maps live on in the kernel
as long as they are attached. All calls take microseconds.
Source: linux/include/uapi/linux/bpf.h; man 2 bpf.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterable, Sequence

HASH, ARRAY, LPM_TRIE = 1, 2, 11
CLASSIFIER, SOCKET_ADDRESS = 3, 18
CONNECT4, CONNECT6, PEERNAME4, PEERNAME6 = 10, 11, 29, 30
NO_PREALLOCATION, MAPPABLE = 1, 1 << 10

_MAP_CREATE, _UPDATE, _DELETE, _LOAD, _UPDATE_BATCH, _LINK_CREATE = 0, 2, 3, 5, 26, 28
_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CREATE = 6
_CLOEXEC = 1
_LOG_BYTES = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)


def _failed(what: str, detail: str = "") -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}" + (f"\n{detail}" if detail else ""))


def _call(command: int, attributes: bytes, what: str) -> int:
    number = _BPF.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"{what}: no bpf system call known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(_libc.syscall(number, command, ctypes.byref(buffer), len(attributes)))
    if result < 0:
        raise _failed(what)
    return result


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Let go; what is attached stays, unless it is a `Link`. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Map(_Descriptor):
    """One map. Keys and values are bytes of exactly the declared sizes.

    Raises (every call): OSError with the kernel's errno.
    """

    def __init__(self, name: str, kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> None:
        self.name, self.key_bytes, self.value_bytes, self.entries = name, key_bytes, value_bytes, entries
        head = struct.pack("=IIIIIII16s", kind, key_bytes, value_bytes, entries, flags, 0, 0, name.encode()[:15])
        super().__init__(_call(_MAP_CREATE, head, f"making map {name}"))
        self._key = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)
        # What a command does not use must be zero.
        self._by_key = struct.pack("=IxxxxQQQ", self.fd, ctypes.addressof(self._key), 0, 0)
        self._one = struct.pack("=IxxxxQQQ", self.fd, ctypes.addressof(self._key), ctypes.addressof(self._value), 0)

    def _put(self, key: bytes, value: bytes = b"") -> None:
        if len(key) != self.key_bytes or len(value) not in (0, self.value_bytes):
            raise ValueError(f"map {self.name}: a key of {len(key)} and a value of {len(value)} bytes")
        ctypes.memmove(self._key, key, len(key))
        if value:
            ctypes.memmove(self._value, value, len(value))

    def set(self, key: bytes, value: bytes) -> None:
        """Add or replace an entry; a program sees the old or the new one, never a mixture."""
        self._put(key, value)
        _call(_UPDATE, self._one, f"writing map {self.name}")

    def set_all(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """`set` for many, in one call where the kernel can (5.6 and later)."""
        if len(items) < 8:
            for key, value in items:
                self.set(key, value)
            return
        keys, values = b"".join(key for key, _value in items), b"".join(value for _key, value in items)
        if len(keys) != len(items) * self.key_bytes or len(values) != len(items) * self.value_bytes:
            raise ValueError(f"map {self.name}: entries of a wrong size")
        keep = ctypes.create_string_buffer(keys, len(keys)), ctypes.create_string_buffer(values, len(values))
        request = struct.pack("=QQQQIIQQ", 0, 0, ctypes.addressof(keep[0]), ctypes.addressof(keep[1]), len(items), self.fd, 0, 0)
        _call(_UPDATE_BATCH, request, f"writing {len(items)} entries of map {self.name}")

    def delete(self, key: bytes) -> None:
        """Remove an entry; one that is missing is fine."""
        self._put(key)
        try:
            _call(_DELETE, self._by_key, f"deleting from map {self.name}")
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def delete_all(self, keys: Iterable[bytes]) -> None:
        """`delete` for many."""
        for key in keys:
            self.delete(key)

    def memory(self) -> mmap.mmap:
        """A MAPPABLE array's content as memory that programs and we both write."""
        size = (self.entries * self.value_bytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        return mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


class Program(_Descriptor):
    """One program, checked and compiled by the kernel.

    Raises:
      OSError: refused; the text ends with the verifier's last words.
    """

    def __init__(self, name: str, kind: int, code: bytes, attach_type: int = 0) -> None:
        instructions, license_ = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"Dual MIT/GPL")
        self.name, self.attach_type = name, attach_type

        def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
            room = (1, _LOG_BYTES, ctypes.addressof(log)) if log is not None else (0, 0, 0)
            head = struct.pack(
                "=IIQQIIQII16sII",
                kind,
                len(code) // 8,
                ctypes.addressof(instructions),
                ctypes.addressof(license_),
                *room,
                0,
                0,
                name.encode()[:15],
                0,
                attach_type,
            )
            return _call(_LOAD, head, f"loading program {name}")

        try:
            fd = load(None)
        except OSError as error:
            log = ctypes.create_string_buffer(_LOG_BYTES)
            try:
                fd = load(log)
            except OSError:
                words = log.value.decode(errors="replace").strip().splitlines()[-12:]
                raise OSError(error.errno, f"{error.strerror}\n" + "\n".join(words)) from error
        super().__init__(fd)


class Link(_Descriptor):
    """A program attached to a cgroup and all below it, beside others; closing it detaches."""

    def __init__(self, program: Program, cgroup: int) -> None:
        request = struct.pack("=IIII", program.fd, cgroup, program.attach_type, 0)
        super().__init__(_call(_LINK_CREATE, request, f"attaching program {program.name}"))


def root_cgroup() -> int:
    """A descriptor of the top of the cgroup v2 tree (of our cgroup namespace), wherever and whether it is mounted. Raises OSError."""

    def ask(number: int, *arguments: object) -> int:
        result = int(_libc.syscall(number, *arguments))
        if result < 0:
            raise _failed("opening the cgroup tree")
        return result

    context = ask(_FSOPEN, b"cgroup2", _CLOEXEC)
    try:
        ask(_FSCONFIG, context, _FSCONFIG_CREATE, None, None, 0)
        mount = ask(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
