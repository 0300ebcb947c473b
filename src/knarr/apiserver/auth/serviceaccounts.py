"""Service account tokens: issuing and checking, bound and legacy.

A bound token names the pod, node or secret it dies with; what it is bound to is looked up in the watch cache at every use, so
a deleted pod's token ends with the pod. Legacy tokens live in secrets and have no expiry.

Source: kubernetes pkg/serviceaccount/claims.go, jwt.go, legacy.go.
"""

from __future__ import annotations

import base64
import hmac
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from knarr.aiokits import clock
from knarr.api import jwt
from knarr.api.types import Object
from knarr.apiserver.attributes import Store, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.auth.tokens import TokenRefused, TokenUser
from knarr.apiserver.metrics import family

LEGACY_ISSUER = "kubernetes/serviceaccount"
LEEWAY_SECONDS = 60.0
_EXTRA = "authentication.kubernetes.io/"


@dataclass(frozen=True, slots=True)
class TokenStores:
    """The stores in which bound objects are looked up."""

    service_accounts: Store
    secrets: Store
    pods: Store
    nodes: Store


def _reference(obj: Object) -> dict[str, str]:
    metadata = obj["metadata"]
    return {"name": metadata["name"], "uid": metadata["uid"]} if metadata.get("uid") else {"name": metadata["name"]}


class Issuer:
    """Signs tokens under the cluster's key and publishes what is needed to check them."""

    def __init__(self, signer: jwt.Signer, issuer: str, keys: Sequence[jwt.PublicKey]) -> None:
        self._signer = signer
        self.issuer = issuer
        self.keys: dict[str, jwt.PublicKey] = {jwt.key_id(key): key for key in (signer.public_key, *keys)}

    def issue(
        self, service_account: Object, audiences: Sequence[str], *, expires_at: float, pod: Object | None = None, node: Object | None = None,
        secret: Object | None = None, warn_after: float | None = None,
    ) -> tuple[str, str]:
        """Return (token, its id). At most one of pod and secret; node beside a pod only adds information."""
        metadata = service_account["metadata"]
        now = clock.now()
        token_id = str(uuid.uuid4())
        private: dict[str, Any] = {"namespace": metadata["namespace"], "serviceaccount": _reference(service_account)}
        for name, bound in (("pod", pod), ("secret", secret), ("node", node)):
            if bound is not None:
                private[name] = _reference(bound)
        if warn_after is not None:
            private["warnafter"] = int(warn_after)
        claims = {
            "aud": list(audiences), "exp": int(expires_at), "iat": int(now), "iss": self.issuer, "jti": token_id,
            "kubernetes.io": private, "nbf": int(now), "sub": users.service_account_name(metadata["namespace"], metadata["name"]),
        }  # fmt: skip
        return self._signer.sign(claims), token_id


class ServiceAccountTokens:
    """Checks tokens of our issuer and legacy tokens."""

    def __init__(self, issuer: Issuer, api_audiences: tuple[str, ...], stores: TokenStores, used: Callable[[Object], None] | None = None) -> None:
        """Args: used: called with the Secret of a legacy token, each time one is shown."""
        self._issuer = issuer
        self._used = used
        self._api_audiences = api_audiences
        self._stores = stores
        # Signatures do not change; checking one costs 100 microseconds, so the claims of good ones are kept.
        self._verified: dict[str, dict[str, Any]] = {}
        self._valid = self._stale = self._legacy = 0

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        told = (
            ("legacy", "Cumulative legacy service account tokens used", self._legacy),
            ("stale", "Cumulative stale projected service account tokens used", self._stale),
            ("valid", "Cumulative valid projected service account tokens used", self._valid),
        )  # fmt: skip
        return [line for name, text, count in told for line in family(f"serviceaccount_{name}_tokens_total", "counter", f"[ALPHA] {text}", [("", count)])]

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        return self.check(token, audiences)

    def check(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        """Like authenticate_token, without waiting."""
        claims = self._verified.get(token)
        if claims is None:
            claims = self._verify(token)
            if claims is None:
                return None
            if len(self._verified) > 2000:
                self._verified.clear()
            self._verified[token] = claims
        if claims["iss"] == LEGACY_ISSUER:
            return self._check_legacy(token, claims, audiences)
        return self._check_bound(claims, audiences)

    def _verify(self, token: str) -> dict[str, Any] | None:
        if token.count(".") != 2:
            return None  # cheaper than an exception, for those who come with tokens of another kind
        try:
            issuer = jwt.unverified_claims(token).get("iss")
        except jwt.TokenError:
            return None
        if issuer not in (self._issuer.issuer, LEGACY_ISSUER):
            return None
        try:
            hint = jwt.header(token).get("kid")
            keys = [self._issuer.keys[hint]] if hint in self._issuer.keys else [] if hint else list(self._issuer.keys.values())
            if not keys:
                raise TokenRefused("invalid signature, no keys found")
            return jwt.verify(token, keys)
        except jwt.TokenError as error:
            raise TokenRefused(str(error)) from error

    def _audiences(self, claimed: Sequence[str], asked: tuple[str, ...]) -> tuple[str, ...]:
        claimed = claimed or self._api_audiences
        asked = asked or self._api_audiences
        common = tuple(audience for audience in claimed if audience in asked)
        if not common:
            from knarr.apiserver.auth.rules import go_list

            raise TokenRefused(f"token audiences {go_list(claimed)} is invalid for the target audiences {go_list(asked)}")
        return common

    def _check_bound(self, claims: dict[str, Any], asked: tuple[str, ...]) -> TokenUser:
        now = clock.now()
        expires = float(claims.get("exp") or 0)
        audience = claims.get("aud") or []
        common = self._audiences([audience] if isinstance(audience, str) else audience, asked)
        if now > expires + LEEWAY_SECONDS:
            raise TokenRefused("service account token has expired")
        if now < float(claims.get("nbf") or 0) - LEEWAY_SECONDS:
            raise TokenRefused("service account token is not valid yet")
        private = claims.get("kubernetes.io") or {}
        namespace, reference = private.get("namespace", ""), private.get("serviceaccount") or {}
        extra: dict[str, tuple[str, ...]] = {}
        self._service_account(namespace, reference.get("name", ""), reference.get("uid", ""))
        if "secret" in private:
            self._alive("Secret", self._stores.secrets, namespace, private["secret"], "secret ref")
        pod, node = private.get("pod"), private.get("node")
        if claims.get("jti"):
            extra[users.CREDENTIAL_ID] = (f"JTI={claims['jti']}",)
        if pod is not None:
            self._alive("Pod", self._stores.pods, namespace, pod, "pod ref")
            extra[_EXTRA + "pod-name"] = (pod.get("name", ""),)
            extra[_EXTRA + "pod-uid"] = (pod.get("uid", ""),)
        elif node is not None:
            self._alive("Node", self._stores.nodes, "", node, "node ref")
        if node is not None:
            extra[_EXTRA + "node-name"] = (node.get("name", ""),)
            if node.get("uid"):
                extra[_EXTRA + "node-uid"] = (node["uid"],)
        if private.get("warnafter") and now > private["warnafter"]:
            self._stale += 1
        else:
            self._valid += 1
        name = users.service_account_name(namespace, reference.get("name", ""))
        user = UserInfo(name, reference.get("uid", ""), users.service_account_groups(namespace), extra)
        return TokenUser(user, common, expires)

    def _service_account(self, namespace: str, name: str, uid: str) -> Object:
        account = self._stores.service_accounts.get_nowait(namespace, name)
        if account is None:
            raise TokenRefused(f'serviceaccounts "{name}" not found')
        if account["metadata"].get("uid") != uid:
            raise TokenRefused(f"service account UID ({account['metadata'].get('uid')}) does not match claim ({uid})")
        if _deleted(account):
            raise TokenRefused(f"service account {namespace}/{name} has been deleted")
        return account

    @staticmethod
    def _alive(kind: str, store: Store, namespace: str, reference: dict[str, str], claim: str) -> None:
        obj = store.get_nowait(namespace, reference.get("name", ""))
        if obj is None:
            raise TokenRefused("service account token has been invalidated")
        if obj["metadata"].get("uid") != reference.get("uid"):
            raise TokenRefused(f"{kind.lower()} UID ({obj['metadata'].get('uid')}) does not match service account {claim} claim ({reference.get('uid')})")
        if _deleted(obj):
            raise TokenRefused("service account token has been invalidated")

    def _check_legacy(self, token: str, claims: dict[str, Any], asked: tuple[str, ...]) -> TokenUser:
        prefix = "kubernetes.io/serviceaccount/"
        namespace, secret_name = claims.get(prefix + "namespace"), claims.get(prefix + "secret.name")
        name, uid = claims.get(prefix + "service-account.name"), claims.get(prefix + "service-account.uid")
        if not (namespace and secret_name and name and uid):
            raise TokenRefused("claims are missing")
        if users.split_service_account(claims.get("sub", "")) != (namespace, name):
            raise TokenRefused("sub claim is invalid")
        common = self._audiences((), asked)
        secret = self._stores.secrets.get_nowait(namespace, secret_name)
        if secret is None or secret["metadata"].get("deletionTimestamp"):
            raise TokenRefused("Token has been invalidated")
        stored = base64.b64decode((secret.get("data") or {}).get("token", ""))
        if not hmac.compare_digest(stored, token.encode()):
            raise TokenRefused("Token does not match server's copy")
        account = self._stores.service_accounts.get_nowait(namespace, name)
        if account is None:
            raise TokenRefused(f'serviceaccounts "{name}" not found')
        if account["metadata"].get("deletionTimestamp"):
            raise TokenRefused(f"ServiceAccount {namespace}/{name} has been deleted")
        if account["metadata"].get("uid") != uid:
            raise TokenRefused(f"ServiceAccount UID ({account['metadata'].get('uid')}) does not match claim ({uid})")
        if self._used is not None:
            self._used(secret)
        if (secret["metadata"].get("labels") or {}).get("kubernetes.io/legacy-token-invalid-since"):
            raise TokenRefused(f"the token in secret {namespace}/{secret_name} for service account {namespace}/{name} has been marked invalid. "
                               "Use tokens from the TokenRequest API or manually created secret-based tokens, or remove the "
                               "'kubernetes.io/legacy-token-invalid-since' label from the secret to temporarily allow use of this token")
        self._legacy += 1
        user = UserInfo(users.service_account_name(namespace, name), uid, users.service_account_groups(namespace))
        return TokenUser(user, common)


def _deleted(obj: Object) -> bool:
    when = obj["metadata"].get("deletionTimestamp")
    return bool(when) and clock.parse_rfc3339(when) < clock.now() - LEEWAY_SECONDS
