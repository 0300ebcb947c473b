"""Where the pods of a DaemonSet belong, and what they look like; pure functions.

Source: pkg/controller/daemon/daemon_controller.go, daemon/util/daemonset_util.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from knarr.api import meta
from knarr.api.types import Object
from knarr.controllers import taints
from knarr.controllers.nodeaffinity import matches_required
from knarr.controllers.podutil import created_at, is_deleting, scaled_value

HASH = "controller-revision-hash"
GENERATION = "pod-template-generation"
_GENERATION_ANNOTATION = "deprecated.daemonset.template.generation"

_TOLERATIONS = (
    (taints.NOT_READY, "NoExecute"),
    (taints.UNREACHABLE, "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    (taints.UNSCHEDULABLE, "NoSchedule"),
)
_NETWORK = ("node.kubernetes.io/network-unavailable", "NoSchedule")


def tolerations(spec: Object) -> list[Object]:
    """The template's tolerations and those that every daemon has."""
    result = list(spec.get("tolerations") or ())
    wanted = [*_TOLERATIONS, _NETWORK] if spec.get("hostNetwork") else list(_TOLERATIONS)
    for key, effect in wanted:
        toleration = {"key": key, "operator": "Exists", "effect": effect}
        same = [
            index
            for index, item in enumerate(result)
            if (item.get("key"), item.get("effect"), item.get("operator", "Equal"), item.get("value", "")) == (key, effect, "Exists", "")
        ]
        if same:
            result[same[0]] = toleration
        else:
            result.append(toleration)
    return result


def should_run(node: Object, ds: Object) -> tuple[bool, bool]:
    """(a pod should be started on the node, a pod there may go on)."""
    spec = ds["spec"]["template"].get("spec") or {}
    if spec.get("nodeName") and spec["nodeName"] != node["metadata"]["name"]:
        return False, False
    if not matches_required(spec, node):
        return False, False
    covered = tolerations(spec)
    present = taints.of_node(node)
    if taints.untolerated(present, covered, ("NoExecute", "NoSchedule")) is not None:
        return False, taints.untolerated(present, covered, ("NoExecute",)) is None
    return True, True


def target_node(pod: Object) -> str:
    """The node a daemon's pod is on, or is meant for; "" when it cannot be told."""
    spec = pod["spec"]
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or ():
        for field in term.get("matchFields") or ():
            if field.get("key") == "metadata.name" and field.get("operator") == "In" and len(field.get("values") or ()) == 1:
                return str(field["values"][0])
    return ""


def pod_template(ds: Object, digest: str) -> Object:
    """The template with what every daemon's pod has."""
    template = meta.deep_copy(ds["spec"]["template"])
    spec = template.setdefault("spec", {})
    spec["tolerations"] = tolerations(spec)
    labels = dict((template.get("metadata") or {}).get("labels") or {})
    generation = template_generation(ds)
    if generation:
        labels[GENERATION] = generation
    labels[HASH] = digest
    template["metadata"] = {**(template.get("metadata") or {}), "labels": labels}
    return template  # type: ignore[no-any-return]


def pin_to_node(template: Object, name: str) -> Object:
    """A copy of the template whose pod can only be bound to that node."""
    field = {"key": "metadata.name", "operator": "In", "values": [name]}
    spec = dict(template["spec"])
    affinity = meta.deep_copy(spec.get("affinity") or {})
    node_affinity = affinity.setdefault("nodeAffinity", {})
    required = node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms = required.get("nodeSelectorTerms") or []
    if terms:
        for term in terms:
            term["matchFields"] = [field]
    else:
        terms = [{"matchFields": [field]}]
    node_affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    spec["affinity"] = affinity
    return {**template, "spec": spec}


def template_generation(ds: Object) -> str:
    text = str(meta.annotations(ds).get(_GENERATION_ANNOTATION, ""))
    return text if text.lstrip("-").isdigit() else ""


def is_updated(pod: Object, ds: Object, digest: str) -> bool:
    """Whether a pod is of the present template."""
    labels = meta.labels(pod)
    generation = template_generation(ds)
    return (bool(digest) and labels.get(HASH) == digest) or (bool(generation) and labels.get(GENERATION) == generation)


def by_age(pods: Iterable[Object]) -> list[Object]:
    """Bound ones first, then oldest first."""
    return sorted(pods, key=lambda pod: (not pod["spec"].get("nodeName"), created_at(pod), pod["metadata"]["name"]))


def surge(ds: Object, desired: int) -> int:
    strategy = ds["spec"].get("updateStrategy") or {}
    if strategy.get("type") != "RollingUpdate":
        return 0
    return scaled_value((strategy.get("rollingUpdate") or {}).get("maxSurge"), desired, True)


def unavailable(ds: Object, desired: int) -> int:
    strategy = ds["spec"].get("updateStrategy") or {}
    if strategy.get("type") != "RollingUpdate":
        return 0
    return scaled_value((strategy.get("rollingUpdate") or {}).get("maxUnavailable"), desired, True)


def allows_surge(ds: Object) -> bool:
    return surge(ds, 1) > 0


def updated_and_old(pods: Iterable[Object], ds: Object, digest: str) -> tuple[Object | None, Object | None] | None:
    """(new pod, old pod) of one node, not counting those being deleted; None when there are too many."""
    new: Object | None = None
    old: Object | None = None
    for pod in pods:
        if is_deleting(pod):
            continue
        if is_updated(pod, ds, digest):
            if new is not None:
                return None
            new = pod
        else:
            if old is not None:
                return None
            old = pod
    return new, old
