"""What pods refer to: secrets, config maps, claims, service accounts; and which node therefore may read them.

`references` is a pure function of a pod. `NodeReferences` keeps, per node, a count of every reference of the pods bound to
it, fed by the pod store's events, so that the node authorizer answers from one dict.

Source: kubernetes pkg/api/v1/pod/util.go (VisitPodSecretNames, VisitPodConfigmapNames), plugin/pkg/auth/authorizer/node/graph.go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knarr.api.types import Object
from knarr.apiserver.attributes import Store

Reference = tuple[str, str, str]
"""(plural, namespace, name)."""

_MOST_SHARED = 4096
# Volume plugins whose secret lives under secretRef.
_SECRET_REF_VOLUMES = ("cephfs", "flexVolume", "rbd", "scaleIO", "iscsi", "storageos")


def _volume_references(volume: Object, pod_name: str) -> Iterator[tuple[str, str]]:
    for plural, source, field in (
        ("secrets", "secret", "secretName"), ("configmaps", "configMap", "name"),
        ("persistentvolumeclaims", "persistentVolumeClaim", "claimName"), ("secrets", "azureFile", "secretName"),
    ):  # fmt: skip
        name = (volume.get(source) or {}).get(field)
        if name:
            yield plural, name
    for source in _SECRET_REF_VOLUMES:
        name = ((volume.get(source) or {}).get("secretRef") or {}).get("name")
        if name:
            yield "secrets", name
    csi = (volume.get("csi") or {}).get("nodePublishSecretRef") or {}
    if csi.get("name"):
        yield "secrets", csi["name"]
    if volume.get("ephemeral"):
        yield "persistentvolumeclaims", f"{pod_name}-{volume.get('name')}"
    for source in (volume.get("projected") or {}).get("sources") or ():
        for plural, key in (("secrets", "secret"), ("configmaps", "configMap")):
            name = (source.get(key) or {}).get("name")
            if name:
                yield plural, name


def _container_references(container: Object) -> Iterator[tuple[str, str]]:
    for entry in container.get("envFrom") or ():
        for plural, key in (("secrets", "secretRef"), ("configmaps", "configMapRef")):
            name = (entry.get(key) or {}).get("name")
            if name:
                yield plural, name
    for variable in container.get("env") or ():
        source = variable.get("valueFrom") or {}
        for plural, key in (("secrets", "secretKeyRef"), ("configmaps", "configMapKeyRef")):
            name = (source.get(key) or {}).get("name")
            if name:
                yield plural, name


def containers(spec: dict[str, Any]) -> Iterator[tuple[str, int, Object]]:
    """(field, index, container) of init, regular and ephemeral containers."""
    for field in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(field) or ()):
            yield field, index, container


def secrets_and_config_maps(pod: Object) -> set[tuple[str, str]]:
    """(plural, name) of every secret, config map and claim that the pod names."""
    spec = pod.get("spec") or {}
    found = {("secrets", entry["name"]) for entry in spec.get("imagePullSecrets") or () if entry.get("name")}
    for volume in spec.get("volumes") or ():
        found.update(_volume_references(volume, pod["metadata"].get("name", "")))
    for _, _, container in containers(spec):
        found.update(_container_references(container))
    return found


def references(pod: Object) -> frozenset[Reference]:
    """Everything beside the pod itself whose reading it justifies, its service account too."""
    metadata, spec = pod["metadata"], pod.get("spec") or {}
    namespace = metadata.get("namespace", "")
    found: set[Reference] = {(plural, namespace, name) for plural, name in secrets_and_config_maps(pod)}
    found.add(("serviceaccounts", namespace, spec.get("serviceAccountName") or "default"))
    statuses = {status.get("name"): status.get("resourceClaimName") for status in (pod.get("status") or {}).get("resourceClaimStatuses") or ()}
    for claim in spec.get("resourceClaims") or ():
        name = claim.get("resourceClaimName") or statuses.get(claim.get("name"))
        if name:
            found.add(("resourceclaims", namespace, name))
    return frozenset(found)


class NodeReferences:
    """Per node: references of its pods, counted. Pods of one workload share theirs."""

    def __init__(self, pods: Store, claims: Store, volumes: Store) -> None:
        self._pods = pods
        self._claims = claims
        self._volumes = volumes
        self._by_pod: dict[tuple[str, str], tuple[str, frozenset[Reference]]] = {}
        self._by_node: dict[str, Counter[Reference]] = {}
        self._shared: dict[frozenset[Reference], frozenset[Reference]] = {}

    def start(self) -> None:
        """Load what is there and follow what comes."""
        self._pods.add_handler(self._changed, previous=False)
        for pod in self._pods.list_nowait():
            self._changed("ADDED", pod, None)

    def _changed(self, type: str, pod: Object, _old: Object | None) -> None:
        metadata = pod["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        node = (pod.get("spec") or {}).get("nodeName") or ""
        now = (node, self._references(pod)) if node and type != "DELETED" else None
        known = self._by_pod.get(key)
        if now == known:
            return
        if known is not None:
            del self._by_pod[key]
            self._discount(*known)
        if now is not None:
            self._by_pod[key] = now
            if now[1]:
                self._by_node.setdefault(node, Counter()).update(now[1])

    def _discount(self, node: str, gone: frozenset[Reference]) -> None:
        counts = self._by_node.get(node)
        if counts is None:
            return
        for reference in gone:
            counts[reference] -= 1
            if counts[reference] <= 0:
                del counts[reference]
        if not counts:
            del self._by_node[node]

    def _references(self, pod: Object) -> frozenset[Reference]:
        """What the pod leads to; a mirror pod names what it likes but was made by the node itself: only itself counts."""
        if "kubernetes.io/config.mirror" in (pod["metadata"].get("annotations") or {}):
            return frozenset()
        found = references(pod)
        if len(self._shared) >= _MOST_SHARED:
            self._shared.clear()
        return self._shared.setdefault(found, found)

    def has(self, node: str, plural: str, namespace: str, name: str) -> bool:
        """Does a pod on the node lead to this object; volumes are reached over claims, their secrets over volumes."""
        if plural == "pods":
            known = self._by_pod.get((namespace, name))
            return known is not None and known[0] == node
        counts = self._by_node.get(node)
        if counts is None:
            return False
        if (plural, namespace, name) in counts:
            return True
        if plural == "persistentvolumes":
            return any(volume["metadata"]["name"] == name for volume in self._volumes_of(counts))
        if plural == "secrets":
            return any((namespace, name) in _volume_secrets(volume) for volume in self._volumes_of(counts))
        return False

    def _volumes_of(self, counts: Counter[Reference]) -> Iterator[Object]:
        for plural, namespace, name in counts:
            if plural == "persistentvolumeclaims":
                claim = self._claims.get_nowait(namespace, name)
                volume_name = ((claim or {}).get("spec") or {}).get("volumeName")
                volume = self._volumes.get_nowait("", volume_name) if volume_name else None
                # Only a volume that points back counts: a claim may name any volume.
                if volume is not None:
                    back = (volume.get("spec") or {}).get("claimRef") or {}
                    if (back.get("namespace"), back.get("name")) == (namespace, name):
                        yield volume


def _volume_secrets(volume: Object) -> set[tuple[str, str]]:
    spec = volume.get("spec") or {}
    home = (spec.get("claimRef") or {}).get("namespace", "")
    found: set[tuple[str, str]] = set()
    for source in _SECRET_REF_VOLUMES:
        reference = (spec.get(source) or {}).get("secretRef") or {}
        if reference.get("name"):
            found.add((reference.get("namespace") or home, reference["name"]))
    azure = spec.get("azureFile") or {}
    if azure.get("secretName"):
        found.add((azure.get("secretNamespace") or home, azure["secretName"]))
    csi = spec.get("csi") or {}
    for field in ("controllerPublishSecretRef", "nodePublishSecretRef", "nodeStageSecretRef", "nodeExpandSecretRef"):
        reference = csi.get(field) or {}
        if reference.get("name") and reference.get("namespace"):
            found.add((reference["namespace"], reference["name"]))
    return found
