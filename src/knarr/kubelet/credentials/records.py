"""Which images this kubelet has pulled, and with whose credentials: a pod may use a private image only when it could have pulled it.

Caller: images (with every pull and every start from an image that is there), garbage (`prune`). An intent is on disk before a pull begins,
so that an image whose pull the kubelet did not survive is not taken for one that was put on the node by its owner. Files are small and
written with pulls only; decisions are made in memory.
Source: pkg/kubelet/images/pullmanager, KEP-2535; formats kubelet.config.k8s.io/v1alpha1 ImagePullIntent, ImagePulledRecord.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.kubelet.credentials.keyring import Credential, Owner
from knarr.runtime.cri import Image

log = get_logger(__name__)

_VERSION = "kubelet.config.k8s.io/v1alpha1"
NEVER, PRELOADED, ALLOWLISTED, ALWAYS = "NeverVerify", "NeverVerifyPreloadedImages", "NeverVerifyAllowlistedImages", "AlwaysVerify"
POLICIES = (NEVER, PRELOADED, ALLOWLISTED, ALWAYS)
_MOST_REMEMBERED = 50
"""Secrets beyond which a merely matching one is not added to a record."""
_Record = dict[str, Any]


def policy(name: str, allowed: Collection[str] = ()) -> Callable[[str, bool], bool]:
    """(image without tag, pulled by this kubelet) to whether a pod must show credentials. `allowed`: names, or prefixes that end in /*."""
    names = frozenset(item for item in allowed if not item.endswith("/*"))
    prefixes = tuple(item[:-1] for item in allowed if item.endswith("/*"))
    decisions: dict[str, Callable[[str, bool], bool]] = {
        NEVER: lambda image, pulled: False,
        PRELOADED: lambda image, pulled: pulled,
        ALLOWLISTED: lambda image, pulled: image not in names and not image.startswith(prefixes),
        ALWAYS: lambda image, pulled: True,
    }
    return decisions[name]


def check_pattern(pattern: str) -> None:
    """Raises ValueError when it cannot be in the list of allowed images."""
    body = pattern[:-1] if pattern.endswith("/*") else pattern
    if not body.strip("/") or body != body.strip() or "*" in body or (body == pattern and (":" in body.rpartition("/")[2] or "@" in body)):
        raise ValueError(f"{pattern!r} is neither an image name without tag and digest nor a prefix that ends in /*")


class PullRecords:
    """See the module.

    Args:
      folder: where files are kept; made when the first is written.
      verify: as `policy` gives it.
    """

    def __init__(self, folder: str, verify: Callable[[str, bool], bool]) -> None:
        self._pulling, self._pulled = os.path.join(folder, "pulling"), os.path.join(folder, "pulled")
        self._verify = verify
        self._intents: Counter[str] = Counter({entry["image"]: 1 for entry in _load(self._pulling)})
        self._records: dict[str, _Record] = {entry["imageRef"]: entry for entry in _load(self._pulled)}
        self.unsettled = set(self._intents)
        """Pulls of an earlier kubelet of which it is not known how they ended."""

    # --- pulls ---

    def intend(self, image: str) -> None:
        """A pull begins; each call is followed by one of `pulled` or `failed`. Raises OSError."""
        if not self._intents[image]:
            _write(self._pulling, image, {"kind": "ImagePullIntent", "image": image})
        self._intents[image] += 1

    def failed(self, image: str) -> None:
        """It came to nothing."""
        self._intents[image] -= 1
        if self._intents[image] <= 0:
            del self._intents[image]
            _remove(self._pulling, image)

    def pulled(self, image: str, name: str, image_id: str, credential: Credential | None) -> None:
        """It brought an image; `name` is without tag and digest."""
        mapping: _Record = {"nodePodsAccessible": True}
        if credential is not None and credential.secret is not None:
            mapping = {"kubernetesSecrets": [_secret(credential, credential.secret)]}
        elif credential is not None and credential.account is not None:
            mapping = {"kubernetesServiceAccounts": [_coordinates(credential.account)]}
        if self._merge(name, image_id, mapping):
            self.failed(image)

    def settle(self, images: Sequence[Image]) -> None:
        """What an earlier kubelet was pulling and is here counts as pulled, by nobody known."""
        for image in images:
            for name in {*image.repo_tags, *image.repo_digests} & self.unsettled:
                if self._merge(name, image.id, None):
                    self.unsettled.discard(name)
                    self.failed(name)

    # --- decisions ---

    def open(self, image: str, name: str, image_id: str) -> bool | None:
        """Whether an image that is here is for every pod; None when it depends on the pod's credentials."""
        record = self._records.get(image_id)
        if not self._verify(name, record is not None or self._intents[image] > 0):
            return True
        held = ((record or {}).get("credentialMapping") or {}).get(name) or {}
        return True if held.get("nodePodsAccessible") else None if held else False

    def allows(self, name: str, image_id: str, credentials: Sequence[Credential]) -> bool:
        """Whether one of these has brought the image before."""
        held = self._records[image_id]["credentialMapping"][name]
        secrets: list[_Record] = held.get("kubernetesSecrets") or []
        for credential in credentials:
            if credential.secret is None:
                continue
            own = _secret(credential, credential.secret)
            for known in secrets:
                same_content = known["credentialHash"] == own["credentialHash"]
                same_object = all(known[field] == own[field] for field in ("namespace", "name", "uid"))
                if same_content or (same_object and len(secrets) < _MOST_REMEMBERED):
                    if not (same_content and same_object) and len(secrets) < _MOST_REMEMBERED:
                        self._merge(name, image_id, {"kubernetesSecrets": [own]})
                    return True
        account = next((c.account for c in credentials if c.account is not None), None)
        return account is not None and _coordinates(account) in (held.get("kubernetesServiceAccounts") or [])

    def prune(self, present: Collection[str], before: float) -> None:
        """Forget images that are gone; records younger than `before`, when the list of images was asked for, stay."""
        for image_id, record in list(self._records.items()):
            if image_id not in present and clock.parse_rfc3339(record["lastUpdatedTime"]) < before:
                del self._records[image_id]
                _remove(self._pulled, image_id)

    def _merge(self, name: str, image_id: str, mapping: _Record | None) -> bool:
        """Add to an image's record; False when that could not be written."""
        old = self._records.get(image_id)
        held = ((old or {}).get("credentialMapping") or {}).get(name) or {}
        new = _joined(held, mapping) if mapping else held
        if old is not None and new == held:
            return True
        record: _Record = {"kind": "ImagePulledRecord", "lastUpdatedTime": clock.now_rfc3339(), "imageRef": image_id}
        record["credentialMapping"] = {**((old or {}).get("credentialMapping") or {}), **({name: new} if new else {})}
        try:
            _write(self._pulled, image_id, record)
        except OSError as error:
            # The intent stays: the image still counts as pulled by this kubelet.
            log.error("failed to write image pulled record", image=image_id, error=str(error))
            return False
        self._records[image_id] = record
        return True


def _joined(held: _Record, new: _Record) -> _Record:
    if held.get("nodePodsAccessible") or new.get("nodePodsAccessible"):
        return {"nodePodsAccessible": True}
    out = dict(held)
    for kind, entries in new.items():
        by_object = {(e["namespace"], e["name"], e["uid"]): e for e in (*(held.get(kind) or ()), *entries)}
        out[kind] = [by_object[key] for key in sorted(by_object)]
    return out


def _coordinates(owner: Owner) -> _Record:
    return {"uid": owner.uid, "namespace": owner.namespace, "name": owner.name}


def _secret(credential: Credential, owner: Owner) -> _Record:
    return {**_coordinates(owner), "credentialHash": credential.digest()}


def _path(folder: str, key: str) -> str:
    return os.path.join(folder, "sha256-" + hashlib.sha256(key.encode()).hexdigest())


def _write(folder: str, key: str, record: _Record) -> None:
    os.makedirs(folder, 0o700, exist_ok=True)
    path = _path(folder, key)
    with open(path + ".tmp", "wb") as file:
        file.write(orjson.dumps({"apiVersion": _VERSION, **record}))
    os.replace(path + ".tmp", path)


def _remove(folder: str, key: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(folder, key))


def _load(folder: str) -> list[_Record]:
    out: list[_Record] = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        try:
            with open(os.path.join(folder, name), "rb") as file:
                record = orjson.loads(file.read())
            if not name.endswith(".tmp") and record["apiVersion"] == _VERSION and (record.get("image") or record["imageRef"]):
                out.append(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("record of an image pull not readable", file=name, error=repr(error))
    return out
