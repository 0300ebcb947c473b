"""Which resources a server really serves, built-in or not, as `Resource` values.

Callers: garbage collector, namespace deletion, resource quota, kubectl: everybody who must
follow custom resources. One request to each of two aggregated documents; servers without them
are asked group by group.
Source: client-go discovery/discovery_client.go; apidiscovery.k8s.io/v2.
"""

from __future__ import annotations

import asyncio
from types import MappingProxyType

import orjson

from knarr.api.errors import StatusError
from knarr.api.scheme import SCHEME, Resource, Subresource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

_ACCEPT = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"


async def server_resources(client: Client) -> tuple[list[Resource], set[str]]:
    """Read all resources of the preferred version of each group.

    Returns:
      (resources, failed): failed holds the "group/version"s that could not be asked (an aggregated
      server that is down); their resources are missing.
    """
    resources: list[Resource] = []
    failed: set[str] = set()
    for root in ("/api", "/apis"):
        response = await client.request("GET", root, headers={"Accept": _ACCEPT})
        document: Object = orjson.loads(response.body)
        if document.get("kind") == "APIGroupDiscoveryList":
            for group in document.get("items") or []:
                _read_group(group, resources, failed)
        else:
            await _legacy(client, root, document, resources, failed)
    return resources, failed


async def served_resource(client: Client, group: str, version: str, plural: str) -> Resource | None:
    """Read one resource of one version, preferred or not; None if it is not served."""
    try:
        listed: Object = orjson.loads((await client.request("GET", f"/apis/{group}/{version}" if group else f"/api/{version}")).body)
    except StatusError as error:
        if error.code == 404:
            return None
        raise
    return next((_listed(group, version, item) for item in listed.get("resources") or [] if item["name"] == plural), None)


def _read_group(group: Object, resources: list[Resource], failed: set[str]) -> None:
    name = group["metadata"].get("name") or ""
    seen: set[str] = set()
    # Versions come in order of preference; a resource counts in the first that has it.
    for version in group.get("versions") or []:
        if version.get("freshness") == "Stale":
            failed.add(f"{name}/{version['version']}" if name else version["version"])
        for item in version.get("resources") or []:
            if item["resource"] not in seen:
                seen.add(item["resource"])
                resources.append(_resource(name, version["version"], item))


def _resource(group: str, version: str, item: Object) -> Resource:
    builtin = SCHEME.resource(group, version, item["resource"])
    if builtin is not None:
        return builtin
    kind = (item.get("responseKind") or {}).get("kind") or ""
    subresources = {
        sub["subresource"]: Subresource(
            sub["subresource"],
            (sub.get("responseKind") or {}).get("group") or group,
            (sub.get("responseKind") or {}).get("version") or version,
            (sub.get("responseKind") or {}).get("kind") or "",
            tuple(sub.get("verbs") or ()),
        )
        for sub in item.get("subresources") or []
    }
    return Resource(
        group=group, version=version, plural=item["resource"], singular=item.get("singularResource") or kind.lower(), kind=kind,
        namespaced=item.get("scope") == "Namespaced", short_names=tuple(item.get("shortNames") or ()),
        categories=tuple(item.get("categories") or ()), verbs=tuple(item.get("verbs") or ()),
        subresources=MappingProxyType(subresources), custom=True,
    )  # fmt: skip


async def _legacy(client: Client, root: str, document: Object, resources: list[Resource], failed: set[str]) -> None:
    if root == "/api":
        paths = [("", version) for version in document.get("versions") or []]
    else:
        paths = [(group["name"], version["version"]) for group in document.get("groups") or [] for version in group["versions"]]

    async def read(group: str, version: str) -> Object | None:
        try:
            path = f"/apis/{group}/{version}" if group else f"/api/{version}"
            listed: Object = orjson.loads((await client.request("GET", path)).body)
            return listed
        except (StatusError, HTTPError):
            failed.add(f"{group}/{version}" if group else version)
            return None

    seen: set[tuple[str, str]] = set()
    for (group, version), listed in zip(paths, await asyncio.gather(*[read(*path) for path in paths]), strict=True):
        for item in (listed or {}).get("resources") or []:
            if "/" in item["name"] or (group, item["name"]) in seen:
                continue
            seen.add((group, item["name"]))
            resources.append(_listed(group, version, item))


def _listed(group: str, version: str, item: Object) -> Resource:
    """A resource as an APIResourceList tells it; without its subresources, unless it is built in."""
    builtin = SCHEME.resource(group, version, item["name"])
    return builtin or Resource(
        group=group, version=version, plural=item["name"], singular=item.get("singularName") or "", kind=item["kind"],
        namespaced=item["namespaced"], short_names=tuple(item.get("shortNames") or ()),
        categories=tuple(item.get("categories") or ()), verbs=tuple(item.get("verbs") or ()), custom=True,
    )  # fmt: skip
