"""Server-side apply: ownership of fields (managedFields) and structured merge.

What the API server calls:
  manager_for(resource, subresource)    the shared FieldManager of a built-in resource
  custom_manager(...)                   one for a custom resource's version
  FieldManager.update / .apply          on every write
  apply_body(...)                       an apply patch from the wire
  scale_to_parent, scale_from_parent    managedFields of the scale subresource

Source: KEP-555; apimachinery util/managedfields; structured-merge-diff.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import orjson

from knarr.api import decode, errors, explain, schema, typeinfo, yamldoc
from knarr.api.apply import fieldset, managed, types
from knarr.api.apply.fieldset import FieldSet, of_paths, only_below, recursive_difference
from knarr.api.apply.manager import FieldManager
from knarr.api.defaulting import default
from knarr.api.scheme import Resource
from knarr.api.types import Object

__all__ = ["FieldManager", "apply_body", "custom_manager", "manager_for", "scale_from_parent", "scale_to_parent"]

_META = ("metadata",)
_RESET: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    ("certificatesigningrequests", ""): (("spec",), ("status",)),
    ("certificatesigningrequests", "status"): (("spec",), ("status", "conditions")),
    ("certificatesigningrequests", "approval"): (("spec",), ("status", "certificate")),
    ("deployments", "status"): (("spec",), ("metadata", "labels")),
    ("pods", "status"): (("spec",), ("metadata", "deletionTimestamp"), ("metadata", "ownerReferences")),
    ("namespaces", "finalize"): (("status",),),
    **{(plural, "status"): (("spec",), _META) for plural in (
        "volumeattachments", "flowschemas", "prioritylevelconfigurations", "validatingadmissionpolicies", "customresourcedefinitions",
        "apiservices")},
    # Upstream names a group that does not exist here, so nothing is reset.
    ("servicecidrs", ""): (), ("servicecidrs", "status"): (),
}

_EPHEMERAL = of_paths(("spec", "ephemeralContainers"))
_RESIZE: FieldSet = {"f:spec": {
    group: {"*": {f"f:{name}": {fieldset.MEMBER: True} for name in ("resources", "resizePolicy")}}
    for group in ("f:containers", "f:initContainers")
}}


def _reset_filter(resource: Resource, subresource: str) -> Callable[[FieldSet], FieldSet] | None:
    """What the endpoint's strategy resets: status on the resource itself, spec on its status, with exceptions."""
    if subresource == "ephemeralcontainers":
        return lambda fields: only_below(fields, _EPHEMERAL)
    if subresource == "resize":
        return lambda fields: only_below(fields, _RESIZE)
    found = _RESET.get((resource.plural, subresource))
    if found is None:
        if "status" not in resource.subresources:
            return None
        found = (("status",),) if not subresource else (("spec",),) if subresource == "status" else ()
    return _excluding(found)


def _excluding(paths: tuple[tuple[str, ...], ...]) -> Callable[[FieldSet], FieldSet] | None:
    if not paths:
        return None
    excluded = of_paths(*paths)
    return lambda fields: recursive_difference(fields, excluded)


_VERSIONS = {("autoscaling", "HorizontalPodAutoscaler"): ("autoscaling/v1", "autoscaling/v2"),
             ("", "Event"): ("v1", "events.k8s.io/v1"), ("events.k8s.io", "Event"): ("v1", "events.k8s.io/v1")}


@cache
def manager_for(resource: Resource, subresource: str = "") -> FieldManager:
    """The FieldManager of a built-in resource; for a subresource with a kind of its own (scale) of that kind."""
    api_version, kind = resource.api_version, resource.kind
    sub = resource.subresources.get(subresource)
    if sub is not None and sub.kind != resource.kind:
        api_version, kind = sub.api_version, sub.kind
    zero = typeinfo.zero_of(typeinfo.message_name(api_version, kind))

    def empty() -> Object:
        return {"apiVersion": api_version, "kind": kind, **zero()}

    def finish(obj: Object) -> None:
        decode.check_object(api_version, kind, obj)
        default((api_version, kind), obj)

    versions = _VERSIONS.get((resource.group, kind), ())

    def convert(obj: Object, version: str) -> Object | None:
        if version not in versions:
            return None
        from knarr.api import conversion

        return conversion.convert(obj, version)

    return FieldManager(
        types.builtin(schema.definition_name(api_version, kind)), api_version, kind, subresource=subresource,
        reset=_reset_filter(resource, subresource), empty=empty, finish=finish, convert=convert if versions else None,
        kind_of=lambda version: types.builtin(schema.definition_name(version, kind)),
    )


def custom_manager(
    resource: Resource, open_api_schema: Object | None, *, subresource: str = "", finish: Callable[[Object], None],
    convert: Callable[[Object, str], Object | None] | None = None, schema_of: Callable[[str], Object | None] | None = None,
) -> FieldManager:
    """A FieldManager for one version of a CRD; keep it as long as the schema is the same.

    Args:
      open_api_schema: The version's openAPIV3Schema.
      finish: Prunes and defaults a merged object in place.
      convert: To another version of the CRD, None if that version is gone.
      schema_of: The schema of another version, by api_version.
    """
    kinds: dict[str, types.Kind] = {}

    def kind_of(version: str) -> types.Kind:
        if version not in kinds:
            kinds[version] = types.custom(schema_of(version) if schema_of else open_api_schema)
        return kinds[version]

    reset: tuple[tuple[str, ...], ...] = ()
    if "status" in resource.subresources:
        reset = (("status",),) if not subresource else (("spec",),) if subresource == "status" else ()

    def empty() -> Object:
        return {"apiVersion": resource.api_version, "kind": resource.kind}

    def finish_all(obj: Object) -> None:
        decode.check_metadata(obj)
        finish(obj)

    return FieldManager(
        types.custom(open_api_schema), resource.api_version, resource.kind, subresource=subresource, reset=_excluding(reset),
        empty=empty, finish=finish_all, convert=convert, kind_of=kind_of,
    )


def apply_body(
    manager: FieldManager, live: Object | None, body: bytes, field_manager: str, *, force: bool = False,
    field_validation: str = decode.WARN,
) -> tuple[Object, list[str]]:
    """Apply a patch from the wire (YAML, which includes JSON).

    Returns:
      (new object, warnings).

    Raises:
      StatusError: 400 unreadable, 409 conflict, 500 not of the schema, as upstream.
    """
    strict = field_validation in (decode.WARN, decode.STRICT)
    try:
        patch = None if b"\n" in body.strip() and not body.lstrip().startswith(b"{") else _json(body)
        duplicates = ""
        if patch is None or (strict and decode.may_repeat_keys(body, patch)):
            value, duplicates = yamldoc.load(body, strict=strict)
            patch = value if patch is None else patch
    except yamldoc.YAMLError as error:
        raise errors.bad_request(f"error decoding YAML: {error}") from None
    if patch is None:
        patch = {}
    if not isinstance(patch, dict):
        word = explain._json_word(patch)
        why = f"json: cannot unmarshal {word} into Go value of type map[string]interface {{}}"
        raise errors.bad_request(f"error decoding YAML: error unmarshaling JSON: while decoding JSON: {why}")
    new = manager.apply(live, patch, field_manager, force=force)
    if duplicates and field_validation == decode.STRICT:
        raise errors.bad_request(f"error strict decoding YAML: {duplicates}")
    return new, [duplicates] if duplicates else []


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


_SCALE_REPLICAS = of_paths(("spec", "replicas"))


def scale_from_parent(parent_entries: list[Object] | None, replicas_path: tuple[str, ...] = ("spec", "replicas")) -> list[Object]:
    """The managedFields that a Scale shows: those managers of the parent that own its replicas."""
    path = tuple(f"f:{name}" for name in replicas_path)
    found: managed.Managers = {}
    for identity, owned in managed.decode(parent_entries).items():
        if fieldset.has(owned.fields, path):
            found[identity] = managed.Owned(_SCALE_REPLICAS, "autoscaling/v1", owned.applied, owned.time)
    return managed.encode(found)


def scale_to_parent(
    parent_entries: list[Object] | None, scale_entries: list[Object] | None, api_version: str,
    replicas_path: tuple[str, ...] = ("spec", "replicas"),
) -> list[Object]:
    """The parent's managedFields after a write to its scale.

    Args:
      parent_entries: The parent's before.
      scale_entries: The Scale's after the write.
      api_version: The parent's version.
      replicas_path: Where the parent keeps its replicas.
    """
    path = tuple(f"f:{name}" for name in replicas_path)
    replicas = of_paths(replicas_path)
    scale = managed.decode(scale_entries)
    found: managed.Managers = {}
    parents = managed.decode(parent_entries)
    for identity, owned in parents.items():
        if not fieldset.has(owned.fields, path):
            found[identity] = owned
            continue
        if identity in scale:
            found[identity] = owned
            del scale[identity]
            continue
        rest = fieldset.difference(owned.fields, replicas)
        if rest:
            found[identity] = owned.having(rest)
    for identity, owned in scale.items():
        if fieldset.has(owned.fields, ("f:spec", "f:replicas")):
            # As upstream: of when the scale was written nothing is known to the parent.
            known = parents.get(identity)
            found[identity] = managed.Owned(replicas, api_version, owned.applied, known.time if known is not None else None)
    return managed.encode(found)
