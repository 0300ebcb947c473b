"""File systems on block devices and on the network: looked for, checked, made, mounted and grown by the host's own programs.

Caller: claims. A device is looked at by one pod at a time, so that two that start together do not both format it; several pods of
this node may then mount it, as the kernel shares one file system. Nothing here unmounts: a pod's folder is unmounted as a whole.
Source: k8s.io/mount-utils mount_linux.go (SafeFormatAndMount, checkAndRepairFilesystem), resizefs_linux.go, pkg/volume/local.
"""

from __future__ import annotations

import asyncio
import os
from weakref import WeakValueDictionary

from knarr.aiokits.log import get_logger
from knarr.kubelet.volumes import mounts
from knarr.kubelet.volumes.model import VolumeError

log = get_logger(__name__)

_MOUNT_TIMEOUT_SECONDS = 60.0
_FORMAT_TIMEOUT_SECONDS = 600.0
_FSCK_CORRECTED, _FSCK_UNCORRECTED = 1, 4

_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


async def run(*argv: str, timeout_seconds: float = _MOUNT_TIMEOUT_SECONDS) -> tuple[int, str]:
    """(exit code, all that the program said). Raises VolumeError when it is missing or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except FileNotFoundError as e:
        raise VolumeError(f'exec: "{argv[0]}": executable file not found in $PATH') from e
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    except BaseException as e:
        process.kill()
        await process.wait()
        if isinstance(e, TimeoutError):
            raise VolumeError(f"{' '.join(argv)}: timed out") from e
        raise
    return process.returncode or 0, output.decode(errors="replace")


async def mount_program(device: str, target: str, kind: str, options: list[str]) -> None:
    """Mount by mount(8), which knows the helpers of network file systems. Idempotent.

    Raises:
      VolumeError: with what the program said; also when the host has no helper for this kind.
    """
    os.makedirs(target, 0o750, exist_ok=True)
    if mounts.is_mount_point(target):
        return
    argv = ["mount", "-t", kind, *(["-o", ",".join(options)] if options else []), device, target]
    try:
        code, output = await run(*argv)
    except VolumeError as e:
        raise VolumeError(f"mount failed: {e}") from e
    if code != 0:
        raise VolumeError(f"mount failed: exit status {code}\nMounting command: mount\nMounting arguments: {' '.join(argv[1:])}\nOutput: {output}")


async def format_and_mount(device: str, target: str, kind: str, options: list[str], *, read_only: bool = False) -> None:
    """Mount a device's file system, which is made when the device holds nothing at all. Idempotent.

    Raises:
      VolumeError: the device holds something else, or a program failed; in its words.
    """
    if mounts.is_mount_point(target):
        return
    real = os.path.realpath(device)
    lock = _locks.setdefault(real, asyncio.Lock())
    async with lock:
        held = await _held_by(device)
        if not held and read_only:
            raise VolumeError(f"cannot mount unformatted disk {device} as we are manipulating it in read-only mode")
        if not held:
            log.info("making a file system", device=device, kind=kind)
            await _format(device, target, kind, options)
        elif not read_only and not is_mounted(real):
            await _check(device)
        try:
            await mount_program(device, target, kind, options)
        except VolumeError as e:
            if held and held != kind:
                raise VolumeError(f'failed to mount the volume as "{kind}", it already contains {held}. Mount error: {e}') from e
            raise


async def grow(device: str, target: str) -> None:
    """Let a mounted file system take all of its device. Raises VolumeError: a kind that cannot, or in the words of the program."""
    kind = await _held_by(device)
    commands = {"xfs": ["xfs_growfs", target], "btrfs": ["btrfs", "filesystem", "resize", "max", target]}
    if kind in ("ext2", "ext3", "ext4"):
        commands[kind] = ["resize2fs", device]
    if kind not in commands:
        raise VolumeError(f"resize of format {kind} is not supported for device {device} mounted at {target}")
    code, output = await run(*commands[kind], timeout_seconds=_FORMAT_TIMEOUT_SECONDS)
    if code != 0:
        raise VolumeError(f"resize of device {device} failed: exit status {code}. {commands[kind][0]} output: {output}")


async def _held_by(device: str) -> str:
    """What a device holds: the kind of file system, words for anything else, "" for nothing."""
    code, output = await run("blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device)
    if code == 2:
        return ""
    if code != 0:
        raise VolumeError(f"failed to get the disk format of {device}: exit status {code}: {output.strip()}")
    found = dict(line.partition("=")[::2] for line in output.splitlines())
    return "unknown data, probably partitions" if found.get("PTTYPE") else found.get("TYPE", "")


async def _format(device: str, target: str, kind: str, options: list[str]) -> None:
    arguments = ["-F", "-m0"] if kind in ("ext3", "ext4") else []
    code, output = await run(f"mkfs.{kind}", *arguments, device, timeout_seconds=_FORMAT_TIMEOUT_SECONDS)
    if code != 0:
        raise VolumeError(f'format of disk "{device}" failed: type:("{kind}") target:("{target}") options:("{",".join(options)}") errcode:(exit status {code}) output:({output})')


async def _check(device: str) -> None:
    try:
        code, output = await run("fsck", "-a", device, timeout_seconds=_FORMAT_TIMEOUT_SECONDS)
    except VolumeError as e:
        log.warning("file system not checked", device=device, error=str(e))
        return
    if code == _FSCK_UNCORRECTED:
        raise VolumeError(f"'fsck' found errors on device {device} but could not correct them: {output}")
    if code == _FSCK_CORRECTED:
        log.info("file system repaired", device=device)


def is_mounted(device: str) -> bool:
    """Whether a device's file system is mounted anywhere in sight."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return any(line.partition(" - ")[2].split()[1:2] == [device] for line in file)
