"""The other objects that plugins ask for: claims, volumes, classes, Services, namespaces.

Filled by the event handlers (tests fill it directly), by kind and namespace, with a version per
kind that moves on every change that matters. What is handed out is never to be mutated.
"""

from __future__ import annotations

from typing import Any

from knarr.scheduler.terms import Selector

Object = dict[str, Any]

_NO_LABELS: dict[str, str] = {}


class Objects:
    """Objects other than pods and nodes, as last seen."""

    def __init__(self) -> None:
        self._kinds: dict[str, dict[str, dict[str, Object]]] = {}
        self._versions: dict[tuple[str, str | None], int] = {}
        self._selected: dict[Selector, tuple[int, frozenset[str]]] = {}

    def _changed(self, kind: str, namespace: str) -> None:
        for key in ((kind, None), (kind, namespace)):
            self._versions[key] = self._versions.get(key, 0) + 1

    def set(self, kind: str, obj: Object, *, matters: bool = True) -> None:
        """Take an object; `matters` False leaves the versions as they are."""
        metadata = obj["metadata"]
        namespace = metadata.get("namespace", "")
        self._kinds.setdefault(kind, {}).setdefault(namespace, {})[metadata["name"]] = obj
        if matters:
            self._changed(kind, namespace)

    def remove(self, kind: str, obj: Object) -> None:
        metadata = obj["metadata"]
        namespace = metadata.get("namespace", "")
        found = self._kinds.get(kind, {}).get(namespace, {})
        found.pop(metadata["name"], None)
        if not found:
            self._kinds.get(kind, {}).pop(namespace, None)
        self._changed(kind, namespace)

    def get(self, kind: str, name: str, namespace: str = "") -> Object | None:
        found = self._kinds.get(kind, {}).get(namespace)
        return found.get(name) if found else None

    def list(self, kind: str, namespace: str | None = None) -> list[Object]:
        items = self._kinds.get(kind, {})
        if namespace is not None:
            return list(items.get(namespace, {}).values())
        return [obj for found in items.values() for obj in found.values()]

    def version(self, kind: str, namespace: str | None = None) -> int:
        """Give a number that moves when an object of the kind (in the namespace) changes."""
        return self._versions.get((kind, namespace), 0)

    def namespace_labels(self, namespace: str) -> dict[str, str]:
        found = self.get("Namespace", namespace)
        return (found["metadata"].get("labels") or _NO_LABELS) if found else _NO_LABELS

    def namespaces_matching(self, selector: Selector) -> frozenset[str]:
        """Names of the namespaces a selector picks; remembered until a namespace changes."""
        version = self.version("Namespace")
        memo = self._selected.get(selector)
        if memo is None or memo[0] != version:
            names = (o["metadata"]["name"] for o in self.list("Namespace") if selector.matches(o["metadata"].get("labels") or _NO_LABELS))
            memo = self._selected[selector] = (version, frozenset(names))
        return memo[1]
