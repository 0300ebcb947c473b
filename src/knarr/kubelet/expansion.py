"""$(NAME) expansion in env values, commands, arguments and subPathExpr. Pure.

Source: third_party/forked/golang/expansion, pkg/kubelet/container/helpers.go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


class UndefinedVariable(Exception):
    """A subPathExpr names a variable that the container does not have."""


def expand(text: str, lookup: Callable[[str], str]) -> str:
    """Replace $(NAME) by lookup(NAME); $$ becomes $; anything else after $ stays."""
    if "$" not in text:
        return text
    out: list[str] = []
    index = 0
    while index < len(text):
        character = text[index]
        if character != "$" or index + 1 >= len(text):
            out.append(character)
            index += 1
            continue
        following = text[index + 1]
        if following == "$":
            out.append("$")
            index += 2
        elif following == "(":
            end = text.find(")", index + 2)
            if end < 0:
                out.append("$(")
                index += 2
            else:
                out.append(lookup(text[index + 2 : end]))
                index = end + 1
        else:
            out.append("$" + following)
            index += 2
    return "".join(out)


def mapping(*sources: Mapping[str, str]) -> Callable[[str], str]:
    """Look names up in the sources in order; an unknown name stays as $(NAME)."""

    def lookup(name: str) -> str:
        for source in sources:
            if name in source:
                return source[name]
        return f"$({name})"

    return lookup


def strict(source: Mapping[str, str]) -> Callable[[str], str]:
    """As `mapping`, but an unknown name raises UndefinedVariable."""

    def lookup(name: str) -> str:
        if name not in source:
            raise UndefinedVariable(f'missing value for "{name}"')
        return source[name]

    return lookup
