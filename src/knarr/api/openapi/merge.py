"""Swagger 2.0 documents of several servers made one. Pure; used by documents.py for extension API servers.

Source: kube-openapi pkg/aggregator (filtering by path, merging with renamed definitions).
"""

from collections.abc import Callable, Iterator
from typing import Any

_PREFIX = "#/definitions/"
_KINDS = "x-kubernetes-group-version-kind"
Swagger = dict[str, Any]


def references(value: Any) -> Iterator[str]:
    """Yield the names of the definitions that a part of a document refers to."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            target = one.get("$ref")
            if isinstance(target, str) and target.startswith(_PREFIX):
                yield target.removeprefix(_PREFIX)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def below(document: Swagger, prefix: str) -> Swagger:
    """Return what a document says of the paths that begin so, with the definitions that are needed for them.

    Definitions that nothing referred to before stay, as they are meant to be looked up by kind.
    """
    definitions: dict[str, Any] = document.get("definitions") or {}
    paths = {path: item for path, item in (document.get("paths") or {}).items() if path.startswith(prefix)}
    used = set(references([document.get("paths"), definitions]))
    kept = {name for name in definitions if name not in used}
    waiting = [*references(paths), *references([definitions[name] for name in kept])]
    while waiting:
        name = waiting.pop()
        if name not in kept and name in definitions:
            kept.add(name)
            waiting.extend(references(definitions[name]))
    return {"paths": paths, "definitions": {name: definitions[name] for name in definitions if name in kept}}


def merge(into: Swagger, other: Swagger) -> None:
    """Add another document's paths and definitions, in place: paths that are there stay, definitions that differ get other names."""
    renamed: dict[str, str] = {}
    definitions: dict[str, Any] = into["definitions"]
    for name, definition in other["definitions"].items():
        number = 1
        own = name
        while own in definitions and not _equal(definitions[own], definition):
            number += 1
            own = f"{name}_v{number}"
        if own != name:
            renamed[name] = own
    rename = _renamer(renamed)
    for name, definition in other["definitions"].items():
        own = renamed.get(name, name)
        known = definitions.get(own)
        if known is None:
            definitions[own] = rename(definition)
        elif definition.get(_KINDS):
            # One type that several servers use for kinds of their own.
            kinds = known.get(_KINDS) or []
            more = [kind for kind in definition[_KINDS] if kind not in kinds]
            if more:
                definitions[own] = {**known, _KINDS: [*kinds, *more]}
    for path, item in other["paths"].items():
        into["paths"].setdefault(path, rename(item))


def _equal(one: Any, other: Any) -> bool:
    return bool(_without_kinds(one) == _without_kinds(other))


def _without_kinds(definition: Any) -> Any:
    return {key: value for key, value in definition.items() if key != _KINDS} if isinstance(definition, dict) else definition


def _renamer(names: dict[str, str]) -> Callable[[Any], Any]:
    targets = {_PREFIX + old: _PREFIX + new for old, new in names.items()}

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: targets.get(item, item) if key == "$ref" and isinstance(item, str) else rename(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item) for item in value]
        return value

    return rename if targets else lambda value: value
