"""Nobody grants what they do not hold: the checks on writes of roles and bindings.

Called by the admission chain between mutation and validation. Members of system:masters pass, as do holders of the verbs
`escalate` (roles) and `bind` (bindings).

Source: kubernetes pkg/registry/rbac/*/policybased, pkg/registry/rbac/validation/rule.go.
"""

from __future__ import annotations

from knarr.api.errors import StatusError, forbidden, go_quote, not_found
from knarr.api.types import Object
from knarr.apiserver.attributes import AdmissionRequest, Attributes, Authorizer, Decision, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.auth.rbac import RBAC
from knarr.apiserver.auth.rules import Rule, compact, describe, go_list, uncovered

RBAC_GROUP = "rbac.authorization.k8s.io"
_EVERYTHING: list[Rule] = [
    {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
    {"nonResourceURLs": ["*"], "verbs": ["*"]},
]
_GC_FIELDS = ("ownerReferences", "finalizers")


def _only_gc_fields_change(new: Object, old: Object) -> bool:
    """True when the update touches nothing but what the garbage collector needs to finish the object."""

    def stripped(obj: Object) -> Object:
        metadata = {key: value for key, value in (obj.get("metadata") or {}).items() if key not in (*_GC_FIELDS, "managedFields", "resourceVersion")}
        return {**obj, "metadata": metadata}

    if stripped(new) != stripped(old):
        return False
    metadata, previous = new.get("metadata") or {}, old.get("metadata") or {}
    return any((metadata.get(field) or []) != (previous.get(field) or []) for field in _GC_FIELDS)


class Escalation:
    """Refuses writes by which a user would gain or give more than they have."""

    def __init__(self, rbac: RBAC, authorizer: Authorizer) -> None:
        self._rbac = rbac
        self._authorizer = authorizer

    async def check(self, request: AdmissionRequest) -> None:
        """Raise a 403 StatusError for an escalating create or update of an RBAC object."""
        resource = request.resource
        if resource.group != RBAC_GROUP or request.object is None or request.subresource or request.operation not in ("CREATE", "UPDATE"):
            return
        if users.MASTERS in request.user.groups:
            return
        obj, old = request.object, request.old_object
        if old is not None and request.operation == "UPDATE" and _only_gc_fields_change(obj, old):
            return
        namespace = request.namespace
        if resource.plural in ("roles", "clusterroles"):
            # The name is the URL's: a create has none there.
            name = request.name if request.operation == "UPDATE" else ""
            if await self._may(request.user, "escalate", resource.plural, namespace, name):
                return
            self._confirm(request, obj.get("rules") or [])
            if any(((one or {}).get("aggregationRule") or {}).get("clusterRoleSelectors") for one in (obj, old)):
                rules, _ = self._rbac.rules_for(request.user, namespace)
                if uncovered(rules, _EVERYTHING):
                    raise self._refuse(request, "must have cluster-admin privileges to use the aggregationRule")
            return
        role_ref = obj.get("roleRef") or {}
        plural = {"ClusterRole": "clusterroles", "Role": "roles"}.get(role_ref.get("kind", ""))
        if plural and await self._may(request.user, "bind", plural, namespace, role_ref.get("name", "")):
            return
        wanted = self._rbac.role_rules(role_ref, namespace)
        if wanted is None:
            # Upstream's error names the resource of the request, not that of the role which is missing.
            raise not_found(request.resource, role_ref.get("name", ""))
        self._confirm(request, wanted)

    async def _may(self, user: UserInfo, verb: str, plural: str, namespace: str, name: str) -> bool:
        attributes = Attributes(user, verb, RBAC_GROUP, "*", plural, "", namespace, name)
        decision, _ = self._authorizer.authorize(attributes)
        if decision is Decision.ASK:
            decision, _ = await self._authorizer.authorize_async(attributes)
        return decision is Decision.ALLOW

    def _confirm(self, request: AdmissionRequest, wanted: list[Rule]) -> None:
        owned, errors = self._rbac.rules_for(request.user, request.namespace)
        missing = uncovered(owned, wanted)
        if not missing:
            return
        user = request.user
        lines = "\n".join(sorted({describe(rule) for rule in compact(missing)}))
        text = f"user {go_quote(user.name)} (groups={go_list(user.groups)}) is attempting to grant RBAC permissions not currently held:\n{lines}"
        if errors:
            text += f"; resolution errors: [{' '.join(errors)}]"
        raise self._refuse(request, text)

    @staticmethod
    def _refuse(request: AdmissionRequest, text: str) -> StatusError:
        name = ((request.object or {}).get("metadata") or {}).get("name") or request.name
        return forbidden(request.resource, name, text)
