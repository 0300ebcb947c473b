"""The expressions of admission: which variables there are, and the authorizer as a value inside of them.

Source: apiserver pkg/admission/plugin/cel, pkg/cel/library/authz.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from knarr.api import cel
from knarr.api.cel import types as T
from knarr.api.cel.admission import REQUEST
from knarr.api.cel.errors import EvalError
from knarr.api.cel.values import Opaque
from knarr.api.types import Object
from knarr.apiserver.admission.matching import Match
from knarr.apiserver.attributes import AdmissionRequest, Attributes, Authorizer, Decision, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.celtimes import COMPILATION, timed

AUTHORIZER = T.parse_type("authorizer")
CONDITION_VARIABLES: dict[str, T.Type] = {
    "object": T.DYN, "oldObject": T.DYN, "request": REQUEST, "authorizer": AUTHORIZER, "authorizer.requestResource": T.parse_type("resourcecheck"),
}  # fmt: skip

_DECLARATIONS = """
authorizer.path(string) pathcheck
authorizer.group(string) groupcheck
authorizer.serviceAccount(string,string) authorizer
pathcheck.check(string) decision
groupcheck.resource(string) resourcecheck
resourcecheck.subresource(string) resourcecheck
resourcecheck.namespace(string) resourcecheck
resourcecheck.name(string) resourcecheck
resourcecheck.fieldSelector(string) resourcecheck
resourcecheck.labelSelector(string) resourcecheck
resourcecheck.check(string) decision
decision.allowed() bool
decision.reason() string
decision.errored() bool
decision.error() string
"""


class AuthorizerValue(Opaque):
    """`authorizer`: asks as the user of the request, or as a service account."""

    __slots__ = ("authorizer", "user")
    type_name = "kubernetes.authorization.Authorizer"

    def __init__(self, authorizer: Authorizer, user: UserInfo) -> None:
        self.authorizer = authorizer
        self.user = user


class _PathCheck(Opaque):
    __slots__ = ("owner", "path")
    type_name = "kubernetes.authorization.PathCheck"

    def __init__(self, owner: AuthorizerValue, path: str) -> None:
        if not path:
            raise EvalError("path must not be empty")
        self.owner = owner
        self.path = path


class _ResourceCheck(Opaque):
    __slots__ = ("attributes", "owner")
    type_name = "kubernetes.authorization.ResourceCheck"

    def __init__(self, owner: AuthorizerValue, attributes: Attributes) -> None:
        self.owner = owner
        self.attributes = attributes

    def having(self, **fields: Any) -> _ResourceCheck:
        return _ResourceCheck(self.owner, self.attributes._replace(**fields))


class _GroupCheck(Opaque):
    __slots__ = ("group", "owner")
    type_name = "kubernetes.authorization.GroupCheck"

    def __init__(self, owner: AuthorizerValue, group: str) -> None:
        self.owner = owner
        self.group = group


class _Decision(Opaque):
    __slots__ = ("allowed", "error", "reason")
    type_name = "kubernetes.authorization.Decision"

    def __init__(self, allowed: bool, reason: str, error: str) -> None:
        self.allowed = allowed
        self.reason = reason
        self.error = error


def _decide(owner: AuthorizerValue, attributes: Attributes) -> _Decision:
    decision, reason = owner.authorizer.authorize(attributes)
    if decision is Decision.ASK:
        # Expressions are evaluated without waiting; what only a webhook could tell counts as an error.
        return _Decision(False, "", "the authorizer cannot decide without asking a webhook")
    return _Decision(decision is Decision.ALLOW, reason, "")


def _check(target: Any, verb: str) -> _Decision:
    if isinstance(target, _PathCheck):
        return _decide(target.owner, Attributes(target.owner.user, verb, path=target.path, is_resource=False))
    if isinstance(target, _ResourceCheck):
        return _decide(target.owner, target.attributes._replace(verb=verb))
    raise EvalError(f"no such overload: check({type(target).__name__})")


def _service_account(owner: AuthorizerValue, namespace: str, name: str) -> AuthorizerValue:
    user = UserInfo(users.service_account_name(namespace, name), "", (*users.service_account_groups(namespace), users.AUTHENTICATED))
    return AuthorizerValue(owner.authorizer, user)


def _namespace(target: Any, namespace: str) -> _ResourceCheck:
    if not isinstance(target, _ResourceCheck):
        raise EvalError("no such overload: namespace")
    return target.having(namespace=namespace)


_FUNCTIONS: dict[tuple[str, bool], Any] = {
    ("path", True): _PathCheck, ("group", True): _GroupCheck, ("serviceAccount", True): _service_account,
    ("resource", True): lambda check, plural: _ResourceCheck(check.owner, Attributes(check.owner.user, "", check.group, "*", plural)),
    ("subresource", True): lambda check, name: check.having(subresource=name), ("namespace", True): _namespace,
    ("name", True): lambda check, name: check.having(name=name),
    ("fieldSelector", True): lambda check, text: check.having(field_selector=text),
    ("labelSelector", True): lambda check, text: check.having(label_selector=text),
    ("check", True): _check, ("allowed", True): lambda decision: decision.allowed, ("reason", True): lambda decision: decision.reason,
    ("errored", True): lambda decision: bool(decision.error), ("error", True): lambda decision: decision.error,
}  # fmt: skip


@cache
def environment() -> cel.Environment:
    """The functions of admission expressions."""
    return cel.base().extended(_DECLARATIONS, _FUNCTIONS)


def request_value(request: AdmissionRequest, match: Match) -> Object:
    """`request` as expressions see it."""
    resource = request.resource
    own = {"group": request.kind[0], "version": request.kind[1], "kind": request.kind[2]}
    seen = own if match.convert is None else {"group": match.resource.group, "version": match.resource.version, "kind": match.resource.kind}
    return {
        "kind": seen, "resource": {"group": match.resource.group, "version": match.resource.version, "resource": match.resource.plural},
        "subResource": request.subresource, "requestKind": own,
        "requestResource": {"group": resource.group, "version": resource.version, "resource": resource.plural},
        "requestSubResource": request.subresource, "name": request.name, "namespace": request.namespace, "operation": request.operation,
        "userInfo": {"username": "", "uid": "", "groups": [], "extra": {}, **request.user.to_object()}, "dryRun": request.dry_run,
        "options": request.options or {},
    }  # fmt: skip


def activation(request: AdmissionRequest, match: Match, authorizer: Authorizer) -> dict[str, Any]:
    """The variables that every admission expression has."""
    convert = match.convert
    asked = AuthorizerValue(authorizer, request.user)
    resource = match.resource
    own = Attributes(request.user, "", resource.group, resource.version, resource.plural, request.subresource, request.namespace, request.name)

    def seen(obj: Object | None) -> Object | None:
        return obj if obj is None or convert is None else convert(obj)

    return {
        "object": seen(request.object), "oldObject": seen(request.old_object), "request": request_value(request, match), "authorizer": asked,
        "authorizer.requestResource": _ResourceCheck(asked, own),
    }  # fmt: skip


class Programs:
    """Compiled expressions by text, bounded; a text that does not compile is remembered with its error."""

    def __init__(self, variables: Mapping[str, T.Type], result: T.Type | tuple[T.Type, ...]) -> None:
        self._variables = variables
        self._result = result
        self._programs: dict[str, cel.Program | cel.CompileError] = {}

    def get(self, source: str) -> cel.Program:
        """Return the program. Raises CompileError."""
        found = self._programs.get(source)
        if found is None:
            if len(self._programs) > 2000:
                self._programs.clear()
            try:
                with timed(COMPILATION):
                    found = environment().compile(source, self._variables, result=self._result, exact=True)
            except cel.CompileError as error:
                found = error
            self._programs[source] = found
        if isinstance(found, cel.CompileError):
            raise found
        return found
