"""`knarr why ns/NAME`: what keeps a namespace Terminating."""

from __future__ import annotations

from knarr.api.errors import StatusError
from knarr.api.resources import API_SERVICES, NAMESPACES
from knarr.api.types import Object
from knarr.client.discovery import server_resources
from knarr.client.rest import Client
from knarr.cluster.why.facts import condition, find
from knarr.network.why import Step

_MOST_OBJECTS = 10


async def why(client: Client, name: str) -> list[Step]:
    """What the namespace controller has said, and the objects that are left. Raises StatusError."""
    namespace = await find(client, NAMESPACES, name)
    if namespace is None:
        return [Step(False, f"namespace {name} does not exist")]
    if "deletionTimestamp" not in namespace["metadata"]:
        return [Step(True, f"namespace {name} is {(namespace.get('status') or {}).get('phase')}, nobody has deleted it")]
    steps = [Step(False, f"namespace {name} is terminating since {namespace['metadata']['deletionTimestamp']}")]
    problems = [item for item in (namespace.get("status") or {}).get("conditions") or () if item.get("status") == "True"]
    steps += [Step(False, f"{item['type']}: {item.get('message')}") for item in problems]
    if condition(namespace, "NamespaceDeletionDiscoveryFailure") is None:
        steps.append(Step(False, "the namespace controller has not reported yet: does it run?"))
    steps += await _left(client, name)
    steps += await _unavailable(client)
    own = [item for item in namespace["spec"].get("finalizers") or () if item != "kubernetes"] + list(namespace["metadata"].get("finalizers") or ())
    steps += [Step(False, f"the namespace itself has finalizer {item}: whoever set it has to take it away") for item in own]
    return steps


async def _left(client: Client, namespace: str) -> list[Step]:
    """The objects that are still there, those with finalizers first, as they hold the others up."""
    found: list[tuple[bool, str]] = []
    for resource in (await server_resources(client))[0]:
        if not resource.namespaced or "list" not in resource.verbs or "delete" not in resource.verbs:
            continue
        try:
            items = (await client.list(resource, namespace)).get("items") or []
        except StatusError as error:
            found.append((False, f"{resource.plural} cannot be listed: {error.message}"))
            continue
        # Events of all that ends are written until the end, and are no reason.
        found += [] if resource.plural == "events" else [_describe(resource.plural, item) for item in items]
    found.sort()
    steps = [Step(False, text) for _, text in found[:_MOST_OBJECTS]]
    if len(found) > _MOST_OBJECTS:
        steps.append(Step(None, f"{len(found) - _MOST_OBJECTS} more objects are left"))
    return steps


def _describe(plural: str, item: Object) -> tuple[bool, str]:
    """(whether nothing holds it, what to say)."""
    metadata = item["metadata"]
    kept = metadata.get("finalizers") or ()
    text = f"{plural}/{metadata['name']} is left"
    if "deletionTimestamp" in metadata:
        text = f"{plural}/{metadata['name']} is being deleted since {metadata['deletionTimestamp']}"
        grace = metadata.get("deletionGracePeriodSeconds")
        text += f" with {grace} s of grace" if grace else ""
    if kept:
        text += f", kept by finalizer {', '.join(kept)}: whoever set it has to take it away"
    return not kept, text


async def _unavailable(client: Client) -> list[Step]:
    """Extension servers that do not answer: what they keep cannot be listed, so it cannot be deleted."""
    steps = []
    for item in (await client.list(API_SERVICES)).get("items") or []:
        available = condition(item, "Available")
        if available is not None and available.get("status") != "True":
            steps.append(Step(False, f"APIService {item['metadata']['name']} does not answer: {available.get('message')}"))
    return steps
