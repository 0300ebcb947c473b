"""The managedFields of an object as values: who owns which paths, since when. Used by manager.py.

Source: apimachinery util/managedfields/internal (managedfields.go, capmanagers.go, conflict.go).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from knarr.api import errors, times
from knarr.api.apply import fieldset as fs
from knarr.api.apply.fieldset import FieldSet
from knarr.api.encode import trimmed
from knarr.api.errors import StatusError, go_quote
from knarr.api.types import Object

APPLY, UPDATE = "Apply", "Update"
MAX_UPDATE_MANAGERS = 10


class ManagerID(NamedTuple):
    """What tells managers apart; api_version is "" for apply, where it does not."""

    manager: str
    operation: str
    api_version: str
    subresource: str


@dataclass(frozen=True, slots=True)
class Owned:
    """One manager's entry; time is RFC 3339 text or None."""

    fields: FieldSet
    api_version: str
    applied: bool
    time: str | None = None

    def having(self, fields: FieldSet) -> "Owned":
        return Owned(fields, self.api_version, self.applied, self.time)


Managers = dict[ManagerID, Owned]


def manager_id(manager: str, operation: str, api_version: str, subresource: str) -> ManagerID:
    """The identity of a manager; an empty name becomes "unknown"."""
    return ManagerID(manager or "unknown", operation, "" if operation == APPLY else api_version, subresource)


_MOST_KNOWN = 2048
_LONGEST_KNOWN = 4096
_by_text: dict[bytes, tuple[FieldSet, Object]] = {}
_by_identity: dict[int, tuple[FieldSet, Object]] = {}
"""Sets that were read, by their text and by their identity, each with its FieldsV1: most objects of a kind are owned alike."""


def _fields(given: Any) -> FieldSet:
    """Read FieldsV1; equal texts give one and the same set. Raises ValueError."""
    text = orjson.dumps(given)
    known = _by_text.get(text)
    if known is None:
        fields = fs.from_json(given)
        if len(text) > _LONGEST_KNOWN:
            return fields
        if len(_by_text) >= _MOST_KNOWN:
            _by_text.clear()
            _by_identity.clear()
        known = _by_text[trimmed(text)] = _by_identity[id(fields)] = (fields, fs.to_json(fields))
    return known[0]


def decode(entries: Any) -> Managers:
    """Read managedFields.

    Raises:
      ValueError: malformed, in upstream's words.
    """
    managers: Managers = {}
    for index, entry in enumerate(entries or ()):
        operation = entry.get("operation")
        if operation not in (APPLY, UPDATE):
            raise ValueError("operation must be `Apply` or `Update`")
        api_version = entry.get("apiVersion") or ""
        if not api_version:
            raise ValueError("apiVersion must not be empty")
        fields_type = entry.get("fieldsType")
        if not fields_type:
            raise ValueError(f"missing fieldsType in managed fields entry {index}")
        if fields_type != "FieldsV1":
            raise ValueError(f"invalid fieldsType {go_quote(fields_type)} in managed fields entry {index}")
        identity = ManagerID(
            entry.get("manager") or "", operation, "" if operation == APPLY else api_version, entry.get("subresource") or "",
        )
        managers[identity] = Owned(_fields(entry.get("fieldsV1") or {}), api_version, operation == APPLY, entry.get("time"))
    return managers


def encode(managers: Managers) -> list[Object]:
    """Write managedFields, in upstream's order."""
    entries: list[Object] = []
    for identity, owned in sorted(managers.items(), key=_sort_key):
        entry: Object = {}
        if identity.manager:
            entry["manager"] = identity.manager
        entry["operation"] = APPLY if owned.applied else identity.operation
        entry["apiVersion"] = owned.api_version
        if owned.time:
            entry["time"] = owned.time
        entry["fieldsType"] = "FieldsV1"
        known = _by_identity.get(id(owned.fields))
        entry["fieldsV1"] = known[1] if known is not None else fs.to_json(owned.fields)
        if identity.subresource:
            entry["subresource"] = identity.subresource
        entries.append(entry)
    return entries


def _seconds(owned: Owned) -> int:
    try:
        return times.to_epoch(owned.time)[0] if owned.time else 0
    except ValueError:
        return 0


def _sort_key(item: tuple[ManagerID, Owned]) -> tuple[str, int, str, str, str]:
    identity, owned = item
    return (APPLY if owned.applied else identity.operation, _seconds(owned), identity.manager, owned.api_version, identity.subresource)


def cap_updaters(managers: Managers) -> Managers:
    """Keep the number of update managers bounded: the oldest of a version merge into "ancient-changes"."""
    updaters = [identity for identity, owned in managers.items() if not owned.applied]
    if len(updaters) <= MAX_UPDATE_MANAGERS:
        return managers
    updaters.sort(key=lambda identity: (_seconds(managers[identity]), identity))
    managers = dict(managers)
    first_of: dict[str, ManagerID] = {}
    count = len(updaters)
    for identity in updaters:
        if count <= MAX_UPDATE_MANAGERS:
            break
        owned = managers[identity]
        bucket = ManagerID("ancient-changes", UPDATE, owned.api_version, "")
        first = first_of.get(owned.api_version)
        if first is None:
            first_of[owned.api_version] = identity
            continue
        if bucket not in managers:
            managers[bucket] = managers.pop(first)
        before = managers[bucket]
        managers[bucket] = Owned(fs.union(owned.fields, before.fields), owned.api_version, owned.applied, owned.time)
        del managers[identity]
        count -= 1
    return managers


class Conflicts(Exception):
    """Fields that others own; a dict of manager to set."""

    def __init__(self, conflicts: dict[ManagerID, FieldSet]) -> None:
        super().__init__("conflicts")
        self.by_manager = conflicts

    def pairs(self) -> list[tuple[ManagerID, tuple[str, ...]]]:
        return [(identity, path) for identity, fields in sorted(self.by_manager.items()) for path in fs.paths(fields)]


def _describe(identity: ManagerID) -> str:
    text = go_quote(identity.manager)
    if identity.subresource:
        text = f"{text} with subresource {go_quote(identity.subresource)}"
    return f"{text} using {identity.api_version}" if identity.operation == UPDATE else text


def conflict_error(conflicts: Conflicts) -> StatusError:
    """The 409 that names every conflicting field."""
    pairs = conflicts.pairs()
    causes = [
        {"reason": "FieldManagerConflict", "message": f"conflict with {_describe(identity)}", "field": fs.path_text(path)}
        for identity, path in pairs
    ]
    if len(pairs) == 1:
        identity, path = pairs[0]
        message = f"Apply failed with 1 conflict: conflict with {_describe(identity)}: {fs.path_text(path)}"
        return errors.apply_conflict(causes, message)
    lines: list[str] = []
    for identity in sorted(conflicts.by_manager):
        lines.append(f"conflicts with {_describe(identity)}:")
        lines.extend(f"- {fs.path_text(path)}" for owner, path in pairs if owner == identity)
    return errors.apply_conflict(causes, f"Apply failed with {len(pairs)} conflicts: " + "\n".join(lines))
