"""Discovery: /api, /apis, groups, versions, and both of them aggregated; made from the registry, kept until it changes.

Source: apiserver endpoints/discovery, endpoints/discovery/aggregated; KEP-3352.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import orjson

from knarr.api.scheme import OPTIONAL, SCHEME, Resource
from knarr.api.types import Object
from knarr.apiserver import negotiation

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

AGGREGATED = negotiation.Clause("", "APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2")


class Discovery:
    """Documents by path."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        self._generation = -1
        self._documents: dict[str, tuple[bytes, str]] = {}
        self.hidden: set[tuple[str, str, str]] = set()
        """Resources that are served but not announced (their names are not accepted yet)."""
        self._foreign: dict[tuple[str, str], list[Object]] = {}
        """Resources of extension API servers: (group, version) -> APIResource entries."""

    def set_foreign(self, group: str, version: str, resources: list[Object]) -> None:
        """Announce what an extension API server serves."""
        if self._foreign.get((group, version)) != resources:
            self._foreign[group, version] = resources
            self._generation = -1

    def drop_foreign(self, group: str, version: str) -> None:
        """Take an extension API server's version off."""
        if self._foreign.pop((group, version), None) is not None:
            self._generation = -1

    def document(self, path: str, *, aggregated: bool) -> tuple[bytes, str] | None:
        """Return (JSON, entity tag) of a discovery path, None when there is no such document; only aggregated ones have a tag."""
        registry = self._server.registry
        if self._generation != registry.generation:
            self._generation = registry.generation
            self._documents = {}
        key = f"{path}#aggregated" if aggregated else path
        found = self._documents.get(key)
        if found is None:
            made = self._aggregated(path) if aggregated else self._make(path)
            if made is None:
                return None
            body = orjson.dumps(made) + b"\n"
            tag = '"' + hashlib.sha512(body).hexdigest().upper() + '"' if aggregated else ""
            found = self._documents[key] = body, tag
        return found

    # -- the content -----------------------------------------------------------------------------------------------------------
    def groups(self) -> dict[str, list[str]]:
        """Return group -> versions, the preferred one first, in the order of /apis; without the core group."""
        out: dict[str, list[str]] = {}
        order = {group.name: (group.order, list(group.versions)) for group in (*OPTIONAL.groups(), *SCHEME.groups())}
        found: dict[str, set[str]] = {}
        for group, version, plural in self._server.registry.endpoints:
            if group and (group, version, plural) not in self.hidden:
                found.setdefault(group, set()).add(version)
        for group, version in self._foreign:
            found.setdefault(group, set()).add(version)
        for group in sorted(found, key=lambda name: (order[name][0], "") if name in order else (1000, name)):
            known = order[group][1] if group in order else []
            versions = sorted(found[group] - set(known), key=version_priority)
            out[group] = [v for v in known if v in found[group]] + versions
        return out

    def resources(self, group: str, version: str) -> list[Resource]:
        found = [
            endpoint.resource for (g, v, plural), endpoint in self._server.registry.endpoints.items()
            if g == group and v == version and (g, v, plural) not in self.hidden
        ]  # fmt: skip
        return sorted(found, key=lambda resource: resource.plural)

    def _make(self, path: str) -> Object | None:
        if path == "/api":
            address = f"{self._server.advertise_address}:{self._server.port}"
            return {
                "kind": "APIVersions", "versions": ["v1"],
                "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
            }  # fmt: skip
        if path == "/apis":
            groups = [_group(name, versions) for name, versions in self.groups().items()]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        parts = path.strip("/").split("/")
        if parts[0] == "api" and len(parts) == 2 and parts[1] == "v1":
            return self._resource_list("", "v1")
        if parts[0] != "apis" or len(parts) not in (2, 3):
            return None
        versions = self.groups().get(parts[1])
        if versions is None:
            return None
        if len(parts) == 2:
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], versions)}
        return self._resource_list(parts[1], parts[2]) if parts[2] in versions else None

    def _resource_list(self, group: str, version: str) -> Object | None:
        if (group, version) in self._foreign:
            return None  # answered by the extension server itself
        entries: list[Object] = []
        for resource in self.resources(group, version):
            entry: Object = {
                "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced, "kind": resource.kind,
                "verbs": _verbs(resource),
            }  # fmt: skip
            if resource.short_names:
                entry["shortNames"] = list(resource.short_names)
            if resource.categories:
                entry["categories"] = list(resource.categories)
            if resource.storage_version_hash:
                entry["storageVersionHash"] = resource.storage_version_hash
            entries.append(entry)
            for name in sorted(resource.subresources):
                sub = resource.subresources[name]
                part: Object = {"name": f"{resource.plural}/{name}", "singularName": "", "namespaced": resource.namespaced}
                if (sub.group, sub.version) != (resource.group, resource.version):
                    if sub.group:
                        part["group"] = sub.group
                    part["version"] = sub.version
                part["kind"] = sub.kind
                part["verbs"] = sorted(sub.verbs)
                entries.append(part)
        out: Object = {"kind": "APIResourceList"}
        if group:
            out["apiVersion"] = "v1"
        out["groupVersion"] = f"{group}/{version}" if group else version
        out["resources"] = entries
        return out

    def _aggregated(self, path: str) -> Object:
        items: list[Object] = []
        if path == "/api":
            items.append({"metadata": {}, "versions": [self._aggregated_group("", "v1")]})
        else:
            for group, versions in self.groups().items():
                items.append({
                    "metadata": {"name": group},
                    "versions": [self._aggregated_group(group, each) for each in versions],
                })
        return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}

    def _aggregated_group(self, group: str, version: str) -> Object:
        foreign = self._foreign.get((group, version))
        if foreign is not None:
            return {"version": version, "resources": _from_resource_list(foreign), "freshness": "Current"}
        entries: list[Object] = []
        for resource in self.resources(group, version):
            entry: Object = {
                "resource": resource.plural,
                "responseKind": _response_kind(resource, resource.group, resource.version, resource.kind),
                "scope": "Namespaced" if resource.namespaced else "Cluster", "singularResource": resource.singular,
                "verbs": _verbs(resource),
            }  # fmt: skip
            if resource.short_names:
                entry["shortNames"] = list(resource.short_names)
            if resource.categories:
                entry["categories"] = list(resource.categories)
            subs = [self._aggregated_sub(resource, name) for name in sorted(resource.subresources)]
            if subs:
                entry["subresources"] = subs
            entries.append(entry)
        return {"version": version, "resources": entries, "freshness": "Current"}

    @staticmethod
    def _aggregated_sub(resource: Resource, name: str) -> Object:
        sub = resource.subresources[name]
        kind = _response_kind(resource, sub.group, sub.version, sub.kind)
        return {"subresource": name, "responseKind": kind, "verbs": sorted(sub.verbs)}


def _response_kind(resource: Resource, group: str, version: str, kind: str) -> Object:
    """Built-in resources say a group and version only where it is not their own; custom ones always do."""
    own = not resource.custom and (group, version) == (resource.group, resource.version)
    return {"group": "" if own else group, "version": "" if own else version, "kind": kind}


def _verbs(resource: Resource) -> list[str]:
    return list(resource.verbs) if resource.custom else sorted(resource.verbs)


def _group(name: str, versions: list[str]) -> Object:
    entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": entries, "preferredVersion": entries[0]}


def _from_resource_list(resources: list[Object]) -> list[Object]:
    """Return aggregated entries made of a plain APIResourceList; a subresource that comes alone makes its resource."""
    entries: dict[str, Object] = {}
    for one in sorted(resources, key=lambda one: "/" in str(one.get("name"))):
        plural, _, sub = str(one.get("name")).partition("/")
        kind = {"group": one.get("group") or "", "version": one.get("version") or "", "kind": one.get("kind") or ""}
        scope, verbs = "Namespaced" if one.get("namespaced") else "Cluster", one.get("verbs") or []
        if sub:
            nothing = {"group": "", "version": "", "kind": ""}
            parent = entries.setdefault(plural, {"resource": plural, "responseKind": nothing, "scope": scope, "singularResource": "", "verbs": []})
            parent.setdefault("subresources", []).append({"subresource": sub, "responseKind": kind if kind["kind"] else nothing, "verbs": verbs})
            continue
        entry: Object = {
            "resource": plural, "responseKind": kind, "scope": scope, "singularResource": one.get("singularName") or "", "verbs": verbs,
        }  # fmt: skip
        for key in ("shortNames", "categories"):
            if one.get(key):
                entry[key] = one[key]
        entries[plural] = entry
    return list(entries.values())


def wanted(path: str, accept: str) -> negotiation.Clause | None:
    """Return what an Accept header asks for of a discovery path, an aggregated document before a plain one; None: nothing there is."""
    clauses = negotiation.parse_accept(accept)
    if path in ("/api", "/apis"):
        for clause in clauses:
            if clause[1:4] == AGGREGATED[1:4]:
                return clause
    return next((clause for clause in clauses if not clause.as_kind), None)


def version_priority(version: str) -> tuple[Any, ...]:
    """Sort key: v10 before v2 before v1beta2 before v1alpha1 before anything that is no version.

    Source: apimachinery version.CompareKubeAwareVersionStrings.
    """
    import re

    match = re.fullmatch(r"v([1-9][0-9]*)(?:(alpha|beta)([1-9][0-9]*))?", version)
    if match is None:
        return (1, 0, 0, 0, version)
    stage = {None: 0, "beta": 1, "alpha": 2}[match[2]]
    return (0, stage, -int(match[1]), -int(match[3] or 0), version)
