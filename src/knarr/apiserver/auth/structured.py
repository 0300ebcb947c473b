"""AuthenticationConfiguration and AuthorizationConfiguration: token issuers, anonymous paths and authorizers from files.

`authentication_settings` and `authorization_settings` read and check a file and give settings of APIServerConfig; `StructuredJWT` and
`webhook_authorizer` make of them what asks and checks. The files are read when the server starts,
and again when they change (reload.py).

Source: apiserver pkg/apis/apiserver/{types.go,validation}, plugin/pkg/authenticator/token/oidc, plugin/pkg/authorizer/webhook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from knarr.api import cel, times
from knarr.api.types import Object
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.auth.oidc import OIDC, OIDCConfig
from knarr.apiserver.auth.tokens import TokenRefused
from knarr.apiserver.auth.webhooks import WebhookAuthorizer

_VERSIONS = frozenset({f"apiserver.config.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1")})
_ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512")
AUTHORIZER_TYPES = ("Node", "RBAC", "Webhook", "AlwaysAllow", "AlwaysDeny")


def _document(path: str, kind: str) -> Object:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != kind or document.get("apiVersion") not in _VERSIONS:
        raise ValueError(f"{path} is no {kind} of apiserver.config.k8s.io")
    return document


def _required(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: Required value")
    return value


# -- authentication ----------------------------------------------------------------------------------------------------
def authentication_settings(path: str) -> dict[str, Any]:
    """Return settings for an AuthenticationConfiguration. Raises ValueError, OSError."""
    document = _document(path, "AuthenticationConfiguration")
    issuers = tuple(document.get("jwt") or ())
    urls = [StructuredJWT(issuer, index).url for index, issuer in enumerate(issuers)]
    if len(set(urls)) < len(urls):
        raise ValueError("jwt: Duplicate value: an issuer URL is given twice")
    changes: dict[str, Any] = {"jwt_issuers": issuers, "authentication_config": path}
    anonymous = document.get("anonymous")
    if anonymous is not None:
        paths = tuple(_required(condition.get("path"), "anonymous.conditions.path") for condition in anonymous.get("conditions") or ())
        if paths and not anonymous.get("enabled"):
            raise ValueError("anonymous.conditions: Invalid value: enabled should be set to true when conditions are defined")
        changes["anonymous_paths"] = (paths or ("*",)) if anonymous.get("enabled") else ()
    return changes


class _Mapping:
    """A claim, with what is put before it, or an expression over all claims."""

    def __init__(self, given: Object, path: str) -> None:
        self.claim = str(given.get("claim") or "")
        self.prefix = str(given.get("prefix") or "")
        expression = given.get("expression")
        if self.claim and expression:
            raise ValueError(f"{path}: Invalid value: claim and expression can't both be set")
        self._program = _compiled(str(expression), f"{path}.expression", "claims") if expression else None

    def of(self, claims: Object) -> Any:
        if self._program is not None:
            return self._program(claims)
        return claims.get(self.claim) if self.claim else None


def _compiled(expression: str, path: str, variable: str) -> Callable[[Any], Any]:
    try:
        program = cel.base().compile(expression, {variable: cel.DYN})
    except cel.CELError as error:
        raise ValueError(f"{path}: Invalid value: {expression!r}: compilation failed: {error}") from error

    def evaluate(value: Any) -> Any:
        try:
            return program.evaluate({variable: value}, cel.Budget(cel.TOTAL_LIMIT))
        except cel.CELError as error:
            raise TokenRefused(f"oidc: error evaluating {path}: {error}") from error

    return evaluate


def _rules(given: Sequence[Object], path: str, variable: str) -> list[tuple[Callable[[Any], Any], str]]:
    return [
        (_compiled(_required(rule.get("expression"), f"{path}[{index}].expression"), f"{path}[{index}].expression", variable),
         str(rule.get("message") or f"failed expression: {rule['expression']}"))
        for index, rule in enumerate(given or ()) if not rule.get("claim")
    ]  # fmt: skip


class StructuredJWT(OIDC):
    """TokenAuthenticator for one entry of `jwt`."""

    def __init__(self, given: Object, index: int) -> None:
        """Raises ValueError, in upstream's terms of paths."""
        path = f"jwt[{index}]"
        issuer, mappings = given.get("issuer") or {}, given.get("claimMappings") or {}
        self.url = _required(issuer.get("url"), f"{path}.issuer.url")
        if not self.url.startswith("https://"):
            raise ValueError(f"{path}.issuer.url: Invalid value: URL scheme must be https")
        self._audiences = tuple(str(one) for one in issuer.get("audiences") or ())
        if not self._audiences:
            raise ValueError(f"{path}.issuer.audiences: Required value: at least one audience is required")
        self._username = _Mapping(mappings.get("username") or {}, f"{path}.claimMappings.username")
        self._groups_mapping = _Mapping(mappings.get("groups") or {}, f"{path}.claimMappings.groups")
        self._uid = _Mapping(mappings.get("uid") or {}, f"{path}.claimMappings.uid")
        if not (mappings.get("username") or {}).get("claim") and not (mappings.get("username") or {}).get("expression"):
            raise ValueError(f"{path}.claimMappings.username: Required value: claim or expression is required")
        self._extra = {
            _required(one.get("key"), f"{path}.claimMappings.extra.key"):
                _compiled(_required(one.get("valueExpression"), f"{path}.claimMappings.extra.valueExpression"), f"{path}.claimMappings.extra", "claims")
            for one in mappings.get("extra") or ()
        }  # fmt: skip
        self._claim_rules = _rules(given.get("claimValidationRules") or (), f"{path}.claimValidationRules", "claims")
        self._user_rules = _rules(given.get("userValidationRules") or (), f"{path}.userValidationRules", "user")
        required = tuple(
            (str(rule["claim"]), str(rule.get("requiredValue") or "")) for rule in given.get("claimValidationRules") or () if rule.get("claim")
        )
        super().__init__(OIDCConfig(
            issuer_url=self.url, client_id=self._audiences[0], required_claims=required, signing_algs=_ALGORITHMS,
            username_claim=self._username.claim, ca_data=str(issuer.get("certificateAuthority") or ""),
            discovery_url=str(issuer.get("discoveryURL") or ""), audiences=self._audiences,
        ))  # fmt: skip

    def _user(self, claims: dict[str, object]) -> UserInfo:
        self._check(claims)
        for holds, message in self._claim_rules:
            if holds(claims) is not True:
                raise TokenRefused(f"oidc: error evaluating claim validation expression: validation expression failed: {message}")
        name = self._username.of(claims)
        if not isinstance(name, str) or not name:
            raise TokenRefused("oidc: error evaluating username claim: it is no string, or empty")
        if self._username.claim == "email" and claims.get("email_verified", True) is not True:
            raise TokenRefused("oidc: email not verified")
        groups = _strings(self._groups_mapping.of(claims), "groups")
        uid = self._uid.of(claims) or ""
        extra = {key: values for key, value in self._extra.items() if (values := _strings(value(claims), key))}
        user = UserInfo(
            self._username.prefix + name, str(uid), tuple(self._groups_mapping.prefix + group for group in groups), extra,
        )
        shown = user.to_object()
        for holds, message in self._user_rules:
            if holds({"username": "", "uid": "", "groups": [], "extra": {}, **shown}) is not True:
                raise TokenRefused(f"oidc: error evaluating user info validation rule: validation expression failed: {message}")
        return user


def _strings(value: Any, what: str) -> tuple[str, ...]:
    """Read a string or a list of strings; nothing, and empty strings, give none."""
    if value is None or value == "":
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TokenRefused(f"oidc: {what} is neither a string nor a list of strings")
    return tuple(one for one in found if one)


# -- authorization -----------------------------------------------------------------------------------------------------
def authorization_settings(path: str) -> dict[str, Any]:
    """Return settings for an AuthorizationConfiguration. Raises ValueError, OSError."""
    authorizers = tuple(_document(path, "AuthorizationConfiguration").get("authorizers") or ())
    if not authorizers:
        raise ValueError("authorizers: Required value: at least one authorization mode must be defined")
    names: set[tuple[str, str]] = set()
    for index, one in enumerate(authorizers):
        own = f"authorizers[{index}]"
        kind, name = _required(one.get("type"), f"{own}.type"), _required(one.get("name"), f"{own}.name")
        if kind not in AUTHORIZER_TYPES:
            raise ValueError(f"{own}.type: Unsupported value: {kind!r}")
        if any(name == other or (kind == earlier and kind != "Webhook") for earlier, other in names):
            raise ValueError(f"{own}: Duplicate value: {name!r}")
        names.add((kind, name))
        if kind == "Webhook":
            webhook_settings(one, own)
    modes = tuple(one["type"] for one in authorizers)
    return {"authorizers": authorizers, "authorization_modes": modes, "authorization_config": path}


def webhook_settings(given: Object, path: str = "webhook") -> dict[str, Any]:
    """Check an authorizer's webhook and return the arguments of WebhookAuthorizer. Raises ValueError."""
    webhook = given.get("webhook") or {}
    connection = webhook.get("connectionInfo") or {}
    if connection.get("type") != "KubeConfigFile":
        raise ValueError(f"{path}.connectionInfo.type: Unsupported value: {connection.get('type')!r}: KubeConfigFile is supported")
    if webhook.get("failurePolicy") not in ("NoOpinion", "Deny"):
        raise ValueError(f"{path}.failurePolicy: Unsupported value: {webhook.get('failurePolicy')!r}: NoOpinion and Deny are supported")
    conditions = []
    for index, one in enumerate(webhook.get("matchConditions") or ()):
        where = f"{path}.matchConditions[{index}].expression"
        conditions.append(_compiled(_required(one.get("expression"), where), where, "request"))
    return {
        "kubeconfig": _required(connection.get("kubeConfigFile"), f"{path}.connectionInfo.kubeConfigFile"),
        "allowed_seconds": _seconds(webhook.get("authorizedTTL"), 300.0), "refused_seconds": _seconds(webhook.get("unauthorizedTTL"), 30.0),
        "timeout_seconds": _seconds(webhook.get("timeout"), 30.0), "denies_on_failure": webhook["failurePolicy"] == "Deny",
        "conditions": conditions,
    }  # fmt: skip


def _seconds(text: Any, default: float) -> float:
    return times.parse_duration(str(text)) / 1e9 if text else default


def webhook_authorizer(given: Object) -> WebhookAuthorizer:
    """Make the authorizer of one entry of type Webhook."""
    return WebhookAuthorizer(**webhook_settings(given))
