"""ControllerRevisions: the remembered templates of StatefulSets and DaemonSets.

Both controllers claim, find, renumber and trim them here; each names its own, and deals with taken names, in its own way.
Source: pkg/controller/history/controller_history.go, pkg/controller/daemon/update.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import orjson

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CONTROLLER_REVISIONS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.informer import Informer, Selector
from knarr.client.rest import Client
from knarr.controllers.context import possibly_owned
from knarr.controllers.podutil import created_at
from knarr.controllers.refs import Claims

_PREFIX_CHARACTERS = 223


def template_data(template: Object) -> Object:
    """The data of a revision: a patch that replaces the whole template.

    Keys are sorted at every level, as Go writes maps: others compare these bytes with what they would write.
    """
    patch: Object = orjson.loads(orjson.dumps({"spec": {"template": {**template, "$patch": "replace"}}}, option=orjson.OPT_SORT_KEYS))
    return patch


def template_of(revision: Object) -> Object:
    """The pod template that a revision remembers."""
    template = dict(((revision.get("data") or {}).get("spec") or {}).get("template") or {})
    template.pop("$patch", None)
    return template


def new_revision(parent: Object, owner: Resource, number: int, label: str, digest: str) -> Object:
    """Make (not write) the revision of the parent's present template; name and label tell its digest."""
    metadata, template = parent["metadata"], parent["spec"]["template"]
    revision_meta: Object = {
        "name": f"{metadata['name'][:_PREFIX_CHARACTERS]}-{digest}",
        "namespace": metadata["namespace"],
        "labels": {**((template.get("metadata") or {}).get("labels") or {}), label: digest},
        "ownerReferences": [meta.new_controller_ref(parent, owner.api_version, owner.kind)],
    }
    if meta.annotations(parent):
        revision_meta["annotations"] = dict(meta.annotations(parent))
    data = template_data(template)
    return {"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": revision_meta, "data": data, "revision": number}


def ordered(revisions: Sequence[Object]) -> list[Object]:
    """Oldest first."""
    return sorted(revisions, key=lambda item: (item.get("revision") or 0, created_at(item), item["metadata"]["name"]))


def limit_of(parent: Object) -> int:
    """How many old revisions the parent wants to keep."""
    limit = parent["spec"].get("revisionHistoryLimit")
    return 10 if limit is None else int(limit)


class History:
    """The revisions of the parents of one resource: reads them from the cache and writes them to the server."""

    def __init__(self, client: Client, cache: Informer, owner: Resource) -> None:
        self._client = client
        self._cache = cache
        self._owner = owner

    async def claim(self, parent: Object, selector: Selector, *, release: bool) -> list[Object]:
        """The parent's revisions, oldest first, those adopted that nobody has.

        What the selector no longer matches is left out, and also released if asked for.
        """
        found = possibly_owned(self._cache, parent)
        if not release:
            found = [revision for revision in found if selector.matches(meta.labels(revision))]
        return ordered(await Claims(self._client, CONTROLLER_REVISIONS, parent, self._owner, selector).claim(found))

    async def present(
        self, parent: Object, revisions: Sequence[Object], make: Callable[[int], Awaitable[Object]]
    ) -> tuple[Object, list[Object]]:
        """The revision of the parent's present template, and the others, oldest first.

        It gets the highest number when its template has come back; without one `make` creates it with the number given.
        """
        wanted = template_data(parent["spec"]["template"])
        same = [revision for revision in revisions if revision.get("data") == wanted]
        number = max((revision.get("revision") or 0 for revision in revisions if revision.get("data") != wanted), default=0) + 1
        if not same:
            return await make(number), list(revisions)
        others = [revision for revision in revisions if revision is not same[-1]]
        if (same[-1].get("revision") or 0) >= number:
            return same[-1], others
        return await self.renumber(same[-1], number), others

    async def create(self, revision: Object) -> Object | None:
        """Create a revision, or find it created by an earlier try; None when its name is taken by other data."""
        try:
            return await self._client.create(CONTROLLER_REVISIONS, revision)
        except StatusError as error:
            if not errors.is_already_exists(error):
                raise
        existing = await self._client.get(CONTROLLER_REVISIONS, revision["metadata"]["name"], revision["metadata"]["namespace"])
        return existing if existing.get("data") == revision["data"] else None

    async def renumber(self, revision: Object, number: int) -> Object:
        """Give a revision a new number, when its template comes back."""
        if revision.get("revision") == number:
            return revision
        try:
            return await self._client.update(CONTROLLER_REVISIONS, {**revision, "revision": number})
        except StatusError as error:
            if not errors.is_conflict(error):
                raise
            fresh = await self._client.get(CONTROLLER_REVISIONS, revision["metadata"]["name"], revision["metadata"]["namespace"])
            return await self._client.update(CONTROLLER_REVISIONS, {**fresh, "revision": number})

    async def trim(self, revisions: Sequence[Object], live: Callable[[Object], bool], excess: int) -> None:
        """Delete so many revisions, oldest first, but none that is live."""
        spare = [revision for revision in revisions if not live(revision)]
        for revision in spare[: max(0, excess)]:
            await self.delete(revision)

    async def delete(self, revision: Object) -> None:
        try:
            await self._client.delete(CONTROLLER_REVISIONS, revision["metadata"]["name"], revision["metadata"]["namespace"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
