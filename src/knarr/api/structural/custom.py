"""A served version of a custom resource, compiled: everything the API server does with its objects.

Made by the CRD code once per schema, shared by all requests. Functions change objects in place. CEL rules are not here:
give a `rules` function.

Source: apiextensions-apiserver registry/customresource (strategy.go, validator.go), apiserver/schema.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from knarr.api import apply, decode, errors
from knarr.api.errors import FieldError, bad_request, go_quote
from knarr.api.scheme import Resource
from knarr.api.structural import compiled, embedded, explain
from knarr.api.table import CustomColumns
from knarr.api.types import Object

Rules = Callable[[Object, Object | None], list[FieldError]]
"""(object, old object or None) -> broken CEL rules."""

_MAX_INT32 = 2**31 - 1
_BLOCKING = frozenset({"FieldValueNotSupported", "FieldValueRequired", "FieldValueTooLong", "FieldValueTooMany", "FieldValueTypeInvalid"})
_NOT_CHECKED = (
    "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation"
)


@dataclass(frozen=True)
class Scaler:
    """Where a custom resource keeps what its scale subresource shows; paths are field names."""

    replicas_path: tuple[str, ...]
    status_path: tuple[str, ...]
    selector_path: tuple[str, ...]

    @classmethod
    def of(cls, scale: Object) -> "Scaler":
        """From subresources.scale of a CRD version."""
        def split(key: str) -> tuple[str, ...]:
            return tuple(part for part in (scale.get(key) or "").split(".") if part)

        return cls(split("specReplicasPath"), split("statusReplicasPath"), split("labelSelectorPath"))

    def read(self, obj: Object) -> tuple[int, int, str]:
        """(wanted replicas, current replicas, selector).

        Raises:
          StatusError: 500, as upstream answers while the object has no replicas.
        """
        replicas = _at(obj, self.replicas_path)
        if replicas is None:
            dotted = "." + ".".join(self.replicas_path)
            raise errors.internal(f'the spec replicas field "{dotted}" does not exist')
        selector = _at(obj, self.selector_path) if self.selector_path else None
        current = _at(obj, self.status_path)
        return int(replicas), int(current) if isinstance(current, int | float) else 0, selector if isinstance(selector, str) else ""

    def write(self, obj: Object, replicas: int) -> None:
        """Set the wanted replicas in place."""
        here = obj
        for name in self.replicas_path[:-1]:
            here = here.setdefault(name, {})
        here[self.replicas_path[-1]] = replicas


def _at(obj: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(obj, dict):
            return None
        obj = obj.get(name)
    return obj


class CustomSchema:
    """See the module.

    Args:
      resource: The version's Resource (custom=True, with its subresources).
      version: The entry of spec.versions of the CRD: schema, subresources, additionalPrinterColumns.
      preserve_unknown_fields: spec.preserveUnknownFields of the CRD.
      rules: Broken CEL rules of an object.
      convert: Converts an object to another version's api_version, None if that is gone; for managed fields.
      schema_of: The openAPIV3Schema of another version by api_version.
    """

    def __init__(
        self, resource: Resource, version: Object, *, preserve_unknown_fields: bool = False, rules: Rules | None = None,
        convert: Callable[[Object, str], Object | None] | None = None, schema_of: Callable[[str], Object | None] | None = None,
    ) -> None:
        self.resource = resource
        self.open_api_schema: Object | None = (version.get("schema") or {}).get("openAPIV3Schema")
        self._version = version
        self._rules = rules
        self._convert = convert
        self._schema_of = schema_of
        schema = self._schema = self.open_api_schema or {}
        self._keeps_unknown = preserve_unknown_fields or self.open_api_schema is None
        self._embedded = embedded.has_embedded(schema)
        subresources = version.get("subresources") or {}
        self.has_status = "status" in subresources
        self.scale = Scaler.of(subresources["scale"]) if subresources.get("scale") else None
        self._scale_spec: Object = subresources.get("scale") or {}
        self._managers: dict[str, apply.FieldManager] = {}

    # Compiled when the first object comes: of many definitions on a cluster few are used.
    @cached_property
    def _prune(self) -> compiled.Pruner | None:
        return None if self._keeps_unknown else compiled.pruner(self._schema, root=True)

    @cached_property
    def _default(self) -> compiled.Changer | None:
        return compiled.defaulter(self._schema)

    @cached_property
    def _drop_nulls(self) -> compiled.Changer | None:
        return compiled.null_dropper(self._schema)

    @cached_property
    def _valid(self) -> compiled.Valid | None:
        return compiled.validator({key: value for key, value in self._schema.items() if key != "x-kubernetes-embedded-resource"})

    @cached_property
    def _list_types(self) -> Callable[[Object], list[FieldError]] | None:
        return embedded.list_type_checker(self._schema)

    @cached_property
    def settled(self) -> bool:
        """Whether what was completed before its write is complete when read: no defaults come back for a status that was taken off."""
        status = (self._schema.get("properties") or {}).get("status") or {}
        return status.get("default") is None and compiled.defaulter(status) is None

    @cached_property
    def columns(self) -> CustomColumns:
        """The table columns of the version."""
        return CustomColumns(self._version.get("additionalPrinterColumns"))

    # --- reading and filling in ----------------------------------------------------------------------------------------

    def prune(self, obj: Object, field_validation: str = decode.WARN) -> list[str]:
        """Drop unspecified fields in place, check embedded metadata.

        Returns:
          Warnings such as `unknown field "spec.foo"`; none with field validation Ignore.

        Raises:
          StatusError: 400, unknown fields under Strict, or metadata of an embedded object with wrong types.
        """
        unknown = self._prune(obj) if self._prune is not None else None
        if self._embedded:
            more = embedded.coerce(self._schema, obj)
            unknown = [*(unknown or ()), *more] if more else unknown
        if not unknown or field_validation == decode.IGNORE:
            return []
        found = [f"unknown field {go_quote(path)}" for path in sorted(unknown)]
        if field_validation == decode.STRICT:
            version = self.resource.version
            raise bad_request(
                f"{self.resource.kind} in version {go_quote(version)} cannot be handled as a {self.resource.kind}: strict decoding error: "
                f"{', '.join(found)}"
            )
        return found

    def default(self, obj: Object, *, nulls: bool = True) -> None:
        """Fill in defaults in place; nulls where none may be are dropped (nulls False: there are none)."""
        if nulls and self._drop_nulls is not None:
            self._drop_nulls(obj)
        if self._default is not None:
            self._default(obj)

    def complete(self, obj: Object) -> None:
        """Bring an object from elsewhere (store, webhook, merge) into form, in place, without complaints."""
        if self._prune is not None:
            self._prune(obj)
        self.default(obj)

    # --- checking ------------------------------------------------------------------------------------------------------

    def validate(self, obj: Object, old: Object | None, subresource: str = "") -> list[FieldError]:
        """All broken rules of an object that is created (old None) or updated, in upstream's order."""
        found = self._type_meta(obj)
        if found:
            return found
        found = self._metadata(obj, old)
        if subresource == "status":
            found += self._check_status(obj, old)
        else:
            found += self._check_schema(obj, old)
            found += self._check_scale(obj, spec=True)
        found += self._check_scale(obj, spec=False)
        if self._embedded:
            found += embedded.validate(self._schema, obj)
        if self._list_types is not None and (old is None or not self._list_types(old)):
            found += self._list_types(obj)
        if self._rules is not None:
            if any(error.type in _BLOCKING for error in found):
                found.append(errors.invalid_value("<nil>", None, _NOT_CHECKED))
            else:
                found += self._rules(obj, old)
        return found

    def _type_meta(self, obj: Object) -> list[FieldError]:
        found = []
        for key, wanted in (("kind", self.resource.kind), ("apiVersion", self.resource.api_version)):
            if obj.get(key) != wanted:
                found.append(errors.invalid_value(key, obj.get(key) or "", f"must be {wanted}"))
        return found

    def _metadata(self, obj: Object, old: Object | None) -> list[FieldError]:
        from knarr.api.validation import metadata, strings

        found: list[FieldError] = []
        meta = obj.get("metadata") or {}
        if old is None:
            metadata.validate_object_meta(meta, self.resource.namespaced, strings.dns_subdomain, found, core_finalizers=False)
        else:
            # Upstream does so on every update, and again in the strategy.
            metadata.validate_generic_meta(meta, self.resource.namespaced, found)
            metadata.validate_object_meta_update(meta, old.get("metadata") or {}, found)
            metadata.validate_object_meta_update(meta, old.get("metadata") or {}, found)
        return found

    def _check_schema(self, obj: Object, old: Object | None) -> list[FieldError]:
        if self._valid is None or self._valid(obj):
            return []
        return explain.explain(self._schema, obj, old, has_old=old is not None)

    def _check_status(self, obj: Object, old: Object | None) -> list[FieldError]:
        schema = (self._schema.get("properties") or {}).get("status")
        if schema is None or "status" not in obj:
            return []
        before = (old or {}).get("status")
        return explain.explain(schema, obj["status"], before, path="status", has_old=before is not None)

    def _check_scale(self, obj: Object, *, spec: bool) -> list[FieldError]:
        if self.scale is None:
            return []
        key, path = ("specReplicasPath", self.scale.replicas_path) if spec else ("statusReplicasPath", self.scale.status_path)
        dotted = self._scale_spec.get(key) or ""
        value = _at(obj, path)
        found = []
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            kind = {bool: "bool", str: "string", float: "float64", dict: "map[string]interface {}", list: "[]interface {}"}[type(value)]
            shown = errors.go_json(value) if not isinstance(value, str) else value
            found.append(errors.invalid_value(dotted, 0, f"{dotted} accessor error: {shown} is of the type {kind}, expected int64"))
        elif value is not None and value < 0:
            found.append(errors.invalid_value(dotted, value, "should be a non-negative integer"))
        elif value is not None and value > _MAX_INT32:
            found.append(errors.invalid_value(dotted, value, f"should be less than or equal to {_MAX_INT32}"))
        if not spec and self.scale.selector_path:
            selector = _at(obj, self.scale.selector_path)
            if selector is not None and not isinstance(selector, str):
                dotted = self._scale_spec.get("labelSelectorPath") or ""
                found.append(errors.invalid_value(dotted, "", f"{dotted} accessor error: expected string"))
        return found

    # --- ownership -----------------------------------------------------------------------------------------------------

    def field_manager(self, subresource: str = "") -> apply.FieldManager:
        """The shared FieldManager of the version (for "scale", the one of Scale is apply.manager_for's)."""
        found = self._managers.get(subresource)
        if found is None:
            found = self._managers[subresource] = apply.custom_manager(
                self.resource, self.open_api_schema, subresource=subresource, finish=self.complete, convert=self._convert,
                schema_of=self._schema_of,
            )
        return found
