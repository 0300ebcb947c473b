"""iSCSI disks: logged in to by the host's iscsiadm (open-iscsi), formatted and mounted as other block devices are, logged out of
when no pod of this node has one of the target's disks any more.

Caller: claims. Nothing is remembered: what is mounted says what is in use, and the name of a device's link its target, so that a
restarted kubelet goes on. Of several portals the first that gives the disk is used; paths are not combined (multipath), and the
initiator's name is the host's. Source: pkg/volume/iscsi/iscsi_util.go.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet.volumes import devices, mounts
from knarr.kubelet.volumes.model import VolumeError

log = get_logger(__name__)

FOLDER = "kubernetes.io~iscsi"
_LINKS = "/dev/disk/by-path"
_LINK = re.compile(r"ip-(?P<portal>.+)-iscsi-(?P<target>.+)-lun-\d+")
_APPEAR_SECONDS, _LOOK_SECONDS = 10.0, 0.1
_DISCOVERY_KEYS = ("discovery.sendtargets.auth.username", "discovery.sendtargets.auth.password", "discovery.sendtargets.auth.username_in", "discovery.sendtargets.auth.password_in")
_SESSION_KEYS = ("node.session.auth.username", "node.session.auth.password", "node.session.auth.username_in", "node.session.auth.password_in")


async def mount(source: Object, secret: Mapping[str, str], target: str, options: list[str], *, read_only: bool) -> None:
    """Bring a disk to this host and its file system to `target`. Idempotent.

    Raises:
      VolumeError: no such program, no such disk, or its file system cannot be mounted.
    """
    if mounts.is_mount_point(target):
        return
    try:
        device = await _attach(source, secret)
    except VolumeError as e:
        raise VolumeError(str(e), step="MountVolume.WaitForAttach") from e
    try:
        await devices.format_and_mount(device, target, source.get("fsType") or "ext4", options + (["ro"] if read_only else []), read_only=read_only)
    except VolumeError as e:
        raise VolumeError(str(e), step="MountVolume.MountDevice") from e


async def release(pod_dir: str) -> None:
    """Unmount a pod's disks, and log out of targets that are then in nobody's use. What fails is logged: it must not hold up the pod."""
    for point in mounts.mount_points(os.path.join(pod_dir, "volumes", FOLDER)):
        device = mounts.source_of(point)
        mounts.unmount(point, lazy=False)
        if device and not devices.is_mounted(device):
            await _detach(device)


async def _attach(source: Object, secret: Mapping[str, str]) -> str:
    if source.get("initiatorName"):
        raise VolumeError("iscsi: initiatorName is not supported here: the host's own name is used")
    interface = source.get("iscsiInterface") or "default"
    code, output = await devices.run("iscsiadm", "-m", "iface", "-I", interface, "-o", "show")
    if code != 0:
        raise VolumeError(f"iscsi: could not read iface {interface} error: {output.strip()}")
    last = ""
    for portal in (source["targetPortal"], *(source.get("portals") or [])):
        portal = portal if re.search(r":\d+$", portal) else f"{portal}:3260"
        try:
            return await _attach_by(portal, interface, source, secret)
        except VolumeError as e:
            last = str(e)
    raise VolumeError(f"failed to get any path for iscsi disk, last err seen:\n{last}")


async def _attach_by(portal: str, interface: str, source: Object, secret: Mapping[str, str]) -> str:
    link = os.path.join(_LINKS, f"ip-{portal.replace('[', '').replace(']', '')}-iscsi-{source['iqn']}-lun-{source.get('lun') or 0}")
    if os.path.exists(link):
        return link
    discovery = ("iscsiadm", "-m", "discoverydb", "-t", "sendtargets", "-p", portal, "-I", interface)
    node = ("iscsiadm", "-m", "node", "-p", portal, "-T", source["iqn"], "-I", interface)
    await devices.run(*discovery, "-o", "new")
    if source.get("chapAuthDiscovery"):
        await _authenticate(discovery, "discovery.sendtargets.auth.authmethod", _DISCOVERY_KEYS, secret, "discoverydb")
    code, output = await devices.run(*discovery, "--discover")
    if code != 0:
        await devices.run(*discovery, "-o", "delete")
        raise VolumeError(f"iscsi: failed to sendtargets to portal {portal} output: {output}, err exit status {code}")
    if source.get("chapAuthSession"):
        await _authenticate(node, "node.session.auth.authmethod", _SESSION_KEYS, secret, "node session")
    code, output = await devices.run(*node, "--login")
    if code != 0:
        await devices.run(*node, "-o", "delete")
        raise VolumeError(f"iscsi: failed to attach disk: Error: {output} (exit status {code})")
    # The host must not log in by itself when it starts.
    await devices.run(*node, "-o", "update", "-n", "node.startup", "-v", "manual")
    # The link is made by udev some moments after the login; the folder itself may not be there before the first disk.
    for _ in range(int(_APPEAR_SECONDS / _LOOK_SECONDS)):
        if os.path.exists(link):
            return link
        await asyncio.sleep(_LOOK_SECONDS)
    raise VolumeError(f"Timed out waiting for device at path {link} after {_APPEAR_SECONDS:.0f}s")


async def _authenticate(command: tuple[str, ...], method: str, keys: tuple[str, ...], secret: Mapping[str, str], what: str) -> None:
    for key, value in ((method, "CHAP"), *((key, secret[key]) for key in keys if secret.get(key))):
        code, output = await devices.run(*command, "-o", "update", "-n", key, "-v", value)
        if code != 0:
            raise VolumeError(f'iscsi: failed to update {what} key "{key}" error: {output}')


async def _detach(device: str) -> None:
    links = {name: os.path.realpath(os.path.join(_LINKS, name)) for name in (os.listdir(_LINKS) if os.path.isdir(_LINKS) else [])}
    found = next((match for name, real in links.items() if real == device and (match := _LINK.fullmatch(name))), None)
    if found is None:
        return
    portal, target = found["portal"], found["target"]
    if any(name.startswith(f"ip-{portal}-iscsi-{target}-lun-") and devices.is_mounted(real) for name, real in links.items()):
        return
    for action in (("--logout",), ("-o", "delete")):
        try:
            code, output = await devices.run("iscsiadm", "-m", "node", "-p", portal, "-T", target, *action)
        except VolumeError as e:
            code, output = -1, str(e)
        if code != 0:
            log.warning("iSCSI target not left", target=target, portal=portal, error=output.strip())
            return
