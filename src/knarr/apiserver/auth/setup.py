"""Builds the API server's authentication and authorization from its configuration; the one place that knows all parts."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec

from knarr.api import jwt
from knarr.api.types import Object
from knarr.apiserver.attributes import PathHandler, ResourceKey, ReviewHandler, Services, UserInfo
from knarr.apiserver.auth import impersonation
from knarr.apiserver.auth.authenticate import RequestAuthenticator
from knarr.apiserver.auth.authorizers import AlwaysAllow, AlwaysDeny, AsyncAuthorizer, SyncAuthorizer, UnionAuthorizer
from knarr.apiserver.auth.bootstrap import BootstrapPolicy, node_rules
from knarr.apiserver.auth.chains import CABundle
from knarr.apiserver.auth.escalation import Escalation
from knarr.apiserver.auth.legacytokens import LegacyTokenUse
from knarr.apiserver.auth.node import NodeAuthorizer
from knarr.apiserver.auth.openid import DISCOVERY_PATH, KEYS_PATH, OpenIDMetadata
from knarr.apiserver.auth.podrefs import NodeReferences
from knarr.apiserver.auth.rbac import RBAC
from knarr.apiserver.auth.reload import Reloads
from knarr.apiserver.auth.requestheader import RequestHeader
from knarr.apiserver.auth.reviews import AccessReviews, IdentityReviews
from knarr.apiserver.auth.serviceaccounts import Issuer, ServiceAccountTokens, TokenStores
from knarr.apiserver.auth.tokenrequest import TokenRequests
from knarr.apiserver.auth.tokens import BootstrapTokens, TokenAuthenticator, TokenFile
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.auth.webhooks import WebhookAuthorizer

RBAC_GROUP = "rbac.authorization.k8s.io"


def _issuer(services: Services) -> Issuer:
    config = services.config
    if config.service_account_key:
        signer = jwt.Signer(jwt.load_private_key(Path(config.service_account_key).read_bytes()))
    else:
        signer = jwt.Signer(ec.generate_private_key(ec.SECP256R1()))
    keys = [key for path in config.service_account_key_files for key in jwt.load_public_keys(Path(path).read_bytes())]
    return Issuer(signer, config.service_account_issuer, keys)


class APIServerAuth:
    """The Auth of attributes.py."""

    def __init__(self, services: Services) -> None:
        config = services.config
        self._services = services
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._webhooks: list[WebhookAuthorizer] = []
        """Of the authorization configuration."""
        store = services.store
        audiences = tuple(config.api_audiences) or (config.service_account_issuer,)
        stores = TokenStores(store("", "serviceaccounts"), store("", "secrets"), store("", "pods"), store("", "nodes"))
        issuer = _issuer(services)
        self._legacy_use = LegacyTokenUse(stores.secrets, store("", "configmaps"), services.tasks)
        self._other_tokens: list[TokenAuthenticator] = []
        """All but those of the structured configuration."""
        tokens = self._other_tokens
        if config.token_file:
            tokens.append(TokenFile(config.token_file))
        tokens.append(BootstrapTokens(stores.secrets))
        if config.oidc:
            from knarr.apiserver.auth.oidc import OIDC, OIDCConfig

            tokens.append(OIDC(OIDCConfig.from_options(config.oidc)))
        if config.authentication_webhook_config:
            from knarr.apiserver.auth.webhooks import WebhookTokens

            asked = WebhookTokens(config.authentication_webhook_config)
            tokens.append(asked)
            self._closing.append(asked.close)
        request_header = None
        if config.requestheader_client_ca:
            request_header = RequestHeader(CABundle(config.requestheader_client_ca), tuple(config.requestheader_allowed_names))
        self.authenticator = RequestAuthenticator(
            client_ca=CABundle(config.client_ca) if config.client_ca else None, request_header=request_header,
            service_accounts=ServiceAccountTokens(issuer, audiences, stores, self._legacy_use.note), tokens=[*tokens, *_structured(config.jwt_issuers)],
            anonymous_paths=config.anonymous_paths, api_audiences=audiences,
        )  # fmt: skip
        roles, role_bindings = store(RBAC_GROUP, "roles"), store(RBAC_GROUP, "rolebindings")
        cluster_roles, cluster_role_bindings = store(RBAC_GROUP, "clusterroles"), store(RBAC_GROUP, "clusterrolebindings")
        self.rbac = RBAC(roles, role_bindings, cluster_roles, cluster_role_bindings)
        self.references = NodeReferences(stores.pods, store("", "persistentvolumeclaims"), store("", "persistentvolumes"))
        self.authorizer = UnionAuthorizer(
            [self._configured(one) for one in config.authorizers] or [self._mode(mode) for mode in config.authorization_modes]
        )
        self._policy: BootstrapPolicy | None = None
        if "RBAC" in config.authorization_modes:
            self._policy = BootstrapPolicy(roles, role_bindings, cluster_roles, cluster_role_bindings, services.tasks)
        self.escalation = Escalation(self.rbac, self.authorizer) if self._policy is not None else None
        access = AccessReviews(self.authorizer, self.rbac if self._policy is not None else None)
        identity = IdentityReviews(self.authenticator, audiences)
        requests = TokenRequests(issuer, stores, audiences, max_seconds=config.service_account_max_token_seconds)
        self.reviews: Mapping[ResourceKey, ReviewHandler] = {
            ResourceKey("authorization.k8s.io", "subjectaccessreviews"): access.subject,
            ResourceKey("authorization.k8s.io", "selfsubjectaccessreviews"): access.self_subject,
            ResourceKey("authorization.k8s.io", "localsubjectaccessreviews"): access.local_subject,
            ResourceKey("authorization.k8s.io", "selfsubjectrulesreviews"): access.self_rules,
            ResourceKey("authentication.k8s.io", "tokenreviews"): identity.token,
            ResourceKey("authentication.k8s.io", "selfsubjectreviews"): identity.self_subject,
            ResourceKey("", "serviceaccounts", "token"): requests.create,
        }
        metadata = OpenIDMetadata(issuer, f"{config.service_account_issuer.rstrip('/')}{KEYS_PATH}")
        self.paths: Mapping[str, PathHandler] = {DISCOVERY_PATH: metadata.configuration, KEYS_PATH: metadata.keys}

        self.reloads = [
            Reloads(kind, path, apply, config.identity or socket.gethostname())
            for kind, path, apply in (
                ("authentication", config.authentication_config, self._reload_authentication),
                ("authorization", config.authorization_config, self._reload_authorization),
            ) if path
        ]  # fmt: skip

    async def _reload_authentication(self, path: str) -> None:
        from knarr.apiserver.auth.structured import authentication_settings

        self.authenticator.replace_tokens([*self._other_tokens, *_structured(authentication_settings(path)["jwt_issuers"])])

    async def _reload_authorization(self, path: str) -> None:
        from knarr.apiserver.auth.structured import authorization_settings

        entries = authorization_settings(path)["authorizers"]
        # What is built in cannot come or go while the server runs: other parts were built for it.
        before, after = ({one["type"] for one in found} - {"Webhook"} for found in (self._services.config.authorizers, entries))
        if before != after:
            raise ValueError(f"authorizers other than webhooks cannot change: {', '.join(sorted(before))} at start, now {', '.join(sorted(after))}")
        old, self._webhooks = self._webhooks, []
        try:
            made = [self._configured(one) for one in entries]
        except BaseException:
            self._webhooks = old
            raise
        self.authorizer.replace(made)
        for one in old:
            await one.close()

    def _configured(self, entry: Object) -> SyncAuthorizer | AsyncAuthorizer:
        """Make the authorizer of an entry of an AuthorizationConfiguration."""
        if entry["type"] != "Webhook":
            return self._mode(entry["type"])
        from knarr.apiserver.auth.structured import webhook_authorizer

        asked = webhook_authorizer(entry)
        self._webhooks.append(asked)
        return asked

    def _mode(self, mode: str) -> SyncAuthorizer | AsyncAuthorizer:
        store = self._services.store
        if mode == "RBAC":
            return self.rbac
        if mode == "Node":
            return NodeAuthorizer(
                self.references, node_rules(), volume_attachments=store("storage.k8s.io", "volumeattachments"),
                resource_slices=store("resource.k8s.io", "resourceslices"),
            )  # fmt: skip
        if mode == "Webhook":
            from knarr.apiserver.auth.webhooks import WebhookAuthorizer

            asked = WebhookAuthorizer(self._services.config.authorization_webhook_config)
            self._closing.append(asked.close)
            return asked
        if mode == "AlwaysAllow":
            return AlwaysAllow()
        if mode == "AlwaysDeny":
            return AlwaysDeny()
        raise ValueError(f"unknown authorization mode {mode!r}")

    async def impersonate(self, request: Request, user: UserInfo) -> UserInfo:
        """Return whom the request acts as: the user, or the one that the Impersonate-* headers name.

        Raises:
          StatusError: 403.
          ImpersonationWithoutUser: answered as a plain-text 500.
        """
        if not impersonation.wants_impersonation(request):
            return user
        return await impersonation.impersonated(request, user, self.authorizer)

    async def start(self) -> None:
        self.references.start()
        await self._legacy_use.start()
        if self._policy is not None:
            await self._policy.start()
        for one in self.reloads:
            self._services.tasks.spawn_eternal(one.follow(), "configuration-reload")

    async def close(self) -> None:
        for close in (*self._closing, *(one.close for one in self._webhooks)):
            await close()


def _structured(issuers: Sequence[Object]) -> list[TokenAuthenticator]:
    if not issuers:
        return []
    from knarr.apiserver.auth.structured import StructuredJWT

    return [StructuredJWT(issuer, index) for index, issuer in enumerate(issuers)]


def build_auth(services: Services) -> APIServerAuth:
    """Make the API server's Auth. Raises ValueError or OSError for bad key files and unknown modes."""
    return APIServerAuth(services)
