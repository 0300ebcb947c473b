"""Every active namespace has a ServiceAccount "default" and a ConfigMap "kube-root-ca.crt".

Source: pkg/controller/serviceaccount/serviceaccounts_controller.go, pkg/controller/certificates/rootcacertpublisher.
"""

from __future__ import annotations

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, NAMESPACES, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context

_ROOT_CA = "kube-root-ca.crt"
_DESCRIPTION = {
    "kubernetes.io/description": (
        "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP "
        "or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters."
    )
}


def _is_active(namespace: Object) -> bool:
    return "deletionTimestamp" not in namespace["metadata"] and (namespace.get("status") or {}).get("phase", "Active") == "Active"


class ServiceAccountController:
    """Keeps the ServiceAccount "default" of every namespace."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._namespaces = ctx.informer(NAMESPACES)
        self._accounts = ctx.informer(SERVICE_ACCOUNTS)
        self.controller = Controller("serviceaccount-controller", self._reconcile)
        add = self.controller.queue.add
        self._namespaces.add_handler(lambda obj: add(obj["metadata"]["name"]), lambda old, new: add(new["metadata"]["name"]))
        self._accounts.add_handler(on_delete=lambda obj: add(obj["metadata"]["namespace"]))

    async def run(self) -> None:
        await self.controller.run()

    async def _reconcile(self, name: str) -> None:
        namespace = self._namespaces.get(None, name)
        if namespace is None or not _is_active(namespace) or self._accounts.get(name, "default") is not None:
            return
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
        try:
            await self._client.create(SERVICE_ACCOUNTS, account)
        except StatusError as error:
            if not errors.is_already_exists(error) and not errors.is_namespace_terminating(error) and not errors.is_not_found(error):
                raise


class RootCAPublisher:
    """Keeps the ConfigMap "kube-root-ca.crt" of every namespace as it should be."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._data = {"ca.crt": (ctx.config.root_ca or b"").decode()}
        self._namespaces = ctx.informer(NAMESPACES)
        self._maps = ctx.informers.get(CONFIG_MAPS, field_selector=f"metadata.name={_ROOT_CA}")
        self.controller = Controller("root-ca-certificate-publisher-controller", self._reconcile)
        add = self.controller.queue.add
        self._namespaces.add_handler(lambda obj: add(obj["metadata"]["name"]), lambda old, new: add(new["metadata"]["name"]))
        self._maps.add_handler(
            on_update=lambda old, new: add(new["metadata"]["namespace"]), on_delete=lambda obj: add(obj["metadata"]["namespace"])
        )

    async def run(self) -> None:
        await self.controller.run()

    async def _reconcile(self, name: str) -> None:
        namespace = self._namespaces.get(None, name)
        if namespace is None or not _is_active(namespace):
            return
        current = self._maps.get(name, _ROOT_CA)
        try:
            if current is None:
                meta = {"name": _ROOT_CA, "namespace": name, "annotations": dict(_DESCRIPTION)}
                await self._client.create(CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": self._data})
            elif current.get("data") != self._data or (current["metadata"].get("annotations") or {}) | _DESCRIPTION != (
                current["metadata"].get("annotations") or {}
            ):
                # Only the bundle and its description are ours; other annotations stay.
                meta = {**current["metadata"], "annotations": {**(current["metadata"].get("annotations") or {}), **_DESCRIPTION}}
                await self._client.update(CONFIG_MAPS, {**current, "metadata": meta, "data": self._data})
        except StatusError as error:
            if not errors.is_already_exists(error) and not errors.is_namespace_terminating(error) and not errors.is_not_found(error):
                raise
