"""Ranges of host user ids for pods with `hostUsers: false`: one of 65536 ids per pod, remembered on disk.

Caller: pod_sync, at the start and the end of a pod. Source: pkg/kubelet/userns.
"""

from __future__ import annotations

import os

import orjson

from knarr.runtime.cri import IDMapping

_LENGTH = 65536
_FIRST = 65536
_RANGES = 1024


class NoRangeLeft(Exception):
    """All ranges are in use."""


class UserNamespaces:
    """Hands out id ranges; a restarted kubelet reads them from the pods' folders."""

    def __init__(self, pods_dir: str) -> None:
        self._pods_dir = pods_dir
        self._used: dict[str, int] = {}
        for uid in os.listdir(pods_dir) if os.path.isdir(pods_dir) else []:
            try:
                with open(self._path(uid), "rb") as file:
                    self._used[uid] = orjson.loads(file.read())["uidMappings"][0]["hostId"]
            except (OSError, ValueError, KeyError, IndexError):
                continue

    def _path(self, pod_uid: str) -> str:
        return os.path.join(self._pods_dir, pod_uid, "userns")

    def mappings(self, pod_uid: str) -> list[IDMapping]:
        """The pod's range, taken now if it has none. Raises NoRangeLeft or OSError."""
        first = self._used.get(pod_uid)
        if first is None:
            taken = set(self._used.values())
            first = next((b for b in range(_FIRST, _FIRST + _RANGES * _LENGTH, _LENGTH) if b not in taken), None)
            if first is None:
                raise NoRangeLeft("could not find an empty slot to allocate a user namespace")
            mapping = {"hostId": first, "containerId": 0, "length": _LENGTH}
            os.makedirs(os.path.dirname(self._path(pod_uid)), 0o750, exist_ok=True)
            with open(self._path(pod_uid), "wb") as file:
                file.write(orjson.dumps({"uidMappings": [mapping], "gidMappings": [mapping]}))
            self._used[pod_uid] = first
        return [IDMapping(first, 0, _LENGTH)]

    def release(self, pod_uid: str) -> None:
        """The pod is gone. Idempotent."""
        self._used.pop(pod_uid, None)
