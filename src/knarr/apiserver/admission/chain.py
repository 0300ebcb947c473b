"""The admission chain: all plugins in upstream's order, asked only where they have something to do.

Order matters: mutating policies, then mutating webhooks, see what the built-in plugins made; validating ones see the final
object; quota is charged last, when nothing else can refuse any more.

Source: kubernetes pkg/kubeapiserver/options/plugins.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from knarr.api.scheme import Resource
from knarr.apiserver.admission.certificates import CertificateApproval, CertificateSigning, CertificateSubjectRestriction
from knarr.apiserver.admission.default_toleration_seconds import DefaultTolerationSeconds
from knarr.apiserver.admission.ingress_class import DefaultIngressClass
from knarr.apiserver.admission.limit_ranger import LimitRanger
from knarr.apiserver.admission.namespace_lifecycle import NamespaceLifecycle
from knarr.apiserver.admission.node_restriction import NodeRestriction
from knarr.apiserver.admission.plugin import Plugin
from knarr.apiserver.admission.pod_security import PodSecurity
from knarr.apiserver.admission.priority import Priority
from knarr.apiserver.admission.rbac_escalation import RBACEscalation
from knarr.apiserver.admission.resource_quota import ResourceQuota
from knarr.apiserver.admission.runtime_class import RuntimeClass
from knarr.apiserver.admission.service_account import ServiceAccount
from knarr.apiserver.admission.storage import DefaultStorageClass, PersistentVolumeClaimResize, StorageObjectInUseProtection
from knarr.apiserver.admission.taint_nodes import TaintNodesByCondition
from knarr.apiserver.admission.topology_labels import PodTopologyLabels
from knarr.apiserver.attributes import AdmissionRequest, Services

Step = Callable[[AdmissionRequest], Awaitable[None] | None]
Place = tuple[str, Resource, str]


class Chain:
    """AdmissionChain of attributes.py."""

    def __init__(self, plugins: list[Plugin]) -> None:
        self.plugins = plugins
        self._places: dict[Place, tuple[tuple[Plugin, ...], tuple[Step, ...], tuple[Step, ...]]] = {}

    def _place(self, operation: str, resource: Resource, subresource: str) -> tuple[tuple[Plugin, ...], tuple[Step, ...], tuple[Step, ...]]:
        key = (operation, resource, subresource)
        found = self._places.get(key)
        if found is None:
            here = tuple(plugin for plugin in self.plugins if plugin.handles(operation, resource, subresource))
            admits = tuple(plugin.admit for plugin in here if type(plugin).admit is not Plugin.admit)
            validates = tuple(plugin.validate for plugin in here if type(plugin).validate is not Plugin.validate)
            found = self._places[key] = (here, admits, validates)
        return found

    def forget(self, resource: Resource) -> None:
        """Drop what is remembered of a resource that is no longer served."""
        for key in [key for key in self._places if key[1] == resource]:
            del self._places[key]

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        plugins = self._place(operation, resource, subresource)[0]
        return any(plugin.concerns(operation, resource, subresource) for plugin in plugins)

    async def admit(self, request: AdmissionRequest) -> None:
        for step in self._place(request.operation, request.resource, request.subresource)[1]:
            waiting = step(request)
            if waiting is not None:
                await waiting

    async def validate(self, request: AdmissionRequest) -> None:
        for step in self._place(request.operation, request.resource, request.subresource)[2]:
            waiting = step(request)
            if waiting is not None:
                await waiting

    async def start(self) -> None:
        """Called once the stores are loaded."""
        for plugin in self.plugins:
            await plugin.start()

    async def close(self) -> None:
        for plugin in self.plugins:
            await plugin.close()


def _plugins(services: Services) -> list[Plugin]:
    store = services.store
    auth = services.auth
    storage_classes = store("storage.k8s.io", "storageclasses")
    namespaces, pods, nodes = store("", "namespaces"), store("", "pods"), store("", "nodes")
    plugins: list[Plugin] = [NamespaceLifecycle(namespaces), LimitRanger(store("", "limitranges")), ServiceAccount(store("", "serviceaccounts"))]
    if auth is not None:
        plugins.append(NodeRestriction(
            pods, nodes, auth.authorizer, claims=store("", "persistentvolumeclaims"), volumes=store("", "persistentvolumes"),
            drivers=store("storage.k8s.io", "csidrivers"),
        ))  # fmt: skip
    pod_security = services.config.admission_config.get("PodSecurity")
    plugins += [
        TaintNodesByCondition(),
        PodSecurity(namespaces, pods, pod_security if isinstance(pod_security, dict) else None),
        Priority(store("scheduling.k8s.io", "priorityclasses")),
        DefaultTolerationSeconds(),
        DefaultStorageClass(storage_classes),
        StorageObjectInUseProtection(),
        PersistentVolumeClaimResize(storage_classes),
        RuntimeClass(store("node.k8s.io", "runtimeclasses")),
        DefaultIngressClass(store("networking.k8s.io", "ingressclasses")),
        PodTopologyLabels(nodes),
    ]
    if auth is not None:
        plugins += [CertificateApproval(auth.authorizer), CertificateSigning(auth.authorizer)]
    plugins.append(CertificateSubjectRestriction())
    escalation = getattr(auth, "escalation", None)
    if escalation is not None:
        plugins.append(RBACEscalation(escalation))
    plugins.append(ResourceQuota(store("", "resourcequotas"), services.tasks))
    return plugins


def build_admission(services: Services) -> Chain:
    """Make the chain. Raises ValueError for names of plugins that do not exist."""
    plugins = _plugins(services)
    config = services.config
    known = {plugin.name for plugin in plugins}
    unknown = [name for name in (*config.admission_plugins_on, *config.admission_plugins_off) if name not in known]
    if unknown:
        raise ValueError(f"unknown admission plugins: {', '.join(unknown)}")
    return Chain([plugin for plugin in plugins if plugin.name not in config.admission_plugins_off])
