"""Service account tokens for projected volumes: requested from the API server, cached, renewed in time.

Callers: volumes.payloads. Bound: one token per (pod, service account, audience, lifetime).
Source: pkg/kubelet/token/token_manager.go.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.api.resources import SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import podutil

_MAX_AGE_SECONDS = 24 * 3600
_JITTER_SECONDS = 10
_REQUESTS = 8


@dataclass(slots=True)
class _Token:
    status: Object
    """As the API server gave it: token, expirationTimestamp."""
    renew_at: float
    expires_at: float


class Tokens:
    """The token cache of a node."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tokens: dict[tuple[str, str, str, str, int], _Token] = {}
        self._slots = asyncio.Semaphore(_REQUESTS)

    async def get(self, pod: Object, audience: str, expiration_seconds: int) -> tuple[str, float]:
        """Give (token, time at which to ask again). As `status`."""
        status, renew_at = await self.status(pod, audience, expiration_seconds)
        return status["token"], renew_at

    async def status(self, pod: Object, audience: str, expiration_seconds: int) -> tuple[Object, float]:
        """Give (status of the TokenRequest, time at which to ask again).

        An old token is given on when a renewal fails but it is still good.

        Raises:
          StatusError: the API server refused, and there is no valid token.
        """
        meta, account = pod["metadata"], pod["spec"].get("serviceAccountName") or "default"
        key = (meta["uid"], meta.get("namespace", ""), account, audience, expiration_seconds)
        token = self._tokens.get(key)
        now = clock.now()
        if token is not None and now < token.renew_at:
            return token.status, token.renew_at
        try:
            answer = await self._request(pod, account, audience, expiration_seconds)
        except Exception:
            if token is not None and now < token.expires_at:
                return token.status, now + 60
            raise
        expires = clock.parse_rfc3339(answer["status"]["expirationTimestamp"])
        granted = (answer.get("spec") or {}).get("expirationSeconds") or (expires - now)
        renew = min(expires - granted * 0.2, now + _MAX_AGE_SECONDS) - random.uniform(0, _JITTER_SECONDS)
        self._tokens[key] = _Token(answer["status"], max(renew, now + 5), expires)
        return answer["status"], self._tokens[key].renew_at

    async def _request(self, pod: Object, account: str, audience: str, expiration_seconds: int) -> Object:
        meta = pod["metadata"]
        async with self._slots:
            return await self._client.create(
                SERVICE_ACCOUNTS,
                {
                    "apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenRequest",
                    "metadata": {"name": account, "namespace": meta.get("namespace", "")},
                    "spec": {
                        "audiences": [audience] if audience else [],
                        "expirationSeconds": expiration_seconds,
                        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]},
                    },
                },
                meta.get("namespace"),
                subresource="token",
                name=account,
            )

    def forget(self, pod_uid: str) -> None:
        """Drop the tokens bound to a pod that is gone."""
        for key in [k for k in self._tokens if k[0] == pod_uid]:
            del self._tokens[key]


def account_of(pod: Object) -> str:
    """namespace/name of the pod's service account, for messages."""
    return f"{podutil.key(pod).partition('/')[0]}/{pod['spec'].get('serviceAccountName') or 'default'}"
