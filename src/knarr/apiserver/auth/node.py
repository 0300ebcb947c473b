"""The Node authorizer: a kubelet reads what its own pods need, and no more.

What it may write is narrowed further by the NodeRestriction admission plugin. Everything not subdivided here follows the
static rules of the system:node role.

Source: kubernetes plugin/pkg/auth/authorizer/node/node_authorizer.go.
"""

from __future__ import annotations

from collections.abc import Callable

from knarr.api.selectors import SelectorError, parse_field_selector
from knarr.apiserver.attributes import Attributes, Decision, Store
from knarr.apiserver.auth import users
from knarr.apiserver.auth.podrefs import NodeReferences
from knarr.apiserver.auth.rules import Rule, rule_allows

_ALLOW = (Decision.ALLOW, "")
Answer = tuple[Decision, str]


def _no(reason: str = "") -> Answer:
    return Decision.NO_OPINION, reason


class NodeAuthorizer:
    """Decides for users system:node:NAME in group system:nodes."""

    def __init__(self, references: NodeReferences, rules: list[Rule], *, volume_attachments: Store, resource_slices: Store) -> None:
        self._references = references
        self._rules = rules
        self._attachments = volume_attachments
        self._slices = resource_slices
        self._subdivided: dict[tuple[str, str], Callable[[str, Attributes], Answer]] = {
            ("", "secrets"): self._read_namespaced,
            ("", "configmaps"): self._read_namespaced,
            ("", "persistentvolumeclaims"): self._claim,
            ("", "persistentvolumes"): self._get,
            ("resource.k8s.io", "resourceclaims"): self._get,
            ("storage.k8s.io", "volumeattachments"): self._get,
            ("", "serviceaccounts"): self._service_account,
            ("coordination.k8s.io", "leases"): self._lease,
            ("storage.k8s.io", "csinodes"): self._csi_node,
            ("resource.k8s.io", "resourceslices"): self._slice,
            ("", "nodes"): self._node,
            ("", "pods"): self._pod,
        }

    def authorize(self, attributes: Attributes) -> Answer:
        node = users.node_name(attributes.user.name, attributes.user.groups)
        if node is None:
            return _no()
        if not node:
            return _no(f'unknown node for user "{attributes.user.name}"')
        if attributes.is_resource:
            special = self._subdivided.get((attributes.group, attributes.resource))
            if special is not None:
                return special(node, attributes)
        return _ALLOW if any(rule_allows(rule, attributes) for rule in self._rules) else _no()

    def _related(self, node: str, attributes: Attributes) -> Answer:
        if not attributes.name:
            return _no("No Object name found")
        if self._is_related(node, attributes):
            return _ALLOW
        return _no(f"no relationship found between node '{node}' and this object")

    def _is_related(self, node: str, attributes: Attributes) -> bool:
        if attributes.resource == "volumeattachments":
            found = self._attachments.get_nowait("", attributes.name)
            return found is not None and (found.get("spec") or {}).get("nodeName") == node
        if attributes.resource == "resourceslices":
            found = self._slices.get_nowait("", attributes.name)
            return found is not None and (found.get("spec") or {}).get("nodeName") == node
        namespace = "" if attributes.resource == "persistentvolumes" else attributes.namespace
        return self._references.has(node, attributes.resource, namespace, attributes.name)

    def _get(self, node: str, attributes: Attributes) -> Answer:
        if attributes.verb != "get":
            return _no("can only get individual resources of this type")
        if attributes.subresource:
            return _no("cannot get subresource")
        return self._related(node, attributes)

    def _read_namespaced(self, node: str, attributes: Attributes) -> Answer:
        if attributes.verb not in ("get", "list", "watch"):
            return _no("can only read resources of this type")
        if attributes.subresource:
            return _no("cannot read subresource")
        if not attributes.namespace:
            return _no("can only read namespaced object of this type")
        return self._related(node, attributes)

    def _claim(self, node: str, attributes: Attributes) -> Answer:
        if attributes.subresource != "status":
            return self._get(node, attributes)
        if attributes.verb not in ("update", "patch"):
            return _no("can only get/update/patch this type")
        return self._related(node, attributes)

    def _service_account(self, node: str, attributes: Attributes) -> Answer:
        if attributes.verb == "get" and not attributes.subresource:
            return self._read_namespaced(node, attributes)
        if attributes.verb != "create" or not attributes.name:
            return _no("can only create tokens for individual service accounts")
        if attributes.subresource != "token":
            return _no("can only create token subresource of serviceaccount")
        return self._related(node, attributes)

    def _lease(self, node: str, attributes: Attributes) -> Answer:
        if attributes.verb not in ("get", "create", "update", "patch", "delete"):
            return _no("can only get, create, update, patch, or delete a node lease")
        if attributes.namespace != "kube-node-lease":
            return _no('can only access leases in the "kube-node-lease" system namespace')
        # A create does not say its name here; NodeRestriction looks at it.
        if attributes.verb != "create" and attributes.name != node:
            return _no("can only access node lease with the same name as the requesting node")
        return _ALLOW

    def _csi_node(self, node: str, attributes: Attributes) -> Answer:
        if attributes.verb not in ("get", "create", "update", "patch", "delete"):
            return _no("can only get, create, update, patch, or delete a CSINode")
        if attributes.subresource:
            return _no("cannot authorize CSINode subresources")
        if attributes.verb != "create" and attributes.name != node:
            return _no("can only access CSINode with the same name as the requesting node")
        return _ALLOW

    def _slice(self, node: str, attributes: Attributes) -> Answer:
        if attributes.subresource:
            return _no("cannot authorize ResourceSlice subresources")
        if attributes.verb == "create":
            return _ALLOW
        if attributes.verb in ("get", "update", "patch", "delete"):
            return self._related(node, attributes)
        if attributes.verb in ("watch", "list", "deletecollection"):
            if _selects(attributes, "spec.nodeName", node):
                return _ALLOW
            return _no("can only list/watch/deletecollection resourceslices with nodeName field selector")
        return _no("only the following verbs are allowed for a ResourceSlice: get, watch, list, create, update, patch, delete, deletecollection")

    def _node(self, node: str, attributes: Attributes) -> Answer:
        verb = attributes.verb
        if attributes.subresource == "" and verb in ("create", "update", "patch"):
            return _ALLOW
        if attributes.subresource == "" and verb in ("get", "list", "watch"):
            if attributes.name == node:
                return _ALLOW
            if not attributes.name:
                return _no(f"node '{node}' cannot read all nodes, only its own Node object")
            return _no(f"node '{node}' cannot read '{attributes.name}', only its own Node object")
        if attributes.subresource == "status" and verb in ("update", "patch"):
            return _ALLOW
        return _no()

    def _pod(self, node: str, attributes: Attributes) -> Answer:
        verb = attributes.verb
        if attributes.subresource == "":
            if verb == "get":
                return self._get(node, attributes)
            if verb in ("list", "watch"):
                if _selects(attributes, "spec.nodeName", node):
                    return _ALLOW
                if attributes.name:
                    return self._related(node, attributes)
                return _no("can only list/watch pods with spec.nodeName field selector")
            if verb in ("create", "delete"):
                return _ALLOW
        if attributes.subresource == "status" and verb in ("update", "patch"):
            return _ALLOW
        if attributes.subresource == "eviction" and verb == "create":
            return _ALLOW
        return _no()


def _selects(attributes: Attributes, field: str, value: str) -> bool:
    if not attributes.field_selector:
        return False
    try:
        return parse_field_selector(attributes.field_selector).required_value(field) == value
    except SelectorError:
        return False
