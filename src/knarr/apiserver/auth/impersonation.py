"""Acting as somebody else: the Impersonate-* headers, each of which must be allowed by itself.

Source: apiserver pkg/endpoints/filters/impersonation.go.
"""

from __future__ import annotations

from urllib.parse import unquote

from knarr.api.errors import StatusError
from knarr.apiserver.attributes import Attributes, Authorizer, Decision, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.auth.forbidden import forbidden_error
from knarr.http.server import Request

_EXTRA_PREFIX = "impersonate-extra-"


class ImpersonationWithoutUser(Exception):
    """Headers ask for groups, extra or uid but name no user: answered as plain-text 500, as upstream does."""


def wants_impersonation(request: Request) -> bool:
    """Cheap first look, for the hot path."""
    headers = request.headers
    if "impersonate-user" in headers or "impersonate-group" in headers or "impersonate-uid" in headers:
        return True
    return any(name.startswith(_EXTRA_PREFIX) for name in headers)


async def impersonated(request: Request, user: UserInfo, authorizer: Authorizer) -> UserInfo:
    """Return the user to act as.

    Raises:
      StatusError: 403, one of the parts is not allowed.
      ImpersonationWithoutUser
    """
    name = request.headers.get("impersonate-user", "")
    groups = [value for value in request.header_values("impersonate-group")]
    uid = request.headers.get("impersonate-uid", "")
    extra: dict[str, tuple[str, ...]] = {}
    for header, value in request.header_list:
        if header.startswith(_EXTRA_PREFIX):
            key = unquote(header[len(_EXTRA_PREFIX) :])
            extra[key] = (*extra.get(key, ()), value)
    if not name:
        raise ImpersonationWithoutUser("requested groups, uid or extra without impersonating a user")
    account = users.split_service_account(name)
    checks = [Attributes(user, "impersonate", "", "v1", "users", "", "", name)]
    if account is not None:
        checks = [Attributes(user, "impersonate", "", "v1", "serviceaccounts", "", *account)]
    checks += [Attributes(user, "impersonate", "", "v1", "groups", "", "", group) for group in groups]
    api = "authentication.k8s.io"
    checks += [Attributes(user, "impersonate", api, "v1", "userextras", key, "", value) for key, values in extra.items() for value in values]
    if uid:
        checks.append(Attributes(user, "impersonate", api, "v1", "uids", "", "", uid))
    for attributes in checks:
        await _require(attributes, authorizer)
    if account is not None and not groups:
        groups = list(users.service_account_groups(account[0]))
    if name != users.ANONYMOUS_NAME:
        if users.AUTHENTICATED not in groups and users.UNAUTHENTICATED not in groups:
            groups.append(users.AUTHENTICATED)
    elif users.UNAUTHENTICATED not in groups:
        groups.append(users.UNAUTHENTICATED)
    return UserInfo(name, uid, tuple(groups), extra)


async def _require(attributes: Attributes, authorizer: Authorizer) -> None:
    decision, reason = authorizer.authorize(attributes)
    if decision is Decision.ASK:
        decision, reason = await authorizer.authorize_async(attributes)
    if decision is not Decision.ALLOW:
        refusal: StatusError = forbidden_error(attributes, reason)
        raise refusal
