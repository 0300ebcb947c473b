"""The RBAC authorizer: compiled per user from the live Roles and Bindings of the watch cache.

For a user and a scope (the cluster, or one namespace) the rules that apply are collected once; each (verb, group,
resource, subresource) asked for is then answered from a small dict. Any event on roles or bindings drops all of it: such
events are rare, and rebuilding one user's entry takes microseconds. Never waits.

Source: kubernetes plugin/pkg/auth/authorizer/rbac, pkg/registry/rbac/validation/rule.go.
"""

from __future__ import annotations

from typing import NamedTuple

from knarr.api.errors import go_quote
from knarr.api.types import Object
from knarr.apiserver.attributes import Attributes, Decision, Store, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.auth.rules import Rule, path_matches, resource_matches, rule_matches_verb

# Users are few on a cluster; impersonation and client certificates could name any number, so the cache is bounded.
_MOST_USERS = 2000


class Grant(NamedTuple):
    """One rule that a user holds, and the binding that gives it."""

    rule: Rule
    source: str


class _Scope:
    """What one user may do in one scope, with answers remembered."""

    __slots__ = ("errors", "grants", "resources")

    def __init__(self, grants: list[Grant], errors: list[str]) -> None:
        self.grants = grants
        self.errors = errors
        self.resources: dict[tuple[str, str, str, str], list[tuple[frozenset[str] | None, str]]] = {}

    def allows(self, attributes: Attributes) -> str | None:
        """Return the reason when a rule allows, else None."""
        if not attributes.is_resource:
            for grant in self.grants:
                urls = grant.rule.get("nonResourceURLs")
                if urls and rule_matches_verb(grant.rule, attributes.verb) and any(path_matches(url, attributes.path) for url in urls):
                    return f"RBAC: allowed by {grant.source}"
            return None
        key = (attributes.verb, attributes.group, attributes.resource, attributes.subresource)
        matching = self.resources.get(key)
        if matching is None:
            matching = self.resources[key] = self._match(*key)
        for names, reason in matching:
            if names is None or attributes.name in names:
                return reason
        return None

    def _match(self, verb: str, group: str, resource: str, subresource: str) -> list[tuple[frozenset[str] | None, str]]:
        found: list[tuple[frozenset[str] | None, str]] = []
        for rule, source in self.grants:
            groups = rule.get("apiGroups") or ()
            if rule_matches_verb(rule, verb) and (group in groups or "*" in groups) and resource_matches(rule, resource, subresource):
                names = rule.get("resourceNames")
                found.append((frozenset(names) if names else None, f"RBAC: allowed by {source}"))
        return found


class _Bindings:
    """Bindings of one scope by subject, in order."""

    __slots__ = ("by_subject",)

    def __init__(self) -> None:
        self.by_subject: dict[tuple[str, str], list[tuple[int, Object, Object]]] = {}

    def add(self, position: int, binding: Object, namespace: str) -> None:
        for subject in binding.get("subjects") or ():
            kind, name = subject.get("kind"), subject.get("name", "")
            if kind == "ServiceAccount":
                home = subject.get("namespace") or namespace
                if not home:
                    continue
                kind, name = "User", users.service_account_name(home, name)
            self.by_subject.setdefault((kind, name), []).append((position, binding, subject))

    def of(self, user: UserInfo) -> list[tuple[Object, Object]]:
        """(binding, first subject that applies), in the order of the bindings."""
        found = list(self.by_subject.get(("User", user.name), ()))
        for group in user.groups:
            found.extend(self.by_subject.get(("Group", group), ()))
        out: dict[int, tuple[Object, Object]] = {}
        for position, binding, subject in sorted(found, key=lambda item: item[0]):
            out.setdefault(position, (binding, subject))
        return list(out.values())


def _describe(binding: Object, subject: Object, namespace: str) -> str:
    kind = "RoleBinding" if namespace else "ClusterRoleBinding"
    name = binding["metadata"]["name"]
    shown = go_quote(f"{name}/{namespace}" if namespace else name)
    subject_name = subject.get("name", "")
    if subject.get("kind") == "ServiceAccount":
        subject_name += "/" + (subject.get("namespace") or namespace)
    role = binding.get("roleRef") or {}
    return f"{kind} {shown} of {role.get('kind')} {go_quote(role.get('name', ''))} to {subject.get('kind')} {go_quote(subject_name)}"


class RBAC:
    """Rules of users, from four stores."""

    def __init__(self, roles: Store, role_bindings: Store, cluster_roles: Store, cluster_role_bindings: Store) -> None:
        self._roles = roles
        self._role_bindings = role_bindings
        self._cluster_roles = cluster_roles
        self._cluster_role_bindings = cluster_role_bindings
        self._scopes: dict[tuple[UserInfo, str], _Scope] = {}
        self._bindings: dict[str, _Bindings] = {}
        for store in (roles, role_bindings, cluster_roles, cluster_role_bindings):
            store.add_handler(self._changed)

    def _changed(self, type: str, obj: Object, old: Object | None) -> None:
        self._scopes.clear()
        self._bindings.clear()

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]:
        """ALLOW with the binding as reason, or NO_OPINION."""
        user = attributes.user
        cluster = self._scope(user, "")
        reason = cluster.allows(attributes)
        if reason is not None:
            return Decision.ALLOW, reason
        errors = cluster.errors
        if attributes.namespace:
            local = self._scope(user, attributes.namespace)
            reason = local.allows(attributes)
            if reason is not None:
                return Decision.ALLOW, reason
            errors = errors + local.errors
        if errors:
            text = errors[0] if len(errors) == 1 else "[" + ", ".join(dict.fromkeys(errors)) + "]"
            return Decision.NO_OPINION, f"RBAC: {text}"
        return Decision.NO_OPINION, ""

    def rules_for(self, user: UserInfo, namespace: str) -> tuple[list[Rule], list[str]]:
        """All rules of a user in a namespace with those of the cluster in front, and what could not be resolved."""
        scopes = [self._scope(user, "")]
        if namespace:
            scopes.append(self._scope(user, namespace))
        return [grant.rule for scope in scopes for grant in scope.grants], [error for scope in scopes for error in scope.errors]

    def role_rules(self, role_ref: Object, namespace: str) -> list[Rule] | None:
        """Rules behind a roleRef; None when the role does not exist."""
        name = role_ref.get("name", "")
        kind = role_ref.get("kind")
        role: Object | None = None
        if kind == "Role":
            role = self._roles.get_nowait(namespace, name)
        elif kind == "ClusterRole":
            role = self._cluster_roles.get_nowait("", name)
        return None if role is None else role.get("rules") or []

    def _scope(self, user: UserInfo, namespace: str) -> _Scope:
        key = (user, namespace)
        scope = self._scopes.get(key)
        if scope is None:
            if len(self._scopes) >= _MOST_USERS:
                self._scopes.clear()
            scope = self._scopes[key] = self._compile(user, namespace)
        return scope

    def _compile(self, user: UserInfo, namespace: str) -> _Scope:
        bindings = self._bindings.get(namespace)
        if bindings is None:
            bindings = self._bindings[namespace] = _Bindings()
            found = self._role_bindings.list_nowait(namespace) if namespace else self._cluster_role_bindings.list_nowait()
            for position, binding in enumerate(found):
                bindings.add(position, binding, namespace)
        grants: list[Grant] = []
        errors: list[str] = []
        for binding, subject in bindings.of(user):
            role_ref = binding.get("roleRef") or {}
            rules = self.role_rules(role_ref, namespace)
            if rules is None:
                plural = "roles" if role_ref.get("kind") == "Role" else "clusterroles"
                errors.append(f"{plural.removesuffix('s')}.rbac.authorization.k8s.io {go_quote(role_ref.get('name', ''))} not found")
                continue
            source = _describe(binding, subject, namespace)
            grants.extend(Grant(rule, source) for rule in rules)
        return _Scope(grants, errors)
