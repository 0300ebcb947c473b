"""Who may use the kubelet's server: client certificates and bearer tokens, asked of the API server what they may do.

Caller: server.server, before every request. Answers are remembered: allowed five minutes, denied thirty seconds.
Source: pkg/kubelet/server/auth.go.
"""

from __future__ import annotations

from knarr.client.delegation import VERBS, Delegation
from knarr.client.rest import Client
from knarr.http.server import Request
from knarr.kubelet.config import KubeletConfig

_ALLOWED_SECONDS = 300.0
_DENIED_SECONDS = 30.0
_TOKEN_SECONDS = 120.0


def subresources(path: str) -> list[str]:
    """The subresources of nodes that allow this path, the finest first."""
    first = path.strip("/").partition("/")[0]
    if first == "stats":
        return ["stats"]
    if first == "metrics":
        return ["metrics"]
    if first == "logs":
        return ["log"]
    if first == "checkpoint":
        return ["checkpoint"]
    if first in ("pods", "runningpods"):
        return ["pods", "proxy"]
    if first in ("healthz", "configz"):
        return [first, "proxy"]
    return ["proxy"]


class Authorizer:
    """Decides on requests to the kubelet."""

    def __init__(self, config: KubeletConfig, client: Client) -> None:
        self._config = config
        self._delegation = Delegation(
            client,
            anonymous=config.anonymous_auth,
            token_seconds=_TOKEN_SECONDS,
            allowed_seconds=_ALLOWED_SECONDS,
            denied_seconds=_DENIED_SECONDS,
        )

    async def check(self, request: Request) -> tuple[int, str] | None:
        """None when the request may go on, else (HTTP status, text)."""
        user = await self._delegation.authenticate(request)
        if user is None:
            return 401, "Unauthorized"
        if self._config.authorization_mode == "AlwaysAllow":
            return None
        verb = VERBS.get(request.method, request.method.lower())
        wanted = subresources(request.path)
        for subresource in wanted:
            attributes = {"verb": verb, "version": "v1", "resource": "nodes", "subresource": subresource, "name": self._config.node_name}
            if await self._delegation.allowed(user, {"resourceAttributes": attributes}):
                return None
        return 403, f"Forbidden (user={user.name}, verb={verb}, resource=nodes, subresource(s)={wanted})"
