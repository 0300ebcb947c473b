"""Flags of Go's regular expressions (RE2) in the spelling of Python's. Pure.

Role: both translators of patterns (CEL's `matches`, `pattern` of schemas) call it first.
Source: RE2 syntax, "(?flags)": set flags within the current group.
"""

from __future__ import annotations

import re

_FLAGS = re.compile(r"\(\?([imsU]*(?:-[imsU]+)?)\)")


def scoped_flags(pattern: str) -> str:
    """Rewrite flags that hold from some point on to the end of their group, which Python takes at the start of a pattern only.

    Flags hold behind a "|", too: "a(?i)b|c" is "a(?i:b)|(?i:c)".
    """
    if "(?" not in pattern or not _FLAGS.search(pattern):
        return pattern
    out: list[str] = []
    groups: list[list[str]] = [[]]
    index, in_class = 0, False
    while index < len(pattern):
        character = pattern[index]
        found = _FLAGS.match(pattern, index) if character == "(" and not in_class else None
        if found is not None:
            groups[-1].append(found[1])
            out.append(f"(?{found[1]}:")
            index = found.end()
            continue
        if character == "\\":
            out.append(pattern[index : index + 2])
            index += 2
            continue
        if in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
            # The first bracket in a class is one of its members.
            start = re.compile(r"\[\^?\]?").match(pattern, index)
            character = start[0] if start else character
        elif character == "(":
            groups.append([])
        elif character == "|" and groups[-1]:
            character = ")" * len(groups[-1]) + "|" + "".join(f"(?{flags}:" for flags in groups[-1])
            out.append(character)
            index += 1
            continue
        elif character == ")":
            out.append(")" * len(groups.pop() if len(groups) > 1 else []))
        out.append(character)
        index += len(character)
    out.append(")" * len(groups[0]))
    return "".join(out)
