"""Patches of the three kinds that are not apply: JSON patch, merge patch, strategic merge patch.

`apply_patch` is what the API server calls: patch bytes and the current object in, the new object out, checked and in
canonical form (not defaulted), with upstream's statuses. The current object is not changed.

Source: apiserver endpoints/handlers/patch.go.
"""

from typing import Any

import orjson

from knarr.api import decode, explain, typeinfo
from knarr.api.errors import (
    FieldError,
    StatusError,
    bad_request,
    go_map,
    go_quote,
    invalid,
    rejected_by_router,
    too_large,
    unsupported_media_type,
)
from knarr.api.meta import deep_copy
from knarr.api.patch import json_patch, merge_patch, strategic
from knarr.api.patch.restore import restore_error
from knarr.api.scheme import Resource
from knarr.api.types import Object

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

MAX_JSON_PATCH_OPERATIONS = 10_000


def patch_type(content_type: str, *, custom: bool = False) -> str:
    """The media type of a patch.

    Args:
      custom: A custom resource: strategic merge patches are not for these.

    Raises:
      StatusError: 415, not a patch type.
    """
    plain = content_type.partition(";")[0].strip().lower()
    known = [JSON_PATCH, MERGE_PATCH, *(() if custom else (STRATEGIC_MERGE_PATCH,)), APPLY_PATCH]
    if plain not in known:
        raise unsupported_media_type(known) if custom else rejected_by_router(415)
    return plain


def rejected_by_patch() -> StatusError:
    """422 without details, which upstream answers when a JSON patch cannot be applied."""
    return StatusError(422, "Invalid", "the server rejected our request due to an error in our request", {})


def apply_patch(
    resource: "Resource | tuple[str, str]", current: Object, body: bytes, content_type: str, field_validation: str = decode.WARN,
    later: typeinfo.Later | None = None,
) -> tuple[Object, list[str]]:
    """Apply a patch to an object.

    Args:
      resource: The Resource, or (api_version, kind) for a subresource's kind such as Scale.
      current: The object in the resource's version, in canonical form.
      content_type: One of the three patch types.
      later: As for decode.decode.

    Returns:
      (new object, warnings). A custom object comes back unpruned, but with typed metadata.

    Raises:
      StatusError: as upstream: 400 unreadable patch, 415 not a patch type, 422 not applicable or of wrong type.
    """
    custom = isinstance(resource, Resource) and resource.custom
    api_version, kind = (resource.api_version, resource.kind) if isinstance(resource, Resource) else resource
    strict = field_validation in (decode.WARN, decode.STRICT)
    warnings: list[str] = []
    match patch_type(content_type, custom=custom):
        case "application/json-patch+json":
            patched, warnings = _json(current, body, strict)
        case "application/merge-patch+json":
            patched, warnings = _merge(current, body, strict)
        case "application/strategic-merge-patch+json":
            return _strategic(api_version, kind, current, body, field_validation, later)
        case other:
            raise unsupported_media_type([other])
    merged = orjson.dumps(patched)
    try:
        warnings += _check(api_version, kind, patched, custom, merged, later)
        if warnings and field_validation == decode.STRICT:
            raise _Unfit(f"strict decoding error: {', '.join(warnings)}")
    except _Unfit as error:
        raise _invalid_patch(_json_text(orjson.loads(merged), _touched(body)), str(error)) from None
    return patched, warnings if strict else []


class _Unfit(Exception):
    """What a patch made is not an object of the resource; the message says why."""


def _json(current: Object, body: bytes, strict: bool) -> tuple[Object, list[str]]:
    try:
        operations = decode.parse_json(body)
    except ValueError as error:
        raise bad_request(f"error decoding patch: {error}" if strict else str(error)) from None
    warnings: list[str] = []
    if strict:
        warnings = _strict_operations(operations, body)
    if operations is None:
        operations = []
    if not isinstance(operations, list):
        word = explain._json_word(operations)
        raise bad_request(f"json: cannot unmarshal {word} into Go value of type jsonpatch.Patch")
    if len(operations) > MAX_JSON_PATCH_OPERATIONS:
        raise too_large(f"The allowed maximum operations in a JSON patch is {MAX_JSON_PATCH_OPERATIONS}, got {len(operations)}")
    try:
        patched = json_patch.apply(deep_copy(current), operations)
    except json_patch.JSONPatchError:
        raise rejected_by_patch() from None
    if not isinstance(patched, dict):
        word = explain._json_word(patched)
        raise _invalid_patch(_json_text(patched), f"couldn't get version/kind; json parse error: json: cannot unmarshal {word}")
    return patched, warnings


_OPERATION_KEYS = {"op": str, "path": str, "from": str, "value": object}


def _strict_operations(operations: Any, body: bytes) -> list[str]:
    """What a strict reader has to say about the operations themselves."""
    if operations is None:
        return []
    if not isinstance(operations, list):
        word = explain._json_word(operations)
        raise bad_request(f"error decoding patch: json: cannot unmarshal {word} into Go value of type []handlers.jsonPatchOp")
    found: list[str] = []
    for index, operation in enumerate(explain.parse_with_duplicates(body)):
        if operation is None:
            continue
        if not isinstance(operation, dict):
            word = explain._json_word(operation)
            raise bad_request(f"error decoding patch: json: cannot unmarshal {word} into Go value of type handlers.jsonPatchOp")
        for key, value in operation.items():
            expected = _OPERATION_KEYS.get(key)
            if expected is None:
                found.append(f'json patch unknown field "[{index}].{key}"')
                continue
            if value is not None and not isinstance(value, expected):
                word = explain._json_word(value)
                raise bad_request(f"error decoding patch: json: cannot unmarshal {word} into Go struct field jsonPatchOp.{key} of type string")
            if getattr(operation, "repeated", {}).get(key):
                found.append(f'json patch duplicate field "[{index}].{key}"')
    return found


def _merge(current: Object, body: bytes, strict: bool) -> tuple[Object, list[str]]:
    try:
        patch = decode.parse_json(body)
    except ValueError as error:
        raise bad_request(f"error decoding patch: {error}" if strict else "Invalid JSON Patch") from None
    warnings: list[str] = []
    if strict:
        if patch is not None and not isinstance(patch, dict):
            word = explain._json_word(patch)
            raise bad_request(f"error decoding patch: json: cannot unmarshal {word} into Go value of type map[string]interface {{}}")
        warnings = _duplicates(body, patch)
    if patch is None:
        raise bad_request("Invalid JSON Patch")
    if not isinstance(patch, dict):
        if not isinstance(patch, list):
            raise bad_request("Invalid JSON Patch")
        raise _invalid_patch(_json_text(patch), "couldn't get version/kind; json parse error: json: cannot unmarshal array")
    return merge_patch.apply(deep_copy(current), patch), warnings


def _duplicates(body: bytes, parsed: Any) -> list[str]:
    if not decode.may_repeat_keys(body, parsed):
        return []
    findings = explain.Findings()
    explain.explain_untyped(explain.parse_with_duplicates(body), findings)
    return findings.strict


def _strategic(
    api_version: str, kind: str, current: Object, body: bytes, field_validation: str, later: typeinfo.Later | None,
) -> tuple[Object, list[str]]:
    try:
        patch = decode.parse_json(body)
    except ValueError as error:
        raise bad_request(str(error)) from None
    strict = field_validation in (decode.WARN, decode.STRICT)
    if patch is not None and not isinstance(patch, dict):
        word = explain._json_word(patch)
        raise bad_request(f"json: cannot unmarshal {word} into Go value of type map[string]interface {{}}")
    warnings = _duplicates(body, patch) if strict else []
    try:
        patched = strategic.apply(orjson.loads(orjson.dumps(current)), patch or {}, api_version, kind)
    except strategic.StrategicPatchError as error:
        if error.code == 422:
            raise rejected_by_patch() from None
        raise StatusError(error.code, "BadRequest" if error.code == 400 else "", str(error)) from None
    merged = orjson.dumps(patched)
    type_error, unknown = _problems(api_version, kind, patched, merged, later)
    if type_error:
        before = orjson.loads(merged)
        wrong = [before[key] for key in ("apiVersion", "kind") if not isinstance(before.get(key, ""), str)]
        number = wrong and isinstance(wrong[0], int) and not isinstance(wrong[0], bool)
        why = restore_error(before, typeinfo.message_name(api_version, kind))
        if wrong:
            why = "cannot convert int64 to string" if number else "unrecognized type: string"
        raise _invalid_patch(go_map(decode.parse_json(body)), why or type_error)
    # What a patch says of the type is not looked at.
    patched["apiVersion"], patched["kind"] = api_version, kind
    warnings += unknown if strict else []
    if warnings and field_validation == decode.STRICT:
        raise _invalid_patch(go_map(decode.parse_json(body)), f"strict decoding error: {', '.join(warnings)}")
    return patched, warnings


def _check(api_version: str, kind: str, patched: Object, custom: bool, merged: bytes, later: typeinfo.Later | None) -> list[str]:
    """Prune a patched object (whose JSON is `merged`) in place; its unknown fields.

    Raises:
      _Unfit: wrong types.
    """
    _check_identity(patched, custom)
    if custom:
        try:
            return decode.check_metadata(patched)
        except StatusError as error:
            raise _Unfit(error.message) from None
    given_version, given_kind = patched.get("apiVersion"), patched.get("kind") or kind
    if not given_version:
        # Upstream then reads it as an empty object: nothing in it is known.
        unknown = sorted(set(patched) - {"apiVersion", "kind"})
        patched.clear()
        _problems(api_version, kind, patched, b"{}", None)
        return [f"unknown field {go_quote(key)}" for key in unknown]
    if given_kind != kind or given_version != api_version:
        raise _Unfit(_other_kind(given_version, given_kind, api_version, kind))
    patched["kind"] = kind
    type_error, unknown = _problems(api_version, kind, patched, merged, later)
    if type_error:
        raise _Unfit(type_error)
    return unknown


def _check_identity(patched: Object, custom: bool) -> None:
    """Whether version and kind can be read. Raises _Unfit."""
    for key in ("apiVersion", "kind"):
        value = patched.get(key)
        if value is not None and not isinstance(value, str):
            text = f"json: cannot unmarshal {explain._json_word(value)} into Go struct field .{key} of type string"
            raise _Unfit(f"couldn't get version/kind; json parse error: {text}")
    version = patched.get("apiVersion") or ""
    if version.count("/") > 1:
        raise _Unfit(f"unexpected GroupVersion string: {version}")
    if custom and not patched.get("kind"):
        raise _Unfit(f"Object 'Kind' is missing in '{orjson.dumps(patched, option=orjson.OPT_SORT_KEYS).decode()}'")
    if custom and not version:
        raise _Unfit("Object 'apiVersion' is missing in 'object has no apiVersion field'")


def _other_kind(given_version: Any, given_kind: Any, api_version: str, kind: str) -> str:
    if isinstance(given_version, str) and isinstance(given_kind, str):
        try:
            typeinfo.message_name(given_version, given_kind)
        except KeyError:
            return decode.no_such_kind(given_version, given_kind, api_version)
    return f"unable to decode {given_version}, Kind={given_kind} into {kind}"


def _problems(api_version: str, kind: str, obj: Object, merged: bytes, later: typeinfo.Later | None) -> tuple[str, list[str]]:
    """(type error or "", unknown fields); obj is pruned in place, merged is its JSON from before."""
    name = typeinfo.message_name(api_version, kind)
    info = typeinfo.message(name)
    meta: Object = {} if info.type_meta else {key: obj.pop(key) for key in ("apiVersion", "kind") if key in obj}
    state = typeinfo.State()
    try:
        typeinfo.pruner(name)(obj, state)
    except typeinfo.Mismatch:
        return explain.explain(orjson.loads(merged), name).type_error or "wrong type", []
    if later is None:
        typeinfo.settle(state.later)
    else:
        later += state.later
    obj.update(meta)
    obj.setdefault("apiVersion", api_version)
    obj.setdefault("kind", kind)
    return "", explain.explain(orjson.loads(merged), name).strict if state.unknown else []


def _invalid_patch(shown: str, why: str) -> StatusError:
    return invalid("", "", [FieldError("FieldValueInvalid", "patch", why, shown)])


_METADATA_ORDER = (
    "name", "generateName", "namespace", "selfLink", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp",
    "deletionGracePeriodSeconds", "labels", "annotations", "ownerReferences", "finalizers", "managedFields",
)


def _json_text(value: Any, touched: Any = None) -> str:
    """A patched object as upstream's messages show it.

    Args:
      touched: Nested dicts, with the places that the patch went through: these come in the order of their names, as Go
        writes maps; what it left alone comes in the order of its fields.
    """
    if isinstance(value, dict):
        value = _shown_map(value, touched if isinstance(touched, dict) else {})
        metadata = value.get("metadata")
        if isinstance(metadata, dict) and not isinstance((touched or {}).get("metadata"), dict):
            known = {key: metadata[key] for key in _METADATA_ORDER if key in metadata}
            value["metadata"] = {**known, **metadata}
    return orjson.dumps(value).decode()


def _shown_map(value: Object, touched: Object) -> Object:
    return {
        key: _shown_map(item, touched[key]) if isinstance(item, dict) and isinstance(touched.get(key), dict) else item
        for key, item in sorted(value.items())
    }


def _touched(body: bytes) -> Any:
    """The objects that a patch goes through, as nested dicts: a merge patch is that itself, a JSON patch names paths."""
    patch = decode.parse_json(body)
    if not isinstance(patch, list):
        return patch
    found: Object = {}
    for operation in patch:
        for pointer in (operation.get("path"), operation.get("from")) if isinstance(operation, dict) else ():
            here = found
            for part in pointer.split("/")[1:-1] if isinstance(pointer, str) else ():
                here = here.setdefault(part.replace("~1", "/").replace("~0", "~"), {})
    return found
