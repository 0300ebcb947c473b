"""The walks of structured merge over one or two values: check, field set, compare, merge, remove. Pure.

Values are JSON values; ABSENT stands for no value, None for null. All functions take the value's Kind.

Source: structured-merge-diff typed (validate.go, tofieldset.go, compare.go, merge.go, remove.go).
"""

from typing import Any

from knarr.api.apply import fieldset as fs
from knarr.api.apply.fieldset import MEMBER, FieldSet
from knarr.api.apply.types import ABSENT, BOOLEAN, NUMERIC, STRING, Kind
from knarr.api.patch.json_patch import equal

_IN: FieldSet = {MEMBER: True}


class TypeMismatch(ValueError):
    """A value does not fit its schema; the message is upstream's, path first."""


def _error(path: str, why: str) -> str:
    return f"{path}: {why}" if path else why


def _shape(kind: Kind, value: Any) -> str:
    """Whether to treat the value as a map, a list or a scalar."""
    cls = value.__class__
    if cls is dict and kind.is_map:
        return "map"
    if cls is list and kind.is_list:
        return "list"
    if cls is not dict and cls is not list and value is not None and value is not ABSENT and kind.scalar:
        return "scalar"
    return "map" if kind.is_map else "scalar" if kind.scalar else "list"


# --- check ------------------------------------------------------------------------------------------------------------


def check(kind: Kind, value: Any, *, allow_duplicates: bool = False) -> None:
    """Check a value against its type.

    Raises:
      TypeMismatch: undeclared fields, wrong types, duplicate keys.
    """
    errors: list[str] = []
    _check(kind, value, "", allow_duplicates, errors)
    if errors:
        raise TypeMismatch(errors[0] if len(errors) == 1 else "\n".join(["errors:", *(f"  {e}" for e in errors)]))


def _go_value(value: Any) -> str:
    return "[" + " ".join(map(_go_value, value)) + "]" if isinstance(value, list) else str(value)


def _check(kind: Kind, value: Any, path: str, allow_duplicates: bool, errors: list[str]) -> None:
    if value is None:
        return
    shape = _shape(kind, value)
    if shape == "map":
        if value.__class__ is not dict:
            errors.append(_error(path, f"expected map, got &{{{_go_value(value)}}}"))
            return
        for key, item in value.items():
            child = kind.field(key) or kind.element
            if child is None:
                errors.append(_error(f"{path}.{key}", "field not declared in schema"))
                # Upstream's walk over a map stops here.
                return
            _check(child, item, f"{path}.{key}", allow_duplicates, errors)
    elif shape == "list":
        if value.__class__ is not list:
            errors.append(_error(path, f"expected list, got &{{{_go_value(value)}}}"))
            return
        _check_list(kind, value, path, allow_duplicates, errors)
    else:
        _check_scalar(kind.scalar, value, path, errors)


def _check_scalar(scalar: str, value: Any, path: str, errors: list[str]) -> None:
    cls = value.__class__
    if scalar == NUMERIC and cls is not int and cls is not float:
        word = {str: "string", bool: "bool", dict: "map[string]interface {}", list: "[]interface {}"}.get(cls, "nil")
        errors.append(_error(path, f"expected numeric (int or float), got {word}"))
    elif scalar == STRING and cls is not str:
        errors.append(_error(path, f"expected string, got &value.valueUnstructured{{Value:{_go_value(value)}}}"))
    elif scalar == BOOLEAN and cls is not bool:
        errors.append(_error(path, f"expected boolean, got &{{{_go_value(value)}}}"))
    elif cls is dict or cls is list:
        errors.append(_error(path, f"expected any scalar, got &{{{_go_value(value)}}}"))


def _check_list(kind: Kind, value: list[Any], path: str, allow_duplicates: bool, errors: list[str]) -> None:
    item_kind = kind.item
    assert item_kind is not None
    seen: set[str] = set()
    for index, item in enumerate(value):
        if kind.atomic_list:
            element = f"i:{index}"
        else:
            try:
                element = item_element(kind, item)
            except TypeMismatch as error:
                errors.append(_error(path, f"element {index}: {error}"))
                return
            if element in seen and not allow_duplicates:
                errors.append(_error(path, f"duplicate entries for key {fs.element_text(element)}"))
            seen.add(element)
        _check(item_kind, item, f"{path}{fs.element_text(element)}", allow_duplicates, errors)


def item_element(kind: Kind, item: Any) -> str:
    """The path element of an item of a set or keyed list.

    Raises:
      TypeMismatch: the item cannot be identified.
    """
    if not kind.keys:
        if item.__class__ is dict:
            raise TypeMismatch("associative list without keys has an element that's a map type")
        if item.__class__ is list:
            raise TypeMismatch("not supported: associative list with lists as elements")
        if item is None:
            raise TypeMismatch("associative list without keys has an element that's an explicit null")
        return fs.value_element(item)
    if item is None:
        raise TypeMismatch("associative list with keys may not have a null element")
    if item.__class__ is not dict:
        raise TypeMismatch("associative list with keys may not have non-map elements")
    pairs = []
    for key in kind.keys:
        value = item.get(key, ABSENT)
        if value is ABSENT:
            value = kind.key_defaults.get(key, ABSENT)
        if value is not ABSENT:
            if value.__class__ is dict or value.__class__ is list:
                raise TypeMismatch(f"associative list with keys has an element whose key {key} is not a scalar")
            pairs.append((key, value))
    if not pairs:
        words = " ".join(f'"{key}"' for key in kind.keys)
        raise TypeMismatch(
            f"associative list with keys has an element that omits all key fields [{words}] (and doesn't have default values for any key "
            "fields)"
        )
    return fs.key_element(*pairs)


# --- field set --------------------------------------------------------------------------------------------------------


def field_set(kind: Kind, value: Any) -> FieldSet:
    """The paths that a configuration names."""
    shape = _shape(kind, value)
    if shape == "scalar":
        return _IN
    if shape == "list":
        if kind.atomic_list:
            return _IN
        return _list_field_set(kind, value) if value.__class__ is list else {}
    if kind.atomic_map:
        return _IN
    node: FieldSet = {}
    if value.__class__ is not dict:
        return node
    for key, item in value.items():
        declared = kind.field(key)
        child_kind = declared or kind.element
        if child_kind is None:
            continue
        child = field_set(child_kind, item)
        if declared is None or item is None or (item.__class__ is dict and not item):
            child = _with_member(child)
        if child:
            node[f"f:{key}"] = child
    return node


def _with_member(node: FieldSet) -> FieldSet:
    return node if MEMBER in node else {MEMBER: True, **node}


def _list_field_set(kind: Kind, value: list[Any]) -> FieldSet:
    item_kind = kind.item
    assert item_kind is not None
    node: FieldSet = {}
    repeated: set[str] = set()
    for item in value:
        element = item_element(kind, item)
        if element in node:
            repeated.add(element)
            continue
        node[element] = _with_member(field_set(item_kind, item))
    for element in repeated:
        node[element] = _IN
    return node


# --- compare ----------------------------------------------------------------------------------------------------------


class Comparison:
    """What differs from one object to another, as field sets."""

    __slots__ = ("added", "modified", "removed")

    def __init__(self, removed: FieldSet, modified: FieldSet, added: FieldSet) -> None:
        self.removed, self.modified, self.added = removed, modified, added


def compare(kind: Kind, left: Any, right: Any) -> Comparison:
    """Compare two values of one type."""
    removed: FieldSet = {}
    modified: FieldSet = {}
    added: FieldSet = {}
    _compare(kind, left, right, removed, modified, added)
    return Comparison(removed, modified, added)


def _compare(kind: Kind, left: Any, right: Any, removed: FieldSet, modified: FieldSet, added: FieldSet) -> None:
    """Record differences into the three nodes, which stand for the path of these values."""
    left_shape, right_shape = _shape(kind, left), _shape(kind, right)
    leaf = False
    if right is ABSENT:
        leaf = _compare_as(kind, left_shape, left, right, removed, modified, added)
    elif left is ABSENT or left_shape == right_shape:
        leaf = _compare_as(kind, right_shape, left, right, removed, modified, added)
    else:
        _compare_as(kind, left_shape, left, right, removed, modified, added)
        leaf = _compare_as(kind, right_shape, left, right, removed, modified, added)
    if not leaf:
        if left is ABSENT:
            added[MEMBER] = True
        elif right is ABSENT:
            removed[MEMBER] = True


def _leaf(left: Any, right: Any, removed: FieldSet, modified: FieldSet, added: FieldSet) -> bool:
    if left is ABSENT:
        added[MEMBER] = True
    elif right is ABSENT:
        removed[MEMBER] = True
    elif left is not right and not _same(left, right):
        modified[MEMBER] = True
    return True


def _same(left: Any, right: Any) -> bool:
    if left.__class__ is right.__class__ and left.__class__ not in (dict, list):
        return bool(left == right)
    if left.__class__ in (int, float) and right.__class__ in (int, float):
        return bool(left == right)
    # C rules out most differences; that 1 equals True there is for the walk to tell.
    return bool(left == right) and equal(left, right)


def _compare_as(kind: Kind, shape: str, left: Any, right: Any, removed: FieldSet, modified: FieldSet, added: FieldSet) -> bool:
    """Compare as this shape; True if the values were taken as a whole."""
    if shape == "scalar":
        return _leaf(left, right, removed, modified, added)
    container = dict if shape == "map" else list
    lhs: Any = left if left.__class__ is container else None
    rhs: Any = right if right.__class__ is container else None
    if (kind.atomic_map if shape == "map" else kind.atomic_list) or (not lhs and not rhs):
        return _leaf(left, right, removed, modified, added)
    if shape == "map":
        _compare_maps(kind, lhs or {}, rhs or {}, removed, modified, added)
    else:
        _compare_lists(kind, lhs or [], rhs or [], removed, modified, added)
    return False


def _child(kind: Kind, element: str, left: Any, right: Any, removed: FieldSet, modified: FieldSet, added: FieldSet) -> None:
    """Compare a member and hang its differences, if any, below the parents."""
    # Most of an object stays as it is; dicts compare in C. (That 1 equals True here can only hide a change of type.)
    if left is right or (left.__class__ is right.__class__ and left == right):
        return
    below_removed: FieldSet = {}
    below_modified: FieldSet = {}
    below_added: FieldSet = {}
    _compare(kind, left, right, below_removed, below_modified, below_added)
    if below_removed:
        removed[element] = below_removed
    if below_modified:
        modified[element] = below_modified
    if below_added:
        added[element] = below_added


def _compare_maps(kind: Kind, lhs: Any, rhs: Any, removed: FieldSet, modified: FieldSet, added: FieldSet) -> None:
    for key, right in rhs.items():
        child = kind.field(key) or kind.element
        if child is not None:
            left = lhs.get(key, ABSENT)
            if left.__class__ is str and left == right:
                continue
            _child(child, f"f:{key}", left, right, removed, modified, added)
    for key, left in lhs.items():
        if key not in rhs:
            child = kind.field(key) or kind.element
            if child is not None:
                _child(child, f"f:{key}", left, ABSENT, removed, modified, added)


def _by_element(kind: Kind, items: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(item_element(kind, item), []).append(item)
    return found


def _compare_lists(kind: Kind, lhs: list[Any], rhs: list[Any], removed: FieldSet, modified: FieldSet, added: FieldSet) -> None:
    item_kind = kind.item
    assert item_kind is not None
    lefts, rights = _by_element(kind, lhs), _by_element(kind, rhs)
    for element in {**lefts, **rights}:
        left, right = lefts.get(element, []), rights.get(element, [])
        if len(left) <= 1 and len(right) <= 1:
            _child(item_kind, element, left[0] if left else ABSENT, right[0] if right else ABSENT, removed, modified, added)
        elif len(left) >= 2 and len(right) >= 2:
            if not equal(left, right):
                modified[element] = _IN
        elif len(left) >= 2:
            if right:
                _child(item_kind, element, ABSENT, right[0], removed, modified, added)
            removed[element] = _with_member(removed.get(element, {}))
        else:
            if left:
                _child(item_kind, element, left[0], ABSENT, removed, modified, added)
            added[element] = _with_member(added.get(element, {}))


# --- merge ------------------------------------------------------------------------------------------------------------


def merge(kind: Kind, left: Any, right: Any) -> Any:
    """Merge right into left; right wins in leaves. ABSENT if nothing is left."""
    left_shape, right_shape = _shape(kind, left), _shape(kind, right)
    if right is ABSENT:
        return _merge_as(kind, left_shape, left, right)
    # Where the two have different shapes upstream walks both, and the right one's result stays.
    return _merge_as(kind, right_shape, left, right)


def _merge_as(kind: Kind, shape: str, left: Any, right: Any) -> Any:
    container = dict if shape == "map" else list
    lhs: Any = left if left.__class__ is container else None
    rhs: Any = right if right.__class__ is container else None
    atomic = shape == "scalar" or (kind.atomic_map if shape == "map" else kind.atomic_list)
    if atomic or (not lhs and not rhs):
        return left if right is ABSENT else right
    if shape == "list":
        return _merge_lists(kind, lhs or [], rhs or [])
    made: dict[str, Any] = {}
    lhs, rhs = lhs or {}, rhs or {}
    for key in (*lhs, *(k for k in rhs if k not in lhs)):
        child = kind.field(key) or kind.element
        if child is None:
            continue
        value = merge(child, lhs.get(key, ABSENT), rhs.get(key, ABSENT))
        if value is not ABSENT:
            made[key] = value
    return made or ABSENT


def _merge_lists(kind: Kind, lhs: list[Any], rhs: list[Any]) -> Any:
    """Items of both, in an order that keeps the right one's and, where it can, the left one's."""
    item_kind = kind.item
    assert item_kind is not None
    left_order = [item_element(kind, item) for item in lhs]
    right_order = [item_element(kind, item) for item in rhs]
    lefts: dict[str, Any] = {}
    for element, item in zip(left_order, lhs, strict=True):
        # Of duplicates on the left neither counts.
        lefts[element] = None if element in lefts else item
    rights = dict(zip(right_order, rhs, strict=True))
    shared = [element for element in right_order if element in lefts]
    next_shared = shared.pop(0) if shared else None
    merged: set[str] = set()
    out: list[Any] = []

    def emit(left: Any, right: Any) -> None:
        value = merge(item_kind, left, right)
        if value is not ABSENT:
            out.append(value)

    i = j = 0
    while i < len(lhs) or j < len(rhs):
        if i < len(lhs) and j < len(rhs):
            element = left_order[i]
            if element == right_order[j]:
                merged.add(element)
                emit(lefts[element], rights[element])
                i, j = i + 1, j + 1
                next_shared = shared.pop(0) if shared else None
                continue
            if element in rights and next_shared is not None and next_shared != element:
                i += 1
                continue
        if i < len(lhs):
            element = left_order[i]
            if element not in rights:
                emit(lhs[i], ABSENT)
                i += 1
                continue
            if element in merged:
                i += 1
        if j < len(rhs):
            element = right_order[j]
            merged.add(element)
            emit(lefts.get(element, ABSENT), rights[element])
            j += 1
            if next_shared == element:
                next_shared = shared.pop(0) if shared else None
    return out or ABSENT


# --- remove -----------------------------------------------------------------------------------------------------------


def remove(kind: Kind, value: Any, paths: FieldSet) -> Any:
    """The value without the members that paths name; what becomes empty becomes null."""
    shape = _shape(kind, value)
    if shape == "scalar":
        return value
    if shape == "list":
        if value.__class__ is not list or not value or kind.atomic_list:
            return None
        item_kind = kind.item
        assert item_kind is not None
        items: list[Any] = []
        for item in value:
            below = paths.get(item_element(kind, item))
            if below is None:
                items.append(item)
            elif MEMBER not in below:
                items.append(remove(item_kind, item, below))
        return items or None
    if value.__class__ is not dict or not value or kind.atomic_map:
        return None
    made: dict[str, Any] = {}
    for key, item in value.items():
        below = paths.get(f"f:{key}")
        if below is None:
            made[key] = item
        elif MEMBER not in below:
            child = kind.field(key) or kind.element
            made[key] = remove(child, item, below) if child is not None else item
    return made or None


# --- sets and types ---------------------------------------------------------------------------------------------------


def with_named_fields(kind: Kind | None, node: FieldSet) -> FieldSet:
    """The set with every declared field that has members below it made a member itself."""
    made: FieldSet = {}
    for element, child in node.items():
        if element == MEMBER:
            made[MEMBER] = True
            continue
        child_kind: Kind | None = None
        declared = None
        if element.startswith("f:") and kind is not None and kind.is_map:
            declared = kind.field(element[2:])
            child_kind = declared or kind.element
        elif element.startswith("k:") and kind is not None and kind.is_list:
            child_kind = kind.item
        below = with_named_fields(child_kind, child)
        if declared is not None and any(e != MEMBER for e in child):
            below = _with_member(below)
        made[element] = below
    return made


def reconcile(kind: Kind, node: FieldSet) -> FieldSet:
    """A stored set after the schema may have changed: paths below what is atomic now become the atomic one's path."""
    below = [e for e in node if e != MEMBER]
    if not below:
        return node
    as_list = not below[0].startswith("f:")
    if as_list:
        if not kind.is_list:
            return node
        if kind.atomic_list:
            return _IN
    else:
        if not kind.is_map or (kind.scalar and kind.is_list):
            return node
        if kind.atomic_map:
            return _IN
    made: FieldSet | None = None
    for element in below:
        child_kind = kind.item if as_list else kind.field(element[2:]) or kind.element
        if child_kind is None:
            continue
        child = node[element]
        changed = reconcile(child_kind, child)
        if changed is not child:
            made = dict(node) if made is None else made
            made[element] = changed
    return node if made is None else made
