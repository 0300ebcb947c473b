"""Writes the default roles and bindings at start and repairs what is missing from them.

What was added by hand stays (upstream's union rule); objects annotated autoupdate=false are left alone. Aggregated roles
get their rules here too, and are kept up to date with every change of a labelled role, so that a role works from the
moment it is stored.

Source: kubernetes plugin/pkg/auth/authorizer/rbac/bootstrappolicy, pkg/registry/rbac/rest/storage_rbac.go,
component-helpers auth/rbac/reconciliation, pkg/controller/clusterroleaggregation.
"""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.resources import files

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import meta
from knarr.api.errors import StatusError, is_already_exists
from knarr.api.selectors import from_label_selector
from knarr.api.types import Object
from knarr.apiserver.attributes import Store
from knarr.apiserver.auth.rules import Rule, uncovered

log = get_logger(__name__)

API_VERSION = "rbac.authorization.k8s.io/v1"
_AUTO_UPDATE = "rbac.authorization.kubernetes.io/autoupdate"


@cache
def facts() -> Object:
    """The bootstrap policy as published for this version."""
    loaded: Object = orjson.loads(files("knarr.api.facts").joinpath("rbac-bootstrap.json").read_bytes())
    return loaded


def node_rules() -> list[Rule]:
    """Rules that the node authorizer grants to every kubelet."""
    rules: list[Rule] = facts()["clusterRoles"]["system:node"]["rules"]
    return rules


def _base(kind: str, namespace: str, name: str, fact: Object) -> Object:
    common = facts()["common"]
    metadata: Object = {"name": name, "labels": {**common["labels"], **(fact.get("labels") or {})}, "annotations": dict(common["annotations"])}
    if namespace:
        metadata["namespace"] = namespace
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata}


def _role(kind: str, namespace: str, name: str, fact: Object) -> Object:
    role = _base(kind, namespace, name, fact)
    if fact.get("aggregate"):
        role["aggregationRule"] = {"clusterRoleSelectors": [{"matchLabels": labels} for labels in fact["aggregate"]]}
    role["rules"] = meta.deep_copy(fact.get("rules"))
    return role


def _binding(kind: str, namespace: str, name: str, fact: Object) -> Object:
    binding = _base(kind, namespace, name, fact)
    binding["roleRef"] = {"apiGroup": "rbac.authorization.k8s.io", "kind": fact["roleRef"]["kind"], "name": fact["roleRef"]["name"]}
    if fact.get("subjects"):
        binding["subjects"] = meta.deep_copy(fact["subjects"])
    return binding


def aggregated_rules(role: Object, cluster_roles: list[Object]) -> list[Rule]:
    """The union of the rules of all roles that the aggregation rule selects, in name order, without repeats."""
    selectors = [from_label_selector(selector) for selector in (role.get("aggregationRule") or {}).get("clusterRoleSelectors") or ()]
    out: list[Rule] = []
    seen: set[bytes] = set()
    for other in sorted(cluster_roles, key=meta.name):
        if meta.name(other) == meta.name(role) or not any(selector.matches(meta.labels(other)) for selector in selectors):
            continue
        for rule in other.get("rules") or ():
            key = orjson.dumps(rule, option=orjson.OPT_SORT_KEYS)
            if key not in seen:
                seen.add(key)
                out.append(rule)
    return out


class BootstrapPolicy:
    """Reconciles the default policy once and aggregated roles for ever."""

    def __init__(self, roles: Store, role_bindings: Store, cluster_roles: Store, cluster_role_bindings: Store, tasks: Tasks) -> None:
        self._roles = roles
        self._role_bindings = role_bindings
        self._cluster_roles = cluster_roles
        self._cluster_role_bindings = cluster_role_bindings
        self._tasks = tasks
        self._dirty = asyncio.Event()
        self.done = False

    async def start(self) -> None:
        """Write what is missing; all objects of a fresh store share a few commits."""
        policy = facts()
        work = [
            self._ensure_role(self._cluster_roles, _role("ClusterRole", "", name, fact)) for name, fact in policy["clusterRoles"].items()
        ]
        work += [
            self._ensure_binding(self._cluster_role_bindings, _binding("ClusterRoleBinding", "", name, fact))
            for name, fact in policy["clusterRoleBindings"].items()
        ]
        for key, fact in policy["roles"].items():
            namespace, _, name = key.partition("/")
            work.append(self._ensure_role(self._roles, _role("Role", namespace, name, fact)))
        for key, fact in policy["roleBindings"].items():
            namespace, _, name = key.partition("/")
            work.append(self._ensure_binding(self._role_bindings, _binding("RoleBinding", namespace, name, fact)))
        await asyncio.gather(*work)
        await self._aggregate()
        self.done = True
        self._cluster_roles.add_handler(self._cluster_role_changed)
        self._tasks.spawn_eternal(self._keep_aggregated(), "rbac-aggregation")

    async def _ensure_role(self, store: Store, wanted: Object) -> None:
        if wanted.get("aggregationRule"):
            chosen = [_role("ClusterRole", "", name, fact) for name, fact in facts()["clusterRoles"].items() if not fact.get("aggregate")]
            nested = [_role("ClusterRole", "", name, fact) for name, fact in facts()["clusterRoles"].items() if fact.get("aggregate")]
            for role in nested:
                role["rules"] = aggregated_rules(role, chosen)
            wanted = {**wanted, "rules": aggregated_rules(wanted, [*chosen, *nested])}
        await self._ensure(store, wanted, _reconcile_role)

    async def _ensure_binding(self, store: Store, wanted: Object) -> None:
        namespace, name = meta.namespace(wanted), meta.name(wanted)
        existing = store.get_nowait(namespace, name)
        if existing is not None and existing.get("roleRef") != wanted["roleRef"] and not _protected(existing):
            # A roleRef cannot be changed; the binding is made anew.
            await store.delete(namespace, name, uid=meta.uid(existing))
        await self._ensure(store, wanted, _reconcile_binding)

    async def _ensure(self, store: Store, wanted: Object, reconcile: object) -> None:
        namespace, name = meta.namespace(wanted), meta.name(wanted)
        assert callable(reconcile)
        try:
            if store.get_nowait(namespace, name) is None:
                await store.create(meta.deep_copy(wanted))
            else:
                await store.update(namespace, name, lambda current: reconcile(current, wanted))
        except StatusError as error:
            # Another API server starts at the same time.
            if not is_already_exists(error):
                raise

    def _cluster_role_changed(self, type: str, obj: Object, old: Object | None) -> None:
        self._dirty.set()

    async def _keep_aggregated(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self._aggregate()
            except StatusError as error:
                log.warning("aggregating cluster roles failed", error=str(error))

    async def _aggregate(self) -> None:
        everything = self._cluster_roles.list_nowait()
        for role in everything:
            if not role.get("aggregationRule"):
                continue
            rules = aggregated_rules(role, everything)
            if (role.get("rules") or []) == rules:
                continue

            def change(current: Object, rules: list[Rule] = rules) -> Object:
                current["rules"] = meta.deep_copy(rules)
                return current

            await self._cluster_roles.update("", meta.name(role), change)


def _protected(existing: Object) -> bool:
    return meta.annotations(existing).get(_AUTO_UPDATE) == "false"


def _merge_metadata(current: Object, wanted: Object) -> None:
    metadata = current["metadata"]
    for field in ("annotations", "labels"):
        # What stands there wins over what is expected, as upstream merges.
        metadata[field] = {**wanted["metadata"][field], **(metadata.get(field) or {})}


def _reconcile_role(current: Object, wanted: Object) -> Object | None:
    if _protected(current):
        return None
    _merge_metadata(current, wanted)
    rules = current.get("rules") or []
    missing = uncovered(rules, wanted.get("rules") or [])
    if missing and not wanted.get("aggregationRule"):
        current["rules"] = [*rules, *missing]
    if wanted.get("aggregationRule"):
        known = (current.get("aggregationRule") or {}).get("clusterRoleSelectors") or []
        extra = [selector for selector in wanted["aggregationRule"]["clusterRoleSelectors"] if selector not in known]
        if extra:
            current["aggregationRule"] = {"clusterRoleSelectors": [*known, *extra]}
    else:
        current.pop("aggregationRule", None)
    return current


def _reconcile_binding(current: Object, wanted: Object) -> Object | None:
    if _protected(current):
        return None
    _merge_metadata(current, wanted)
    subjects = current.get("subjects") or []
    missing = [subject for subject in wanted.get("subjects") or () if subject not in subjects]
    if missing:
        current["subjects"] = [*subjects, *missing]
    return current
