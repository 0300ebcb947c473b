"""ServiceAccount: every pod runs as a service account that exists, and gets its token mounted.

Source: kubernetes plugin/pkg/admission/serviceaccount.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store
from knarr.apiserver.auth.podrefs import containers, secrets_and_config_maps

MOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
VOLUME_PREFIX = "kube-api-access-"
MIRROR = "kubernetes.io/config.mirror"
TOKEN_SECONDS = 3607
_ENFORCE = "kubernetes.io/enforce-mountable-secrets"
_NAME_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
# The controller makes the default account right after its namespace; a pod that comes first is made to wait for it.
_DEFAULT_ACCOUNT_WAIT_SECONDS = 1.5


def token_volume(name: str) -> Object:
    """The projected volume with token, CA bundle and namespace."""
    return {
        "name": name,
        "projected": {
            "sources": [
                {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
            ],
            "defaultMode": 420,
        },
    }


class ServiceAccount(Plugin):
    name = "ServiceAccount"

    def __init__(self, service_accounts: Store) -> None:
        self._accounts = service_accounts

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        if not is_resource(resource, "", "pods"):
            return False
        return (operation == CREATE and not subresource) or (operation == UPDATE and subresource == "ephemeralcontainers")

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        pod = request.object
        if request.operation != CREATE or pod is None:
            return None
        if MIRROR in (pod["metadata"].get("annotations") or {}):
            self._validate_mirror(request, pod)
            return None
        spec = pod["spec"]
        name = spec.get("serviceAccountName")
        if not name:
            # The deprecated twin follows, as conversion keeps the two equal.
            name = spec["serviceAccountName"] = spec["serviceAccount"] = "default"
        account = self._accounts.get_nowait(request.namespace, name)
        if account is None:
            return self._admit_later(request, pod, name)
        self._complete(pod, account)
        return None

    async def _admit_later(self, request: AdmissionRequest, pod: Object, name: str) -> None:
        if name == "default":
            await self._wait_for(request.namespace, name)
        account = self._accounts.get_nowait(request.namespace, name)
        if account is None:
            raise self._missing(request, name)
        self._complete(pod, account)

    async def _wait_for(self, namespace: str, name: str) -> None:
        found = asyncio.Event()

        def look(type: str, obj: Object, old: Object | None) -> None:
            metadata = obj["metadata"]
            if type == "ADDED" and metadata["name"] == name and metadata.get("namespace") == namespace:
                found.set()

        cancel = self._accounts.add_handler(look)
        try:
            async with asyncio.timeout(_DEFAULT_ACCOUNT_WAIT_SECONDS):
                await found.wait()
        except TimeoutError:
            pass
        finally:
            cancel()

    @staticmethod
    def _missing(request: AdmissionRequest, name: str) -> Exception:
        return refuse(request, f'error looking up service account {request.namespace}/{name}: serviceaccount "{name}" not found')

    @staticmethod
    def _complete(pod: Object, account: Object) -> None:
        spec = pod["spec"]
        wish = spec.get("automountServiceAccountToken")
        if wish is None:
            wish = account.get("automountServiceAccountToken")
        if wish is not False:
            _mount_token(spec)
        if not spec.get("imagePullSecrets"):
            secrets = [{"name": entry.get("name", "")} for entry in account.get("imagePullSecrets") or ()]
            if secrets:
                spec["imagePullSecrets"] = secrets

    def validate(self, request: AdmissionRequest) -> None:
        pod = request.object
        if pod is None:
            return
        if MIRROR in (pod["metadata"].get("annotations") or {}) and request.operation == CREATE:
            self._validate_mirror(request, pod)
            return
        name = (pod.get("spec") or {}).get("serviceAccountName")
        if not name:
            raise refuse(request, f"no service account specified for pod {request.namespace}/{pod['metadata'].get('name', '')}")
        account = self._accounts.get_nowait(request.namespace, name)
        if account is None:
            raise self._missing(request, name)
        enforced = (account["metadata"].get("annotations") or {}).get(_ENFORCE, "")
        if enforced in ("1", "t", "T", "true", "TRUE", "True"):
            why = _forbidden_secret(pod, account, ephemeral_only=request.operation == UPDATE)
            if why:
                raise refuse(request, why)

    @staticmethod
    def _validate_mirror(request: AdmissionRequest, pod: Object) -> None:
        spec = pod.get("spec") or {}
        if spec.get("serviceAccountName"):
            raise refuse(request, "a mirror pod may not reference service accounts")
        if any(plural == "secrets" for plural, _ in secrets_and_config_maps(pod)):
            raise refuse(request, "a mirror pod may not reference secrets")
        for volume in spec.get("volumes") or ():
            if any("serviceAccountToken" in source for source in (volume.get("projected") or {}).get("sources") or ()):
                raise refuse(request, "a mirror pod may not use ServiceAccountToken volume projections")


def _mount_token(spec: Object) -> None:
    volume_name = next((volume["name"] for volume in spec.get("volumes") or () if volume.get("name", "").startswith(VOLUME_PREFIX)), "")
    has_volume = bool(volume_name)
    volume_name = volume_name or VOLUME_PREFIX + "".join(random.choices(_NAME_LETTERS, k=5))
    needed = False
    for field in ("initContainers", "containers"):
        for container in spec.get(field) or ():
            mounts = container.get("volumeMounts") or []
            if not any(mount.get("mountPath") == MOUNT_PATH for mount in mounts):
                container["volumeMounts"] = [*mounts, {"name": volume_name, "readOnly": True, "mountPath": MOUNT_PATH}]
                needed = True
    if needed and not has_volume:
        spec["volumes"] = [*(spec.get("volumes") or ()), token_volume(volume_name)]


_CONTAINER_WORDS = {"initContainers": "init container", "containers": "container", "ephemeralContainers": "ephemeral container"}


def _forbidden_secret(pod: Object, account: Object, *, ephemeral_only: bool) -> str:
    """Say which secret of the pod is not among those of its account; "" if none."""
    spec = pod["spec"]
    owner = account["metadata"]["name"]
    mountable = {entry.get("name") for entry in account.get("secrets") or ()}
    end = f"is not allowed because service account {owner} does not reference that secret"
    if not ephemeral_only:
        for volume in spec.get("volumes") or ():
            secret = (volume.get("secret") or {}).get("secretName")
            if secret and secret not in mountable:
                return f'volume with secret.secretName="{secret}" {end}'
    for field, _, container in containers(spec):
        if (field == "ephemeralContainers") != ephemeral_only:
            continue
        word = f"{_CONTAINER_WORDS[field]} {container.get('name')}"
        for variable in container.get("env") or ():
            secret = ((variable.get("valueFrom") or {}).get("secretKeyRef") or {}).get("name")
            if secret and secret not in mountable:
                return f'{word} with envVar {variable.get("name")} referencing secret.secretName="{secret}" {end}'
        for entry in container.get("envFrom") or ():
            secret = (entry.get("secretRef") or {}).get("name")
            if secret and secret not in mountable:
                return f'{word} with envFrom referencing secret.secretName="{secret}" {end}'
    if not ephemeral_only:
        pull = {entry.get("name") for entry in account.get("imagePullSecrets") or ()}
        for index, entry in enumerate(spec.get("imagePullSecrets") or ()):
            if entry.get("name") not in pull:
                return f'imagePullSecrets[{index}].name="{entry.get("name")}" is not allowed because service account {owner} does not reference that imagePullSecret'
    return ""
