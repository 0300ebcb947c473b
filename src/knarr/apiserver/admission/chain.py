"""The admission chain: all plugins in upstream's order, asked only where they have something to do.

Order matters: mutating policies, then mutating webhooks, see what the built-in plugins made; validating ones see the final
object; quota is charged last, when nothing else can refuse any more.

Source: kubernetes pkg/kubeapiserver/options/plugins.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from knarr.api.meta import deep_copy
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.always_pull_images import AlwaysPullImages
from knarr.apiserver.admission.certificates import (
    CertificateApproval,
    CertificateSigning,
    CertificateSubjectRestriction,
    ClusterTrustBundleAttest,
)
from knarr.apiserver.admission.conditions import Conditions
from knarr.apiserver.admission.default_toleration_seconds import DefaultTolerationSeconds
from knarr.apiserver.admission.event_rate_limit import EventRateLimit
from knarr.apiserver.admission.extended_resource_toleration import ExtendedResourceToleration
from knarr.apiserver.admission.external_ips import DenyServiceExternalIPs
from knarr.apiserver.admission.image_policy import ImagePolicyWebhook
from knarr.apiserver.admission.ingress_class import DefaultIngressClass
from knarr.apiserver.admission.limit_ranger import LimitRanger
from knarr.apiserver.admission.matching import GROUP, Equivalent, NamespaceMatcher
from knarr.apiserver.admission.measures import ADMIT, BOUNDS, VALIDATE, Measures
from knarr.apiserver.admission.namespace_lifecycle import NamespaceLifecycle
from knarr.apiserver.admission.node_restriction import NodeRestriction
from knarr.apiserver.admission.owner_references import OwnerReferencesPermissionEnforcement
from knarr.apiserver.admission.plugin import Plugin
from knarr.apiserver.admission.pod_node_selector import PodNodeSelector
from knarr.apiserver.admission.pod_security import PodSecurity
from knarr.apiserver.admission.pod_tolerations import PodTolerationRestriction
from knarr.apiserver.admission.policies import ValidatingAdmissionPolicies
from knarr.apiserver.admission.priority import Priority
from knarr.apiserver.admission.rbac_escalation import RBACEscalation
from knarr.apiserver.admission.resource_quota import ResourceQuota
from knarr.apiserver.admission.runtime_class import RuntimeClass
from knarr.apiserver.admission.service_account import ServiceAccount
from knarr.apiserver.admission.simple_plugins import (
    AlwaysAdmit,
    AlwaysDeny,
    LimitPodHardAntiAffinityTopology,
    NamespaceAutoProvision,
    NamespaceExists,
)
from knarr.apiserver.admission.storage import DefaultStorageClass, PersistentVolumeClaimResize, StorageObjectInUseProtection
from knarr.apiserver.admission.taint_nodes import TaintNodesByCondition
from knarr.apiserver.admission.topology_labels import PodTopologyLabels
from knarr.apiserver.admission.webhook_client import WebhookClient
from knarr.apiserver.admission.webhooks import MutatingWebhooks, ValidatingWebhooks
from knarr.apiserver.attributes import AdmissionRequest, Services, Store
from knarr.apiserver.instruments import Histogram

if TYPE_CHECKING:
    from knarr.apiserver.registry.all import Registry

QUICK_SECONDS = BOUNDS[0]
Step = Callable[[AdmissionRequest], Awaitable[None] | None]


class Part(NamedTuple):
    """The steps of one type, each with the plugin's name and its time's histogram; and the histogram of them all."""

    steps: tuple[tuple[Step, str, Histogram], ...]
    whole: Histogram
    operation: str
    type: str


class Place(NamedTuple):
    """What runs for one operation on one (sub)resource as things stand."""

    plugins: tuple[Plugin, ...]
    admits: Part
    validates: Part


class Chain:
    """AdmissionChain of attributes.py.

    Which plugins have something to do is worked out once per place, and anew after a change of webhooks, policies, quotas and
    limits; a plugin that has nothing to do costs a request nothing.
    """

    def __init__(self, plugins: list[Plugin]) -> None:
        self.plugins = plugins
        self.measures = Measures()
        self._places: dict[tuple[str, Resource, str], Place] = {}
        for plugin in plugins:
            for store in plugin.sources():
                store.add_handler(self._changed)
            if isinstance(plugin, MutatingWebhooks):
                plugin.again = self._again
            if isinstance(plugin, MutatingWebhooks | ValidatingWebhooks | ValidatingAdmissionPolicies):
                plugin.measures = self.measures

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        return [*self.measures.lines(), *(line for plugin in self.plugins for line in plugin.metrics())]

    async def _again(self, request: AdmissionRequest) -> None:
        """Run the plugins in front of the mutating webhooks once more, on what those have made."""
        for plugin in self._place(request.operation, request.resource, request.subresource).plugins:
            if isinstance(plugin, MutatingWebhooks):
                return
            waiting = plugin.admit(request)
            if waiting is not None:
                await waiting

    def _changed(self, type: str, obj: Object, old: Object | None) -> None:
        self._places.clear()

    def _place(self, operation: str, resource: Resource, subresource: str) -> Place:
        key = (operation, resource, subresource)
        found = self._places.get(key)
        if found is None:
            here = tuple(plugin for plugin in self.plugins if plugin.handles(*key) and plugin.concerns(*key))
            admits = [(plugin.admit, plugin.name) for plugin in here if type(plugin).admit is not Plugin.admit]
            validates = [(plugin.validate, plugin.name) for plugin in here if type(plugin).validate is not Plugin.validate]
            found = self._places[key] = Place(here, self._part(operation, ADMIT, admits), self._part(operation, VALIDATE, validates))
        return found

    def _part(self, operation: str, type: str, steps: Sequence[tuple[Step, str]]) -> Part:
        timed = tuple((step, name, self.measures.of_plugin(name, operation, type, rejected=False)) for step, name in steps)
        return Part(timed, self.measures.step.at(operation, "false", type), operation, type)

    def forget(self, resource: Resource) -> None:
        """Drop what is remembered of a resource that is no longer served."""
        for key in [key for key in self._places if key[1] == resource]:
            del self._places[key]

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        return bool(self._place(operation, resource, subresource).plugins)

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        return self._run(self._place(request.operation, request.resource, request.subresource).admits, request)

    def validate(self, request: AdmissionRequest) -> Awaitable[None] | None:
        return self._run(self._place(request.operation, request.resource, request.subresource).validates, request)

    def _run(self, part: Part, request: AdmissionRequest) -> Awaitable[None] | None:
        """Run steps until one has to wait; what is returned does the rest."""
        begin = before = perf_counter()
        index = 0
        try:
            for index, (step, _, times) in enumerate(part.steps):
                waiting = step(request)
                if waiting is not None:
                    return self._rest(part, request, waiting, index, begin, before)
                now = perf_counter()
                seconds = now - before
                before = now
                if seconds <= QUICK_SECONDS:
                    # Written out: nearly all are so quick, and a call for each would cost as much as the smaller plugins.
                    times.count += 1
                    times.total += seconds
                    times.buckets[0] += 1
                else:
                    times.observe(seconds)
        except BaseException:
            self._refused(part, index, begin, before)
            raise
        part.whole.observe(before - begin)
        return None

    async def _rest(self, part: Part, request: AdmissionRequest, waiting: Awaitable[None], index: int, begin: float, before: float) -> None:
        try:
            await waiting
            now = perf_counter()
            part.steps[index][2].observe(now - before)
            before = now
            while (index := index + 1) < len(part.steps):
                step, _, times = part.steps[index]
                following = step(request)
                if following is not None:
                    await following
                now = perf_counter()
                times.observe(now - before)
                before = now
        except BaseException:
            self._refused(part, index, begin, before)
            raise
        part.whole.observe(before - begin)

    def _refused(self, part: Part, index: int, begin: float, before: float) -> None:
        now = perf_counter()
        self.measures.of_plugin(part.steps[index][1], part.operation, part.type, rejected=True).observe(now - before)
        self.measures.step.at(part.operation, "true", part.type).observe(now - begin)

    async def run(self, request: AdmissionRequest) -> None:
        for part in (self.admit, self.validate):
            waiting = part(request)
            if waiting is not None:
                await waiting

    async def start(self) -> None:
        """Called once the stores are loaded."""
        for plugin in self.plugins:
            await plugin.start()

    async def close(self) -> None:
        for plugin in self.plugins:
            await plugin.close()


class _Versions:
    """What the registry knows about versions of a resource, for webhooks and policies."""

    def __init__(self, services: Services) -> None:
        self._services = services

    @property
    def _registry(self) -> Registry | None:
        # Looked up late: custom resources come and go.
        return getattr(self._services, "registry", None)

    def equivalents(self, resource: Resource) -> Sequence[Equivalent]:
        """Other served versions that share the stored object."""
        registry = self._registry
        own = registry.find(resource.group, resource.version, resource.plural) if registry is not None else None
        if registry is None or own is None or own.store is None:
            return ()
        found: list[Equivalent] = []
        for endpoint in registry.endpoints.values():
            if endpoint is not own and endpoint.store is own.store:
                found.append(Equivalent(endpoint.resource, _converter(own.to_stored, endpoint.from_stored, endpoint.resource)))
        return found

    def find_store(self, api_version: str, kind: str) -> tuple[Store, bool] | None:
        """Return where objects of a kind live, and whether in namespaces."""
        registry = self._registry
        for endpoint in registry.endpoints.values() if registry is not None else ():
            if endpoint.resource.kind == kind and endpoint.resource.api_version == api_version and endpoint.store is not None:
                return endpoint.store, endpoint.resource.namespaced
        return None

    def find_resources(self, api_version: str, kind: str) -> list[Resource]:
        """Return the served resources of a kind."""
        registry = self._registry
        endpoints = registry.endpoints.values() if registry is not None else ()
        return [one.resource for one in endpoints if one.resource.kind == kind and one.resource.api_version == api_version]

    def complete(self, request: AdmissionRequest, obj: Object) -> None:
        """Prune and default what a webhook made of an object."""
        resource = request.resource
        if (resource.group, resource.version, resource.kind) != request.kind:
            return
        registry = self._registry
        endpoint = registry.find(resource.group, resource.version, resource.plural) if registry is not None else None
        if endpoint is not None:
            from knarr.apiserver import machinery

            machinery.complete(endpoint, obj)


def _converter(to_stored: Callable[[Object], Object] | None, from_stored: Callable[[Object], Object] | None, resource: Resource) -> Callable[[Object], Object]:
    def convert(obj: Object) -> Object:
        seen = to_stored(deep_copy(obj)) if to_stored is not None else deep_copy(obj)
        seen = from_stored(seen) if from_stored is not None else seen
        return {**seen, "apiVersion": resource.api_version, "kind": resource.kind}

    return convert


def _plugins(services: Services) -> list[Plugin]:
    store = services.store
    auth = services.auth
    storage_classes = store("storage.k8s.io", "storageclasses")
    namespaces, pods, nodes = store("", "namespaces"), store("", "pods"), store("", "nodes")
    plugins: list[Plugin] = [
        AlwaysAdmit(), NamespaceAutoProvision(namespaces), NamespaceLifecycle(namespaces), NamespaceExists(namespaces),
        LimitPodHardAntiAffinityTopology(), LimitRanger(store("", "limitranges")), ServiceAccount(store("", "serviceaccounts")),
    ]  # fmt: skip
    if auth is not None:
        plugins.append(NodeRestriction(
            pods, nodes, auth.authorizer, claims=store("", "persistentvolumeclaims"), volumes=store("", "persistentvolumes"),
            drivers=store("storage.k8s.io", "csidrivers"),
        ))  # fmt: skip
    configured = services.config.admission_config
    pod_security = configured.get("PodSecurity")
    plugins += [
        TaintNodesByCondition(),
        AlwaysPullImages(),
        ImagePolicyWebhook(configured.get("ImagePolicyWebhook")),
        PodSecurity(namespaces, pods, pod_security if isinstance(pod_security, dict) else None),
        PodNodeSelector(namespaces, configured.get("PodNodeSelector")),
        Priority(store("scheduling.k8s.io", "priorityclasses")),
        DefaultTolerationSeconds(),
        PodTolerationRestriction(namespaces, configured.get("PodTolerationRestriction")),
        EventRateLimit(configured.get("EventRateLimit")),
        ExtendedResourceToleration(),
        DefaultStorageClass(storage_classes),
        StorageObjectInUseProtection(),
        *([OwnerReferencesPermissionEnforcement(auth.authorizer, _Versions(services).find_resources)] if auth is not None else []),
        PersistentVolumeClaimResize(storage_classes),
        RuntimeClass(store("node.k8s.io", "runtimeclasses")),
        DefaultIngressClass(store("networking.k8s.io", "ingressclasses")),
        DenyServiceExternalIPs(),
        PodTopologyLabels(nodes),
    ]
    if auth is not None:
        plugins += [CertificateApproval(auth.authorizer), CertificateSigning(auth.authorizer), ClusterTrustBundleAttest(auth.authorizer)]
    plugins.append(CertificateSubjectRestriction())
    validating: list[Plugin] = []
    if auth is not None:
        matcher = NamespaceMatcher(namespaces)
        client = WebhookClient(store("", "services"), store("discovery.k8s.io", "endpointslices"))
        conditions = Conditions(auth.authorizer)
        versions = _Versions(services)
        plugins.append(MutatingWebhooks(
            store(GROUP, "mutatingwebhookconfigurations"), matcher, client, conditions, versions.equivalents, versions.complete,
        ))  # fmt: skip
        validating.append(ValidatingAdmissionPolicies(
            store(GROUP, "validatingadmissionpolicies"), store(GROUP, "validatingadmissionpolicybindings"), namespaces, auth.authorizer,
            versions.equivalents, versions.find_store,
        ))  # fmt: skip
        validating.append(ValidatingWebhooks(
            store(GROUP, "validatingwebhookconfigurations"), matcher, client, conditions, versions.equivalents,
        ))  # fmt: skip
    escalation = getattr(auth, "escalation", None)
    if escalation is not None:
        plugins.append(RBACEscalation(escalation))
    plugins += validating
    plugins += [ResourceQuota(store("", "resourcequotas"), services.tasks), AlwaysDeny()]
    return plugins


def build_admission(services: Services) -> Chain:
    """Make the chain. Raises ValueError for names of plugins that do not exist."""
    plugins = _plugins(services)
    config = services.config
    known = {plugin.name for plugin in plugins}
    unknown = [name for name in (*config.admission_plugins_on, *config.admission_plugins_off) if name not in known]
    if unknown:
        raise ValueError(f"unknown admission plugins: {', '.join(unknown)}")
    wanted = {plugin.name for plugin in plugins if plugin.by_default} | set(config.admission_plugins_on)
    return Chain([plugin for plugin in plugins if plugin.name in wanted and plugin.name not in config.admission_plugins_off])
