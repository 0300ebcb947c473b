"""What payload volumes contain: configMap, secret, downwardAPI, projected with all its sources.

Caller: volumes.manager, before the first start of a container and at every change of what a volume refers to. Nothing is
written here. Source: pkg/volume/{configmap,secret,downwardapi,projected}.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from knarr.api import errors
from knarr.api.resources import CONFIG_MAPS, SECRETS
from knarr.api.scheme import SCHEME, Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import downward, podutil
from knarr.kubelet.objects import ReferencedObjects
from knarr.kubelet.tokens import Tokens
from knarr.kubelet.volumes.atomic_writer import FileProjection
from knarr.kubelet.volumes.model import VolumeError

KINDS = ("configMap", "secret", "downwardAPI", "projected")
_DEFAULT_MODE = 0o644
_SIZE_LIMIT_BYTES = 1 << 20


@dataclass(slots=True)
class PayloadContext:
    """Where payloads come from."""

    client: Client
    objects: ReferencedObjects
    tokens: Tokens
    ips: Sequence[str] = ()
    host_ips: Sequence[str] = ()
    allocatable: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Payload:
    """The files of one volume, and when the kubelet must come back to renew a token."""

    files: dict[str, FileProjection] = field(default_factory=dict)
    renew_at: float | None = None


async def collect(pod: Object, volume: Object, context: PayloadContext) -> Payload:
    """Gather the content of one volume.

    Raises:
      VolumeError: something that is not optional is missing; text as upstream's FailedMount events.
    """
    out = Payload()
    if "configMap" in volume:
        source = volume["configMap"]
        await _from_object(pod, CONFIG_MAPS, source, source.get("defaultMode", _DEFAULT_MODE), context, out, name=source.get("name", ""))
    elif "secret" in volume:
        source = volume["secret"]
        mode = source.get("defaultMode", _DEFAULT_MODE)
        await _from_object(pod, SECRETS, source, mode, context, out, name=source.get("secretName", ""))
    elif "downwardAPI" in volume:
        source = volume["downwardAPI"]
        _from_downward(pod, source.get("items") or [], source.get("defaultMode", _DEFAULT_MODE), context, out)
    else:
        source = volume["projected"]
        mode = source.get("defaultMode", _DEFAULT_MODE)
        for part in source.get("sources") or []:
            await _from_part(pod, part, mode, context, out)
    return out


async def _from_part(pod: Object, part: Object, mode: int, context: PayloadContext, out: Payload) -> None:
    if part.get("configMap"):
        await _from_object(pod, CONFIG_MAPS, part["configMap"], mode, context, out, name=part["configMap"].get("name", ""))
    elif part.get("secret"):
        await _from_object(pod, SECRETS, part["secret"], mode, context, out, name=part["secret"].get("name", ""))
    elif part.get("downwardAPI"):
        _from_downward(pod, part["downwardAPI"].get("items") or [], mode, context, out)
    elif part.get("serviceAccountToken"):
        await _from_token(pod, part["serviceAccountToken"], mode, context, out)
    elif part.get("clusterTrustBundle"):
        await _from_trust_bundle(part["clusterTrustBundle"], mode, context, out)
    elif part.get("podCertificate"):
        raise VolumeError("pod certificate projected volumes are not supported by this kubelet; no signer is configured")


async def _from_object(
    pod: Object, resource: Resource, source: Object, mode: int, context: PayloadContext, out: Payload, *, name: str
) -> None:
    namespace = pod["metadata"].get("namespace", "")
    optional = bool(source.get("optional"))
    try:
        found = await context.objects.get(resource, namespace, name, podutil.uid(pod))
    except errors.StatusError as e:
        if optional and errors.is_not_found(e):
            return
        raise VolumeError(e.message) from e
    data: dict[str, bytes] = {}
    if resource is SECRETS:
        data = {k: base64.b64decode(v or "") for k, v in (found.get("data") or {}).items()}
    else:
        data = {k: (v or "").encode(errors="surrogateescape") for k, v in (found.get("data") or {}).items()}
        data.update({k: base64.b64decode(v or "") for k, v in (found.get("binaryData") or {}).items()})
    if not source.get("items"):
        for key, value in data.items():
            out.files[key] = FileProjection(value, mode)
        return
    for item in source["items"]:
        if item["key"] not in data:
            if optional:
                continue
            raise VolumeError("references non-existent secret key: " + item["key"] if resource is SECRETS else "references non-existent config key: " + item["key"])
        item_mode = item.get("mode")
        out.files[item["path"]] = FileProjection(data[item["key"]], mode if item_mode is None else item_mode)


def _from_downward(pod: Object, items: Sequence[Object], mode: int, context: PayloadContext, out: Payload) -> None:
    for item in items:
        try:
            if item.get("fieldRef"):
                text = downward.field(pod, item["fieldRef"]["fieldPath"], ips=context.ips, host_ips=context.host_ips)
            else:
                reference = item["resourceFieldRef"]
                container = podutil.container(pod, reference.get("containerName", "")) or {}
                text = downward.resource(pod, container, reference, context.allocatable)
        except downward.DownwardError as e:
            raise VolumeError(str(e)) from e
        item_mode = item.get("mode")
        out.files[item["path"]] = FileProjection(text.encode(errors="surrogateescape"), mode if item_mode is None else item_mode)


async def _from_token(pod: Object, source: Object, mode: int, context: PayloadContext, out: Payload) -> None:
    """The file belongs to the one user of the pod when there is one, else every group may read it.

    Source: pkg/volume/projected/projected.go collectData.
    """
    try:
        token, renew_at = await context.tokens.get(pod, source.get("audience") or "", source.get("expirationSeconds") or 3600)
    except errors.StatusError as e:
        raise VolumeError(f"failed to fetch token: {e.message}") from e
    out.renew_at = renew_at if out.renew_at is None else min(out.renew_at, renew_at)
    shared = pod["spec"].get("securityContext") or {}
    owner = _only_user(pod)
    if owner is not None:
        mode = 0o600
    elif shared.get("fsGroup") is not None:
        mode = 0o600
    out.files[source["path"]] = FileProjection(token.encode(), mode, owner)


def _only_user(pod: Object) -> int | None:
    """The uid that all containers run as; None when they differ or it is not said."""
    shared = (pod["spec"].get("securityContext") or {}).get("runAsUser")
    users = set()
    for container in podutil.all_containers(pod):
        own = (container.get("securityContext") or {}).get("runAsUser")
        users.add(own if own is not None else shared)
    if len(users) != 1:
        return None
    user = users.pop()
    return int(user) if user is not None else None


async def _from_trust_bundle(source: Object, mode: int, context: PayloadContext, out: Payload) -> None:
    optional = bool(source.get("optional"))
    resource = SCHEME.resource("certificates.k8s.io", "v1beta1", "clustertrustbundles")
    if resource is None:
        raise VolumeError("ClusterTrustBundle projection is not supported in static kubelet mode")
    try:
        if source.get("name"):
            bundles = [await context.client.get(resource, source["name"])]
        else:
            listed = await context.client.list(resource, label_selector=_selector(source.get("labelSelector")))
            bundles = [b for b in listed.get("items") or [] if b["spec"].get("signerName") == source.get("signerName")]
    except errors.StatusError as e:
        if optional and errors.is_not_found(e):
            bundles = []
        else:
            raise VolumeError(e.message) from e
    if not bundles and not optional:
        raise VolumeError(f"no ClusterTrustBundle matches signer {source.get('signerName', '')}")
    certificates = sorted({c.strip() for b in bundles for c in _split_pem(b["spec"].get("trustBundle", ""))})
    text = "".join(c + "\n" for c in certificates)
    if len(text) <= _SIZE_LIMIT_BYTES:
        out.files[source["path"]] = FileProjection(text.encode(), mode)


def _split_pem(text: str) -> list[str]:
    end = "-----END CERTIFICATE-----"
    return [part[part.find("-----BEGIN") :] + end for part in text.split(end) if "-----BEGIN" in part]


def _selector(selector: Object | None) -> str:
    parts = [f"{k}={v}" for k, v in ((selector or {}).get("matchLabels") or {}).items()]
    for expression in (selector or {}).get("matchExpressions") or []:
        key, operator, values = expression["key"], expression["operator"], ",".join(expression.get("values") or [])
        forms = {"In": f"{key} in ({values})", "NotIn": f"{key} notin ({values})", "Exists": key, "DoesNotExist": f"!{key}"}
        parts.append(forms[operator])
    return ",".join(parts)
