"""Strategic merge patch: lists merged by key, and the directives $patch, $retainKeys, $setElementOrder and
$deleteFromPrimitiveList. Pure.

How a field merges comes from the type facts (knarr.api.schema).

Source: apimachinery util/strategicpatch/patch.go, util/mergepatch/errors.go.
"""

from typing import Any

from knarr.api import schema
from knarr.api.errors import go_map
from knarr.api.types import Object

_PATCH = "$patch"
_RETAIN_KEYS = "$retainKeys"
_DELETE_FROM = "$deleteFromPrimitiveList"
_SET_ORDER = "$setElementOrder"

_BAD_PRIMITIVE_LIST = "invalid patch format of primitive list"
_BAD_RETAIN_KEYS = "invalid patch format of retainKeys"
_BAD_SET_ORDER = "invalid patch format of setElementOrder list"


class StrategicPatchError(ValueError):
    """The patch cannot be applied; code is the HTTP status upstream answers (400, 422 or 500)."""

    def __init__(self, message: str, code: int = 500) -> None:
        super().__init__(message)
        self.code = code


def apply(original: Object, patch: Object, api_version: str, kind: str) -> Object:
    """Merge a patch into an object of a built-in kind; both arguments are used up.

    Raises:
      StrategicPatchError: malformed directives, missing merge keys.
    """
    return _merge_map(original, patch, schema.definition_name(api_version, kind))


def _bad_type(expected: str, given: Any) -> StrategicPatchError:
    return StrategicPatchError(f"expected a {expected}, but received a {_go_kind(given)}")


def _go_kind(value: Any) -> str:
    return {dict: "map", list: "slice", str: "string", bool: "bool", int: "int64", float: "float64"}.get(type(value), "nil")


def _no_merge_key(item: Any, merge_key: str) -> StrategicPatchError:
    return StrategicPatchError(f"map: {go_map(item)} does not contain declared merge key: {merge_key}")


def _field(ref: str, key: str) -> schema.FieldSchema:
    found = schema.field_schema(ref, key) if ref else None
    if found is None:
        raise StrategicPatchError(f'unable to find api field in struct {ref.rpartition(".")[2]} for the json field "{key}"')
    return found


def _strategy(field: schema.FieldSchema) -> str:
    """The strategy besides retainKeys: "merge", "replace" or ""."""
    rest = [s for s in field.strategies if s != "retainKeys"]
    if len(rest) > 1 or len(field.strategies) > 2:
        raise StrategicPatchError(f"unexpected patch strategies {field.strategies}")
    return rest[0] if rest else ""


def _merge_map(original: Object, patch: Object, ref: str) -> Object:
    if _PATCH in patch:
        directive = patch[_PATCH]
        if directive == "replace":
            del patch[_PATCH]
            return patch
        if directive == "delete":
            return {}
        raise StrategicPatchError(f"unknown patch type: {directive} in map: {go_map(patch)}")
    _retain_keys(original, patch)
    _set_orders(original, patch, ref)
    for patch_key, value in patch.items():
        key, deletes = patch_key, False
        if patch_key.startswith(_DELETE_FROM):
            key, deletes = _after_slash(patch_key, _DELETE_FROM, _BAD_PRIMITIVE_LIST), True
        if value is None:
            original.pop(key, None)
            continue
        if key not in original or type(original[key]) is not type(value):
            if not deletes:
                _put_new(original, key, value)
            continue
        if isinstance(value, dict):
            _merge_member(original, key, value, ref)
        elif isinstance(value, list):
            field = _field(ref, key)
            if _strategy(field) == "merge" or deletes:
                original[key] = _merge_list(original[key], value, field, deletes)
            else:
                original[key] = value
        else:
            original[key] = value
    return original


def _merge_member(original: Object, key: str, value: Object, ref: str) -> None:
    field = schema.field_schema(ref, key) if ref else None
    if field is None:
        # Inside of a map of scalars, or of raw JSON: plain merge by key.
        if ref and schema.definition(ref) and (schema.definition(ref) or {}).get("fields"):
            _field(ref, key)
        original[key] = _merge_map(original[key], value, "")
        return
    if _strategy(field) == "replace":
        original[key] = value
    elif field.kind == "map":
        original[key] = _merge_values(original[key], value, field)
    else:
        original[key] = _merge_map(original[key], value, field.ref)


def _merge_values(original: Object, patch: Object, field: schema.FieldSchema) -> Object:
    """Merge a map whose values are of one type."""
    if _PATCH in patch or _RETAIN_KEYS in patch or not field.ref:
        return _merge_map(original, patch, "")
    for key, value in patch.items():
        if value is None:
            original.pop(key, None)
        elif isinstance(value, dict) and isinstance(original.get(key), dict):
            original[key] = _merge_map(original[key], value, field.ref)
        else:
            _put_new(original, key, value)
    return original


def _put_new(original: Object, key: str, value: Any) -> None:
    _discard_nulls(value)
    kept, value = _remove_directives(value)
    if kept:
        original[key] = value
    else:
        original.pop(key, None)


def _discard_nulls(value: Any) -> None:
    if isinstance(value, dict):
        for key in [k for k, v in value.items() if v is None]:
            del value[key]
        for item in value.values():
            _discard_nulls(item)
    elif isinstance(value, list):
        for item in value:
            _discard_nulls(item)


def _remove_directives(value: Any) -> tuple[bool, Any]:
    """(whether to keep it, the value without directives)."""
    if isinstance(value, dict):
        if _PATCH in value:
            return False, None
        for key in list(value):
            kept, item = _remove_directives(value[key])
            if kept:
                value[key] = item
            else:
                del value[key]
        return True, value
    if isinstance(value, list):
        return True, [item for kept, item in map(_remove_directives, value) if kept]
    return True, value


def _after_slash(key: str, prefix: str, message: str) -> str:
    head, slash, rest = key.partition("/")
    if not slash or head != prefix:
        raise StrategicPatchError(message, 400)
    return rest


def _retain_keys(original: Object, patch: Object) -> None:
    if _RETAIN_KEYS not in patch:
        return
    retained = patch.pop(_RETAIN_KEYS)
    if not isinstance(retained, list):
        raise StrategicPatchError(_BAD_RETAIN_KEYS, 400)
    for key, value in patch.items():
        if value is None or key.startswith((_DELETE_FROM, _SET_ORDER)):
            continue
        if key not in retained:
            raise StrategicPatchError(_BAD_RETAIN_KEYS, 400)
    for key in [k for k in original if k not in retained]:
        del original[key]


def _set_orders(original: Object, patch: Object, ref: str) -> None:
    """Apply the $setElementOrder lists, which take their lists out of the patch."""
    for order_key in [k for k in patch if k.startswith(_SET_ORDER)]:
        order = patch.pop(order_key)
        if not isinstance(order, list):
            raise _bad_type("slice", order)
        key = _after_slash(order_key, _SET_ORDER, _BAD_SET_ORDER)
        before, given = original.get(key), patch.get(key)
        for value in (before, given):
            if value is not None and not isinstance(value, list):
                raise _bad_type("slice", value)
        field = _field(ref, key)
        merge_key = field.merge_key
        _check_order(given or [], order, merge_key)
        if key in original and key not in patch:
            merged = before or []
        elif key not in original and key in patch:
            merged = _remove_directives(given)[1]
        elif key in original:
            merged = given if _strategy(field) != "merge" else _merge_list(list(before or []), given or [], field, False)
        else:
            continue
        maps = _holds_maps(before or given or [])
        in_order, server_only = _partition(merged or [], order, merge_key)
        original[key] = _interleave(in_order, server_only, order, before or [], merge_key, maps)
        patch.pop(key, None)


def _holds_maps(items: list[Any]) -> bool:
    if any(isinstance(item, list) for item in items):
        raise StrategicPatchError("lists of lists are not supported", 422)
    return any(isinstance(item, dict) for item in items)


def _check_order(given: list[Any], order: list[Any], merge_key: str) -> None:
    """The items of the patch must come in the order that the directive names."""
    if not given or not order:
        return
    items = [i for i in given if not (isinstance(i, dict) and _PATCH in i)]
    position = 0
    for item in items:
        while position < len(order) and not _same_key(item, order[position], merge_key):
            position += 1
        if position >= len(order):
            raise StrategicPatchError(f"The order in patch list:\n{go_map(given)}\n doesn't match {_SET_ORDER} list:\n{go_map(order)}\n")
        position += 1


def _same_key(left: Any, right: Any, merge_key: str) -> bool:
    if not merge_key:
        return type(left) is type(right) and left == right
    for side in (left, right):
        if not isinstance(side, dict):
            raise _bad_type("map", side)
        if merge_key not in side:
            raise _no_merge_key(side, merge_key)
    return bool(left[merge_key] == right[merge_key])


def _merge_list(original: list[Any], patch: list[Any], field: schema.FieldSchema, deletes: bool) -> list[Any]:
    if not original and not patch:
        return original
    maps = _holds_maps([*original, *patch])
    if not maps:
        if deletes:
            return [item for item in original if item not in patch]
        merged = _deduplicate([*original, *patch])
        in_order, server_only = _partition(merged, patch, "")
        return _interleave(in_order, server_only, patch, original, "", False)
    merge_key = field.merge_key
    if not merge_key:
        raise StrategicPatchError("cannot merge lists without merge key for struct")
    original, patch = _special_elements(original, patch, merge_key)
    merged = list(original)
    for item in patch:
        if merge_key not in item:
            raise _no_merge_key(item, merge_key)
        index = _find(merged, merge_key, item[merge_key])
        if index is None:
            merged.append(item)
        else:
            merged[index] = _merge_map(merged[index], item, field.ref)
    in_order, server_only = _partition(merged, patch, merge_key)
    return _interleave(in_order, server_only, patch, original, merge_key, True)


def _special_elements(original: list[Any], patch: list[Any], merge_key: str) -> tuple[list[Any], list[Any]]:
    """Carry out the elements that are directives; (remaining original, plain elements)."""
    plain: list[Any] = []
    replace = False
    for item in patch:
        if not isinstance(item, dict):
            raise _bad_type("map", item)
        directive = item.get(_PATCH)
        if _PATCH not in item:
            plain.append(item)
        elif directive == "delete":
            if merge_key not in item:
                raise _no_merge_key(item, merge_key)
            original = [o for o in original if not (isinstance(o, dict) and o.get(merge_key) == item[merge_key])]
        elif directive == "replace":
            replace = True
        elif directive == "merge":
            raise StrategicPatchError("merging lists cannot yet be specified in the patch")
        else:
            raise StrategicPatchError(f"unknown patch type: {directive} in map: {go_map(item)}")
    return (plain, []) if replace else (original, plain)


def _find(items: list[Any], merge_key: str, value: Any) -> int | None:
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise StrategicPatchError(f"value for key {index} is not a map")
        if merge_key in item and item[merge_key] == value and type(item[merge_key]) is type(value):
            return index
    return None


def _partition(items: list[Any], by: list[Any], merge_key: str) -> tuple[list[Any], list[Any]]:
    """(items that are in the other list, items that are not)."""
    inside: list[Any] = []
    outside: list[Any] = []
    for item in items:
        if merge_key:
            if not isinstance(item, dict):
                raise _bad_type("map", item)
            if merge_key not in item:
                raise _no_merge_key(item, merge_key)
            found = _find(by, merge_key, item[merge_key]) is not None
        else:
            found = any(type(item) is type(other) and item == other for other in by)
        (inside if found else outside).append(item)
    return inside, outside


def _deduplicate(items: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if not any(type(item) is type(other) and item == other for other in kept):
            kept.append(item)
    return kept


def _interleave(
    in_order: list[Any], server_only: list[Any], order: list[Any], server_order: list[Any], merge_key: str, maps: bool,
) -> list[Any]:
    """Both parts in their own orders, server-only items placed by the live list as well as can be."""

    def index(items: list[Any], item: Any) -> int:
        for position, other in enumerate(items):
            if maps and merge_key:
                if isinstance(other, dict) and other.get(merge_key) == item.get(merge_key):
                    return position
            elif type(other) is type(item) and other == item:
                return position
        return -1

    if maps and merge_key:
        for items in (in_order, order, server_only, server_order):
            for item in items:
                if not isinstance(item, dict):
                    raise _bad_type("map", item)
                if merge_key not in item:
                    raise _no_merge_key(item, merge_key)
    left = sorted(server_only, key=lambda item: index(server_order, item))
    right = sorted(in_order, key=lambda item: index(order, item))
    result: list[Any] = []
    i = j = 0
    while i < len(left) or j < len(right):
        if i >= len(left):
            result.append(right[j])
            j += 1
        elif j >= len(right):
            result.append(left[i])
            i += 1
        else:
            before, after = index(server_order, left[i]), index(server_order, right[j])
            if before >= 0 and after >= 0 and before < after:
                result.append(left[i])
                i += 1
            else:
                result.append(right[j])
                j += 1
    return result
