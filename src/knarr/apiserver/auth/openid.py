"""What others need to check our service account tokens: the OpenID discovery document and the key set.

Source: kubernetes pkg/serviceaccount/openidmetadata.go, pkg/routes/openidmetadata.go.
"""

from __future__ import annotations

import orjson

from knarr.api import jwt
from knarr.apiserver.auth.serviceaccounts import Issuer
from knarr.http.server import Request

DISCOVERY_PATH = "/.well-known/openid-configuration"
KEYS_PATH = "/openid/v1/jwks"
_CACHE = ("Cache-Control", "public, max-age=3600")


class OpenIDMetadata:
    """Serves both documents from bytes made once."""

    def __init__(self, issuer: Issuer, keys_url: str) -> None:
        keys = list(issuer.keys.values())
        self._configuration = orjson.dumps({
            "issuer": issuer.issuer, "jwks_uri": keys_url, "response_types_supported": ["id_token"], "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": sorted({jwt.algorithm(key) for key in keys}),
        })  # fmt: skip
        self._keys = orjson.dumps({"keys": [jwt.to_jwk(key) for key in keys]})

    async def configuration(self, request: Request) -> None:
        request.respond(200, [("Content-Type", "application/json"), _CACHE], self._configuration)

    async def keys(self, request: Request) -> None:
        request.respond(200, [("Content-Type", "application/jwk-set+json"), _CACHE], self._keys)
