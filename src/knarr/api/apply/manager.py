"""Server-side apply and the tracking of ownership on every other write.

A FieldManager serves one resource (or subresource) in one version and is shared. `update` is called on create, update
and the other patches, `apply` on apply patches. Pure but for the clock, which callers may pass.

Source: structured-merge-diff merge/update.go; apimachinery util/managedfields/internal (fieldmanager.go,
structuredmerge.go, managedfieldsupdater.go, skipnonapplied.go, stripmeta.go, lastapplied*.go), KEP-555.
"""

from collections.abc import Callable
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.apply import fieldset as fs
from knarr.api.apply import managed, walk
from knarr.api.apply.fieldset import FieldSet
from knarr.api.apply.managed import APPLY, UPDATE, Conflicts, ManagerID, Managers, Owned
from knarr.api.apply.shapes import Shapes, shape
from knarr.api.apply.types import Kind
from knarr.api.meta import deep_copy
from knarr.api.types import Object

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_BEFORE_FIRST_APPLY = "before-first-apply"
MOST_SETTLED = 2048
_SELF = ManagerID("current-operation", UPDATE, "", "")

_STRIPPED = fs.of_paths(
    ("apiVersion",), ("kind",), ("metadata",), ("metadata", "name"), ("metadata", "namespace"), ("metadata", "creationTimestamp"),
    ("metadata", "selfLink"), ("metadata", "uid"), ("metadata", "clusterName"), ("metadata", "generation"),
    ("metadata", "managedFields"), ("metadata", "resourceVersion"),
)

Filter = Callable[[FieldSet], FieldSet]
Converter = Callable[[Object, str], Object | None]


class FieldManager:
    """Tracks and merges for one resource in one version.

    Args:
      kind: How objects of the version merge.
      api_version, kind_name: Of the objects.
      subresource: "" for the resource itself.
      reset: Takes the fields that the endpoint's strategy resets out of a set; None keeps all.
      empty: Makes the object that stands for "nothing yet".
      finish: Brings a merged object into canonical form and applies defaults, in place.
      convert: (object, api_version) -> the object in another version, None if there is no such version any more.
      kind_of: The Kind of another version.
    """

    def __init__(
        self, kind: Kind, api_version: str, kind_name: str, *, subresource: str = "", reset: Filter | None = None,
        empty: Callable[[], Object], finish: Callable[[Object], None], convert: Converter | None = None,
        kind_of: Callable[[str], Kind] | None = None,
    ) -> None:
        self._kind = kind
        self._api_version = api_version
        self._kind_name = kind_name
        self._subresource = subresource
        self._reset = reset
        self._empty = empty
        self._finish = finish
        self._convert = convert
        self._kind_of = kind_of
        self._shapes = Shapes()
        self._settled: dict[tuple[int, str], FieldSet] = {}
        """Sets known to fit the schema, by identity and version."""

    # --- writes other than apply --------------------------------------------------------------------------------------

    def update(self, live: Object | None, new: Object, manager: str, *, now: str | None = None) -> None:
        """Record a create or update: sets new's managedFields in place.

        Args:
          live: The object before, None on create.
          new: The object after, in canonical form; its own managedFields count only on the resource itself, where an
            empty list, or a list of one empty entry, resets the tracking.
          manager: The field manager's name.

        Problems never fail a write: the object then goes untracked, as upstream does.
        """
        meta = new.setdefault("metadata", {})
        given = meta.pop("managedFields", None)
        key: Any = None
        if live is None and given is None and not self._subresource:
            key = shape(new)
            fields = self._shapes.get(key)
            if fields is not None:
                meta["managedFields"] = [{
                    "manager": manager or "unknown", "operation": UPDATE, "apiVersion": self._api_version, "time": now or clock.now_rfc3339(),
                    "fieldsType": "FieldsV1", "fieldsV1": fields,
                }]
                return
        try:
            managers = self._managers_for_update(live, given)
            live_or_empty = live if live is not None else self._empty()
            managers = self._update_as(live_or_empty, new, managers, manager or "unknown", now or clock.now_rfc3339())
        except (ValueError, walk.TypeMismatch, RecursionError):
            return
        if managers:
            meta["managedFields"] = managed.encode(managers)
            if key is not None:
                self._shapes.put(key, meta["managedFields"][0]["fieldsV1"])

    def _managers_for_update(self, live: Object | None, given: Any) -> Managers:
        before = (live or {}).get("metadata", {}).get("managedFields")
        if not self._subresource and given is not None:
            if given == [] or given == [{}]:
                return {}
            try:
                decoded = managed.decode(given)
            except ValueError:
                decoded = {}
            if decoded:
                return decoded
        try:
            return managed.decode(before)
        except ValueError:
            return {}

    def _update_as(self, live: Object, new: Object, managers: Managers, manager: str, now: str) -> Managers:
        if not managers and live.get("metadata", {}).get("uid"):
            # An object that nobody tracked stays untracked until its first apply.
            return managers
        return managed.cap_updaters(self._tracked_update(live, new, managers, manager, now))

    def _tracked_update(self, live: Object, new: Object, managers: Managers, manager: str, now: str) -> Managers:
        managers = self._reconciled(live, managers)
        managers, comparison = self._compare_and_take(live, new, managers, _SELF, force=True)
        own = fs.union(comparison.modified, comparison.added)
        if self._reset is not None:
            own = self._reset(own)
        own = fs.difference(own, _STRIPPED)
        if own:
            identity = managed.manager_id(manager, UPDATE, self._api_version, self._subresource)
            previous = managers.get(identity)
            fields = fs.union(own, previous.fields) if previous else own
            managers[identity] = Owned(fields, self._api_version, False, now)
        return managers

    # --- apply ---------------------------------------------------------------------------------------------------------

    def apply(self, live: Object | None, patch: Object, manager: str, *, force: bool = False, now: str | None = None) -> Object:
        """Apply a configuration.

        Args:
          live: The object as stored, None to create it.
          patch: The configuration as sent.
          manager: The field manager's name, not empty.
          force: Take fields that others own.

        Returns:
          The new object, canonical, defaulted, with managedFields. Neither argument is changed.

        Raises:
          StatusError: 400 wrong version or kind, managedFields in the patch; 409 conflicts; 500 schema violations.
        """
        now = now or clock.now_rfc3339()
        self._check_identity(patch)
        exists = live is not None
        before = live if live is not None else self._empty()
        try:
            managers = managed.decode(before.get("metadata", {}).get("managedFields"))
        except ValueError as error:
            raise errors.StatusError(500, "", f"failed to decode managed fields: {error}") from None
        stripped = _without_managed_fields(before)
        try:
            if not managers and exists:
                managers = self._tracked_update(self._empty(), stripped, managers, _BEFORE_FIRST_APPLY, now)
            new, managers = self._apply_as(stripped, patch, managers, manager, force, now)
        except Conflicts as conflicts:
            raise managed.conflict_error(conflicts) from None
        if manager == "kubectl" and (new.get("metadata", {}).get("annotations") or {}).get(LAST_APPLIED):
            new["metadata"]["annotations"] = {**new["metadata"]["annotations"], LAST_APPLIED: _last_applied(patch)}
        if managers:
            new["metadata"]["managedFields"] = managed.encode(managers)
        return new

    def _check_identity(self, patch: Object) -> None:
        version, kind = _text(patch.get("apiVersion")), _text(patch.get("kind"))
        if version != self._api_version or kind != self._kind_name:
            raise errors.bad_request(f"invalid object type: {_group_version(version)}, Kind={kind}")
        meta = patch.get("metadata")
        if isinstance(meta, dict) and meta.get("managedFields") is not None:
            raise errors.bad_request("metadata.managedFields must be nil")

    def _apply_as(self, live: Object, patch: Object, managers: Managers, manager: str, force: bool, now: str) -> tuple[Object, Managers]:
        try:
            return self._merge_and_take(live, patch, managers, manager, force, now)
        except Conflicts as conflicts:
            if manager != "kubectl":
                raise
            rest = self._not_last_applied(live, conflicts)
            if rest:
                raise Conflicts(rest) from None
            return self._merge_and_take(live, patch, managers, manager, True, now)

    def _not_last_applied(self, live: Object, conflicts: Conflicts) -> dict[ManagerID, FieldSet]:
        """The conflicts that the last client-side apply does not explain."""
        text = (live.get("metadata", {}).get("annotations") or {}).get(LAST_APPLIED)
        try:
            last = orjson.loads(text or "")
            if last.get("apiVersion") != self._api_version:
                raise ValueError("other version")
            walk.check(self._kind, last)
            allowed = walk.field_set(self._kind, last)
            comparison = walk.compare(self._kind, last, live)
        except (ValueError, AttributeError):
            return conflicts.by_manager
        for changed in (comparison.modified, comparison.added, comparison.removed):
            allowed = fs.difference(allowed, changed)
        rest = {identity: fs.difference(fields, allowed) for identity, fields in conflicts.by_manager.items()}
        return {identity: fields for identity, fields in rest.items() if fields}

    def _merge_and_take(
        self, live: Object, patch: Object, managers: Managers, manager: str, force: bool, now: str,
    ) -> tuple[Object, Managers]:
        identity = managed.manager_id(manager, APPLY, self._api_version, self._subresource)
        try:
            walk.check(self._kind, patch)
        except walk.TypeMismatch as error:
            raise errors.StatusError(500, "", f"failed to create typed patch object ({self._object_text(patch)}): {error}") from None
        managers = self._reconciled(live, managers)
        merged = walk.merge(self._kind, live, patch)
        own = walk.field_set(self._kind, patch)
        if self._reset is not None:
            own = self._reset(own)
        last = managers.get(identity)
        managers[identity] = Owned(own, self._api_version, True, last.time if last else None)
        merged = self._prune(merged, managers, last, own)
        managers, _ = self._compare_and_take(live, merged, managers, identity, force=force)
        changed = not walk._same(live, merged)
        taken = managers.get(identity)
        if taken is not None:
            fields = fs.difference(taken.fields, _STRIPPED)
            if fields:
                managers[identity] = Owned(fields, self._api_version, True, now if changed else taken.time)
            else:
                del managers[identity]
        if not changed:
            return deep_copy(live), managers
        new: Object = deep_copy(merged)
        try:
            self._finish(new)
        except errors.StatusError as error:
            raise errors.StatusError(500, "", self._unfit(patch, error.message)) from None
        return new, managers

    def _unfit(self, patch: Object, why: str) -> str:
        """What is said of a merged object that the version's type cannot hold."""
        version = _group_version(self._api_version)
        reason = why.partition(f"cannot be handled as a {self._kind_name}: ")[2] or why
        return (
            f"failed to convert new object ({self._object_text(patch)}) to proper version: "
            f"unable to convert unstructured object to {version}, Kind={self._kind_name}: {reason}"
        )

    def _object_text(self, obj: Object) -> str:
        meta = obj.get("metadata")
        if not isinstance(meta, dict):
            meta = {}
        return f"{meta.get('namespace') or ''}/{meta.get('name') or ''}; {_group_version(self._api_version)}, Kind={self._kind_name}"

    def _prune(self, merged: Any, managers: Managers, last: Owned | None, own: FieldSet) -> Any:
        """Take out what the manager applied before and does not any more, unless somebody else owns it."""
        if last is None or not last.fields:
            return merged
        if last.api_version == self._api_version and not fs.difference(last.fields, own):
            # Everything it applied before it applies again, and what is owned is never taken out: the common case.
            return merged
        at_last = self._in_version(merged, last.api_version)
        if at_last is None:
            return merged
        kind = self._kind_in(last.api_version)
        pruned = walk.remove(kind, at_last, walk.with_named_fields(kind, last.fields))
        pruned = self._add_back_owned(at_last, pruned, last.api_version, managers)
        # What the manager did not own, but which hung below what it did, comes back as well.
        pruned_set = walk.with_named_fields(kind, walk.field_set(kind, pruned))
        merged_set = walk.with_named_fields(kind, walk.field_set(kind, at_last))
        dangling = fs.intersection(fs.difference(merged_set, pruned_set), walk.with_named_fields(kind, last.fields))
        result = walk.remove(kind, at_last, dangling)
        if last.api_version != self._api_version and self._convert is not None:
            return self._convert(result, self._api_version) or merged
        return result

    def _add_back_owned(self, merged: Any, pruned: Any, version: str, managers: Managers) -> Any:
        by_version: dict[str, FieldSet] = {}
        for owned in managers.values():
            by_version[owned.api_version] = fs.union(by_version.get(owned.api_version, fs.EMPTY), owned.fields)
        current = version
        for other in sorted(by_version, key=lambda v: v != version):
            merged_there = merged if other == current else self._in_version(merged, other)
            pruned_there = pruned if other == current else self._in_version(pruned, other)
            if merged_there is None or pruned_there is None:
                continue
            kind = self._kind_in(other)
            keep = fs.union(
                walk.with_named_fields(kind, walk.field_set(kind, pruned_there)), walk.with_named_fields(kind, by_version[other]),
            )
            everything = walk.with_named_fields(kind, walk.field_set(kind, merged_there))
            merged, pruned, current = merged_there, walk.remove(kind, merged_there, fs.difference(everything, keep)), other
        return pruned if current == version else self._in_version(pruned, version) or pruned

    # --- shared --------------------------------------------------------------------------------------------------------

    def _kind_in(self, version: str) -> Kind:
        return self._kind if version == self._api_version or self._kind_of is None else self._kind_of(version)

    def _in_version(self, obj: Any, version: str) -> Any:
        """The object in a version, None if there is no such version any more."""
        given = obj.get("apiVersion") if isinstance(obj, dict) else None
        if version == (given or self._api_version):
            return obj
        return self._convert(obj, version) if self._convert is not None else None

    def _reconciled(self, live: Object, managers: Managers) -> Managers:
        """The managers with sets that fit today's schema; those of versions that are gone are left out."""
        result: Managers = {}
        for identity, owned in managers.items():
            if owned.api_version != self._api_version and self._in_version(live, owned.api_version) is None:
                continue
            if self._settled.get((id(owned.fields), owned.api_version)) is owned.fields:
                result[identity] = owned
                continue
            fields = walk.reconcile(self._kind_in(owned.api_version), owned.fields)
            if fields is owned.fields:
                result[identity] = owned
                if len(self._settled) >= MOST_SETTLED:
                    self._settled.clear()
                self._settled[id(fields), owned.api_version] = fields
            else:
                result[identity] = owned.having(fields)
        return result

    def _compare_and_take(
        self, old: Object, new: Any, managers: Managers, workflow: ManagerID, *, force: bool,
    ) -> tuple[Managers, walk.Comparison]:
        """Take what changed from everybody else; conflicts are an error unless forced."""
        comparisons = {self._api_version: self._filtered(walk.compare(self._kind, old, new))}
        conflicts: dict[ManagerID, FieldSet] = {}
        result = dict(managers)
        for identity, owned in managers.items():
            if identity == workflow:
                continue
            comparison = comparisons.get(owned.api_version)
            if comparison is None:
                old_there, new_there = self._in_version(old, owned.api_version), self._in_version(new, owned.api_version)
                if old_there is None or new_there is None:
                    del result[identity]
                    continue
                comparison = self._filtered(walk.compare(self._kind_in(owned.api_version), old_there, new_there))
                comparisons[owned.api_version] = comparison
            conflict = fs.intersection(owned.fields, fs.union(comparison.modified, comparison.added))
            fields = owned.fields
            if conflict:
                conflicts[identity] = conflict
                fields = fs.difference(fields, conflict)
            if comparison.removed:
                fields = fs.difference(fields, comparison.removed)
            if fields is not owned.fields:
                result[identity] = owned.having(fields)
        if conflicts and not force:
            raise Conflicts(conflicts)
        return {i: o for i, o in result.items() if o.fields}, comparisons[self._api_version]

    def _filtered(self, comparison: walk.Comparison) -> walk.Comparison:
        if self._reset is None:
            return comparison
        return walk.Comparison(self._reset(comparison.removed), self._reset(comparison.modified), self._reset(comparison.added))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _group_version(api_version: str) -> str:
    """The group and version as in messages: that of the core group begins with the slash."""
    return api_version if "/" in api_version else f"/{api_version}"


def _without_managed_fields(obj: Object) -> Object:
    meta = obj.get("metadata") or {}
    if "managedFields" not in meta:
        return obj
    return {**obj, "metadata": {k: v for k, v in meta.items() if k != "managedFields"}}


def _last_applied(patch: Object) -> str:
    copy = deep_copy(patch)
    annotations = (copy.get("metadata") or {}).get("annotations")
    if annotations:
        annotations.pop(LAST_APPLIED, None)
        if not annotations:
            del copy["metadata"]["annotations"]
    return orjson.dumps(copy, option=orjson.OPT_SORT_KEYS).decode() + "\n"
