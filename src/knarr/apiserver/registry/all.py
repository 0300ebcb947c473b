"""The table of built-in kinds: which strategy each has, and the building of all endpoints.

Callers: server.py at start. Kinds not named here follow the plain conventions: status subresource if discovery says so.
"""

from __future__ import annotations

from collections.abc import Container

from knarr.api import conversion
from knarr.api.scheme import OPTIONAL, SCHEME, Resource
from knarr.apiserver.attributes import Services
from knarr.apiserver.endpoint import Endpoint, TableFactory
from knarr.apiserver.forms import Converter
from knarr.apiserver.registry import core, devices, jobs, pods, services, simple
from knarr.apiserver.registry.base import Strategy
from knarr.apiserver.storage import Storage
from knarr.apiserver.store import ResourceStore

STRATEGIES: dict[tuple[str, str], type[Strategy]] = {
    ("", "configmaps"): simple.Plain,
    ("", "endpoints"): simple.CreateOnUpdate,
    ("", "events"): simple.Event,
    ("", "limitranges"): simple.LimitRange,
    ("", "namespaces"): core.Namespace,
    ("", "nodes"): core.Node,
    ("", "persistentvolumeclaims"): simple.PersistentVolumeClaim,
    ("", "persistentvolumes"): simple.PersistentVolume,
    ("", "pods"): pods.Pod,
    ("", "podtemplates"): simple.PodTemplate,
    ("", "replicationcontrollers"): simple.ReplicationController,
    ("", "resourcequotas"): simple.ResourceQuota,
    ("", "secrets"): simple.Secret,
    ("", "serviceaccounts"): simple.ServiceAccount,
    ("", "services"): services.Service,
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"): simple.AdmissionConfiguration,
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations"): simple.AdmissionConfiguration,
    ("admissionregistration.k8s.io", "validatingadmissionpolicies"): simple.AdmissionPolicy,
    ("admissionregistration.k8s.io", "validatingadmissionpolicybindings"): simple.AdmissionConfiguration,
    ("apiextensions.k8s.io", "customresourcedefinitions"): simple.CustomResourceDefinition,
    ("apiregistration.k8s.io", "apiservices"): simple.APIService,
    ("apps", "controllerrevisions"): simple.ControllerRevision,
    ("apps", "daemonsets"): simple.DaemonSet,
    ("apps", "deployments"): simple.Deployment,
    ("apps", "replicasets"): simple.ReplicaSet,
    ("apps", "statefulsets"): simple.StatefulSet,
    ("autoscaling", "horizontalpodautoscalers"): simple.HorizontalPodAutoscaler,
    ("batch", "cronjobs"): simple.CronJob,
    ("batch", "jobs"): jobs.Job,
    ("certificates.k8s.io", "certificatesigningrequests"): core.CertificateSigningRequest,
    ("certificates.k8s.io", "clustertrustbundles"): simple.ClusterTrustBundle,
    ("certificates.k8s.io", "podcertificaterequests"): simple.PodCertificateRequest,
    ("coordination.k8s.io", "leases"): simple.Lease,
    ("discovery.k8s.io", "endpointslices"): simple.EndpointSlice,
    ("flowcontrol.apiserver.k8s.io", "flowschemas"): simple.FlowControl,
    ("flowcontrol.apiserver.k8s.io", "prioritylevelconfigurations"): simple.FlowControl,
    ("networking.k8s.io", "ingressclasses"): simple.IngressClass,
    ("networking.k8s.io", "ingresses"): simple.Ingress,
    ("networking.k8s.io", "ipaddresses"): services.IPAddress,
    ("networking.k8s.io", "networkpolicies"): simple.NetworkPolicy,
    ("networking.k8s.io", "servicecidrs"): services.ServiceCIDR,
    ("node.k8s.io", "runtimeclasses"): simple.RuntimeClass,
    ("policy", "poddisruptionbudgets"): simple.PodDisruptionBudget,
    ("rbac.authorization.k8s.io", "clusterrolebindings"): simple.CreateOnUpdate,
    ("rbac.authorization.k8s.io", "clusterroles"): simple.CreateOnUpdate,
    ("rbac.authorization.k8s.io", "rolebindings"): simple.CreateOnUpdate,
    ("rbac.authorization.k8s.io", "roles"): simple.CreateOnUpdate,
    ("resource.k8s.io", "deviceclasses"): simple.DeviceClass,
    ("resource.k8s.io", "devicetaintrules"): devices.DeviceTaintRule,
    ("resource.k8s.io", "resourceclaims"): devices.ResourceClaim,
    ("resource.k8s.io", "resourceclaimtemplates"): devices.ResourceClaimTemplate,
    ("resource.k8s.io", "resourceslices"): devices.ResourceSlice,
    ("scheduling.k8s.io", "priorityclasses"): simple.PriorityClass,
    ("storage.k8s.io", "csidrivers"): simple.CSIDriver,
    ("storage.k8s.io", "csinodes"): simple.CSINode,
    ("storage.k8s.io", "csistoragecapacities"): simple.Conditional,
    ("storage.k8s.io", "storageclasses"): simple.ReturnsDeleted,
    ("storage.k8s.io", "volumeattachments"): simple.VolumeAttachment,
    ("storage.k8s.io", "volumeattributesclasses"): simple.Plain,
    ("storagemigration.k8s.io", "storageversionmigrations"): simple.StorageVersionMigration,
}


DEPRECATED = {
    ("", "endpoints"): ("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice",),
    ("", "componentstatuses"): ("v1 ComponentStatus is deprecated in v1.19+",),
}


class Registry:
    """Endpoints by (group, version, plural) and stores by (group, plural)."""

    def __init__(self) -> None:
        self.endpoints: dict[tuple[str, str, str], Endpoint] = {}
        self.stores: dict[tuple[str, str], ResourceStore] = {}
        self.generation = 0
        """Grows when a resource appears or goes: what was derived from the table is then derived anew."""

    def add(self, endpoint: Endpoint) -> None:
        resource = endpoint.resource
        self.endpoints[resource.group, resource.version, resource.plural] = endpoint
        if endpoint.store is not None:
            self.stores.setdefault((resource.group, resource.plural), endpoint.store)
        self.generation += 1

    def remove(self, group: str, version: str, plural: str) -> None:
        self.endpoints.pop((group, version, plural), None)
        if not any(key[0] == group and key[2] == plural for key in self.endpoints):
            self.stores.pop((group, plural), None)
        self.generation += 1

    def find(self, group: str, version: str, plural: str) -> Endpoint | None:
        return self.endpoints.get((group, version, plural))


def build(
    registry: Registry, storage: Storage, owner: Services, table: TableFactory | None, *, event_ttl_seconds: int, also: Container[str] = (),
) -> None:
    """Fill a registry with every built-in resource; the caches are filled when the storage starts.

    Args:
      also: Group versions to be served that are off by default.
    """
    made: dict[str, tuple[ResourceStore, Strategy]] = {}
    optional = [resource for resource in OPTIONAL.resources() if resource.api_version in also]
    for resource in sorted([*SCHEME.resources(), *optional], key=_stored_first):
        if not _is_stored(resource):
            endpoint = Endpoint(resource, None, Plain)
            endpoint.warnings = DEPRECATED.get((resource.group, resource.plural), ())
            registry.add(endpoint)
            continue
        shared = made.get(resource.prefix)
        if shared is None:
            strategy = STRATEGIES.get((resource.group, resource.plural), Strategy)()
            strategy.bind(owner)
            cache = storage.add(resource.prefix, strategy.field_names, strategy.field_function, strategy.trigger)
            lease = event_ttl_seconds if resource.plural == "events" else strategy.lease_seconds
            shared = made[resource.prefix] = (ResourceStore(storage, cache, resource, lease_seconds=lease), strategy)
        store, strategy = shared
        from_stored, to_stored = _converters(resource)
        endpoint = Endpoint(resource, store, strategy, from_stored=from_stored, to_stored=to_stored, table=table)
        endpoint.warnings = DEPRECATED.get((resource.group, resource.plural), ())
        registry.add(endpoint)


def _converters(resource: Resource) -> tuple[Converter | None, Converter | None]:
    """Return how to get from the stored version to the served one and back; None where they are the same."""
    if not conversion.needed(resource.api_version, resource.storage_api_version):
        return None, None
    return (
        lambda obj: conversion.convert(obj, resource.api_version),
        lambda obj: conversion.convert(obj, resource.storage_api_version),
    )


def _is_stored(resource: Resource) -> bool:
    return "get" in resource.verbs and resource.plural != "componentstatuses"


def _stored_first(resource: Resource) -> bool:
    """The version that is stored makes the store; others share it."""
    return resource.api_version != resource.storage_api_version


Plain = simple.Plain()

