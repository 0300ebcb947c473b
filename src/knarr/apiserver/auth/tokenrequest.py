"""serviceaccounts/NAME/token: issues a token bound to an audience, a lifetime, and perhaps a pod, node or secret.

Source: kubernetes pkg/registry/core/serviceaccount/storage/token.go.
"""

from __future__ import annotations

from collections.abc import Callable

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import FieldError, invalid_value
from knarr.api.types import Object
from knarr.apiserver.attributes import ReviewRequest
from knarr.apiserver.auth.serviceaccounts import Issuer, TokenStores

_GROUP_KIND = "TokenRequest.authentication.k8s.io"
# The kubelet asks for exactly this long for the default token volume; old clients that never reread it get a year, and a warning.
WARN_ONLY_SECONDS = 3607
EXTENDED_SECONDS = 365 * 24 * 3600
MIN_SECONDS = 600
DEFAULT_SECONDS = 3600


class TokenRequests:
    """The handler of the token subresource."""

    def __init__(
        self, issuer: Issuer, stores: TokenStores, api_audiences: tuple[str, ...], *, max_seconds: int, warn: Callable[[str], None] | None = None
    ) -> None:
        self._issuer = issuer
        self._stores = stores
        self._api_audiences = api_audiences
        self._max_seconds = max_seconds
        self._warn = warn

    async def create(self, review: ReviewRequest) -> Object:
        request: Object = meta.deep_copy(review.object)
        namespace, name = review.namespace, review.name
        metadata = request.setdefault("metadata", {})
        for field, wanted in (("name", name), ("namespace", namespace)):
            if metadata.get(field) and metadata[field] != wanted:
                text = f"must match the service account {field} if specified"
                raise errors.invalid(_GROUP_KIND, name, [invalid_value(f"metadata.{field}", metadata[field], text)])
        account = self._stores.service_accounts.get_nowait(namespace, name)
        if account is None:
            raise errors.not_found("serviceaccounts", name)
        uid = account["metadata"]["uid"]
        if metadata.get("uid") and metadata["uid"] != uid:
            text = f"the UID in the token request ({metadata['uid']}) does not match the UID of the service account ({uid})"
            raise errors.conflict("TokenRequest.authentication.k8s.io", name, text)
        metadata.update(name=name, namespace=namespace, uid=uid)
        spec = request.setdefault("spec", {})
        if not spec.get("audiences"):
            spec["audiences"] = list(self._api_audiences)
        if spec.get("expirationSeconds") is None:
            spec["expirationSeconds"] = DEFAULT_SECONDS
        now = clock.now()
        metadata["creationTimestamp"] = clock.rfc3339(now)
        self._validate(spec["expirationSeconds"])
        pod, node, secret = self._bound(spec.get("boundObjectRef"), namespace, name)
        if self._max_seconds and spec["expirationSeconds"] > self._max_seconds:
            if self._warn is not None:
                self._warn(f"requested expiration of {spec['expirationSeconds']} seconds shortened to {self._max_seconds} seconds")
            spec["expirationSeconds"] = self._max_seconds
        seconds = spec["expirationSeconds"]
        warn_after: float | None = None
        lifetime = seconds
        if pod is not None and seconds == WARN_ONLY_SECONDS and all(audience in self._api_audiences for audience in spec["audiences"]):
            warn_after, lifetime = now + seconds, EXTENDED_SECONDS
        token, _ = self._issuer.issue(
            account, spec["audiences"], expires_at=now + lifetime, pod=pod, node=node, secret=secret, warn_after=warn_after
        )
        request["kind"], request["apiVersion"] = "TokenRequest", "authentication.k8s.io/v1"
        request["status"] = {"token": token, "expirationTimestamp": clock.rfc3339(now + seconds)}
        return request

    @staticmethod
    def _validate(seconds: int) -> None:
        found: list[FieldError] = []
        if seconds < MIN_SECONDS:
            found.append(invalid_value("spec.expirationSeconds", seconds, "may not specify a duration less than 10 minutes"))
        if seconds > 1 << 32:
            found.append(invalid_value("spec.expirationSeconds", seconds, "may not specify a duration larger than 2^32 seconds"))
        if found:
            raise errors.invalid(_GROUP_KIND, "", found)

    def _bound(self, reference: Object | None, namespace: str, account: str) -> tuple[Object | None, Object | None, Object | None]:
        """Return (pod, node, secret)."""
        if not reference:
            return None, None, None
        group, _ = meta.split_api_version(reference.get("apiVersion") or "")
        kind, name = reference.get("kind") or "", reference.get("name") or ""
        pod = node = secret = None
        bound: Object
        if not group and kind == "Pod":
            bound = pod = self._find("pods", namespace, name)
            if ((pod.get("spec") or {}).get("serviceAccountName") or "") != account:
                text = f'cannot bind token for serviceaccount "{account}" to pod running with different serviceaccount name.'
                raise errors.bad_request(text)
            node_name = (pod.get("spec") or {}).get("nodeName")
            if node_name:
                node = self._stores.nodes.get_nowait("", node_name) or {"metadata": {"name": node_name}}
        elif not group and kind == "Node":
            bound = node = self._find("nodes", "", name)
        elif not group and kind == "Secret":
            bound = secret = self._find("secrets", namespace, name)
        else:
            version = (reference.get("apiVersion") or "").rpartition("/")[2]
            raise errors.bad_request(f"cannot bind token to object of type {group}/{version}, Kind={kind}")
        uid = bound["metadata"]["uid"]
        if reference.get("uid") and reference["uid"] != uid:
            text = (
                f"the UID in the bound object reference ({reference['uid']}) does not match the UID in record. "
                "The object might have been deleted and then recreated"
            )
            raise errors.conflict(kind, name, text)
        return pod, node, secret

    def _find(self, plural: str, namespace: str, name: str) -> Object:
        store = {"pods": self._stores.pods, "nodes": self._stores.nodes, "secrets": self._stores.secrets}[plural]
        found = store.get_nowait(namespace, name)
        if found is None:
            raise errors.not_found(plural, name)
        return found
