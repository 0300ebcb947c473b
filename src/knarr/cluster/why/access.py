"""`knarr why can-i VERB RESOURCE`: the authorizers' own answer, for whoever is named by --as, and what would change it."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CLUSTER_ROLES, ROLES, SERVICE_ACCOUNTS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.auth.rules import resource_matches, rule_matches_verb
from knarr.client.discovery import server_resources
from knarr.client.rest import Client
from knarr.cluster.why.facts import find
from knarr.network.why import BadQuestion, Step

_SERVICE_ACCOUNT = "system:serviceaccount:"
_MOST_ROLES = 6
_AUTHORIZATION = "/apis/authorization.k8s.io/v1"


@dataclass(frozen=True)
class Request:
    """The request in question. A path ("/metrics") instead of a resource asks about something that is none."""

    verb: str
    resource: str
    name: str = ""
    namespace: str = "default"
    user: str = ""
    groups: tuple[str, ...] = ()


async def why(client: Client, request: Request) -> list[Step]:
    """Ask whether a request is allowed, and if not, what is and who could. Raises BadQuestion, StatusError."""
    headers = _impersonation(request)
    steps: list[Step] = []
    asked = request.resource.partition("/")
    found = None if request.resource.startswith("/") else await _find_resource(client, asked[0])
    if found is None and not request.resource.startswith("/"):
        steps.append(Step(None, f"the server has no resource {asked[0]!r}: a request for it would not be found even if it is allowed"))
    who = await _ask(client, "/apis/authentication.k8s.io/v1/selfsubjectreviews", {}, headers)
    user = who["status"]["userInfo"]
    attributes, words = _attributes(request, found)
    answer = (await _ask(client, f"{_AUTHORIZATION}/selfsubjectaccessreviews", {"spec": attributes}, headers))["status"]
    name = f"{user['username']} (groups {', '.join(user.get('groups') or ()) or 'none'})"
    if answer.get("allowed"):
        return [*steps, Step(True, f"{name} may {words}: {answer.get('reason') or 'the authorizer gives no reason'}")]
    said = "; ".join(part for part in (answer.get("reason"), answer.get("evaluationError")) if part)
    refusal = "denied by an authorizer" if answer.get("denied") else "no authorizer allows it"
    steps.append(Step(False, f"{name} may not {words}: {refusal}{f' ({said})' if said else ''}"))
    steps += await _account_steps(client, user["username"])
    if "resourceAttributes" in attributes:
        steps += await _allowed_instead(client, request, attributes["resourceAttributes"], headers)
        steps += await _roles(client, attributes["resourceAttributes"])
    return steps


def _impersonation(request: Request) -> dict[str, str]:
    if request.groups and not request.user:
        raise BadQuestion("--as-group needs --as as well")
    if len(request.groups) > 1:
        raise BadQuestion("one --as-group only: header fields are sent once")
    headers = {"Impersonate-User": request.user} if request.user else {}
    if request.groups:
        headers["Impersonate-Group"] = request.groups[0]
    return headers


async def _ask(client: Client, path: str, body: Object, headers: dict[str, str]) -> Object:
    answer: Object = orjson.loads((await client.request("POST", path, body=body, headers=headers)).body)
    return answer


async def _find_resource(client: Client, text: str) -> Resource | None:
    """By plural, singular, short name or kind; "deployments.apps" names the group as well."""
    wanted, _, group = text.lower().partition(".")
    for resource in (await server_resources(client))[0]:
        names = {resource.plural, resource.singular, resource.kind.lower(), *resource.short_names}
        if wanted in names and group in ("", resource.group):
            return resource
    return None


def _attributes(request: Request, found: Resource | None) -> tuple[Object, str]:
    """(the question for the authorizers, the same in words)."""
    if request.resource.startswith("/"):
        return {"nonResourceAttributes": {"verb": request.verb, "path": request.resource}}, f"{request.verb} {request.resource}"
    plain, _, subresource = request.resource.partition("/")
    plural, _, group = plain.partition(".")
    attributes: Object = {
        "verb": request.verb,
        "group": found.group if found is not None else group,
        "resource": found.plural if found is not None else plural,
    }
    if found is None or found.namespaced:
        attributes["namespace"] = request.namespace
    if subresource:
        attributes["subresource"] = subresource
    if request.name:
        attributes["name"] = request.name
    thing = attributes["resource"] + (f".{attributes['group']}" if attributes["group"] else "") + (f"/{subresource}" if subresource else "")
    where = f" in namespace {request.namespace}" if "namespace" in attributes else " in the cluster"
    return {"resourceAttributes": attributes}, f"{request.verb} {thing}{f' {request.name}' if request.name else ''}{where}"


async def _account_steps(client: Client, username: str) -> list[Step]:
    if not username.startswith(_SERVICE_ACCOUNT):
        return []
    namespace, _, name = username.removeprefix(_SERVICE_ACCOUNT).partition(":")
    if await find(client, SERVICE_ACCOUNTS, name, namespace) is None:
        return [Step(None, f"service account {namespace}/{name} does not exist")]
    return []


async def _allowed_instead(client: Client, request: Request, attributes: Object, headers: dict[str, str]) -> list[Step]:
    review = await _ask(client, f"{_AUTHORIZATION}/selfsubjectrulesreviews", {"spec": {"namespace": request.namespace}}, headers)
    verbs: dict[str, None] = {}
    for rule in (review.get("status") or {}).get("resourceRules") or ():
        groups = rule.get("apiGroups") or ()
        if (attributes["group"] in groups or "*" in groups) and _names_resource(rule, attributes):
            only = f" (only {', '.join(rule['resourceNames'])})" if rule.get("resourceNames") else ""
            verbs.update(dict.fromkeys(f"{verb}{only}" for verb in rule.get("verbs") or ()))
    text = f"allowed on {attributes['resource']} are: {', '.join(verbs)}" if verbs else f"nothing is allowed on {attributes['resource']}"
    return [Step(None, text)]


def _names_resource(rule: Object, attributes: Object) -> bool:
    return resource_matches(rule, attributes["resource"], attributes.get("subresource", ""))


async def _roles(client: Client, attributes: Object) -> list[Step]:
    """The roles that would allow it to whoever is bound to them."""
    namespace = attributes.get("namespace")
    found: list[str] = []
    try:
        listed = [("ClusterRole", item) for item in (await client.list(CLUSTER_ROLES)).get("items") or []]
        if namespace:
            listed = [("Role", item) for item in (await client.list(ROLES, namespace)).get("items") or []] + listed
    except StatusError as error:
        if not errors.is_forbidden(error):
            raise
        return []
    for kind, role in listed:
        if any(_rule_allows(rule, attributes) for rule in role.get("rules") or ()):
            found.append(f"{kind} {role['metadata']['name']}")
    # What belongs to components is not meant for others.
    found.sort(key=lambda text: (" system:" in text, text))
    if not found:
        return [Step(None, "no role of this cluster allows it")]
    more = f" and {len(found) - _MOST_ROLES} more" if len(found) > _MOST_ROLES else ""
    binding = "a RoleBinding or ClusterRoleBinding" if namespace else "a ClusterRoleBinding"
    return [Step(None, f"{binding} to one of these would allow it: {', '.join(found[:_MOST_ROLES])}{more}")]


def _rule_allows(rule: Object, attributes: Object) -> bool:
    groups, names = rule.get("apiGroups") or (), rule.get("resourceNames")
    return (
        rule_matches_verb(rule, attributes["verb"])
        and (attributes["group"] in groups or "*" in groups)
        and _names_resource(rule, attributes)
        and (not names or attributes.get("name") in names)
    )
