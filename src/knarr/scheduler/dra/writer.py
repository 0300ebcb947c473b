"""Writes allocations and reservations of ResourceClaims to the API, and takes them back.

Source: plugins/dynamicresources bindClaim, Unreserve, PostFilter.
"""

from __future__ import annotations

from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError, is_conflict, is_not_found
from knarr.api.resources import RESOURCE_CLAIMS
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.scheduler.dra.claims import FINALIZER, Claims, allocation_of, is_reserved_for
from knarr.scheduler.framework import PluginError
from knarr.scheduler.objects import Object
from knarr.scheduler.podinfo import PodInfo

log = get_logger(__name__)

_TRIES = 5


class ClaimWriter:
    """See the module."""

    def __init__(self, client: Client, claims: Claims) -> None:
        self._client = client
        self._claims = claims

    async def bind(self, pod: PodInfo, claim: Object, allocation: Object | None) -> Object:
        """Store the allocation (None: it has one) and reserve the claim for the pod; gives the claim as written.

        Raises:
          PluginError: somebody else was faster, or the API refused.
        """
        shown = f"{pod.namespace}/{claim['metadata']['name']}"
        first = claim
        try:
            for attempt in range(_TRIES):
                try:
                    written = await self._try(pod, claim, allocation, shown)
                    break
                except StatusError as error:
                    if not is_conflict(error) or attempt == _TRIES - 1:
                        raise
                    claim = await self._client.get(RESOURCE_CLAIMS, claim["metadata"]["name"], pod.namespace)
            self._claims.assume(written)
        except (StatusError, HTTPError) as error:
            what = "add allocation and reservation" if allocation is not None else "add reservation"
            raise PluginError(f"{what} to claim {shown}: {error}") from error
        finally:
            self._claims.end(first)
        return written

    async def _try(self, pod: PodInfo, claim: Object, allocation: Object | None, shown: str) -> Object:
        if "deletionTimestamp" in claim["metadata"]:
            raise PluginError(f"claim {shown} got deleted in the meantime")
        status = dict(claim.get("status") or {})
        if allocation is not None:
            if allocation_of(claim) is not None:
                raise PluginError(f"claim {shown} got allocated elsewhere in the meantime")
            finalizers = claim["metadata"].get("finalizers") or []
            if FINALIZER not in finalizers:
                # Finalizers cannot be written together with the status.
                claim = {**claim, "metadata": {**claim["metadata"], "finalizers": [*finalizers, FINALIZER]}}
                claim = await self._client.update(RESOURCE_CLAIMS, claim)
                status = dict(claim.get("status") or {})
            status["allocation"] = allocation
        reserved = status.get("reservedFor") or []
        if not is_reserved_for(claim, pod.uid):
            status["reservedFor"] = [*reserved, {"resource": "pods", "name": pod.name, "uid": pod.uid}]
        return await self._client.update(RESOURCE_CLAIMS, {**claim, "status": status}, subresource="status")

    async def release(self, pod: PodInfo, claim: Object) -> None:
        """Take the pod's reservation back; a failure is only logged, the next attempt finds it."""
        metadata = claim["metadata"]
        patch = {"metadata": {"uid": metadata["uid"]}, "status": {"reservedFor": [{"$patch": "delete", "uid": pod.uid}]}}
        try:
            await self._client.patch(
                RESOURCE_CLAIMS, metadata["name"], metadata["namespace"], patch, type="strategic", subresource="status"
            )
        except (StatusError, HTTPError, OSError) as error:
            if not (isinstance(error, StatusError) and is_not_found(error)):
                log.warning("claim could not be released", claim=f"{metadata['namespace']}/{metadata['name']}", error=repr(error))

    async def deallocate(self, claim: Object) -> None:
        """Free a claim that nobody else uses, so that it can be allocated where its pod fits."""
        status = {key: value for key, value in claim["status"].items() if key not in ("allocation", "reservedFor", "devices")}
        try:
            await self._client.update(RESOURCE_CLAIMS, {**claim, "status": status}, subresource="status")
        except (StatusError, HTTPError, OSError) as error:
            metadata = claim["metadata"]
            log.warning("claim could not be deallocated", claim=f"{metadata['namespace']}/{metadata['name']}", error=repr(error))
