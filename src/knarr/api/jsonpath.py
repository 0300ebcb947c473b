"""JSONPath as Kubernetes reads it in printer columns, selectable fields and scale paths. Pure.

Understood: .a.b, ['a.b'], escaped dots, [n], [a:b:c], [*], .*, ..name, unions [0,2] and ['a','b'], filters
[?(@.type=="Ready")] with ==, !=, <, <=, >, >=, and a bare path as a test for presence. Results come in document order.

Source: client-go util/jsonpath.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

Step = Callable[[Any], Iterator[Any]]


class JSONPathError(ValueError):
    """The path cannot be parsed."""


_TOKEN = re.compile(r"\.\.|\.?\*|\.((?:\\.|[^.\[\]\\*()?@ ])+)|\[")
_COMPARE = re.compile(r"\s*(.+?)\s*(==|!=|<=|>=|<|>)\s*(.+?)\s*$", re.DOTALL)


class JSONPath:
    """A compiled path: `path.find(obj)` yields all values, `path.first(obj)` the first or None."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._steps = _parse(text)

    def find(self, value: Any) -> list[Any]:
        found = [value]
        for step in self._steps:
            found = [result for item in found for result in step(item)]
        return found

    def first(self, value: Any) -> Any:
        found = self.find(value)
        return found[0] if found else None


@lru_cache(maxsize=1024)
def compile_path(text: str) -> JSONPath:
    """Compile a path such as ".spec.replicas"; an outer {…} and a leading $ are taken off.

    Raises:
      JSONPathError: cannot be parsed.
    """
    return JSONPath(text)


def _parse(text: str) -> list[Step]:
    text = text.strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    text = text.removeprefix("$").removeprefix("@")
    if text and text[0] not in ".[":
        text = "." + text
    steps: list[Step] = []
    position = 0
    while position < len(text):
        if text[position:] == ".":
            break
        match = _TOKEN.match(text, position)
        if match is None:
            raise JSONPathError(f"cannot parse {text!r} at {position}")
        token = match[0]
        position = match.end()
        if token == "[":
            end = _closing(text, position)
            steps.append(_bracket(text[position:end]))
            position = end + 1
        elif token == "..":
            steps.append(_descend)
            if position < len(text) and text[position] not in ".[":
                text = text[:position] + "." + text[position:]
        elif token.endswith("*"):
            steps.append(_all)
        else:
            steps.append(_member(re.sub(r"\\(.)", r"\1", match[1])))
    return steps


def _closing(text: str, position: int) -> int:
    depth, quote = 1, ""
    for index in range(position, len(text)):
        character = text[index]
        if quote:
            if character == quote and text[index - 1] != "\\":
                quote = ""
        elif character in "'\"":
            quote = character
        elif character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if not depth:
                return index
    raise JSONPathError(f"unterminated array in {text!r}")


def _member(name: str) -> Step:
    def step(value: Any) -> Iterator[Any]:
        if isinstance(value, dict) and name in value:
            yield value[name]

    return step


def _all(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _descend(value: Any) -> Iterator[Any]:
    yield value
    for item in _all(value):
        yield from _descend(item)


def _bracket(text: str) -> Step:
    text = text.strip()
    if text == "*":
        return _all
    if text.startswith("?(") and text.endswith(")"):
        return _filter(text[2:-1])
    parts = _split_union(text)
    if len(parts) > 1:
        steps = [_bracket(part) for part in parts]

        def union(value: Any) -> Iterator[Any]:
            for step in steps:
                yield from step(value)

        return union
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return _member(re.sub(r"\\(.)", r"\1", text[1:-1]))
    match = re.fullmatch(r"(-?\d*)(?::(-?\d*))?(?::(-?\d*))?", text)
    if match is None or not text:
        raise JSONPathError(f"invalid array index {text}")
    if ":" not in text:
        return _index(int(text))
    start, stop, stride = (int(part) if part else None for part in match.groups())

    def cut(value: Any) -> Iterator[Any]:
        if isinstance(value, list):
            yield from value[start:stop:stride]

    return cut


def _index(index: int) -> Step:
    def step(value: Any) -> Iterator[Any]:
        if isinstance(value, list) and -len(value) <= index < len(value):
            yield value[index]

    return step


def _split_union(text: str) -> list[str]:
    parts, start, quote = [], 0, ""
    for index, character in enumerate(text):
        if quote:
            if character == quote and text[index - 1] != "\\":
                quote = ""
        elif character in "'\"":
            quote = character
        elif character == ",":
            parts.append(text[start:index].strip())
            start = index + 1
    parts.append(text[start:].strip())
    return parts


def _filter(text: str) -> Step:
    match = _COMPARE.match(text)
    if match is None:
        path = compile_path(text.strip())
        return lambda value: (item for item in _all(value) if path.find(item))
    left, operator, right = _operand(match[1]), match[2], _operand(match[3])

    def step(value: Any) -> Iterator[Any]:
        for item in _all(value) if isinstance(value, list) else ():
            if _compare(left(item), operator, right(item)):
                yield item

    return step


def _operand(text: str) -> Callable[[Any], list[Any]]:
    if text.startswith(("@", "$", ".")):
        path = compile_path(text)
        return path.find
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        value: Any = re.sub(r"\\(.)", r"\1", text[1:-1])
    elif text in ("true", "false"):
        value = text == "true"
    else:
        try:
            value = int(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                raise JSONPathError(f"cannot read {text}") from None
    return lambda _item: [value]


def _compare(left: list[Any], operator: str, right: list[Any]) -> bool:
    if len(left) != 1 or len(right) != 1:
        return False
    a, b = left[0], right[0]
    if isinstance(a, bool) != isinstance(b, bool) or isinstance(a, str) != isinstance(b, str):
        return operator == "!="
    try:
        match operator:
            case "==":
                return bool(a == b)
            case "!=":
                return bool(a != b)
            case "<":
                return bool(a < b)
            case "<=":
                return bool(a <= b)
            case ">":
                return bool(a > b)
    except TypeError:
        return False
    return bool(a >= b)
