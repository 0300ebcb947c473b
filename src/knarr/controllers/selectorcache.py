"""Compiled selectors of cached objects: compiled once per object, again only when the selector changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from knarr.api.selectors import NOTHING, LabelSelector, SelectorError
from knarr.api.types import Object

_MOST = 50_000


class SelectorCache:
    """Selectors by uid of the object that carries them. An invalid selector matches nothing."""

    __slots__ = ("_compile", "_compiled")

    def __init__(self, compile: Callable[[Any], LabelSelector]) -> None:
        self._compile = compile
        self._compiled: dict[str, tuple[Any, LabelSelector]] = {}

    def get(self, obj: Object, source: Any) -> LabelSelector:
        """Give the compiled form of `source`, the selector found in `obj`."""
        uid = obj["metadata"].get("uid", "")
        known = self._compiled.get(uid)
        if known is not None and (known[0] is source or known[0] == source):
            return known[1]
        try:
            selector = self._compile(source)
        except SelectorError:
            selector = NOTHING
        if len(self._compiled) >= _MOST:
            self._compiled.clear()
        self._compiled[uid] = (source, selector)
        return selector

    def forget(self, obj: Object) -> None:
        self._compiled.pop(obj["metadata"].get("uid", ""), None)
