"""StorageVersionMigrations: what moves stays what it is, and how it ended stays so.

Source: pkg/apis/storagemigration/validation/validation.go.
"""

from __future__ import annotations

import re
from typing import Any

from knarr.api.errors import invalid_value, required
from knarr.api.validation.metadata import Errors, validate_conditions

Object = dict[str, Any]
_NUMBER = re.compile(r"[+-]?\d{1,19}", re.ASCII)


def create_migration(obj: Object, errors: Errors) -> None:
    resource = (obj.get("spec") or {}).get("resource") or {}
    for key in ("resource", "version"):
        if not resource.get(key):
            errors.append(required(f"spec.resource.{key}", f"{key} is required"))


def update_migration(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource:
        _status(new.get("status") or {}, old.get("status") or {}, errors)
        return
    create_migration(new, errors)
    resource, before = ((obj.get("spec") or {}).get("resource") or {} for obj in (new, old))
    for key in ("group", "version", "resource"):
        if (resource.get(key) or "") != (before.get(key) or ""):
            errors.append(invalid_value(key, resource.get(key) or "", "field is immutable"))


def _status(status: Object, before: Object, errors: Errors) -> None:
    version, path = status.get("resourceVersion") or "", "status.resourceVersion"
    if version and not _NUMBER.fullmatch(version):
        detail = f'failed to parse resource version "{version}": strconv.ParseInt: parsing "{version}": invalid syntax'
        errors.append(invalid_value(path, version, detail))
    elif version and int(version) < 0:
        errors.append(invalid_value(path, int(version), "must be greater than or equal to 0"))
    conditions = status.get("conditions") or []
    # The same rules as for the conditions of other kinds, but the time has another name.
    validate_conditions([{**one, "lastTransitionTime": one.get("lastUpdateTime")} for one in conditions], "status.conditions", errors)
    if before.get("resourceVersion") and before["resourceVersion"] != version:
        errors.append(invalid_value(path, version, "field is immutable"))
    running, succeeded, failed = (_holds(status, kind) for kind in ("Running", "Succeeded", "Failed"))

    def refuse(detail: str) -> None:
        errors.append(invalid_value("status.conditions", conditions, detail))

    if succeeded and failed:
        refuse("Both success and failed conditions cannot be true at the same time")
    if succeeded and running:
        refuse("Running condition cannot be true when success condition is true")
    if failed and running:
        refuse("Running condition cannot be true when failed condition is true")
    if _holds(before, "Succeeded") and not succeeded:
        refuse("Success condition cannot be set to false once it is true")
    if _holds(before, "Failed") and not failed:
        refuse("Failed condition cannot be set to false once it is true")


def _holds(status: Object, kind: str) -> bool:
    return next((one.get("status") == "True" for one in status.get("conditions") or () if one.get("type") == kind), False)
