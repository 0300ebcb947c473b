"""Asking somebody else: token reviews and access reviews sent to a web server named by a kubeconfig.

Answers are kept for a while: allowed ones longer than refused ones. A server that does not answer means no opinion for
access, and a refused token.

Source: apiserver plugin/pkg/authenticator/token/webhook, plugin/pkg/authorizer/webhook.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.apiserver.attributes import Attributes, Decision, UserInfo
from knarr.apiserver.auth.tokens import TokenRefused, TokenUser
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)

ALLOWED_SECONDS, REFUSED_SECONDS = 300.0, 30.0
_MOST_CACHED = 8192


class ReviewCaller:
    """Posts reviews to the server of a kubeconfig's current context."""

    def __init__(self, kubeconfig: str) -> None:
        self._config = ClientConfig.from_kubeconfig(Path(kubeconfig))
        self._client: Client | None = None

    async def post(self, review: Object) -> Object:
        """Return the answered review. Raises HTTPError, StatusError, ValueError."""
        if self._client is None:
            self._client = Client(self._config, max_connections=64)
        answer = orjson.loads((await self._client.request("POST", "" if self._has_path() else "/", body=review)).body)
        if not isinstance(answer, dict) or not isinstance(answer.get("status"), dict):
            raise ValueError("the answer is no review")
        return answer

    def _has_path(self) -> bool:
        return "/" in self._config.server.split("://", 1)[-1].rstrip("/")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


class WebhookTokens:
    """TokenAuthenticator that asks with TokenReviews."""

    def __init__(self, kubeconfig: str) -> None:
        self._caller = ReviewCaller(kubeconfig)

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        spec: Object = {"token": token, "audiences": list(audiences)}
        try:
            status = (await self._caller.post({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}))["status"]
        except (HTTPError, StatusError, ValueError) as error:
            raise TokenRefused(f"webhook authenticator failed: {error}") from error
        if not status.get("authenticated"):
            if status.get("error"):
                raise TokenRefused(str(status["error"]))
            return None
        user = status.get("user") or {}
        extra = {key: tuple(values or ()) for key, values in (user.get("extra") or {}).items()}
        return TokenUser(UserInfo(user.get("username") or "", user.get("uid") or "", tuple(user.get("groups") or ()), extra), tuple(status.get("audiences") or ()))

    async def close(self) -> None:
        await self._caller.close()


class WebhookAuthorizer:
    """Mode Webhook: asks with SubjectAccessReviews; remembered answers are given at once."""

    def __init__(
        self, kubeconfig: str, *, allowed_seconds: float = ALLOWED_SECONDS, refused_seconds: float = REFUSED_SECONDS,
        timeout_seconds: float = 30.0, denies_on_failure: bool = False, conditions: Sequence[Callable[[Object], object]] = (),
    ) -> None:  # fmt: skip
        """Args: conditions: say of a review's spec whether the server is asked at all; TokenRefused when that cannot be told."""
        self._caller = ReviewCaller(kubeconfig)
        self._allowed_seconds, self._refused_seconds = allowed_seconds, refused_seconds
        self._timeout_seconds = timeout_seconds
        self._failure = Decision.DENY if denies_on_failure else Decision.NO_OPINION
        self._conditions = tuple(conditions)
        self._cache: dict[Attributes, tuple[float, Decision, str]] = {}

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]:
        known = self._cache.get(attributes)
        if known is not None and clock.now() < known[0]:
            return known[1], known[2]
        if self._conditions:
            spec = _review(attributes)["spec"]
            failed = False
            for condition in self._conditions:
                try:
                    if condition(spec) is not True:
                        return Decision.NO_OPINION, ""
                except TokenRefused as error:
                    log.warning("condition of an authorization webhook failed", error=str(error))
                    failed = True
            if failed:
                return self._failure, ""
        return Decision.ASK, ""

    async def authorize_async(self, attributes: Attributes) -> tuple[Decision, str]:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                status = (await self._caller.post(_review(attributes)))["status"]
        except (HTTPError, StatusError, ValueError, TimeoutError) as error:
            log.warning("authorization webhook failed", error=str(error))
            return self._failure, ""
        decision = Decision.ALLOW if status.get("allowed") else Decision.DENY if status.get("denied") else Decision.NO_OPINION
        reason = str(status.get("reason") or "")
        if len(self._cache) >= _MOST_CACHED:
            self._cache.clear()
        self._cache[attributes] = (clock.now() + (self._allowed_seconds if decision is Decision.ALLOW else self._refused_seconds), decision, reason)
        return decision, reason

    async def close(self) -> None:
        await self._caller.close()


def _review(attributes: Attributes) -> Object:
    user = attributes.user
    spec: Object = {"user": user.name, "groups": list(user.groups)}
    if user.uid:
        spec["uid"] = user.uid
    if user.extra:
        spec["extra"] = {key: list(values) for key, values in user.extra.items()}
    if attributes.is_resource:
        named = {
            "namespace": attributes.namespace, "verb": attributes.verb, "group": attributes.group, "version": attributes.version,
            "resource": attributes.resource, "subresource": attributes.subresource, "name": attributes.name,
        }  # fmt: skip
        spec["resourceAttributes"] = {key: value for key, value in named.items() if value}
        for key, text in (("fieldSelector", attributes.field_selector), ("labelSelector", attributes.label_selector)):
            if text:
                spec["resourceAttributes"][key] = {"rawSelector": text}
    else:
        spec["nonResourceAttributes"] = {"path": attributes.path, "verb": attributes.verb}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
