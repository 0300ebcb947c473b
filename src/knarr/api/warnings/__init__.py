"""What a server says about an object it accepts: texts of Warning headers. Pure.

`of_change` is called by the API server for every valid create and update, `of_status` for status updates; kubectl prints
what they return. Each kind has one function of (new, old); old is None on create. Objects have passed validation.

Source: WarningsOnCreate, WarningsOnUpdate in pkg/registry/*/*/strategy.go; pkg/api/{job,service,storage,persistentvolume}.
"""

from collections.abc import Callable

from knarr.api.structural.formats import FORMATS
from knarr.api.types import Object
from knarr.api.validation.strings import dns_label, label_key_errors
from knarr.api.warnings import addresses, pods

Rule = Callable[[Object, Object | None], list[str]]


def of_change(obj: Object, old: Object | None) -> list[str]:
    """Return the warnings for a create (old is None) or an update of a built-in object."""
    rule = _RULES.get((obj.get("apiVersion"), obj.get("kind")))
    return rule(obj, old) if rule is not None else []


def of_status(obj: Object) -> list[str]:
    """Return the warnings for an update of a built-in object's status."""
    status = obj.get("status") or {}
    kind = obj.get("kind")
    warnings: list[str] = []
    if kind == "Pod":
        for key in ("podIPs", "hostIPs"):
            for index, entry in enumerate(status.get(key) or ()):
                warnings += addresses.of_ip(f"status.{key}[{index}].ip", entry.get("ip") or "")
    elif kind in ("Service", "Ingress"):
        for index, entry in enumerate((status.get("loadBalancer") or {}).get("ingress") or ()):
            if entry.get("ip"):
                warnings += addresses.of_ip(f"status.loadBalancer.ingress[{index}]", entry["ip"])
    return warnings


def of_custom(obj: Object, old: Object | None) -> list[str]:
    """Return the warnings for a create or update of a custom object: finalizers that could be anyone's."""
    finalizers = set(obj["metadata"].get("finalizers") or ())
    if old is not None:
        finalizers -= set(old["metadata"].get("finalizers") or ())
    warnings = []
    for name in sorted(finalizers):
        warnings += [f'metadata.finalizers: "{name}": {message}' for message in label_key_errors(name)]
        if "/" not in name and name not in ("orphan", "foregroundDeletion", "kubernetes"):
            path = " including a path (/)" if "." in name else ""
            warnings.append(
                f'metadata.finalizers: "{name}": prefer a domain-qualified finalizer name{path} to avoid accidental conflicts with '
                "other finalizer writers"
            )
    return warnings


# --- workloads ----------------------------------------------------------------------------------------------------------


def _name(obj: Object, used: str) -> list[str]:
    messages = dns_label(obj["metadata"].get("name") or "")
    if not messages:
        return []
    return [
        f"metadata.name: this is used in {used}, which can result in surprising behavior; a DNS label is recommended: [{' '.join(messages)}]"
    ]


def _pod(obj: Object, old: Object | None) -> list[str]:
    # People do not update pods, machines do, often.
    return _name(obj, "the Pod's hostname") + pods.of_template("", obj) if old is None else []


def _same_generation(obj: Object, old: Object | None) -> bool:
    return old is not None and obj["metadata"].get("generation") == old["metadata"].get("generation")


def _named_workload(obj: Object, old: Object | None) -> list[str]:
    return ([] if old is not None else _name(obj, "Pod names and hostnames")) + _workload(obj, old)


def _workload(obj: Object, old: Object | None) -> list[str]:
    return [] if _same_generation(obj, old) else pods.of_template("spec.template", (obj.get("spec") or {}).get("template"))


def _daemon_set(obj: Object, old: Object | None) -> list[str]:
    template = (obj.get("spec") or {}).get("template")
    if old is not None and template == (old.get("spec") or {}).get("template"):
        return []
    return pods.of_template("spec.template", template)


def _pod_template(obj: Object, old: Object | None) -> list[str]:
    return [] if _same_generation(obj, old) else pods.of_template("template", obj.get("template"))


def _stateful_set(obj: Object, old: Object | None) -> list[str]:
    warnings = _workload(obj, old)
    spec = obj.get("spec") or {}
    for index, claim in enumerate(spec.get("volumeClaimTemplates") or ()):
        path = f"spec.volumeClaimTemplates[{index}]{'' if old is None else '.Spec'}"
        warnings += pods.of_claim_spec(path, claim.get("spec") or {})
    if (spec.get("revisionHistoryLimit") or 0) < 0:
        warnings.append("spec.revisionHistoryLimit: a negative value retains all historical revisions; a value >= 0 is recommended")
    return warnings


def _job_spec(path: str, spec: Object) -> list[str]:
    warnings = []
    many = (spec.get("completions") or 0) > 100_000 and (spec.get("parallelism") or 0) > 10_000
    if spec.get("completionMode") == "Indexed" and many:
        warnings.append(
            f"{path}: In Indexed Jobs with a number of completions higher than 10^5 and a parallelism higher than 10^4, Kubernetes might "
            "not be able to track completedIndexes when a big number of indexes fail"
        )
    return warnings + pods.of_template(f"{path}.template", spec.get("template"))


def _job(obj: Object, old: Object | None) -> list[str]:
    warnings = [] if old is not None else _name(obj, "Pod names and hostnames")
    return warnings if _same_generation(obj, old) else warnings + _job_spec("spec", obj.get("spec") or {})


def _cron_job(obj: Object, old: Object | None) -> list[str]:
    spec = obj.get("spec") or {}
    warnings = [] if old is not None else _name(obj, "Pod names and hostnames")
    if not _same_generation(obj, old):
        warnings += _job_spec("spec.jobTemplate.spec", (spec.get("jobTemplate") or {}).get("spec") or {})
    if old is not None and "TZ" in (spec.get("schedule") or ""):
        warnings.append(
            "cannot use TZ or CRON_TZ in spec.spec.schedule, use timeZone instead, see "
            "https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details"
        )
    return warnings


# --- networking ---------------------------------------------------------------------------------------------------------


def _service(obj: Object, old: Object | None) -> list[str]:
    spec = obj.get("spec") or {}
    warnings = []
    if "service.kubernetes.io/topology-aware-hints" in (obj["metadata"].get("annotations") or {}):
        warnings.append(
            "annotation service.kubernetes.io/topology-aware-hints is deprecated, please use service.kubernetes.io/topology-mode instead"
        )
    kind, address, external = spec.get("type") or "", spec.get("clusterIP") or "", spec.get("externalIPs") or ()
    if address and address != "None":
        for index, own in enumerate(spec.get("clusterIPs") or ()):
            warnings += addresses.of_ip(f"spec.clusterIPs[{index}]", own)
    balancer = spec.get("loadBalancerIP") or ""
    if kind == "ClusterIP" and address == "None":
        if balancer:
            warnings.append("spec.loadBalancerIP is ignored for headless services")
        if external:
            warnings.append("spec.externalIPs is ignored for headless services")
        if spec.get("sessionAffinity") != "None":
            warnings.append("spec.SessionAffinity is ignored for headless services")
    for index, own in enumerate(external):
        warnings += addresses.of_ip(f"spec.externalIPs[{index}]", own)
    if balancer:
        warnings += addresses.of_ip("spec.loadBalancerIP", balancer)
    for index, cidr in enumerate(spec.get("loadBalancerSourceRanges") or ()):
        warnings += addresses.of_cidr(f"spec.loadBalancerSourceRanges[{index}]", cidr)
    if kind == "ExternalName" and external:
        warnings.append('spec.externalIPs is ignored when spec.type is "ExternalName"')
    if kind != "ExternalName" and spec.get("externalName"):
        warnings.append('spec.externalName is ignored when spec.type is not "ExternalName"')
    return warnings


def _endpoints(obj: Object, old: Object | None) -> list[str]:
    if (obj["metadata"].get("labels") or {}).get("endpoints.kubernetes.io/managed-by") == "endpoint-controller":
        return []
    warnings: list[str] = []
    for index, subset in enumerate(obj.get("subsets") or ()):
        for key in ("addresses", "notReadyAddresses"):
            for position, address in enumerate(subset.get(key) or ()):
                warnings += addresses.of_ip(f"subsets[{index}].{key}[{position}].ip", address.get("ip") or "")
    return warnings


def _endpoint_slice(obj: Object, old: Object | None) -> list[str]:
    warnings = ["spec.addressType: FQDN endpoints are deprecated"] if old is None and obj.get("addressType") == "FQDN" else []
    manager = (obj["metadata"].get("labels") or {}).get("endpointslice.kubernetes.io/managed-by")
    if manager in ("endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io"):
        return warnings
    for index, endpoint in enumerate(obj.get("endpoints") or ()):
        for position, address in enumerate(endpoint.get("addresses") or ()):
            warnings += addresses.of_ip(f"endpoints[{index}].addresses[{position}]", address)
    return warnings


def _network_policy(obj: Object, old: Object | None) -> list[str]:
    spec = obj.get("spec") or {}
    warnings: list[str] = []
    for rules, peers in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(rules) or ()):
            for position, peer in enumerate(rule.get(peers) or ()):
                block = peer.get("ipBlock")
                if block:
                    path = f"spec.{rules}[{index}].{peers}[{position}].ipBlock"
                    warnings += addresses.of_cidr(f"{path}.cidr", block.get("cidr") or "")
                    for place, cidr in enumerate(block.get("except") or ()):
                        warnings += addresses.of_cidr(f"{path}.except[{place}]", cidr)
    return warnings


def _ingress(obj: Object, old: Object | None) -> list[str]:
    if old is not None or (obj.get("spec") or {}).get("ingressClassName") is not None:
        return []
    if "kubernetes.io/ingress.class" not in (obj["metadata"].get("annotations") or {}):
        return []
    return ["annotation \"kubernetes.io/ingress.class\" is deprecated, please use 'spec.ingressClassName' instead"]


# --- storage and nodes --------------------------------------------------------------------------------------------------

_STORAGE_CLASS = "volume.beta.kubernetes.io/storage-class"
_STORAGE_CLASS_MESSAGE = f'metadata.annotations[{_STORAGE_CLASS}]: deprecated since v1.8; use "storageClassName" attribute instead'
_MOUNT_OPTIONS = "volume.beta.kubernetes.io/mount-options"


def _persistent_volume(obj: Object, old: Object | None) -> list[str]:
    annotations, spec = obj["metadata"].get("annotations") or {}, obj.get("spec") or {}
    warnings = []
    if _STORAGE_CLASS in annotations:
        warnings.append(_STORAGE_CLASS_MESSAGE)
    if _MOUNT_OPTIONS in annotations:
        warnings.append(f'metadata.annotations[{_MOUNT_OPTIONS}]: deprecated since v1.31; use "mountOptions" attribute instead')
    if spec.get("persistentVolumeReclaimPolicy") == "Recycle":
        warnings.append(
            "spec.persistentVolumeReclaimPolicy: The Recycle reclaim policy is deprecated. Instead, the recommended approach is to use "
            "dynamic provisioning."
        )
    terms = ((spec.get("nodeAffinity") or {}).get("required") or {}).get("nodeSelectorTerms") or ()
    for index, term in enumerate(terms):
        warnings += pods.of_node_term(f"spec.nodeAffinity.required.nodeSelectorTerms[{index}]", term)
    for key, field in (
        ("cephfs", "cephfs"), ("photonPersistentDisk", "photonPersistentDisk"), ("scaleIO", "scaleIO"), ("storageos", "storageOS"),
        ("glusterfs", "glusterfs"), ("rbd", "rbd"),
    ):  # fmt: skip
        if key in spec:
            warnings.append(f"spec.{field}: {pods.VOLUMES[key]}")
    return warnings


def _persistent_volume_claim(obj: Object, old: Object | None) -> list[str]:
    deprecated = [_STORAGE_CLASS_MESSAGE] if _STORAGE_CLASS in (obj["metadata"].get("annotations") or {}) else []
    return deprecated + pods.of_claim_spec("spec", obj.get("spec") or {})


def _storage_class(obj: Object, old: Object | None) -> list[str]:
    warnings = []
    for index, topology in enumerate(obj.get("allowedTopologies") or ()):
        for position, expression in enumerate(topology.get("matchLabelExpressions") or ()):
            message = pods.of_node_label(expression.get("key") or "")
            if message:
                warnings.append(f"allowedTopologies[{index}].matchLabelExpressions[{position}].key: {message}")
    return warnings


def _storage_capacity(obj: Object, old: Object | None) -> list[str]:
    topology = obj.get("nodeTopology") or {}
    labels = [
        f"nodeTopology.matchLabels.{key}: {message}" for key in topology.get("matchLabels") or () if (message := pods.of_node_label(key))
    ]
    return pods.of_node_term("nodeTopology", topology) + labels


def _runtime_class(obj: Object, old: Object | None) -> list[str]:
    chosen = (obj.get("scheduling") or {}).get("nodeSelector") or ()
    return [f"scheduling.nodeSelector: {message}" for key in chosen if (message := pods.of_node_label(key))]


def _node(obj: Object, old: Object | None) -> list[str]:
    spec = obj.get("spec") or {}
    warnings = []
    if spec.get("configSource") is not None:
        warnings.append("spec.configSource: the feature is removed")
    if spec.get("externalID"):
        warnings.append("spec.externalID: this field is deprecated, and is unused by Kubernetes")
    for index, cidr in enumerate(spec.get("podCIDRs") or ()):
        warnings += addresses.of_cidr(f"spec.podCIDRs[{index}]", cidr)
    return warnings


def _resource_slice(obj: Object, old: Object | None) -> list[str]:
    driver = (obj.get("spec") or {}).get("driver") or ""
    if driver == driver.lower():
        return []
    return [f'spec.driver: driver names should be lowercase; "{driver}" contains uppercase characters']


# --- others -------------------------------------------------------------------------------------------------------------

_MOUNTABLE_SECRETS = "kubernetes.io/enforce-mountable-secrets"


def _service_account(obj: Object, old: Object | None) -> list[str]:
    if _MOUNTABLE_SECRETS not in (obj["metadata"].get("annotations") or {}):
        return []
    if old is not None and _MOUNTABLE_SECRETS in (old["metadata"].get("annotations") or {}):
        return []
    return [
        f"metadata.annotations[{_MOUNTABLE_SECRETS}]: deprecated in v1.32+; prefer separate namespaces to isolate access to mounted secrets"
    ]


def _secret(obj: Object, old: Object | None) -> list[str]:
    if obj.get("type") != "kubernetes.io/tls":
        return []
    # Certificates are rare here, their library is large.
    from knarr.api.warnings.certificates import of_pair

    data = obj.get("data") or {}
    return of_pair(data.get("tls.crt") or "", data.get("tls.key") or "")


def _custom_resource_definition(obj: Object, old: Object | None) -> list[str]:
    known = set(_unknown_formats(old)) if old is not None else set()
    return [f'unrecognized format "{name}"' for name in _unknown_formats(obj) if name not in known]


def _unknown_formats(definition: Object) -> list[str]:
    found: list[str] = []

    def walk(schema: object) -> None:
        if not isinstance(schema, dict):
            return
        name = schema.get("format")
        if name and schema.get("type") == "string" and name.replace("-", "") not in FORMATS:
            found.append(name)
        for key in ("items", "additionalProperties", "not"):
            walk(schema.get(key))
        for key in ("properties", "patternProperties", "definitions"):
            for part in (schema.get(key) or {}).values():
                walk(part)
        for key in ("allOf", "anyOf", "oneOf"):
            for part in schema.get(key) or ():
                walk(part)

    for version in (definition.get("spec") or {}).get("versions") or ():
        walk((version.get("schema") or {}).get("openAPIV3Schema"))
    return found


_RULES: dict[tuple[str | None, str | None], Rule] = {
    ("v1", "Pod"): _pod,
    ("v1", "PodTemplate"): _pod_template,
    ("v1", "ReplicationController"): _named_workload,
    ("v1", "Service"): _service,
    ("v1", "Endpoints"): _endpoints,
    ("v1", "Secret"): _secret,
    ("v1", "ServiceAccount"): _service_account,
    ("v1", "Node"): _node,
    ("v1", "PersistentVolume"): _persistent_volume,
    ("v1", "PersistentVolumeClaim"): _persistent_volume_claim,
    ("apps/v1", "Deployment"): _named_workload,
    ("apps/v1", "ReplicaSet"): _named_workload,
    ("apps/v1", "DaemonSet"): _daemon_set,
    ("apps/v1", "StatefulSet"): _stateful_set,
    ("batch/v1", "Job"): _job,
    ("batch/v1", "CronJob"): _cron_job,
    ("discovery.k8s.io/v1", "EndpointSlice"): _endpoint_slice,
    ("networking.k8s.io/v1", "NetworkPolicy"): _network_policy,
    ("networking.k8s.io/v1", "Ingress"): _ingress,
    ("node.k8s.io/v1", "RuntimeClass"): _runtime_class,
    ("resource.k8s.io/v1", "ResourceSlice"): _resource_slice,
    ("storage.k8s.io/v1", "StorageClass"): _storage_class,
    ("storage.k8s.io/v1", "CSIStorageCapacity"): _storage_capacity,
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"): _custom_resource_definition,
}
