"""YAML in, as upstream reads it: YAML 1.1 scalars by go-yaml v2's rules, turned into JSON values.

Used by decode.py for request bodies, by server-side apply and by the command line for files. Depth, size and alias
expansion are bounded. Only the first document of a stream is read, as upstream does.

Source: go.yaml.in/yaml/v2 (resolve.go, decode.go), sigs.k8s.io/yaml.
"""

import re
from typing import Any

import yaml

_RECURSION_LIMIT = 400

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BOOLEANS = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
}
_NULLS = {"", "~", "null", "Null", "NULL"}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_INTEGER = re.compile(r"([-+]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+|0[0-7]*|[1-9][0-9]*)", re.ASCII)
_TIMESTAMP = re.compile(
    r"\d{4}-(0?[1-9]|1[0-2])-\d{1,2}([Tt]\d{1,2}:\d{1,2}:\d{1,2}(\.\d+)?(Z|[-+]\d\d:\d\d)| \d{1,2}:\d{1,2}:\d{1,2}(\.\d+)?)?", re.ASCII,
)
_STR_TAG, _BINARY_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:binary"
_MERGE_TAG = "tag:yaml.org,2002:merge"


class YAMLError(ValueError):
    """The text is not usable YAML; the message begins like upstream's."""


def resolve_scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar: bool, None, int, float or text."""
    if text in _NULLS:
        return None
    first = text[0]
    if first.isalpha() or first == "_":
        return _BOOLEANS.get(text, text)
    if first not in "+-.0123456789":
        return text
    if text.lower() in (".inf", "+.inf", "-.inf", ".nan"):
        raise YAMLError(f"json: unsupported value: {text}")
    if first == ".":
        return float(text) if _FLOAT.fullmatch(text) else text
    if text[:4].isdigit() and text[4:5] == "-" and _TIMESTAMP.fullmatch(text):
        return text
    plain = text.replace("_", "")
    match = _INTEGER.fullmatch(plain)
    if match is not None:
        digits = match[2]
        base = {"x": 16, "b": 2, "o": 8}.get(digits[1:2].lower(), 8 if digits[0] == "0" and len(digits) > 1 else 10)
        number = int(digits[2:] if digits[1:2].isalpha() else digits, base)
        number = -number if match[1] == "-" else number
        if -(2**63) <= number < 2**64:
            return number
    if _FLOAT.fullmatch(plain):
        return float(plain)
    return text


class _Builder:
    """Turns a node graph into JSON values, counting what aliases expand to."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.resolver: Any = yaml.resolver.Resolver()
        self.duplicates: list[str] = []
        self.decoded = 0
        self.aliased = 0
        self.seen: set[int] = set()
        self.alias_depth = 0

    def count(self, node: Any) -> bool:
        """Count one node; True if it was reached through an alias of its own."""
        again = id(node) in self.seen and not isinstance(node, yaml.ScalarNode)
        self.seen.add(id(node))
        self.decoded += 1
        if self.alias_depth or again:
            self.aliased += 1
        if self.aliased > 100 and self.decoded > 1000 and self.aliased / self.decoded > _allowed_alias_ratio(self.decoded):
            raise YAMLError("yaml: document contains excessive aliasing")
        return again

    def build(self, node: Any, depth: int) -> Any:
        if depth > _RECURSION_LIMIT:
            raise YAMLError("yaml: exceeded max depth of nesting")
        again = self.count(node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.alias_depth += again
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, depth + 1) for item in node.value]
            return self.mapping(node, depth)
        finally:
            self.alias_depth -= again

    def scalar(self, node: Any) -> Any:
        text: str = node.value
        if node.style in ("'", '"', "|", ">"):
            return text
        if node.tag in (_STR_TAG, _BINARY_TAG) and self.resolver.resolve(yaml.ScalarNode, text, (True, False)) != node.tag:
            # An explicit !!str keeps a text that looks like a number.
            return text
        return resolve_scalar(text)

    def mapping(self, node: Any, depth: int) -> Any:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG or (isinstance(key_node, yaml.ScalarNode) and key_node.value == "<<" and not key_node.style):
                self.merge(merged, value_node, depth)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise YAMLError("yaml: invalid map key")
            key = _key_text(self.scalar(key_node))
            if key in result:
                line = key_node.start_mark.line + 1
                self.duplicates.append(f'line {line}: key "{key}" already set in map')
            result[key] = self.build(value_node, depth + 1)
        return {**merged, **result} if merged else result

    def merge(self, into: dict[str, Any], node: Any, depth: int) -> None:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for one in nodes:
            if not isinstance(one, yaml.MappingNode):
                raise YAMLError("yaml: map merge requires map or sequence of maps as the value")
            for key, value in self.build(one, depth + 1).items():
                into.setdefault(key, value)


def _key_text(key: Any) -> str:
    if isinstance(key, str):
        return key
    if key is True:
        return "true"
    if key is False:
        return "false"
    if key is None:
        raise YAMLError("unsupported map key of type: <nil>")
    return str(key)


def _allowed_alias_ratio(decoded: int) -> float:
    low, high = 400_000, 4_000_000
    if decoded <= low:
        return 0.99
    if decoded >= high:
        return 0.10
    return 0.99 - 0.89 * (decoded - low) / (high - low)


def load(text: bytes | str, *, strict: bool = False) -> tuple[Any, str]:
    """Read the first document.

    Args:
      strict: Also look for duplicate keys.

    Returns:
      (value, duplicates): duplicates is upstream's message naming the lines, "" if there are none or not strict.

    Raises:
      YAMLError: syntax error, excessive aliases, unusable keys, non-finite numbers.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        _check_depth(text)
        loader = _LOADER(text)
        try:
            node = _compose(loader)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YAMLError(_message(error)) from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise YAMLError(f"yaml: {error}") from None
    if node is None:
        return None, ""
    builder = _Builder(strict)
    value = builder.build(node, 0)
    duplicates = ""
    if strict and builder.duplicates:
        duplicates = "\n  ".join(builder.duplicates)
    return value, duplicates


_NESTING = ("{", "[", ":", "-", "?")
"""Each level of nesting has at least one of these."""


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything recursive sees it: libyaml's composer would overflow the C stack."""
    if sum(map(text.count, _NESTING)) <= _RECURSION_LIMIT:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _RECURSION_LIMIT:
                raise YAMLError("yaml: exceeded max depth of nesting")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentEndEvent):
            return


def _compose(loader: Any) -> Any:
    return loader.get_node() if loader.check_node() else None


def _message(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"yaml: line {mark.line + 1}: {error.problem or error.context}" if mark else f"yaml: {error.problem or error.context}"
    return f"yaml: {error}"
