"""Tables: the seam to knarr.api.table."""

from __future__ import annotations

from knarr.api import table
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.forms import RowFunction


def table_of(resource: Resource) -> tuple[list[Object], RowFunction]:
    """Return (columnDefinitions, row function) of a built-in kind."""

    def row(obj: Object, include: str) -> Object:
        return table.row(resource, obj, include)

    return table.columns(resource), row
