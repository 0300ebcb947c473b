"""Tables: what `kubectl get` shows, made by the server; and the metadata-only forms.

`table` is called by the API server when a client accepts `as=Table`. Columns come from facts, cells from
table_cells.py, those of custom resources from their CRD's JSON paths. Ages are computed at the time of the call, so
tables are not cached.

Source: pkg/printers/internalversion/printers.go, apiextensions tableconvertor, apiserver registry/rest/table.go.
"""

import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import orjson

from knarr.api import jsonpath, table_cells, times
from knarr.api.facts import read_fact
from knarr.api.scheme import Resource
from knarr.api.types import Object


@cache
def _columns() -> dict[str, list[list[Any]]]:
    columns: dict[str, list[list[Any]]] = orjson.loads(read_fact("resource-table-columns.json"))
    return columns


def supports_table(resource: Resource) -> bool:
    """False for reviews and bindings, which answer 406 to a request for a Table."""
    return "list" in resource.verbs or "get" in resource.verbs


def _definition(name: str, kind: str, format: str, priority: int, description: str = "") -> Object:
    return {"name": name, "type": kind, "format": format, "description": description, "priority": priority}


@cache
def _builtin_definitions(group_kind: str) -> list[Object]:
    columns = _columns()
    return [_definition(*column) for column in columns.get(group_kind) or columns["*default"]]


class CustomColumns:
    """The columns of one version of a CRD.

    Args:
      additional: additionalPrinterColumns of the CRD version; empty means just an age.
    """

    def __init__(self, additional: Iterable[Object] | None) -> None:
        given = list(additional or ())
        if not given:
            given = [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp", "description": ""}]
        self.definitions = [_definition("Name", "string", "name", 0)]
        self._paths: list[tuple[str, jsonpath.JSONPath]] = []
        for column in given:
            description = column.get("description")
            if description is None:
                description = f"Custom resource definition column (in JSONPath format): {column['jsonPath']}"
            kind = column.get("type") or "string"
            self.definitions.append(
                _definition(column["name"], kind, column.get("format") or "", column.get("priority") or 0, description)
            )
            self._paths.append((kind, jsonpath.compile_path(column["jsonPath"])))

    def cells(self, obj: Object, now: float) -> list[Any]:
        """One row."""
        found: list[Any] = [(obj.get("metadata") or {}).get("name") or ""]
        for kind, path in self._paths:
            values = path.find(obj)
            found.append(_custom_cell(kind, values[0], now) if values else None)
        return found


def _custom_cell(kind: str, value: Any, now: float) -> Any:
    if value is None:
        return "<nil>" if kind == "string" else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "string":
            if isinstance(value, str):
                return value
            if isinstance(value, dict | list):
                return orjson.dumps(value).decode()
            return ("true" if value else "false") if isinstance(value, bool) else str(value)
        case "integer":
            return int(value) if is_number else None
        case "number":
            return float(value) if is_number else None
        case "boolean":
            return value if isinstance(value, bool) else None
        case "date":
            if not isinstance(value, str):
                return None
            try:
                return table_cells.human_duration(now - times.to_epoch(value)[0])
            except ValueError:
                return "<invalid>"
    return None


def columns(resource: Resource | tuple[str, str], custom: CustomColumns | None = None) -> list[Object]:
    """The column definitions of a resource, or of (group, kind) such as ("autoscaling", "Scale"); shared, not to be changed."""
    if custom is not None:
        return custom.definitions
    group, kind = (resource.group, resource.kind) if isinstance(resource, Resource) else resource
    return _builtin_definitions(f"{group}/{kind}" if group else kind)


def row(resource: Resource | tuple[str, str], obj: Object, include_object: str = "Metadata", custom: CustomColumns | None = None) -> Object:
    """One row of a table; see `table`."""
    now = time.time()
    made: Object
    if custom is not None:
        made = {"cells": custom.cells(obj, now)}
    else:
        group, kind = (resource.group, resource.kind) if isinstance(resource, Resource) else resource
        cells, conditions = table_cells.cells(group, kind, obj, now)
        made = {"cells": cells}
        if conditions:
            made["conditions"] = conditions
    if include_object == "Object":
        made["object"] = obj
    elif include_object == "None":
        made["object"] = None
    else:
        made["object"] = partial_metadata(obj)
    return made


def table(
    resource: Resource | tuple[str, str], objects: Iterable[Object], list_metadata: Object | None = None, *, include_object: str = "Metadata",
    headers: bool = True, custom: CustomColumns | None = None,
) -> Object:
    """Make a Table.

    Args:
      resource: A Resource, or (group, kind) of a subresource's own kind.
      objects: The objects, one row each.
      list_metadata: resourceVersion, continue, remainingItemCount of the list, or resourceVersion of the single object.
      include_object: "Metadata" (default), "Object" or "None".
      headers: False leaves the column definitions out, as in later events of a watch.
      custom: The columns of a custom resource.
    """
    return {
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_metadata or {},
        "columnDefinitions": columns(resource, custom) if headers else None,
        "rows": [row(resource, obj, include_object, custom) for obj in objects],
    }


def partial_metadata(obj: Object) -> Object:
    """A PartialObjectMetadata of an object; shares its metadata."""
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj.get("metadata") or {}}


def partial_metadata_list(objects: Iterable[Object], list_metadata: Object | None = None) -> Object:
    """A PartialObjectMetadataList of objects."""
    return {
        "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": list_metadata or {},
        "items": [partial_metadata(obj) for obj in objects],
    }
