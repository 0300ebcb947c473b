"""How properties are written in CEL, where not every name can be."""

from __future__ import annotations

import re

RESERVED = frozenset(
    "true false null in as break const continue else for function if import let loop package namespace return var void while".split()
)
_ESCAPES = {"__": "__underscores__", ".": "__dot__", "-": "__dash__", "/": "__slash__"}
_ESCAPE = re.compile(r"__|[./-]")
_IDENTIFIER = re.compile(r"[a-zA-Z_][a-zA-Z0-9_./-]*")


def escape(name: str) -> str | None:
    """Return how a property is written in CEL, None if it cannot be."""
    if name in RESERVED:
        return f"__{name}__"
    if not _IDENTIFIER.fullmatch(name):
        return None
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], name)
