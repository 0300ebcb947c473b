"""NodeRestriction: a kubelet changes its own Node, its own pods' status and what belongs to them, and nothing else.

Source: kubernetes plugin/pkg/admission/noderestriction.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable

from knarr.api import errors, meta
from knarr.api.errors import StatusError, go_quote
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CONNECT, CREATE, DELETE, UPDATE, Plugin, refuse
from knarr.apiserver.attributes import AdmissionRequest, Attributes, Authorizer, Decision, Store
from knarr.apiserver.auth import users
from knarr.apiserver.auth.podrefs import secrets_and_config_maps

_MIRROR = "kubernetes.io/config.mirror"
_KUBELET_LABELS = frozenset({
    "kubernetes.io/hostname", "topology.kubernetes.io/zone", "topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region", "beta.kubernetes.io/instance-type", "node.kubernetes.io/instance-type", "kubernetes.io/os",
    "kubernetes.io/arch", "beta.kubernetes.io/os", "beta.kubernetes.io/arch",
})  # fmt: skip
_KUBELET_SIGNERS = ("kubernetes.io/kubelet-serving", "kubernetes.io/kube-apiserver-client-kubelet")
_FREE_VOLUMES = frozenset({
    "awsElasticBlockStore", "azureDisk", "cephfs", "cinder", "downwardAPI", "emptyDir", "fc", "flexVolume", "flocker", "gcePersistentDisk",
    "gitRepo", "hostPath", "image", "iscsi", "nfs", "photonPersistentDisk", "portworxVolume", "quobyte", "rbd", "scaleIO", "storageos",
    "vsphereVolume",
})  # fmt: skip
_API_VOLUMES = {
    "configMap": "configmaps (via configmap volumes)", "secret": "secrets (via secret volumes)", "csi": "csidrivers (via CSI volumes)",
    "glusterfs": "endpoints (via glusterFS volumes)", "persistentVolumeClaim": "persistentvolumeclaims",
    "ephemeral": "persistentvolumeclaims (via ephemeral volumes)", "azureFile": "secrets (via azureFile volumes)",
}  # fmt: skip
_API_PROJECTIONS = {
    "configMap": "configmaps (via projected volumes)", "secret": "secrets (via projected volumes)",
    "serviceAccountToken": "serviceaccounts (via projected volumes)", "clusterTrustBundle": "clustertrustbundles",
    "podCertificate": "podcertificates",
}  # fmt: skip


def api_reference(pod: Object) -> str:
    """Name the first kind of API object that a pod refers to; "" when it refers to none."""
    spec = pod.get("spec") or {}
    if spec.get("serviceAccountName"):
        return "serviceaccounts"
    named = {plural for plural, _ in secrets_and_config_maps(pod)}
    for plural in ("secrets", "configmaps"):
        if plural in named:
            return plural
    if spec.get("resourceClaims"):
        return "resourceclaims"
    for volume in spec.get("volumes") or ():
        kinds = volume.keys() - {"name"}
        for kind in kinds:
            if kind in _API_VOLUMES:
                return _API_VOLUMES[kind]
            if kind == "projected":
                for source in (volume[kind] or {}).get("sources") or ():
                    for projection, words in _API_PROJECTIONS.items():
                        if source.get(projection) is not None:
                            return words
            elif kind not in _FREE_VOLUMES:
                return f"unknown volume type {kind}"
    return ""


def _label_domain(key: str) -> str:
    return key.split("/", 1)[0] if "/" in key else ""


def _within(domain: str, suffix: str) -> bool:
    return domain == suffix or domain.endswith("." + suffix)


def forbidden_labels(new: Object, old: Object | None) -> list[str]:
    """Labels that differ and that a kubelet may not touch."""
    now, then = meta.labels(new), meta.labels(old or {})
    out: list[str] = []
    for key in sorted({*now, *then}):
        if now.get(key) == then.get(key):
            continue
        domain = _label_domain(key)
        kubernetes = _within(domain, "kubernetes.io") or _within(domain, "k8s.io")
        allowed = key in _KUBELET_LABELS or _within(domain, "kubelet.kubernetes.io") or _within(domain, "node.kubernetes.io")
        if _within(domain, "node-restriction.kubernetes.io") or (kubernetes and not allowed):
            out.append(key)
    return out


class NodeRestriction(Plugin):
    name = "NodeRestriction"

    def __init__(self, pods: Store, nodes: Store, authorizer: Authorizer, *, claims: Store, volumes: Store, drivers: Store) -> None:
        self._pods = pods
        self._nodes = nodes
        self._authorizer = authorizer
        self._claims = claims
        self._volumes = volumes
        self._drivers = drivers
        self._rules: dict[tuple[str, str], Callable[[str, AdmissionRequest], Awaitable[None] | None]] = {
            ("", "pods"): self._pod, ("", "nodes"): self._node, ("", "persistentvolumeclaims"): self._claim,
            ("", "serviceaccounts"): self._service_account, ("coordination.k8s.io", "leases"): self._lease,
            ("storage.k8s.io", "csinodes"): self._csi_node, ("resource.k8s.io", "resourceslices"): self._slice,
            ("certificates.k8s.io", "certificatesigningrequests"): self._signing_request,
        }  # fmt: skip

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return operation != CONNECT and (resource.group, resource.plural) in self._rules

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        node = users.node_name(request.user.name, request.user.groups)
        if node is None:
            return None
        if not node:
            raise refuse(request, f"could not determine node from user {go_quote(request.user.name)}")
        return self._rules[(request.resource.group, request.resource.plural)](node, request)

    # -- pods ------------------------------------------------------------------------------------------------------------
    def _pod(self, node: str, request: AdmissionRequest) -> None:
        if request.subresource == "":
            if request.operation == CREATE:
                self._mirror_pod(node, request, request.object or {})
            elif request.operation == DELETE:
                existing = self._pods.get_nowait(request.namespace, request.name)
                if existing is None:
                    raise errors.not_found("pods", request.name)
                if existing["spec"].get("nodeName") != node:
                    raise refuse(request, f'node "{node}" can only delete pods with spec.nodeName set to itself')
            else:
                raise refuse(request, f'unexpected operation "{request.operation}", node "{node}" can only create and delete mirror pods')
        elif request.subresource == "status":
            self._pod_status(node, request)
        elif request.subresource == "eviction":
            if request.operation != CREATE:
                raise refuse(request, f"unexpected operation {request.operation}")
            name = request.name or ((request.object or {}).get("metadata") or {}).get("name") or ""
            if not name:
                raise refuse(request, "could not determine pod from request data")
            existing = self._pods.get_nowait(request.namespace, name)
            if existing is None:
                raise errors.not_found("pods", name)
            if existing["spec"].get("nodeName") != node:
                raise refuse(request, f"node {node} can only evict pods with spec.nodeName set to itself")
        else:
            raise refuse(request, f'unexpected pod subresource "{request.subresource}", only \'status\' and \'eviction\' are allowed')

    def _mirror_pod(self, node: str, request: AdmissionRequest, pod: Object) -> None:
        if _MIRROR not in meta.annotations(pod):
            raise refuse(request, f'pod does not have "{_MIRROR}" annotation, node "{node}" can only create mirror pods')
        if pod["spec"].get("nodeName") != node:
            raise refuse(request, f'node "{node}" can only create pods with spec.nodeName set to itself')
        owners = meta.owner_references(pod)
        if len(owners) > 1:
            raise refuse(request, f'node "{node}" can only create pods with a single owner reference set to itself')
        if not owners or (owners[0].get("apiVersion"), owners[0].get("kind"), owners[0].get("name")) != ("v1", "Node", node):
            raise refuse(request, f'node "{node}" can only create pods with an owner reference set to itself')
        owner = owners[0]
        if not owner.get("controller"):
            raise refuse(request, f'node "{node}" can only create pods with a controller owner reference set to itself')
        if owner.get("blockOwnerDeletion"):
            raise refuse(request, f'node "{node}" must not set blockOwnerDeletion on an owner reference')
        known = self._nodes.get_nowait("", node)
        if known is None:
            raise errors.not_found("nodes", node)
        if owner.get("uid") != meta.uid(known):
            raise refuse(request, f"node {node} UID mismatch: expected {owner.get('uid')} got {meta.uid(known)}")
        referenced = api_reference(pod)
        if referenced:
            raise refuse(request, f'node "{node}" can not create pods that reference {referenced}')

    @staticmethod
    def _pod_status(node: str, request: AdmissionRequest) -> None:
        if request.operation != UPDATE:
            raise refuse(request, f'unexpected operation "{request.operation}"')
        new, old = request.object or {}, request.old_object or {}
        if (old.get("spec") or {}).get("nodeName") != node:
            raise refuse(request, f'node "{node}" can only update pod status for pods with spec.nodeName set to itself')
        if dict(meta.labels(new)) != dict(meta.labels(old)):
            raise refuse(request, f'node "{node}" cannot update labels through pod status')
        now, then = new.get("status") or {}, old.get("status") or {}
        if (now.get("resourceClaimStatuses") or []) != (then.get("resourceClaimStatuses") or []):
            raise refuse(request, f'node "{node}" cannot update resource claim statues')
        if now.get("extendedResourceClaimStatus") != then.get("extendedResourceClaimStatus"):
            raise refuse(request, f'node "{node}" cannot update extended resource claim status')

    # -- nodes and what belongs to them ------------------------------------------------------------------------------------
    @staticmethod
    def _node(node: str, request: AdmissionRequest) -> None:
        name = request.name or ((request.object or {}).get("metadata") or {}).get("name") or ""
        if name != node:
            raise refuse(request, f'node "{node}" is not allowed to modify node "{name}"')
        new, old = request.object or {}, request.old_object or {}
        if request.operation == CREATE:
            if (new.get("spec") or {}).get("configSource") is not None:
                raise refuse(request, f'node "{node}" is not allowed to create pods with a non-nil configSource')
            labels = forbidden_labels(new, None)
            if labels:
                raise refuse(request, f'node "{node}" is not allowed to set the following labels: {", ".join(labels)}')
        if request.operation == UPDATE:
            spec, before = new.get("spec") or {}, old.get("spec") or {}
            if spec.get("configSource") is not None and spec["configSource"] != before.get("configSource"):
                raise refuse(request, f'node "{node}" is not allowed to update configSource to a new non-nil configSource')
            if (spec.get("taints") or []) != (before.get("taints") or []):
                raise refuse(request, f'node "{node}" is not allowed to modify taints')
            if meta.owner_references(new) != meta.owner_references(old):
                raise refuse(request, f'node "{node}" is not allowed to modify ownerReferences')
            labels = forbidden_labels(new, old)
            if labels:
                raise refuse(request, f"is not allowed to modify labels: {', '.join(labels)}")

    @staticmethod
    def _claim(node: str, request: AdmissionRequest) -> None:
        if request.subresource != "status":
            raise refuse(request, "may only update PVC status")
        if request.operation != UPDATE:
            raise refuse(request, f'unexpected operation "{request.operation}"')

        def stripped(claim: Object) -> Object:
            metadata = {key: value for key, value in claim["metadata"].items() if key not in ("resourceVersion", "managedFields")}
            free = ("capacity", "conditions", "allocatedResourceStatuses", "allocatedResources")
            status = {key: value for key, value in (claim.get("status") or {}).items() if key not in free}
            return {**claim, "metadata": metadata, "status": status}

        if stripped(request.object or {"metadata": {}}) != stripped(request.old_object or {"metadata": {}}):
            raise refuse(request, f'node "{node}" is not allowed to update fields other than status.quantity and status.conditions')

    @staticmethod
    def _lease(node: str, request: AdmissionRequest) -> None:
        if request.namespace != "kube-node-lease":
            raise refuse(request, 'can only access leases in the "kube-node-lease" system namespace')
        name = ((request.object or {}).get("metadata") or {}).get("name") if request.operation == CREATE else request.name
        if name != node:
            raise refuse(request, "can only access node lease with the same name as the requesting node")

    @staticmethod
    def _csi_node(node: str, request: AdmissionRequest) -> None:
        name = ((request.object or {}).get("metadata") or {}).get("name") if request.operation == CREATE else request.name
        if name != node:
            raise refuse(request, "can only access CSINode with the same name as the requesting node")

    @staticmethod
    def _slice(node: str, request: AdmissionRequest) -> None:
        if request.operation == CREATE and ((request.object or {}).get("spec") or {}).get("nodeName") != node:
            raise refuse(request, "can only create ResourceSlice with the same NodeName as the requesting node")
        if request.operation == DELETE and ((request.old_object or {}).get("spec") or {}).get("nodeName") != node:
            raise refuse(request, "can only delete ResourceSlice with the same NodeName as the requesting node")

    @staticmethod
    def _signing_request(node: str, request: AdmissionRequest) -> None:
        spec = (request.object or {}).get("spec") or {}
        if request.operation != CREATE or spec.get("signerName") not in _KUBELET_SIGNERS:
            return
        from cryptography import x509
        from cryptography.x509.oid import NameOID

        try:
            parsed = x509.load_pem_x509_csr(base64.b64decode(spec.get("request") or ""))
        except (ValueError, binascii.Error) as error:
            raise refuse(request, f"unable to parse csr: {error}") from error
        names = [str(attribute.value) for attribute in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if names != [f"system:node:{node}"]:
            raise refuse(request, f"can only create a node CSR with CN=system:node:{node}")

    # -- tokens ----------------------------------------------------------------------------------------------------------
    def _service_account(self, node: str, request: AdmissionRequest) -> Awaitable[None] | None:
        if request.operation != CREATE or request.subresource != "token":
            return None
        spec = (request.object or {}).get("spec") or {}
        reference = spec.get("boundObjectRef") or {}
        if (reference.get("apiVersion"), reference.get("kind")) != ("v1", "Pod") or not reference.get("name"):
            raise refuse(request, "node requested token not bound to a pod")
        if not reference.get("uid"):
            raise refuse(request, "node requested token with a pod binding without a uid")
        pod = self._pods.get_nowait(request.namespace, reference["name"])
        if pod is None:
            raise errors.not_found("pods", reference["name"])
        if reference["uid"] != meta.uid(pod):
            raise refuse(request, f"the UID in the bound object reference ({reference['uid']}) does not match the UID in record. "
                                  "The object might have been deleted and then recreated")
        if pod["spec"].get("nodeName") != node:
            raise refuse(request, "node requested token bound to a pod scheduled on a different node")
        audiences = spec.get("audiences") or []
        if len(audiences) > 1:
            raise refuse(request, "node may only request 0 or 1 audiences")
        audience = audiences[0] if audiences else ""
        return None if self._pod_wants(pod, audience) else self._may_request(request, audience)

    def _pod_wants(self, pod: Object, audience: str) -> bool:
        """Whether a volume of the pod asks for a token of this audience, directly or through its CSI driver."""
        for volume in pod["spec"].get("volumes") or ():
            for source in (volume.get("projected") or {}).get("sources") or ():
                token = source.get("serviceAccountToken")
                if token is not None and (token.get("audience") or "") == audience:
                    return True
            driver = (volume.get("csi") or {}).get("driver") or ""
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if volume.get("ephemeral"):
                claim = f"{meta.name(pod)}-{volume['name']}"
            if claim:
                bound = self._claims.get_nowait(meta.namespace(pod), claim)
                volume_name = ((bound or {}).get("spec") or {}).get("volumeName")
                persistent = self._volumes.get_nowait("", volume_name) if volume_name else None
                driver = (((persistent or {}).get("spec") or {}).get("csi") or {}).get("driver") or ""
            found = self._drivers.get_nowait("", driver) if driver else None
            if found is not None and any((one.get("audience") or "") == audience for one in (found.get("spec") or {}).get("tokenRequests") or ()):
                return True
        return False

    async def _may_request(self, request: AdmissionRequest, audience: str) -> None:
        attributes = Attributes(
            request.user, "request-serviceaccounts-token-audience", "", "v1", audience, "", request.namespace, request.name
        )
        decision, _ = self._authorizer.authorize(attributes)
        if decision is Decision.ASK:
            decision, _ = await self._authorizer.authorize_async(attributes)
        if decision is not Decision.ALLOW:
            text = f"audience {go_quote(audience)} not found in pod spec volume, {request.user.name} is not authorized to request tokens for this audience"
            error: StatusError = refuse(request, text)
            raise error
