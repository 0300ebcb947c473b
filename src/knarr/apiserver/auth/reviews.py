"""Questions about access and identity, asked through the API: the reviews of authorization.k8s.io and authentication.k8s.io.

Each is a create that is answered and not stored.
Source: kubernetes pkg/registry/authorization, pkg/registry/authentication, pkg/apis/authorization/validation.
"""

from __future__ import annotations

from typing import Any

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.errors import FieldError, invalid_value, required
from knarr.api.types import Object
from knarr.apiserver.attributes import Attributes, Decision, ReviewRequest, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.auth.authenticate import RequestAuthenticator
from knarr.apiserver.auth.authorizers import UnionAuthorizer
from knarr.apiserver.auth.rbac import RBAC
from knarr.apiserver.auth.rules import Rule
from knarr.apiserver.auth.tokens import TokenRefused

_GROUP_KIND = ".authorization.k8s.io"
_FIELD_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


class AccessReviews:
    """SubjectAccessReview and its siblings."""

    def __init__(self, authorizer: UnionAuthorizer, rbac: RBAC | None) -> None:
        self._authorizer = authorizer
        self._rbac = rbac

    async def subject(self, review: ReviewRequest) -> Object:
        spec = review.object.get("spec") or {}
        _raise_invalid([*_spec_errors(spec, subject=True), *_metadata_errors(review.object)])
        return await self._answer(review.object, _subject(spec))

    async def self_subject(self, review: ReviewRequest) -> Object:
        spec = review.object.get("spec") or {}
        _raise_invalid([*_spec_errors(spec, subject=False), *_metadata_errors(review.object)])
        return await self._answer(review.object, review.user)

    async def local_subject(self, review: ReviewRequest) -> Object:
        obj = review.object
        spec = obj.get("spec") or {}
        found = [*_spec_errors(spec, subject=True), *_metadata_errors(obj, namespace=True)]
        namespace = (obj.get("metadata") or {}).get("namespace") or ""
        resource = spec.get("resourceAttributes")
        if resource is not None and (resource.get("namespace") or "") != namespace:
            found.append(invalid_value("spec.resourceAttributes.namespace", resource.get("namespace") or "", "must match metadata.namespace"))
        if spec.get("nonResourceAttributes") is not None:
            found.append(invalid_value("spec.nonResourceAttributes", spec["nonResourceAttributes"], "disallowed on this kind of request"))
        _raise_invalid(found)
        if namespace != review.namespace:
            raise errors.bad_request(f"spec.resourceAttributes.namespace must match namespace: {review.namespace}")
        return await self._answer(obj, _subject(spec))

    async def _answer(self, obj: Object, user: UserInfo) -> Object:
        attributes, problem = _attributes(user, obj["spec"])
        decision, reason = await self._authorizer.decide(attributes)
        status: Object = {"allowed": decision is Decision.ALLOW}
        if decision is Decision.DENY:
            status["denied"] = True
        if reason:
            status["reason"] = reason
        if problem:
            status["evaluationError"] = problem
        return {**obj, "status": status}

    async def self_rules(self, review: ReviewRequest) -> Object:
        namespace = (review.object.get("spec") or {}).get("namespace") or ""
        if not namespace:
            raise errors.bad_request("no namespace on request")
        rules: list[Rule] = []
        problems: list[str] = []
        incomplete = self._rbac is None
        if users.node_name(review.user.name, review.user.groups) is not None:
            incomplete = True
            problems.append("node authorizer does not support user rule resolution")
        if self._rbac is not None:
            found, unresolved = self._rbac.rules_for(review.user, namespace)
            rules += found
            problems += unresolved
        resource_rules = [_shown(rule, "verbs", "apiGroups", "resources", "resourceNames") for rule in rules if rule.get("resources")]
        path_rules = [_shown(rule, "verbs", "nonResourceURLs") for rule in rules if rule.get("nonResourceURLs")]
        status: Object = {"resourceRules": resource_rules, "nonResourceRules": path_rules, "incomplete": incomplete}
        if problems:
            status["evaluationError"] = problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"
        return {
            "kind": "SelfSubjectRulesReview", "apiVersion": "authorization.k8s.io/v1", "metadata": {"creationTimestamp": None},
            "spec": {}, "status": status,
        }  # fmt: skip


def _shown(rule: Rule, *fields: str) -> Object:
    return {field: list(rule[field]) for field in fields if rule.get(field)}


def _subject(spec: Object) -> UserInfo:
    extra = {key.lower(): tuple(values or ()) for key, values in (spec.get("extra") or {}).items()}
    return UserInfo(spec.get("user") or "", spec.get("uid") or "", tuple(spec.get("groups") or ()), extra)


def _attributes(user: UserInfo, spec: Object) -> tuple[Attributes, str]:
    resource = spec.get("resourceAttributes")
    if resource is None:
        path = spec["nonResourceAttributes"]
        return Attributes(user, path.get("verb") or "", path=path.get("path") or "", is_resource=False), ""
    problems: list[str] = []
    field_selector = _field_selector(resource.get("fieldSelector"), problems)
    label_selector = _label_selector(resource.get("labelSelector"), problems)
    attributes = Attributes(
        user, resource.get("verb") or "", resource.get("group") or "", resource.get("version") or "*", resource.get("resource") or "",
        resource.get("subresource") or "", resource.get("namespace") or "", resource.get("name") or "",
        field_selector=field_selector, label_selector=label_selector,
    )  # fmt: skip
    return attributes, "; ".join(problems)


def _field_selector(selector: Object | None, problems: list[str]) -> str:
    if not selector:
        return ""
    if selector.get("rawSelector"):
        from knarr.api.selectors import SelectorError, parse_field_selector

        try:
            parse_field_selector(selector["rawSelector"])
        except SelectorError as error:
            problems.append(f"spec.resourceAttributes.fieldSelector partially ignored due to parse error: {error}")
            return ""
        return str(selector["rawSelector"])
    terms: list[str] = []
    bad: list[str] = []
    for requirement in selector.get("requirements") or ():
        operator, values = requirement.get("operator"), requirement.get("values") or []
        if len(values) > 1:
            bad.append("fieldSelectors do not yet support multiple values")
        elif operator in ("In", "NotIn"):
            terms.append(f"{requirement.get('key')}{'=' if operator == 'In' else '!='}{values[0] if values else ''}")
        elif operator in _FIELD_OPERATORS:
            bad.append(f"fieldSelectors do not yet support {operator}")
        else:
            bad.append(f'"{operator}" is not a valid field selector operator')
    if bad:
        problems.append(f"spec.resourceAttributes.fieldSelector partially ignored due to parse error: {_aggregate(bad)}")
    return ",".join(terms)


def _label_selector(selector: Object | None, problems: list[str]) -> str:
    if not selector:
        return ""
    from knarr.api.selectors import SelectorError, from_label_selector, parse_label_selector

    try:
        if selector.get("rawSelector"):
            return str(parse_label_selector(selector["rawSelector"]))
        return str(from_label_selector({"matchExpressions": selector.get("requirements") or []}))
    except SelectorError as error:
        problems.append(f"spec.resourceAttributes.labelSelector partially ignored due to parse error: {error}")
        return ""


def _aggregate(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _raise_invalid(found: list[FieldError]) -> None:
    if found:
        raise errors.invalid(_GROUP_KIND, "", found)


def _metadata_errors(obj: Object, *, namespace: bool = False) -> list[FieldError]:
    metadata = {key: value for key, value in (obj.get("metadata") or {}).items() if value and key != "managedFields"}
    if namespace:
        metadata.pop("namespace", None)
    if metadata:
        return [invalid_value("metadata", obj["metadata"], "must be empty except for namespace" if namespace else "must be empty")]
    return []


def _spec_errors(spec: Object, *, subject: bool) -> list[FieldError]:
    found: list[FieldError] = []
    resource, path = spec.get("resourceAttributes"), spec.get("nonResourceAttributes")
    if resource is not None and path is not None:
        found.append(invalid_value("spec.nonResourceAttributes", path, "cannot be specified in combination with resourceAttributes"))
    if resource is None and path is None:
        text = "exactly one of nonResourceAttributes or resourceAttributes must be specified"
        found.append(invalid_value("spec.resourceAttributes", None, text))
    if subject and not spec.get("user") and not spec.get("groups"):
        found.append(invalid_value("spec.user", spec.get("user") or "", "at least one of user or group must be specified"))
    for kind in ("fieldSelector", "labelSelector"):
        selector = (resource or {}).get(kind)
        if selector is not None:
            found += _selector_errors(f"spec.resourceAttributes.{kind}", selector)
    return found


def _selector_errors(path: str, selector: dict[str, Any]) -> list[FieldError]:
    raw, requirements = selector.get("rawSelector"), selector.get("requirements") or []
    found: list[FieldError] = []
    if raw and requirements:
        found.append(invalid_value(f"{path}.rawSelector", raw, "may not specified at the same time as requirements"))
    if not raw and not requirements:
        found.append(required(f"{path}.requirements", f"when {path} is specified, requirements or rawSelector is required"))
    for index, requirement in enumerate(requirements):
        here = f"{path}.requirements[{index}]"
        operator, values = requirement.get("operator") or "", requirement.get("values") or []
        if not requirement.get("key"):
            found.append(required(f"{here}.key", "must be specified"))
        if operator in ("In", "NotIn") and not values:
            found.append(required(f"{here}.values", "must be specified when `operator` is 'In' or 'NotIn'"))
        elif operator in ("Exists", "DoesNotExist") and values:
            found.append(errors.field_forbidden(f"{here}.values", "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"))
        elif not operator:
            found.append(required(f"{here}.operator", "must be specified"))
    return found


class IdentityReviews:
    """TokenReview and SelfSubjectReview."""

    def __init__(self, authenticator: RequestAuthenticator, api_audiences: tuple[str, ...]) -> None:
        self._authenticator = authenticator
        self._api_audiences = api_audiences

    async def token(self, review: ReviewRequest) -> Object:
        spec = review.object.get("spec") or {}
        token = spec.get("token") or ""
        if not token:
            raise errors.bad_request("token is required for TokenReview in authentication")
        audiences = tuple(spec.get("audiences") or ()) or self._api_audiences
        status: Object = {"user": {}}
        try:
            found = await self._authenticator.authenticate_token(token, audiences)
            if found is None:
                status["error"] = "invalid bearer token"
            else:
                if not any(audience in audiences for audience in found.audiences):
                    raise errors.internal("error validating audiences")
                status = {"authenticated": True, "user": found.user.to_object(), "audiences": list(found.audiences)}
        except TokenRefused as refusal:
            status["error"] = f"[invalid bearer token, {refusal}]"
        return {**review.object, "status": status}

    async def self_subject(self, review: ReviewRequest) -> Object:
        return {
            "kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"creationTimestamp": clock.now_rfc3339()}, "status": {"userInfo": review.user.to_object()},
        }  # fmt: skip
