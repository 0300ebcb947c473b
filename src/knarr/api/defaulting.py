"""Default values, as upstream's versioned API applies them on decoding: literal rules compiled from the facts, the
conditional ones by hand in defaults_by_hand.py.

Callers: the API server right after decoding or patching, controllers that compare pod templates. `default` also does
what a round trip through upstream's internal version changes (roundtrip.py), since upstream's clients see both as one.

A rule applies when its field is unset; a path applies only where its parents are present. Objects must have been pruned
(typeinfo.pruner), which drops what is unset and adds the structs that Go always has.

Source: pkg/apis/*/v*/defaults.go, zz_generated.defaults.go.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import orjson

from knarr.api import defaults_by_hand, roundtrip, typeinfo
from knarr.api.facts import read_fact
from knarr.api.scheme import Resource
from knarr.api.types import Object

Defaulter = Callable[[Object], None]


class _Node:
    """Rules of one struct: literals (field, value, set even if zero), hooks, and children by JSON key."""

    __slots__ = ("children", "hooks", "literals")

    def __init__(self) -> None:
        self.literals: dict[str, Any] = {}
        self.hooks: list[tuple[str, str]] = []
        self.children: dict[str, _Node] = {}


def default(resource: "Resource | tuple[str, str]", obj: Object) -> None:
    """Fill in defaults in place, for a built-in resource or an (api_version, kind); unknown kinds are left as they are."""
    api_version, kind = (resource.api_version, resource.kind) if isinstance(resource, Resource) else resource
    defaulter(api_version, kind)(obj)


@cache
def defaulter(api_version: str, kind: str) -> Defaulter:
    """The compiled function that `default` applies for a kind."""
    rules = _rules().get(f"{api_version}/{kind}")
    steps: list[Defaulter] = []
    hook = defaults_by_hand.KINDS.get((api_version, kind))
    if hook is not None:
        steps.append(hook)
    if rules:
        steps.append(_compile(_tree(rules), typeinfo.message_name(api_version, kind)))
    steps.extend(roundtrip.STEPS.get((api_version, kind), ()))

    def run(obj: Object) -> None:
        for step in steps:
            step(obj)

    return run


@cache
def _rules() -> dict[str, dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = orjson.loads(read_fact("defaults.json"))["kinds"]
    return kinds


def _tree(rules: dict[str, Any]) -> _Node:
    root = _Node()
    for path, value in rules.items():
        node = root
        *parents, leaf = path.split(".")
        for part in parents:
            node = node.children.setdefault(part, _Node())
        if isinstance(value, str) and value.startswith("@"):
            rule = value.removeprefix("@io.k8s.")
            if rule in defaults_by_hand.FIELDS:
                node.hooks.append((leaf, rule))
            elif rule not in defaults_by_hand.IN_KINDS:
                raise KeyError(rule)
        elif path not in defaults_by_hand.CREATED_IN_KINDS:
            node.literals[leaf] = value
    return root


_compiled: dict[str, Defaulter] = {}


def _signature(node: _Node, message_name: str) -> str:
    """Equal for subtrees that compile to the same function: pod templates share theirs."""
    parts = [message_name, orjson.dumps(node.literals).decode(), repr(node.hooks)]
    parts.extend(f"{key}({_signature(child, '')})" for key, child in node.children.items())
    return "|".join(parts)


def _compile(node: _Node, message_name: str) -> Defaulter:
    """Generate the function for a struct: `d(o)` with one line per rule."""
    signature = _signature(node, message_name)
    found = _compiled.get(signature)
    if found is not None:
        return found
    info = typeinfo.message(message_name)
    lines = ["def d(o):"]
    names: dict[str, Any] = {}
    for key, value in node.literals.items():
        one = info.fields[key]
        # A pointer without omitempty stands there as null when unset, a kept scalar as its zero value.
        test = f"if o.get({key!r}) is None" if one.pointer else f"if not o.get({key!r})"
        if isinstance(value, dict | list) and value:
            names[f"copy_{key}"] = _copier(value)
            lines.append(f"    {test}: o[{key!r}] = copy_{key}()")
        else:
            lines.append(f"    {test}: o[{key!r}] = {value!r}")
    for index, (key, rule) in enumerate(node.hooks):
        names[f"hook{index}"] = defaults_by_hand.FIELDS[rule]
        lines.append(f"    hook{index}(o, {key!r})")
    if node.children:
        lines.append("    get = o.get")
    for index, (part, child) in enumerate(node.children.items()):
        key = part.removesuffix("[]")
        if key not in info.fields:
            continue
        names[f"child{index}"] = _compile(child, info.fields[key].type)
        lines.append(f"    v = get({key!r})")
        if part.endswith("[]"):
            lines.append(f"    if v:\n        for x in v: child{index}(x)")
        else:
            lines.append(f"    if v is not None: child{index}(v)")
    lines.append("    return None")
    exec("\n".join(lines), names)
    made: Defaulter = names["d"]
    _compiled[signature] = made
    return made


def _copier(value: Any) -> Callable[[], Any]:
    encoded = orjson.dumps(value)
    return lambda: orjson.loads(encoded)
