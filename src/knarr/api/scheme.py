"""Which resources the built-in API has: a lookup over `facts/discovery.json`.

Used by everybody who must turn a kind or a path into a resource. `SCHEME` holds only what a 1.35 API server serves by
default (GA versions); `OPTIONAL` what one can be told to serve as well. Custom resources get a `Resource` of the same class,
made by the API server; they are never put into `SCHEME`, which is immutable after import.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import orjson

from knarr.api.facts import read_fact

_EMPTY: Mapping[str, "Subresource"] = MappingProxyType({})

# Off by default in 1.35; what works with them is there once they are served.
_OPTIONAL = ("storagemigration.k8s.io/v1alpha1", "resource.k8s.io/v1alpha3", "certificates.k8s.io/v1beta1", "certificates.k8s.io/v1alpha1")
# Served in a later version of the same group alone.
_OUTDATED = frozenset({"certificates.k8s.io/v1alpha1/clustertrustbundles"})

# One kind served under two groups or versions is stored once; the store key follows the storage side.
_STORED_AS = {("events.k8s.io", "events"): ""}
_STORAGE_VERSION = {
    ("events.k8s.io", "v1", "Event"): ("", "v1"),
    ("autoscaling", "v1", "HorizontalPodAutoscaler"): ("autoscaling", "v2"),
}


@dataclass(frozen=True, slots=True)
class Subresource:
    """A subresource such as status or scale; group and version are those of its own kind."""

    name: str
    group: str
    version: str
    kind: str
    verbs: tuple[str, ...]

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


@dataclass(frozen=True, slots=True)
class Resource:
    """One served resource: a plural in a group and version. Hashable and shared."""

    group: str
    version: str
    plural: str
    singular: str
    kind: str
    namespaced: bool
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    subresources: Mapping[str, Subresource] = field(default_factory=lambda: _EMPTY, hash=False, compare=False)
    storage_version_hash: str = ""
    list_kind: str = ""
    custom: bool = False
    api_version: str = field(init=False, compare=False)
    prefix: str = field(init=False, compare=False)
    storage_api_version: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "api_version", f"{self.group}/{self.version}" if self.group else self.version)
        stored_group = self.group if self.custom else _STORED_AS.get((self.group, self.plural), self.group)
        set_field(self, "prefix", f"/registry/{stored_group or 'core'}/{self.plural}/")
        group, version = _STORAGE_VERSION.get((self.group, self.version, self.kind), (self.group, self.version))
        set_field(self, "storage_api_version", f"{group}/{version}" if group else version)
        if not self.list_kind:
            set_field(self, "list_kind", self.kind + "List")

    def __hash__(self) -> int:
        # Group, version and plural name it; the generated hash would go through every field, several times a request.
        return hash((self.group, self.version, self.plural))

    @property
    def gv(self) -> str:
        """The same as `api_version`: "v1", "apps/v1"."""
        return self.api_version

    @property
    def group_resource(self) -> str:
        """The name in messages: "pods", "deployments.apps"."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def group_kind(self) -> str:
        """The kind in messages: "Pod", "Deployment.apps"."""
        return f"{self.kind}.{self.group}" if self.group else self.kind

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """Build the URL path.

        Args:
          namespace: None or "" means all namespaces (or a cluster-scoped resource).
          name: None means the collection.
          subresource: e.g. "status"; needs a name.
        """
        base = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [base]
        if namespace and self.namespaced:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        if name:
            parts.append(name)
            if subresource:
                parts.append(subresource)
        return "/".join(parts)


@dataclass(frozen=True, slots=True)
class Group:
    """An API group with its served versions, the preferred one first."""

    name: str
    versions: tuple[str, ...]
    preferred: str
    order: int
    priority: Mapping[str, tuple[int, int]]


class Scheme:
    """Immutable index of resources by path parts and by kind."""

    def __init__(self, resources: list[Resource], groups: list[Group]) -> None:
        self._resources = resources
        self._groups = groups
        self._by_path = {(r.group, r.version, r.plural): r for r in resources}
        self._by_kind = {(r.api_version, r.kind): r for r in resources}

    def resource(self, group: str, version: str, plural: str) -> Resource | None:
        """The resource at these path parts (group "" for core), None if not built in."""
        return self._by_path.get((group, version, plural))

    def for_kind(self, api_version: str, kind: str) -> Resource | None:
        """The resource of a top-level kind, None if not built in or not a resource of its own."""
        return self._by_kind.get((api_version, kind))

    def resources(self) -> list[Resource]:
        """All built-in resources."""
        return list(self._resources)

    def groups(self) -> list[Group]:
        """All built-in groups, in the order of /apis; the core group (name "") first."""
        return list(self._groups)


def builtin(group: str, version: str, plural: str) -> Resource:
    """The built-in resource, served by default or not; KeyError is our bug."""
    found = SCHEME.resource(group, version, plural) or OPTIONAL.resource(group, version, plural)
    if found is None:
        raise KeyError((group, version, plural))
    return found


def load_discovery() -> dict[str, Any]:
    """The discovery facts as data."""
    data: dict[str, Any] = orjson.loads(read_fact("discovery.json"))
    return data


def _build(facts: dict[str, Any]) -> Scheme:
    groups = [_group(name, entry, tuple(entry["onByDefault"])) for name, entry in facts["groups"].items() if entry["onByDefault"]]
    groups.sort(key=lambda g: g.order)
    resources = [_resource(*_split(key), entry) for key, entry in facts["resources"].items() if entry.get("onByDefault")]
    return Scheme(resources, groups)


def _build_optional(facts: dict[str, Any]) -> Scheme:
    groups = [
        _group(name, entry, versions)
        for name, entry in facts["groups"].items()
        if (versions := tuple(version for version in entry["versions"] if f"{name}/{version}" in _OPTIONAL))
    ]
    keys = [(key, _split(key)) for key in facts["resources"] if key not in _OUTDATED]
    resources = [_resource(*parts, facts["resources"][key]) for key, parts in keys if f"{parts[0]}/{parts[1]}" in _OPTIONAL]
    return Scheme(resources, groups)


def _group(name: str, entry: dict[str, Any], versions: tuple[str, ...]) -> Group:
    return Group(
        name="" if name == "(core)" else name, versions=versions, preferred=versions[0], order=entry["order"],
        priority={v: (p[0], p[1]) for v, p in entry.get("priority", {}).items()},
    )


def _split(key: str) -> tuple[str, str, str]:
    parts = key.split("/")
    return ("", parts[0], parts[1]) if len(parts) == 2 else (parts[0], parts[1], parts[2])


def _resource(group: str, version: str, plural: str, entry: dict[str, Any]) -> Resource:
    def subresources() -> Iterator[tuple[str, Subresource]]:
        for name, sub in entry.get("subresources", {}).items():
            yield name, Subresource(name, sub.get("group", group), sub.get("version", version), sub["kind"], tuple(sub["verbs"]))

    return Resource(
        group=group, version=version, plural=plural, singular=entry["singular"], kind=entry["kind"],
        namespaced=entry["namespaced"], short_names=tuple(entry.get("shortNames", ())),
        categories=tuple(entry.get("categories", ())), verbs=tuple(entry["verbs"]),
        subresources=MappingProxyType(dict(subresources())), storage_version_hash=entry.get("storageVersionHash", ""),
    )


_facts = load_discovery()
SCHEME = _build(_facts)
OPTIONAL = _build_optional(_facts)
"""What an API server serves only when it is told to (--runtime-config)."""
del _facts
