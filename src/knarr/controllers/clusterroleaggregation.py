"""Aggregated ClusterRoles: their rules are the union of the roles that their selectors match.

Source: pkg/controller/clusterroleaggregation/clusterroleaggregation_controller.go.
"""

from __future__ import annotations

from knarr.api.resources import CLUSTER_ROLES
from knarr.api.selectors import from_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context


class ClusterRoleAggregationController:
    """Keeps the rules of ClusterRoles with an aggregationRule."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._roles = ctx.informer(CLUSTER_ROLES)
        self.controller = Controller("clusterrole-aggregation-controller", self._reconcile, workers=5)
        self._roles.add_handler(self._changed, self._updated, self._changed)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, _: Object) -> None:
        # Any role may be part of any aggregate, and of those there are few.
        for role in self._roles:
            if role.get("aggregationRule"):
                self.controller.queue.add(role["metadata"]["name"])

    def _updated(self, old: Object, new: Object) -> None:
        parts = ("rules", "aggregationRule")
        if any(old.get(name) != new.get(name) for name in parts) or old["metadata"].get("labels") != new["metadata"].get("labels"):
            self._changed(new)

    async def _reconcile(self, name: str) -> None:
        role = self._roles.get(None, name)
        if role is None or not role.get("aggregationRule"):
            return
        rules: list[Object] = []
        for source in role["aggregationRule"].get("clusterRoleSelectors") or ():
            selector = from_label_selector(source)
            for other in sorted(self._roles.list(None, selector), key=lambda item: str(item["metadata"]["name"])):
                if other["metadata"]["name"] != name:
                    rules += [rule for rule in other.get("rules") or () if rule not in rules]
        if rules == (role.get("rules") or []):
            return
        patch = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules}
        await self._client.patch(
            CLUSTER_ROLES, name, None, patch, type="apply", field_manager="clusterrole-aggregation-controller", force=True
        )
