"""Small pure questions about a pod object. Used all over this package; no I/O, no state.

Invariant: never changes the object that it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import orjson

from knarr.api.types import Object

POD_NAME_LABEL = "io.kubernetes.pod.name"
POD_NAMESPACE_LABEL = "io.kubernetes.pod.namespace"
POD_UID_LABEL = "io.kubernetes.pod.uid"
CONTAINER_NAME_LABEL = "io.kubernetes.container.name"

CONFIG_SOURCE_ANNOTATION = "kubernetes.io/config.source"
CONFIG_MIRROR_ANNOTATION = "kubernetes.io/config.mirror"
CONFIG_HASH_ANNOTATION = "kubernetes.io/config.hash"

KUBELET_CONDITIONS = (
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    "PodResizePending",
    "PodResizeInProgress",
)


def uid(pod: Object) -> str:
    return str(pod["metadata"].get("uid", ""))


def key(pod: Object) -> str:
    meta = pod["metadata"]
    return f"{meta.get('namespace', '')}/{meta['name']}"


def full_name(pod: Object) -> str:
    """<name>_<namespace>(<uid>), as messages show it."""
    meta = pod["metadata"]
    return f"{meta['name']}_{meta.get('namespace', '')}({meta.get('uid', '')})"


def init_containers(pod: Object) -> list[Object]:
    return pod["spec"].get("initContainers") or []


def containers(pod: Object) -> list[Object]:
    return pod["spec"].get("containers") or []


def ephemeral_containers(pod: Object) -> list[Object]:
    return pod["spec"].get("ephemeralContainers") or []


def all_containers(pod: Object) -> Iterator[Object]:
    yield from init_containers(pod)
    yield from containers(pod)
    yield from ephemeral_containers(pod)


def container(pod: Object, name: str) -> Object | None:
    """The container of any kind with this name."""
    return next((c for c in all_containers(pod) if c["name"] == name), None)


def field_path(pod: Object, name: str) -> str:
    """The field path that events of a container carry, e.g. "spec.initContainers{setup}"."""
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        if any(c["name"] == name for c in pod["spec"].get(kind) or []):
            return f"spec.{kind}{{{name}}}"
    return ""


def is_sidecar(spec: Object) -> bool:
    """An init container that keeps running beside the main ones."""
    return spec.get("restartPolicy") == "Always"


def has_sidecars(pod: Object) -> bool:
    return any(is_sidecar(c) for c in init_containers(pod))


def restart_policy(pod: Object) -> str:
    return str(pod["spec"].get("restartPolicy") or "Always")


def should_restart_after_exit(pod: Object, spec: Object, exit_code: int) -> bool:
    """Whether a container that ended with this code is started again.

    The container's rules come first, then its own policy, then the pod's.
    Source: pkg/api/v1/pod ContainerShouldRestart, KEP-5307.
    """
    for rule in spec.get("restartPolicyRules") or []:
        codes = rule.get("exitCodes") or {}
        values = codes.get("values") or []
        matched = exit_code in values if codes.get("operator") == "In" else exit_code not in values
        if codes and matched and rule.get("action") == "Restart":
            return True
    policy = spec.get("restartPolicy") or restart_policy(pod)
    if policy == "Never":
        return False
    return policy != "OnFailure" or exit_code != 0


def is_restartable(pod: Object, spec: Object) -> bool:
    """Whether any exit code could bring this container back."""
    if spec.get("restartPolicyRules"):
        return True
    return (spec.get("restartPolicy") or restart_policy(pod)) != "Never"


def host_network(pod: Object) -> bool:
    return bool(pod["spec"].get("hostNetwork"))


def is_deleted(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase") or "")


def is_terminal_phase(value: str) -> bool:
    return value in ("Failed", "Succeeded")


def is_mirror(pod: Object) -> bool:
    return CONFIG_MIRROR_ANNOTATION in (pod["metadata"].get("annotations") or {})


def is_static(pod: Object) -> bool:
    source = (pod["metadata"].get("annotations") or {}).get(CONFIG_SOURCE_ANNOTATION)
    return source is not None and source != "api"


def is_critical(pod: Object) -> bool:
    """Static, mirror or of a system priority: never evicted, may preempt on the node."""
    priority = pod["spec"].get("priority")
    return is_static(pod) or is_mirror(pod) or (priority is not None and priority >= 2_000_000_000)


def container_hash(spec: Object) -> str:
    """A digest of what makes a running container out of date when it changes: name and image.

    Only the image of a running pod may be changed through the API without its own procedure (resources are resized).
    Source: kubecontainer.HashContainer, which also takes just these two.
    """
    return hashlib.blake2s(orjson.dumps([spec["name"], spec.get("image", "")]), digest_size=4).hexdigest()


def qos_class(pod: Object) -> str:
    """Guaranteed, Burstable or BestEffort, as stored by the API server, else computed.

    Source: pkg/apis/core/v1/helper/qos ComputePodQOS.
    """
    stored = (pod.get("status") or {}).get("qosClass")
    if stored:
        return str(stored)
    return compute_qos(pod)


def compute_qos(pod: Object) -> str:
    """The QoS class from the resources of the pod or of its containers."""
    pod_level = pod["spec"].get("resources") or {}
    if pod_level.get("requests") or pod_level.get("limits"):
        sets = [pod_level]
    else:
        sets = [c.get("resources") or {} for c in (*init_containers(pod), *containers(pod))]
    any_set, guaranteed = False, True
    for resources in sets:
        limits = _compute_only(resources.get("limits"))
        requests = _compute_only(resources.get("requests")) or limits
        any_set = any_set or bool(limits or requests)
        if set(limits) != {"cpu", "memory"} or limits != {**limits, **requests}:
            guaranteed = False
    if not any_set:
        return "BestEffort"
    return "Guaranteed" if guaranteed else "Burstable"


def _compute_only(values: dict[str, Any] | None) -> dict[str, int]:
    from knarr.api import quantity

    out = {}
    for name in ("cpu", "memory"):
        raw = (values or {}).get(name)
        if raw is None:
            continue
        amount = quantity.cpu_millicores(raw) if name == "cpu" else quantity.value(raw)
        if amount:
            out[name] = amount
    return out


def status_of(statuses: list[Object] | None, name: str) -> Object | None:
    return next((s for s in statuses or [] if s["name"] == name), None)
