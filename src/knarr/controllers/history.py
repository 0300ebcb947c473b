"""ControllerRevisions: the remembered templates of StatefulSets and DaemonSets.

Source: pkg/controller/history/controller_history.go.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CONTROLLER_REVISIONS
from knarr.api.types import Object
from knarr.client.informer import Informer, Selector
from knarr.client.rest import Client
from knarr.controllers.context import possibly_owned
from knarr.controllers.hashing import revision_hash
from knarr.controllers.podutil import created_at

HASH = "controller.kubernetes.io/hash"
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


def new_revision(
    parent: Object, api_version: str, kind: str, number: int, collision_count: int | None, *, annotations: bool = True
) -> Object:
    """Make (not write) the revision of the parent's present template."""
    template = parent["spec"]["template"]
    data = template_data(template)
    digest = revision_hash(orjson.dumps(data, option=orjson.OPT_SORT_KEYS), collision_count)
    labels = dict((template.get("metadata") or {}).get("labels") or {})
    labels[HASH] = digest
    revision_meta: Object = {
        "name": f"{parent['metadata']['name'][:_PREFIX_CHARACTERS]}-{digest}",
        "namespace": parent["metadata"]["namespace"],
        "labels": labels,
        "ownerReferences": [meta.new_controller_ref(parent, api_version, kind)],
    }
    if annotations and meta.annotations(parent):
        revision_meta["annotations"] = dict(meta.annotations(parent))
    return {"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": revision_meta, "data": data, "revision": number}


def ordered(revisions: Sequence[Object]) -> list[Object]:
    """Oldest first."""
    return sorted(revisions, key=lambda item: (item.get("revision") or 0, created_at(item), item["metadata"]["name"]))


def equal(left: Object, right: Object) -> bool:
    return left is right or left.get("data") == right.get("data")


class History:
    """Reads revisions from the cache and writes them to the server."""

    def __init__(self, client: Client, cache: Informer) -> None:
        self._client = client
        self._cache = cache

    def of(self, parent: Object, selector: Selector) -> list[Object]:
        """Revisions that the selector matches and the parent, or nobody, controls."""
        return [revision for revision in possibly_owned(self._cache, parent) if selector.matches(meta.labels(revision))]

    async def create(self, parent: Object, revision: Object, collision_count: int) -> tuple[Object, int]:
        """Create a revision; on a name that is taken by other data count a collision and try the next.

        Returns:
          (the revision as stored, the collision count then).
        """
        while True:
            digest = revision_hash(orjson.dumps(revision["data"], option=orjson.OPT_SORT_KEYS), collision_count)
            name = f"{parent['metadata']['name'][:_PREFIX_CHARACTERS]}-{digest}"
            labels = {**revision["metadata"]["labels"], HASH: digest}
            candidate = {**revision, "metadata": {**revision["metadata"], "name": name, "labels": labels}}
            try:
                return await self._client.create(CONTROLLER_REVISIONS, candidate), collision_count
            except StatusError as error:
                if not errors.is_already_exists(error):
                    raise
                existing = await self._client.get(CONTROLLER_REVISIONS, name, revision["metadata"]["namespace"])
                if equal(existing, revision):
                    return existing, collision_count
                collision_count += 1

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

    async def delete(self, revision: Object) -> None:
        try:
            await self._client.delete(CONTROLLER_REVISIONS, revision["metadata"]["name"], revision["metadata"]["namespace"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
