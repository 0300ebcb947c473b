"""The OpenAPI documents of a server: index and documents by group version, made on first demand and kept.

Owner: the API server, one object. Built-in group versions never change; custom ones are set by the CRD code with
`set_custom`. Memory: a document is kept as compressed bytes, so idle ones cost little.
"""

import hashlib
import zlib
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from knarr.api import schema, typeinfo
from knarr.api.openapi import crd, definitions, gnostic, merge, paths, v2
from knarr.api.scheme import OPTIONAL, SCHEME, Resource
from knarr.api.types import Object

_META = paths.META
_TITLE = {"title": "Kubernetes", "version": "v1.35.0"}
_SECURITY = {"BearerToken": {"type": "apiKey", "name": "authorization", "in": "header", "description": "Bearer Token authentication"}}
_VERSION = "io.k8s.apimachinery.pkg.version.Info"


@dataclass(frozen=True, slots=True)
class CustomAPI:
    """One served version of a CRD. open_api_schema is the version's openAPIV3Schema, or None."""

    resource: Resource
    open_api_schema: Object | None


@dataclass(frozen=True, slots=True)
class Document:
    """A rendered document: JSON bytes (compressed) and the hash that its URL and ETag carry."""

    compressed: bytes
    hash: str

    @property
    def body(self) -> bytes:
        return zlib.decompress(self.compressed)


def _render(value: Any) -> Document:
    body = orjson.dumps(value)
    return Document(zlib.compress(body, 6), hashlib.sha512(body).hexdigest().upper())


class OpenAPIDocuments:
    """All OpenAPI documents of a server; see the module."""

    def __init__(self, also: Container[str] = ()) -> None:
        """`also`: group versions served that are off by default."""
        self._builtin: dict[str, list[Resource]] = {}
        for resource in (*SCHEME.resources(), *(one for one in OPTIONAL.resources() if one.api_version in also)):
            self._builtin.setdefault(_path_of(resource), []).append(resource)
        self._custom: dict[str, list[CustomAPI]] = {}
        self._foreign: dict[str, bytes] = {}
        """Swagger 2.0 documents of extension servers, compressed, by path."""
        self._documents: dict[str, Document] = {}
        self._v2: Document | None = None
        self._v2_binary: Document | None = None
        self._index: bytes | None = None

    def set_custom(self, apis: Iterable[CustomAPI]) -> None:
        """Replace the custom APIs; documents whose content did not change keep their hash."""
        grouped: dict[str, list[CustomAPI]] = {}
        for api in apis:
            grouped.setdefault(_path_of(api.resource), []).append(api)
        for path in set(self._custom) | set(grouped):
            if self._custom.get(path) != grouped.get(path):
                self._documents.pop(path, None)
        self._custom = grouped
        self._v2 = self._v2_binary = None
        self._index = None

    def set_foreign(self, path: str, document: dict[str, Any] | None) -> None:
        """Take over what an extension server's Swagger 2.0 document says of a path such as "apis/GROUP/VERSION"; None takes it off."""
        packed = None if document is None else zlib.compress(orjson.dumps(merge.below(document, f"/{path}/")), 6)
        if self._foreign.get(path) == packed:
            return
        if packed is None:
            del self._foreign[path]
        else:
            self._foreign[path] = packed
        self._v2 = self._v2_binary = None

    def v3_paths(self) -> list[str]:
        """Paths that have a v3 document, such as "api/v1", "apis/apps/v1", "version"."""
        fixed = ["api", "apis", "version"]
        groups = {f"apis/{path.split('/')[1]}" for path in (*self._builtin, *self._custom) if path.startswith("apis/")}
        return sorted({*fixed, *groups, *self._builtin, *self._custom})

    def v3_index(self) -> bytes:
        """The body of /openapi/v3 as JSON."""
        if self._index is None:
            entries = {
                path: {"serverRelativeURL": f"/openapi/v3/{path}?hash={self._hash(path)}"} for path in self.v3_paths()
            }
            self._index = orjson.dumps({"paths": entries})
        return self._index

    def v3(self, path: str) -> Document | None:
        """The document of a path such as "apis/apps/v1"; None if there is none."""
        found = self._documents.get(path)
        if found is None and path in self.v3_paths():
            made = self._build(path)
            found = self._documents[path] = Document(_render(made).compressed, self._hash(path))
        return found

    def v2(self) -> Document:
        """The Swagger 2.0 document of everything."""
        if self._v2 is None:
            merged: dict[str, Any] = {"paths": {}, "components": {"schemas": {}}}
            for path in self.v3_paths():
                document = self._build(path)
                merged["paths"].update(document["paths"])
                merged["components"]["schemas"].update(document["components"]["schemas"])
            made = v2.convert(merged, _TITLE, _SECURITY)
            for _, packed in sorted(self._foreign.items()):
                merge.merge(made, orjson.loads(zlib.decompress(packed)))
            self._v2 = _render(made)
        return self._v2

    def v2_protobuf(self) -> Document:
        """The same as `v2` in the binary form of `gnostic.MEDIA_TYPE`."""
        if self._v2_binary is None:
            json_form = self.v2()
            body = gnostic.encode(orjson.loads(json_form.body))
            self._v2_binary = Document(zlib.compress(body, 6), json_form.hash)
        return self._v2_binary

    def _hash(self, path: str) -> str:
        """Stable without rendering: the built-in content follows from the facts, the custom one from its schemas."""
        content = orjson.dumps([(repr(api.resource), api.open_api_schema) for api in self._custom.get(path, ())])
        return hashlib.sha512(_facts_stamp() + path.encode() + content).hexdigest().upper()

    def _build(self, path: str) -> dict[str, Any]:
        if path in self._builtin:
            found, names = self._builtin_paths(path)
            schemas: dict[str, Any] = {}
        elif path in self._custom:
            found, schemas, names = self._custom_paths(path)
        else:
            found, names = _fixed_paths(path)
            schemas = {}
        for name in definitions.closure(names):
            schemas.setdefault(name, definitions.definition(name))
        return {
            "openapi": "3.0.0", "info": _TITLE, "paths": dict(sorted(found.items())),
            "components": {"schemas": dict(sorted(schemas.items())), "securitySchemes": _SECURITY},
        }

    def _builtin_paths(self, path: str) -> tuple[dict[str, Any], list[str]]:
        found: dict[str, Any] = {f"/{path}/": _discovery(path)}
        names = [_META + n for n in ("APIResourceList", "DeleteOptions", "Status", "Patch", "WatchEvent")]
        for resource in self._builtin[path]:
            name = schema.definition_name(resource.api_version, resource.kind)
            list_name = name + "List"
            subresources: dict[str, str] = {}
            for sub_name, subresource in resource.subresources.items():
                try:
                    message = typeinfo.message(typeinfo.message_name(subresource.api_version, subresource.kind))
                except KeyError:
                    continue
                if schema.definition(message.openapi) is not None:
                    subresources[sub_name] = message.openapi
            found.update(paths.ResourcePaths(resource, name, list_name, subresources).items())
            names += [name, list_name, *subresources.values()]
        return found, names

    def _custom_paths(self, path: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        found: dict[str, Any] = {f"/{path}/": _discovery(path)}
        schemas: dict[str, Any] = {}
        names = [_META + n for n in ("APIResourceList", "DeleteOptions", "Status", "Patch", "ObjectMeta", "ListMeta")]
        for api in self._custom[path]:
            name = crd.definition_name(api.resource)
            schemas[name] = crd.definition(api.resource, api.open_api_schema)
            schemas[name + "List"] = crd.list_definition(api.resource, name)
            scale = "io.k8s.api.autoscaling.v1.Scale"
            subresources = {sub: scale if sub == "scale" else name for sub in api.resource.subresources}
            if "scale" in subresources:
                names.append(scale)
            found.update(paths.ResourcePaths(api.resource, name, name + "List", subresources).items())
        return found, schemas, names


def _path_of(resource: Resource) -> str:
    return f"apis/{resource.group}/{resource.version}" if resource.group else f"api/{resource.version}"


def _facts_stamp() -> bytes:
    import os

    from knarr.api.facts import fact_path

    size = os.stat(fact_path("schema.json")).st_size
    return f"knarr-1.35-{size}".encode()


def _get(operation_id: str, name: str, tag: str) -> dict[str, Any]:
    return {"get": {
        "operationId": operation_id, "tags": [tag],
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": {"$ref": definitions.REF + name}}}},
                      "401": {"description": "Unauthorized"}},
    }}


def _discovery(path: str) -> dict[str, Any]:
    parts = path.split("/")
    group, version = (parts[1], parts[2]) if len(parts) == 3 else ("core", parts[1])
    word = paths.camel(group.split(".", 1)[0]) + paths.camel(version)
    return _get(f"get{word}APIResources", _META + "APIResourceList", f"{group.split('.', 1)[0]}_{version}")


def _fixed_paths(path: str) -> tuple[dict[str, Any], list[str]]:
    if path == "version":
        return {"/version/": _get("getCodeVersion", _VERSION, "version")}, [_VERSION]
    if path == "api":
        return {"/api/": _get("getCoreAPIVersions", _META + "APIVersions", "core")}, [_META + "APIVersions"]
    if path == "apis":
        return {"/apis/": _get("getAPIVersions", _META + "APIGroupList", "apis")}, [_META + "APIGroupList"]
    group = path.partition("/")[2]
    word = paths.camel(group.split(".", 1)[0])
    return {f"/{path}/": _get(f"get{word}APIGroup", _META + "APIGroup", group.split(".", 1)[0])}, [_META + "APIGroup"]
