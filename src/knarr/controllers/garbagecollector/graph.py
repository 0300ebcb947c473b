"""The graph of owners and dependents, in memory, fed by events.

Only objects that own or are owned, or that are being deleted with a finalizer of ours, have a
node: the many others cost nothing. An owner that only a reference speaks of has a node that is
not `observed` until the object itself was seen.
Source: pkg/controller/garbagecollector/graph_builder.go, graph.go.
"""

from __future__ import annotations

from collections.abc import Callable

from knarr.api.scheme import Resource
from knarr.api.types import Object

ORPHAN = "orphan"
FOREGROUND = "foregroundDeletion"


_NOBODY: frozenset[Node] = frozenset()


class Node:
    """One object that owns, is owned, or waits for its dependents."""

    __slots__ = ("api_version", "being_deleted", "deleting_dependents", "dependents", "kind", "name", "namespace", "observed", "owners", "uid", "waits")

    def __init__(self, uid: str, api_version: str, kind: str, namespace: str, name: str) -> None:
        self.uid = uid
        self.api_version = api_version
        self.kind = kind
        self.namespace = namespace
        self.name = name
        self.owners: list[Object] = []
        self.dependents: set[Node] | frozenset[Node] = _NOBODY
        """Most objects own nothing, and an empty set of their own would be half of what they cost."""
        self.being_deleted = False
        self.deleting_dependents = False
        self.observed = False
        self.waits = False

    def add_dependent(self, node: Node) -> None:
        if isinstance(self.dependents, frozenset):
            self.dependents = set()
        self.dependents.add(node)

    def drop_dependent(self, node: Node) -> None:
        if isinstance(self.dependents, set):
            self.dependents.discard(node)

    def blocking_dependents(self) -> list[Node]:
        """Dependents whose reference to this node says that they must go first."""
        return [
            node
            for node in self.dependents
            if any(ref["uid"] == self.uid and ref.get("blockOwnerDeletion") for ref in node.owners)
        ]

    def reference(self) -> Object:
        """An event's reference to the object."""
        result = {"apiVersion": self.api_version, "kind": self.kind, "name": self.name, "uid": self.uid}
        if self.namespace:
            result["namespace"] = self.namespace
        return result


class Graph:
    """All nodes, and what their changes make necessary.

    Args:
      delete: called with the uid of a node that may have to go.
      orphan: called with the uid of a node whose dependents are to be released.
      invalid: called with a dependent and a reference that leads into another namespace.
    """

    def __init__(
        self, delete: Callable[[str], None], orphan: Callable[[str], None], invalid: Callable[[Node, Object], None] | None = None
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self._delete = delete
        self._orphan = orphan
        self._invalid = invalid

    def changed(self, resource: Resource, obj: Object) -> None:
        """An object was added or updated."""
        meta = obj["metadata"]
        uid = meta["uid"]
        owners = meta.get("ownerReferences") or []
        finalizers = meta.get("finalizers") or ()
        deleting = "deletionTimestamp" in meta
        waits = deleting and (ORPHAN in finalizers or FOREGROUND in finalizers)
        node = self.nodes.get(uid)
        if node is None:
            if not owners and not waits:
                return
            node = Node(uid, resource.api_version, resource.kind, meta.get("namespace", ""), meta["name"])
            self.nodes[uid] = node
        node.waits = waits
        self._observe(node, resource, obj)
        if owners != node.owners:
            self._set_owners(node, owners)
        self._note_deletion(node, deleting, finalizers)
        self._drop_if_idle(node)

    def _observe(self, node: Node, resource: Resource, obj: Object) -> None:
        meta = obj["metadata"]
        namespace = meta.get("namespace", "")
        if not node.observed:
            # References may have named it wrongly; those that did have no such owner.
            if (node.namespace, node.name, node.kind) != (namespace, meta["name"], resource.kind):
                for dependent in node.dependents:
                    self._delete(dependent.uid)
            for dependent in node.dependents:
                if namespace and dependent.namespace != namespace:
                    self._report_invalid(dependent, node.uid)
            node.observed = True
            node.api_version, node.kind = resource.api_version, resource.kind
            node.namespace, node.name = namespace, meta["name"]

    def _report_invalid(self, dependent: Node, owner_uid: str) -> None:
        if self._invalid is not None:
            for reference in dependent.owners:
                if reference["uid"] == owner_uid:
                    self._invalid(dependent, reference)

    def _set_owners(self, node: Node, owners: list[Object]) -> None:
        before = {reference["uid"]: reference for reference in node.owners}
        after = {reference["uid"]: reference for reference in owners}
        node.owners = owners
        unblocked = False
        for uid, reference in after.items():
            old = before.get(uid)
            if old is None:
                self._link(node, reference)
            elif old.get("blockOwnerDeletion") and not reference.get("blockOwnerDeletion"):
                self._wake_waiting(uid)
        for uid in before.keys() - after.keys():
            owner = self.nodes.get(uid)
            if owner is None:
                continue
            owner.drop_dependent(node)
            unblocked = unblocked or bool(before[uid].get("blockOwnerDeletion"))
            self._wake_waiting(uid)
            self._drop_if_idle(owner)
        if before and after:
            # With an owner less, the ones that are left may all be gone.
            self._delete(node.uid)

    def _wake_waiting(self, uid: str) -> None:
        owner = self.nodes.get(uid)
        if owner is not None and owner.deleting_dependents:
            self._delete(uid)

    def _link(self, node: Node, reference: Object) -> None:
        owner = self.nodes.get(reference["uid"])
        if owner is None:
            # Same namespace until seen otherwise; the controller finds out whether it exists.
            owner = Node(reference["uid"], reference["apiVersion"], reference["kind"], node.namespace, reference["name"])
            self.nodes[owner.uid] = owner
        owner.add_dependent(node)
        if not owner.observed or owner.being_deleted:
            self._delete(node.uid)
        elif (owner.kind, owner.name) != (reference["kind"], reference["name"]):
            self._delete(node.uid)
        elif owner.namespace and owner.namespace != node.namespace:
            self._report_invalid(node, owner.uid)
            self._delete(node.uid)

    def _note_deletion(self, node: Node, deleting: bool, finalizers: list[str] | tuple[str, ...]) -> None:
        if not deleting:
            return
        first = not node.being_deleted
        node.being_deleted = True
        if ORPHAN in finalizers:
            self._orphan(node.uid)
        elif FOREGROUND in finalizers:
            if not node.deleting_dependents:
                node.deleting_dependents = True
                for dependent in node.dependents:
                    self._delete(dependent.uid)
            self._delete(node.uid)
        elif first:
            # Its owner may wait for exactly this object, or it may be what kept dependents waiting.
            node.deleting_dependents = False

    def removed(self, uid: str) -> None:
        """An object is gone, or was found never to have existed."""
        node = self.nodes.pop(uid, None)
        if node is None:
            return
        for reference in node.owners:
            owner = self.nodes.get(reference["uid"])
            if owner is not None:
                owner.drop_dependent(node)
                if owner.deleting_dependents:
                    self._delete(owner.uid)
                else:
                    self._drop_if_idle(owner)
        for dependent in node.dependents:
            self._delete(dependent.uid)

    def confirm(self, uid: str, resource: Resource, namespace: str, name: str) -> None:
        """The server says that an owner known from references exists."""
        node = self.nodes.get(uid)
        if node is not None and not node.observed:
            node.observed = True
            node.api_version, node.kind, node.namespace, node.name = resource.api_version, resource.kind, namespace, name

    def _drop_if_idle(self, node: Node) -> None:
        if not node.owners and not node.dependents and not node.waits:
            self.nodes.pop(node.uid, None)

    def of_kind(self, resource: Resource) -> list[Node]:
        """Observed nodes of one resource."""
        return [node for node in self.nodes.values() if node.observed and node.kind == resource.kind and node.api_version == resource.api_version]
