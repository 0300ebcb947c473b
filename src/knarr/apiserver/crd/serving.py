"""From a CRD to endpoints: one store, one endpoint per served version.

Source: apiextensions-apiserver pkg/apiserver/customresource_handler.go, pkg/registry/customresource/strategy.go.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from knarr.api import table
from knarr.api.errors import FieldError
from knarr.api.scheme import Resource, Subresource
from knarr.api.structural import CustomSchema
from knarr.api.types import Object
from knarr.apiserver.crd.rules import Rules
from knarr.apiserver.crd.webhook import WebhookConverter
from knarr.apiserver.discovery import version_priority
from knarr.apiserver.endpoint import Endpoint
from knarr.apiserver.forms import RowFunction
from knarr.apiserver.registry.base import Strategy
from knarr.apiserver.store import ResourceStore

if TYPE_CHECKING:
    from knarr.apiserver.call import Call

VERBS = ("delete", "deletecollection", "get", "list", "patch", "create", "update", "watch")
STATUS_VERBS = ("get", "patch", "update")


class CustomStrategy(Strategy):
    """One version's strategy. Without a status subresource, status is a field like any other."""

    unconditional_update = False
    has_generation = True

    def __init__(self, *, has_status: bool) -> None:
        self.resets_status = has_status

    def changed(self, obj: Object, old: Object) -> bool:
        skip = {"metadata", "status"} if self.resets_status else {"metadata"}
        mine = {key: value for key, value in obj.items() if key not in skip and key not in ("kind", "apiVersion")}
        theirs = {key: value for key, value in old.items() if key not in skip and key not in ("kind", "apiVersion")}
        return mine != theirs

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        """Everything but status is kept, metadata apart from managedFields included."""
        metadata = {**old["metadata"]}
        for key in ("managedFields", "resourceVersion"):
            if key in obj["metadata"]:
                metadata[key] = obj["metadata"][key]
        status = obj.get("status")
        given = "status" in obj
        obj.clear()
        obj.update({**old, "metadata": metadata})
        if given:
            obj["status"] = status
        else:
            obj.pop("status", None)

    def validate_update(self, call: Call, obj: Object, old: Object) -> list[FieldError]:
        return []


class SelectableFields:
    """Values of a CRD's selectableFields: simple dotted paths to scalars."""

    def __init__(self, fields: list[Object]) -> None:
        self._paths = [tuple(field["jsonPath"].lstrip(".").split(".")) for field in fields]
        self.names = tuple(".".join(path) for path in self._paths)

    def __call__(self, obj: Object) -> tuple[str, ...]:
        return tuple(_scalar(obj, path) for path in self._paths)


def _scalar(value: Any, path: tuple[str, ...]) -> str:
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def storage_hash(group: str, version: str, kind: str) -> str:
    """Return the hash by which clients notice a change of the stored version."""
    return b64encode(hashlib.sha256(f"{group}/{version}/{kind}".encode()).digest()[:8]).decode()


def storage_version(crd: Object) -> str:
    return next((str(v["name"]) for v in crd["spec"]["versions"] if v.get("storage")), "")


def resource_of(crd: Object, version: Object) -> Resource:
    """Return the Resource of one version, with the accepted names."""
    spec, names = crd["spec"], crd["status"]["acceptedNames"]
    group, name, kind = spec["group"], version["name"], names["kind"]
    declared = version.get("subresources") or {}
    subresources: dict[str, Subresource] = {}
    if declared.get("status") is not None:
        subresources["status"] = Subresource("status", group, name, kind, STATUS_VERBS)
    if declared.get("scale") is not None:
        subresources["scale"] = Subresource("scale", "autoscaling", "v1", "Scale", STATUS_VERBS)
    return Resource(
        group=group, version=name, plural=names["plural"], singular=names.get("singular") or kind.lower(), kind=kind,
        namespaced=spec["scope"] == "Namespaced", short_names=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()), verbs=VERBS, subresources=subresources,
        storage_version_hash=storage_hash(group, storage_version(crd), kind), list_kind=names.get("listKind") or kind + "List", custom=True,
    )  # fmt: skip


def table_factory(schema: CustomSchema) -> Callable[[Resource], tuple[list[Object], RowFunction]]:
    def factory(resource: Resource) -> tuple[list[Object], RowFunction]:
        columns = schema.columns

        def row(obj: Object, include: str) -> Object:
            return table.row(resource, obj, include, columns)

        return table.columns(resource, columns), row

    return factory


def schema_of(crd: Object, version: Object) -> CustomSchema:
    """Compile one version's schema."""
    spec = crd["spec"]

    def convert(obj: Object, api_version: str) -> Object | None:
        known = any(v.get("served") and f"{spec['group']}/{v['name']}" == api_version for v in spec["versions"])
        return {**obj, "apiVersion": api_version} if known else None

    def other_schema(api_version: str) -> Object | None:
        for candidate in spec["versions"]:
            if f"{spec['group']}/{candidate['name']}" == api_version:
                found: Object | None = (candidate.get("schema") or {}).get("openAPIV3Schema")
                return found
        return None

    rules = Rules((version.get("schema") or {}).get("openAPIV3Schema") or {})
    return CustomSchema(
        resource_of(crd, version), version, preserve_unknown_fields=bool(spec.get("preserveUnknownFields")), convert=convert,
        schema_of=other_schema, rules=None if rules.empty else rules,
    )


def _deprecation(crd: Object, version: Object, resource: Resource) -> str:
    """The warning of a deprecated version that brings none: it names the best newer version that is served."""
    text = f"{resource.api_version} {resource.kind} is deprecated"
    better = [
        other["name"] for other in crd["spec"]["versions"]
        if other.get("served") and not other.get("deprecated") and version_priority(other["name"]) < version_priority(version["name"])
    ]  # fmt: skip
    return f"{text}; use {resource.group}/{min(better, key=version_priority)} {resource.kind}" if better else text


def endpoint_of(crd: Object, version: Object, store: ResourceStore, converter: WebhookConverter | None) -> Endpoint:
    """Make the endpoint of one served version."""
    schema = schema_of(crd, version)
    resource = schema.resource
    strategy = CustomStrategy(has_status="status" in resource.subresources)
    selectable = SelectableFields(version.get("selectableFields") or [])
    strategy.field_names = selectable.names
    stored = f"{resource.group}/{storage_version(crd)}"

    def to_stored(obj: Object) -> Object:
        return obj if obj.get("apiVersion") == stored else {**obj, "apiVersion": stored}

    def from_stored(obj: Object) -> Object:
        obj = obj if obj.get("apiVersion") == resource.api_version else {**obj, "apiVersion": resource.api_version}
        schema.complete(obj)
        return obj

    endpoint = Endpoint(
        resource, store, strategy, from_stored=from_stored, to_stored=to_stored, table=table_factory(schema), protobuf=False, schema=schema,
    )
    endpoint.converter = converter
    if version.get("deprecated"):
        endpoint.warnings = (version.get("deprecationWarning") or _deprecation(crd, version, resource),)
    return endpoint
