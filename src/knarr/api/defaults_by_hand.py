"""The conditional defaults, written out: per field (FIELDS) and per kind (KINDS, run before the compiled rules).

Used by defaulting.py only. Every conditional rule of facts/defaults.json is either in FIELDS, or named in IN_KINDS
because a function in KINDS does it; defaulting.py refuses a rule that is in neither, so that new facts cannot be missed.

Source: pkg/apis/*/v*/defaults.go.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from knarr.aiokits import clock
from knarr.api import quantity
from knarr.api.types import Object

_PART = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:(?:{_PART}(?:\.{_PART})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::(?P<tag>[\w][\w.-]{0,127}))?(?P<digest>@[A-Za-z][A-Za-z0-9]*(?:[+._-][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)
MAX_INT32 = 2**31 - 1


@lru_cache(maxsize=4096)
def pull_policy_of(image: str) -> str:
    """ "Always" for the tag latest or no tag and no digest, otherwise, and for what is no image's name, "IfNotPresent"."""
    match = _IMAGE.fullmatch(image)
    if match is None:
        return "IfNotPresent"
    tag = match["tag"] or ("" if match["digest"] else "latest")
    return "Always" if tag == "latest" else "IfNotPresent"


def _image_pull_policy(container: Object, key: str) -> None:
    if key not in container:
        container[key] = pull_policy_of(container.get("image") or "")


def _image_volume_pull_policy(source: Object, key: str) -> None:
    if key not in source:
        source[key] = pull_policy_of(source.get("reference") or "")


def _resource_list(holder: Object, key: str) -> None:
    resources = holder.get(key)
    if resources:
        for name, text in resources.items():
            # Whole and milli texts are the rule; anything finer has an n or u suffix or decimals, now canonical.
            if text[-1] in "nu":
                resources[name] = quantity.round_up_milli(text)


def _volume_source(volume: Object, key: str) -> None:
    if len(volume) == 1 or (len(volume) == 0):
        volume[key] = {}


def _nothing(holder: Object, key: str) -> None:
    """The rule's feature gate is off in 1.35, or the effect is not visible in JSON."""


def _subject_api_group(subject: Object, key: str) -> None:
    if key not in subject and subject.get("kind") in ("User", "Group"):
        subject[key] = "rbac.authorization.k8s.io"


def _exact_count(request: Object, key: str) -> None:
    if key not in request and request.get("allocationMode", "ExactCount") == "ExactCount":
        request[key] = 1


def _time_added(taint: Object, key: str) -> None:
    if key not in taint:
        taint[key] = clock.now_rfc3339()


def _se_linux_mount(spec: Object, key: str) -> None:
    if key not in spec:
        spec[key] = False


FIELDS: dict[str, Callable[[Object, str], None]] = {
    "api.core.v1.Container#imagePullPolicy": _image_pull_policy,
    "api.core.v1.EphemeralContainer#imagePullPolicy": _image_pull_policy,
    "api.core.v1.ResourceList#*": _resource_list,
    # These paths carry a rule of the Pod, done in _pod, and then the one of every resource list.
    **{f"api.core.v1.Pod#spec.{path}": _resource_list for path in (
        "containers[].resources.requests", "initContainers[].resources.requests", "resources.limits", "resources.requests")},
    "api.core.v1.Volume#emptyDir": _volume_source,
    "api.core.v1.Volume#image.pullPolicy": _image_volume_pull_policy,
    "api.core.v1.ConfigMap#data": _nothing,
    "api.core.v1.PodLogOptions#stream": _nothing,
    "api.rbac.v1.Subject#apiGroup": _subject_api_group,
    "api.resource.v1.DeviceSubRequest#count": _exact_count,
    "api.resource.v1.ExactDeviceRequest#count": _exact_count,
    "api.resource.v1.DeviceTaint#timeAdded": _time_added,
    "api.resource.v1alpha3.DeviceTaint#timeAdded": _time_added,
    "api.storage.v1.CSIDriver#spec.seLinuxMount": _se_linux_mount,
}


# --- whole kinds ------------------------------------------------------------------------------------------------------


def _rolling_update(strategy: Object, surge: Any, unavailable: Any) -> None:
    if not strategy.get("type"):
        strategy["type"] = "RollingUpdate"
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", unavailable)
        rolling.setdefault("maxSurge", surge)


def _deployment(obj: Object) -> None:
    _rolling_update(obj["spec"].setdefault("strategy", {}), "25%", "25%")


def _daemon_set(obj: Object) -> None:
    strategy = obj["spec"].setdefault("updateStrategy", {})
    _rolling_update(strategy, 0, 1)


def _stateful_set(obj: Object) -> None:
    spec = obj["spec"]
    strategy = spec.setdefault("updateStrategy", {})
    if not strategy.get("type"):
        strategy["type"] = "RollingUpdate"
        strategy.setdefault("rollingUpdate", {})
    if strategy["type"] == "RollingUpdate" and "rollingUpdate" in strategy:
        strategy["rollingUpdate"].setdefault("partition", 0)
    retention = spec.setdefault("persistentVolumeClaimRetentionPolicy", {})
    for key in ("whenDeleted", "whenScaled"):
        if not retention.get(key):
            retention[key] = "Retain"


def _scaling_rules(given: Object | None, defaults: Object) -> Object:
    # In place: who decoded the object may still have to take something out of it.
    rules = {} if given is None else given
    for key, value in defaults.items():
        rules.setdefault(key, value)
    return rules


def _autoscaler(obj: Object) -> None:
    spec = obj["spec"]
    if not spec.get("metrics"):
        target = {"type": "Utilization", "averageUtilization": 80}
        spec["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    behavior = spec.get("behavior")
    if behavior is not None:
        behavior["scaleUp"] = _scaling_rules(behavior.get("scaleUp"), {
            "stabilizationWindowSeconds": 0, "selectPolicy": "Max",
            "policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}, {"type": "Percent", "value": 100, "periodSeconds": 15}],
        })
        behavior["scaleDown"] = _scaling_rules(behavior.get("scaleDown"), {
            "selectPolicy": "Max", "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        })


def _autoscaler_v1(obj: Object) -> None:
    obj["spec"].setdefault("targetCPUUtilizationPercentage", 80)


def _labels_from_template(obj: Object) -> None:
    labels = ((obj["spec"].get("template") or {}).get("metadata") or {}).get("labels")
    if labels and not obj["metadata"].get("labels"):
        obj["metadata"]["labels"] = dict(labels)


def _job(obj: Object) -> None:
    spec = obj["spec"]
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    if "backoffLimit" not in spec:
        spec["backoffLimit"] = MAX_INT32 if "backoffLimitPerIndex" in spec else 6
    if "podReplacementPolicy" not in spec:
        spec["podReplacementPolicy"] = "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed"
    _labels_from_template(obj)


def _replication_controller(obj: Object) -> None:
    labels = ((obj["spec"].get("template") or {}).get("metadata") or {}).get("labels")
    if labels and not obj["spec"].get("selector"):
        obj["spec"]["selector"] = dict(labels)
    _labels_from_template(obj)


def _namespace(obj: Object) -> None:
    name = obj["metadata"].get("name")
    if name:
        obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name


def _node(obj: Object) -> None:
    status = obj.get("status") or {}
    if not status.get("allocatable") and status.get("capacity"):
        status["allocatable"] = dict(status["capacity"])


def _limit_range(obj: Object) -> None:
    for item in (obj.get("spec") or {}).get("limits") or ():
        if item.get("type") != "Container":
            continue
        limits = {**item.get("default", {})}
        for name, text in item.get("max", {}).items():
            limits.setdefault(name, text)
        requests = {**item.get("defaultRequest", {})}
        for name, text in (*limits.items(), *item.get("min", {}).items()):
            requests.setdefault(name, text)
        for key, found in (("default", limits), ("defaultRequest", requests)):
            if found:
                item[key] = found


def _service(obj: Object) -> None:
    spec = obj["spec"]
    affinity = spec.setdefault("sessionAffinity", "None")
    if affinity == "None":
        spec.pop("sessionAffinityConfig", None)
    elif affinity == "ClientIP" and ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds") is None:
        spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": 10800}}
    kind = spec.setdefault("type", "ClusterIP")
    for port in spec.get("ports") or ():
        if not port.get("targetPort"):
            port["targetPort"] = port.get("port") or 0
    external = kind in ("LoadBalancer", "NodePort") or (kind == "ClusterIP" and spec.get("externalIPs"))
    if external and not spec.get("externalTrafficPolicy"):
        spec["externalTrafficPolicy"] = "Cluster"
    if "internalTrafficPolicy" not in spec and kind in ("NodePort", "LoadBalancer", "ClusterIP"):
        spec["internalTrafficPolicy"] = "Cluster"
    if kind == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
        for ingress in ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ():
            if ingress.get("ip"):
                ingress.setdefault("ipMode", "VIP")


def _network_policy(obj: Object) -> None:
    spec = obj.get("spec") or {}
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def _ingress_class(obj: Object) -> None:
    parameters = (obj.get("spec") or {}).get("parameters")
    if parameters is not None and parameters.get("scope") is None:
        parameters["scope"] = "Cluster"


def _custom_resource_definition(obj: Object) -> None:
    spec = obj["spec"]
    names = spec.setdefault("names", {})
    if not names.get("singular"):
        names["singular"] = (names.get("kind") or "").lower()
    if not names.get("listKind") and names.get("kind"):
        names["listKind"] = names["kind"] + "List"
    if not names["singular"]:
        del names["singular"]
    spec.setdefault("conversion", {"strategy": "None"})
    status = obj.setdefault("status", {})
    if not status.get("storedVersions"):
        stored = next((v.get("name") for v in spec.get("versions") or () if v.get("storage")), None)
        if stored:
            status["storedVersions"] = [stored]


def _pod(obj: Object) -> None:
    spec = obj["spec"]
    containers = spec.get("containers") or ()
    init_containers = spec.get("initContainers") or ()
    for container in (*containers, *init_containers):
        resources = container.get("resources")
        limits = resources and resources.get("limits")
        if limits:
            requests = resources.setdefault("requests", {})
            for name, text in limits.items():
                if name not in requests:
                    requests[name] = text
    if "resources" in spec:
        _pod_level_resources(spec)
    if spec.get("hostNetwork"):
        for container in (*containers, *init_containers):
            for port in container.get("ports") or ():
                if not port.get("hostPort"):
                    port["hostPort"] = port.get("containerPort", 0)
                    if not port["hostPort"]:
                        del port["hostPort"]


def _is_pod_level(name: str) -> bool:
    return name in ("cpu", "memory") or name.startswith("hugepages-")


def _pod_level_resources(spec: Object) -> None:
    resources = spec["resources"] or {}
    limits, requests = dict(resources.get("limits") or {}), dict(resources.get("requests") or {})
    if limits or requests:
        for name, text in aggregate_container_resources(spec, "limits").items():
            if name.startswith("hugepages-") and name not in requests:
                limits.setdefault(name, text)
        if limits:
            resources["limits"] = limits
    if limits:
        for name, text in aggregate_container_resources(spec, "requests").items():
            if name in ("cpu", "memory"):
                requests.setdefault(name, text)
        for name, text in limits.items():
            if _is_pod_level(name):
                requests.setdefault(name, text)
        if requests:
            resources["requests"] = requests


def aggregate_container_resources(spec: Object, which: str) -> dict[str, str]:
    """What a pod's containers need together, by resource: the sum of the containers and the restartable init containers,
    or what the init sequence needs at once if that is more.

    Args:
      spec: A PodSpec.
      which: "requests" or "limits".

    Source: component-helpers resource AggregateContainerRequests, AggregateContainerLimits.
    """
    total: dict[str, tuple[Fraction, str]] = {}
    restartable: dict[str, tuple[Fraction, str]] = {}
    peak: dict[str, tuple[Fraction, str]] = {}

    def add(into: dict[str, tuple[Fraction, str]], amounts: dict[str, tuple[Fraction, str]]) -> None:
        for name, (number, form) in amounts.items():
            before = into.get(name)
            into[name] = (before[0] + number, before[1]) if before else (number, form)

    def amounts_of(container: Object) -> dict[str, tuple[Fraction, str]]:
        given = (container.get("resources") or {}).get(which) or {}
        return {name: (parsed.number, parsed.form) for name, text in given.items() for parsed in (quantity.parse_full(text),)}

    for container in spec.get("containers") or ():
        add(total, amounts_of(container))
    for container in spec.get("initContainers") or ():
        amounts = amounts_of(container)
        if container.get("restartPolicy") == "Always":
            add(total, amounts)
            add(restartable, amounts)
            amounts = dict(restartable)
        else:
            combined = dict(amounts)
            add(combined, restartable)
            amounts = combined
        for name, found in amounts.items():
            if name not in peak or found[0] > peak[name][0]:
                peak[name] = found
    for name, found in peak.items():
        if name not in total or found[0] > total[name][0]:
            total[name] = found
    return {name: quantity.format(number, form) for name, (number, form) in total.items()}


KINDS: dict[tuple[str, str], Callable[[Object], None]] = {
    ("apps/v1", "Deployment"): _deployment,
    ("apps/v1", "DaemonSet"): _daemon_set,
    ("apps/v1", "StatefulSet"): _stateful_set,
    ("autoscaling/v1", "HorizontalPodAutoscaler"): _autoscaler_v1,
    ("autoscaling/v2", "HorizontalPodAutoscaler"): _autoscaler,
    ("batch/v1", "Job"): _job,
    ("v1", "ReplicationController"): _replication_controller,
    ("v1", "Namespace"): _namespace,
    ("v1", "Node"): _node,
    ("v1", "LimitRange"): _limit_range,
    ("v1", "Service"): _service,
    ("v1", "Pod"): _pod,
    ("networking.k8s.io/v1", "NetworkPolicy"): _network_policy,
    ("networking.k8s.io/v1", "IngressClass"): _ingress_class,
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"): _custom_resource_definition,
}

_CRD = "apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition"
IN_KINDS = {
    *(f"api.apps.v1.DaemonSet#spec.updateStrategy.rollingUpdate.{f}" for f in ("maxSurge", "maxUnavailable")),
    *(f"api.apps.v1.Deployment#spec.strategy.rollingUpdate.{f}" for f in ("maxSurge", "maxUnavailable")),
    *(f"api.apps.v1.StatefulSet#spec.updateStrategy.rollingUpdate{f}" for f in ("", ".maxUnavailable", ".partition")),
    "api.autoscaling.v1.HorizontalPodAutoscaler#spec.targetCPUUtilizationPercentage",
    *(f"api.autoscaling.v2.HorizontalPodAutoscaler#spec.{f}" for f in (
        "behavior.scaleDown.policies", "behavior.scaleDown.selectPolicy", "behavior.scaleUp.policies", "behavior.scaleUp.selectPolicy",
        "behavior.scaleUp.stabilizationWindowSeconds", "metrics")),
    *(f"api.batch.v1.Job#{f}" for f in ("metadata.labels", "spec.backoffLimit", "spec.completions", "spec.podReplacementPolicy")),
    *(f"api.core.v1.LimitRangeItem#{f}" for f in ("default", "defaultRequest")),
    "api.core.v1.Namespace#metadata.labels", "api.core.v1.NodeStatus#allocatable",
    *(f"api.core.v1.Pod#spec.{f}" for f in (
        "containers[].ports[].hostPort", "initContainers[].ports[].hostPort")),
    "api.core.v1.ReplicationController#metadata.labels", "api.core.v1.ReplicationController#spec.selector",
    *(f"api.core.v1.Service#{f}" for f in (
        "spec.allocateLoadBalancerNodePorts", "spec.externalTrafficPolicy", "spec.internalTrafficPolicy", "spec.ports[].targetPort",
        "spec.sessionAffinityConfig", "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "status.loadBalancer.ingress[].ipMode")),
    "api.networking.v1.IngressClass#spec.parameters.scope", "api.networking.v1.NetworkPolicy#spec.policyTypes",
    f"{_CRD}#status.storedVersions", f"{_CRD}Spec#conversion", f"{_CRD}Spec#names.listKind", f"{_CRD}Spec#names.singular",
}
"""Conditional rules that a function of KINDS applies."""

CREATED_IN_KINDS = {
    "spec.persistentVolumeClaimRetentionPolicy.whenDeleted", "spec.persistentVolumeClaimRetentionPolicy.whenScaled",
}
"""Literal rules that create their parent, which a function of KINDS does."""
