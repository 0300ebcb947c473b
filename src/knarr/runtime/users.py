"""Users and groups of a container, looked up in the image's own /etc/passwd and /etc/group.

Role: below container.py. The files belong to the image, so they are opened without leaving its root, and read with a bound.
Source: moby/sys/user, containerd oci.WithUser and WithAdditionalGIDs, KEP-3619 (supplementalGroupsPolicy).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from knarr.runtime import syscalls
from knarr.runtime.cri import ContainerSecurity, RuntimeFault

_MAX_FILE = 4 << 20


@dataclass(frozen=True, slots=True)
class User:
    """The identity of a container's first process."""

    uid: int = 0
    gid: int = 0
    groups: list[int] = field(default_factory=list)
    """Supplemental groups, without repetition, in order."""
    home: str = "/"


def _lines(root: str, path: str) -> list[list[str]]:
    try:
        fd = syscalls.open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return []
        text = file.read(_MAX_FILE).decode("utf-8", "replace")
    return [line.split(":") for line in text.splitlines() if line and not line.startswith("#")]


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() and len(text) < 11 else None


def resolve(root: str, image_user: str, security: ContainerSecurity) -> User:
    """Decide uid, gid and groups. Blocks (reads the image's files). Raises RuntimeFault for names the image lacks.

    Args:
      root: The container's mounted root.
      image_user: "User" of the image's configuration: user, user:group, or numbers.
    """
    wanted, _, wanted_group = image_user.partition(":")
    if security.run_as_user is not None:
        wanted, wanted_group = str(security.run_as_user), ""
    elif security.run_as_username:
        wanted, wanted_group = security.run_as_username, ""
    if security.run_as_group is not None:
        wanted_group = str(security.run_as_group)
    passwd, groups = _lines(root, "/etc/passwd"), _lines(root, "/etc/group")
    uid, gid, name, home = 0, 0, "", "/"
    number = _number(wanted)
    entry = next((line for line in passwd if len(line) >= 4 and (line[0] == wanted or (number is not None and line[2] == wanted))), None)
    if not wanted:
        entry = next((line for line in passwd if len(line) >= 4 and line[2] == "0"), None)
    if entry is not None:
        name, uid, gid = entry[0], _number(entry[2]) or 0, _number(entry[3]) or 0
        home = entry[5] if len(entry) > 5 and entry[5] else "/"
    elif number is not None:
        uid = number
    elif wanted:
        raise RuntimeFault(f"unable to find user {wanted}: no matching entries in passwd file")
    if wanted_group:
        gid = _group(groups, wanted_group)
    supplemental: list[int] = []
    if security.supplemental_groups_policy == "Merge" and name:
        for line in groups:
            if len(line) >= 4 and name in line[3].split(",") and (member := _number(line[2])) is not None:
                supplemental.append(member)
    supplemental += security.supplemental_groups
    return User(uid, gid, list(dict.fromkeys([gid, *supplemental])), home)


def _group(groups: list[list[str]], wanted: str) -> int:
    for line in groups:
        if len(line) >= 3 and line[0] == wanted and (number := _number(line[2])) is not None:
            return number
    number = _number(wanted)
    if number is None:
        raise RuntimeFault(f"unable to find group {wanted}: no matching entries in group file")
    return number
