"""Adoption and release: making owner references agree with selectors.

An object that the selector matches and nobody controls is adopted; one that we control but the
selector no longer matches is released. Before the first adoption the owner is read from the
server, because a cached owner may be deleted already.
Source: pkg/controller/controller_ref_manager.go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.podutil import gather_all

_NO_LABELS: dict[str, str] = {}


class Selector(Protocol):
    def matches(self, labels: dict[str, str], /) -> bool: ...


class Claims:
    """Claims objects of one resource for one owner; make a new one per reconcile."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        owner: Object,
        owner_resource: Resource,
        selector: Selector,
        *,
        finalizers: tuple[str, ...] = (),
    ) -> None:
        self._client = client
        self._resource = resource
        self._owner = owner
        self._owner_resource = owner_resource
        self._selector = selector
        self._finalizers = finalizers
        self._checked: Exception | None = None
        self._was_checked = False

    async def claim(self, objects: Iterable[Object]) -> list[Object]:
        """Give the objects that belong to the owner now, adopting and releasing as needed.

        Raises:
          StatusError: an adoption or release failed; what was done stays done.
        """
        owner_meta = self._owner["metadata"]
        claimed: list[Object] = []
        adopt: list[Object] = []
        release: list[Object] = []
        # Informers keep equal labels of many pods once: each is matched once.
        matched: dict[int, bool] = {}
        for obj in objects:
            reference = meta.controller_of(obj)
            labels = obj["metadata"].get("labels") or _NO_LABELS
            matches = matched.get(id(labels))
            if matches is None:
                matches = matched[id(labels)] = self._selector.matches(labels)
            if reference is not None:
                if reference["uid"] != owner_meta["uid"]:
                    continue
                if matches:
                    claimed.append(obj)
                elif "deletionTimestamp" not in owner_meta:
                    release.append(obj)
            elif matches and "deletionTimestamp" not in owner_meta and "deletionTimestamp" not in obj["metadata"]:
                adopt.append(obj)
        if release:
            await gather_all([self._release(obj) for obj in release])
        if adopt:
            await self._check_owner()
            adopted: list[Object] = []
            await gather_all([self._adopt(obj, adopted) for obj in adopt])
            claimed += adopted
        return claimed

    async def _check_owner(self) -> None:
        owner_meta = self._owner["metadata"]
        fresh = await self._client.get(self._owner_resource, owner_meta["name"], owner_meta.get("namespace"))
        if fresh["metadata"]["uid"] != owner_meta["uid"]:
            raise errors.conflict(self._owner_resource, owner_meta["name"], "the original owner is gone")
        if "deletionTimestamp" in fresh["metadata"]:
            raise errors.conflict(self._owner_resource, owner_meta["name"], "the owner is being deleted")

    async def _adopt(self, obj: Object, adopted: list[Object]) -> None:
        reference = meta.new_controller_ref(self._owner, self._owner_resource.api_version, self._owner_resource.kind)
        patch: Object = {"metadata": {"ownerReferences": [reference], "uid": obj["metadata"]["uid"]}}
        if self._finalizers:
            patch["metadata"]["finalizers"] = list(self._finalizers)
        try:
            updated = await self._client.patch(
                self._resource, obj["metadata"]["name"], obj["metadata"].get("namespace"), patch, type="strategic"
            )
        except StatusError as error:
            if errors.is_not_found(error):
                return
            raise
        adopted.append({**obj, "metadata": {**obj["metadata"], **updated["metadata"]}})

    async def _release(self, obj: Object) -> None:
        owner_uid = self._owner["metadata"]["uid"]
        patch: Object = {"metadata": {"ownerReferences": [{"$patch": "delete", "uid": owner_uid}], "uid": obj["metadata"]["uid"]}}
        if self._finalizers:
            patch["metadata"]["$deleteFromPrimitiveList/finalizers"] = list(self._finalizers)
        try:
            await self._client.patch(self._resource, obj["metadata"]["name"], obj["metadata"].get("namespace"), patch, type="strategic")
        except StatusError as error:
            # Gone, or another object of that name: either way there is nothing left to release.
            if not errors.is_not_found(error) and not errors.is_invalid(error):
                raise
