"""Path items of resources in OpenAPI v3 form: which verbs, parameters and bodies exist. Pure; used by documents.py."""

from typing import Any

from knarr.api.openapi.definitions import REF, group_version_kind
from knarr.api.scheme import Resource, Subresource

META = "io.k8s.apimachinery.pkg.apis.meta.v1."
_TYPES = ("application/json", "application/vnd.kubernetes.protobuf", "application/yaml")
_CUSTOM_TYPES = ("application/json", "application/yaml")
_STREAMS = {"exec", "attach", "portforward", "proxy", "log"}
_METHODS = {"create": "post", "get": "get", "list": "get", "update": "put", "patch": "patch", "delete": "delete", "deletecollection": "delete"}


def _query(name: str, kind: str = "string", *, required: bool = False) -> dict[str, Any]:
    parameter: dict[str, Any] = {"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": True}}
    if required:
        parameter["required"] = True
    return parameter


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "uniqueItems": True}}


_PRETTY = _query("pretty")
_WRITE = [_query("dryRun"), _query("fieldManager"), _query("fieldValidation")]
_DELETE = [_query("dryRun"), _query("gracePeriodSeconds", "integer"), _query("ignoreStoreReadErrorWithClusterBreakingPotential", "boolean"),
           _query("orphanDependents", "boolean"), _query("propagationPolicy")]
_LIST = [
    _query("allowWatchBookmarks", "boolean"), _query("continue"), _query("fieldSelector"), _query("labelSelector"),
    _query("limit", "integer"), _query("resourceVersion"), _query("resourceVersionMatch"), _query("sendInitialEvents", "boolean"),
    _query("timeoutSeconds", "integer"), _query("watch", "boolean"),
]
_COLLECTION_DELETE = [*(p for p in _LIST if p["name"] not in ("allowWatchBookmarks", "watch")),
                      *(p for p in _DELETE)]


def camel(text: str) -> str:
    """ "apps" and "v1" joined as in operation ids: first letters in upper case, no dots or dashes."""
    return "".join(part[:1].upper() + part[1:] for part in text.replace("-", ".").replace("_", ".").split("."))


def _group_word(resource: Resource) -> str:
    return camel(resource.group.split(".", 1)[0] or "core") if not resource.custom else camel(resource.group)


def _answer(name: str, types: tuple[str, ...]) -> dict[str, Any]:
    return {kind: {"schema": {"$ref": REF + name}} for kind in types}


def _responses(name: str, codes: tuple[str, ...], types: tuple[str, ...]) -> dict[str, Any]:
    words = {"200": "OK", "201": "Created", "202": "Accepted"}
    made: dict[str, Any] = {code: {"description": words[code], "content": _answer(name, types)} for code in codes}
    made["401"] = {"description": "Unauthorized"}
    return made


class ResourcePaths:
    """Makes the path items of one resource.

    Args:
      resource: Built in or custom.
      definition: Name of the kind's definition; list_definition that of its list.
      subresource_definitions: Names for the kinds of subresources; a missing one answers text.
    """

    def __init__(
        self, resource: Resource, definition: str, list_definition: str, subresource_definitions: dict[str, str],
    ) -> None:
        self.resource = resource
        self.definition = definition
        self.list_definition = list_definition
        self.subresource_definitions = subresource_definitions
        self.types = _CUSTOM_TYPES if resource.custom else _TYPES

    def items(self) -> dict[str, Any]:
        """path -> path item."""
        resource = self.resource
        base = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
        found: dict[str, Any] = {}
        collection = f"{base}/{resource.plural}"
        if resource.namespaced:
            if "list" in resource.verbs:
                found[collection] = {
                    "get": self._operation("list", f"{resource.kind}ForAllNamespaces", _LIST, self.list_definition, namespaced=False),
                    "parameters": [_PRETTY],
                }
            collection = f"{base}/namespaces/{{namespace}}/{resource.plural}"
        scope = [_path_parameter("namespace")] if resource.namespaced else []
        self._collection(found, collection, scope)
        self._item(found, f"{collection}/{{name}}", [_path_parameter("name"), *scope])
        return found

    def _collection(self, found: dict[str, Any], path: str, scope: list[dict[str, Any]]) -> None:
        item: dict[str, Any] = {}
        verbs = self.resource.verbs
        kind = self.resource.kind
        if "list" in verbs:
            item["get"] = self._operation("list", kind, _LIST, self.list_definition)
        if "create" in verbs:
            item["post"] = self._operation("create", kind, _WRITE, self.definition, body=self.definition)
        if "deletecollection" in verbs:
            item["delete"] = self._operation("deletecollection", kind, _COLLECTION_DELETE, META + "Status", body=META + "DeleteOptions")
        if item:
            found[path] = {**item, "parameters": [*scope, _PRETTY]}

    def _item(self, found: dict[str, Any], path: str, scope: list[dict[str, Any]]) -> None:
        resource = self.resource
        item = self._verbs(resource.verbs, resource.kind, self.definition, resource.api_version)
        if item:
            found[path] = {**item, "parameters": [*scope, _PRETTY]}
        for name, subresource in resource.subresources.items():
            found[f"{path}/{name}"] = {**self._subresource(name, subresource), "parameters": [*scope, _PRETTY]}

    def _verbs(self, verbs: tuple[str, ...], word: str, definition: str, api_version: str, kind: str = "") -> dict[str, Any]:
        item: dict[str, Any] = {}
        identity = group_version_kind(api_version, kind or self.resource.kind)
        if "get" in verbs:
            item["get"] = self._operation("get", word, [], definition, identity=identity)
        if "update" in verbs:
            item["put"] = self._operation("update", word, _WRITE, definition, body=definition, identity=identity)
        if "patch" in verbs:
            item["patch"] = self._operation("patch", word, [*_WRITE, _query("force", "boolean")], definition, identity=identity)
        if "delete" in verbs:
            item["delete"] = self._operation("delete", word, _DELETE, META + "Status", body=META + "DeleteOptions", identity=identity)
        return item

    def _subresource(self, name: str, subresource: Subresource) -> dict[str, Any]:
        word = self.resource.kind + camel(name)
        definition = self.subresource_definitions.get(name, "")
        if name in _STREAMS or not definition:
            methods = sorted({_METHODS.get(verb, "get") for verb in subresource.verbs})
            action = "connect" if name != "log" else "get"
            return {method: self._stream(action, method, word, subresource) for method in methods}
        item = self._verbs(subresource.verbs, word, definition, subresource.api_version, subresource.kind)
        if "create" in subresource.verbs:
            identity = group_version_kind(subresource.api_version, subresource.kind)
            item["post"] = self._operation("create", word, _WRITE, definition, body=definition, identity=identity)
        return item

    def _stream(self, action: str, method: str, word: str, subresource: Subresource) -> dict[str, Any]:
        scope = "Namespaced" if self.resource.namespaced else ""
        version = camel(self.resource.version)
        return {
            "operationId": f"{action}{_group_word(self.resource)}{version}{camel(method) if action == 'connect' else ''}{scope}{word}",
            "responses": {"200": {"description": "OK", "content": {"*/*": {"schema": {"type": "string"}}}},
                          "401": {"description": "Unauthorized"}},
            "tags": [self._tag()],
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": group_version_kind(subresource.api_version, subresource.kind),
        }

    def _tag(self) -> str:
        group = self.resource.group.split(".", 1)[0] if not self.resource.custom else self.resource.group.replace(".", "")
        return f"{group or 'core'}_{self.resource.version}"

    def _operation(
        self, verb: str, word: str, parameters: list[dict[str, Any]], answer: str, *, body: str = "",
        identity: dict[str, str] | None = None, namespaced: bool = True,
    ) -> dict[str, Any]:
        resource = self.resource
        words = {"get": "read", "update": "replace", "deletecollection": "delete"}
        collection = "Collection" if verb == "deletecollection" else ""
        actions = {"update": "put", "create": "post"}
        scope = "Namespaced" if resource.namespaced and namespaced else ""
        codes = {"create": ("200", "201", "202"), "update": ("200", "201"), "patch": ("200", "201"), "delete": ("200", "202")}
        types = self.types
        if verb == "list":
            types = (*types, *(f"{t};stream=watch" for t in self.types if t != "application/yaml"))
        operation: dict[str, Any] = {
            "operationId": f"{words.get(verb, verb)}{_group_word(resource)}{camel(resource.version)}{collection}{scope}{word}",
            "responses": _responses(answer, codes.get(verb, ("200",)), types),
            "tags": [self._tag()],
            "x-kubernetes-action": actions.get(verb, verb),
            "x-kubernetes-group-version-kind": identity or group_version_kind(resource.api_version, resource.kind),
        }
        if parameters:
            operation["parameters"] = parameters
        if verb == "patch":
            kinds = ["application/apply-patch+yaml", "application/json-patch+json", "application/merge-patch+json"]
            if not resource.custom:
                kinds.append("application/strategic-merge-patch+json")
            operation["requestBody"] = {"content": _answer(META + "Patch", tuple(kinds)), "required": True}
        elif body:
            kinds = ["*/*"] if not resource.custom or body.startswith(META) else list(_CUSTOM_TYPES)
            operation["requestBody"] = {"content": _answer(body, tuple(kinds))}
            if verb in ("create", "update"):
                operation["requestBody"]["required"] = True
        return operation
