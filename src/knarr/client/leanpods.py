"""Pods as controllers and scheduler keep them: what neither of them reads is dropped, equal parts and words are kept once.

Pods are most of the memory of the control process. Callers: informers of the controllers (controllers/context.py) and of the
scheduler (scheduler/handlers.py), by the same transform, so that informers of one family keep each pod once for both (informer.py).
"""

from __future__ import annotations

from sys import intern

from knarr.api.types import Object
from knarr.client.sharing import Parts

_parts = Parts()
# How containers start and what they may, what only kubelets and the API server read.
_UNREAD_OF_SPEC = frozenset({
    "automountServiceAccountToken", "dnsConfig", "dnsPolicy", "enableServiceLinks", "ephemeralContainers", "hostAliases", "hostIPC", "hostPID", "hostUsers",
    "imagePullSecrets", "readinessGates", "runtimeClassName", "securityContext", "serviceAccount", "serviceAccountName", "setHostnameAsFQDN", "shareProcessNamespace",
})  # fmt: skip
_UNREAD_OF_STATUS = frozenset({"ephemeralContainerStatuses", "qosClass"})
_CONTAINER_FIELDS = frozenset({"name", "image", "resources", "ports", "restartPolicy"})
_CONTAINER_STATUS_FIELDS = frozenset({"name", "ready", "started", "restartCount", "state", "lastState", "resources", "allocatedResources"})
_PLAIN_VOLUMES = frozenset({"projected", "configMap", "emptyDir", "downwardAPI", "hostPath"})
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
# Values that readers assume where there is none.
_ASSUMED = (("schedulerName", "default-scheduler"), ("preemptionPolicy", "PreemptLowerPriority"), ("priority", 0))


def lean_pod(pod: Object) -> Object:
    """Drop what no controller and no plugin of the scheduler reads; takes a fresh object and gives one of its own."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": _metadata(pod["metadata"]), "spec": _spec(pod.get("spec") or {}), "status": _status(pod.get("status") or {})}


def pod_ips(pod: Object) -> list[str]:
    """Give the addresses of a pod, lean or not."""
    status = pod.get("status") or {}
    listed = status.get("podIPs")
    if listed:
        return [item["ip"] for item in listed]
    return [status["podIP"]] if status.get("podIP") else []


def _metadata(metadata: Object) -> Object:
    kept = {key: value for key, value in metadata.items() if key != "managedFields"}
    for name in ("namespace", "generateName", "creationTimestamp", "deletionTimestamp"):
        if name in kept:
            kept[name] = intern(kept[name])
    annotations = kept.get("annotations")
    if annotations:
        annotations.pop(_LAST_APPLIED, None)
    _parts.within(kept, ("labels", "ownerReferences", "annotations", "finalizers"))
    return kept


def _spec(spec: Object) -> Object:
    volumes = [volume for volume in spec.pop("volumes", None) or () if _PLAIN_VOLUMES.isdisjoint(volume)]
    for name, value in _ASSUMED:
        if spec.get(name) == value:
            del spec[name]
    kept = {key: value for key, value in spec.items() if key not in _UNREAD_OF_SPEC}
    for group in ("containers", "initContainers"):
        if kept.get(group):
            kept[group] = [{key: value for key, value in container.items() if key in _CONTAINER_FIELDS} for container in kept[group]]
    _share(kept)
    if volumes:
        kept["volumes"] = volumes
    return kept


def _status(status: Object) -> Object:
    kept = {key: value for key, value in status.items() if key not in _UNREAD_OF_STATUS}
    for group in ("containerStatuses", "initContainerStatuses"):
        if kept.get(group):
            kept[group] = [{key: value for key, value in one.items() if key in _CONTAINER_STATUS_FIELDS} for one in kept[group]]
    listed = kept.get("podIPs")
    if listed and len(listed) == 1 and listed[0].get("ip") == kept.get("podIP"):
        del kept["podIPs"]
    _share(kept)
    return kept


def _share(holder: Object) -> None:
    """Keep every word, list and object of a specification or status once."""
    one = _parts.one
    for name, value in holder.items():
        kind = value.__class__
        if kind is str:
            if name != "podIP":
                holder[name] = intern(value)
        elif kind is dict or kind is list:
            holder[name] = one(value)
