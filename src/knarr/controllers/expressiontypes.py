"""Types of the objects that a policy's expressions see, and what the expressions get wrong about them.

The types come from the schemas that the API server publishes, for builtin and custom kinds alike.
Source: apiserver pkg/admission/plugin/policy/validating/typechecking.go.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import orjson

from knarr.api import cel
from knarr.api.cel import types as T
from knarr.api.cel.admission import NAMESPACE, REQUEST
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.client.rest import Client

_MOST_KINDS = 10
_REFERENCE = "#/components/schemas/"
_KINDS = "x-kubernetes-group-version-kind"


class Schemas:
    """CEL types out of one OpenAPI v3 document."""

    def __init__(self, document: Object) -> None:
        self._schemas: Object = (document.get("components") or {}).get("schemas") or {}
        self._known: dict[str, T.Type] = {}

    def of_kind(self, group: str, version: str, kind: str) -> T.Type | None:
        wanted = {"group": group, "version": version, "kind": kind}
        for name, schema in self._schemas.items():
            if wanted in (schema.get(_KINDS) or ()):
                return self._named(name)
        return None

    def _named(self, name: str) -> T.Type:
        if name not in self._known:
            schema = self._schemas.get(name) or {}
            if schema.get("properties") and not schema.get("x-kubernetes-preserve-unknown-fields"):
                # Known before its fields are: schemas refer to themselves.
                fields: dict[str, T.Type] = {}
                self._known[name] = T.ObjectType(name, fields)
                fields.update((field, self._type(part)) for field, part in schema["properties"].items())
            else:
                self._known[name] = self._type(schema)
        return self._known[name]

    def _type(self, schema: Object) -> T.Type:
        parts: list[Object] = schema.get("allOf") or []
        reference = schema.get("$ref") or (parts[0].get("$ref") if len(parts) == 1 else None)
        if reference:
            return self._named(reference.removeprefix(_REFERENCE))
        if schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("oneOf"):
            return T.DYN
        kind, format = schema.get("type"), schema.get("format")
        if kind == "object":
            if schema.get("properties"):
                return T.ObjectType("object", {name: self._type(part) for name, part in schema["properties"].items()})
            more = schema.get("additionalProperties")
            return ("map", T.STRING, self._type(more)) if isinstance(more, dict) else T.DYN
        if kind == "array":
            return ("list", self._type(schema.get("items") or {}))
        if kind == "string":
            return T.DYN if format else T.STRING
        simple: dict[str | None, T.Type] = {"integer": T.INT, "boolean": T.BOOL}
        return simple.get(kind, T.DYN)


class TypeChecker:
    """Checks expressions against the kinds that a policy names one by one."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def warnings(self, policy: Object) -> list[Object]:
        """Give status.typeChecking.expressionWarnings."""
        spec = policy.get("spec") or {}
        kinds = await self._kinds(spec)
        params = await self._params(spec) if kinds else T.DYN
        found = []
        for index, validation in enumerate(spec.get("validations") or ()):
            for field in ("expression", "messageExpression"):
                text = self._problems(spec, validation.get(field) or "", kinds, params)
                if text:
                    found.append({"fieldRef": f"spec.validations[{index}].{field}", "warning": text})
        return found

    async def _kinds(self, spec: Object) -> list[tuple[str, T.Type]]:
        """(as shown, type) of each kind; rules with wildcards name none."""
        found: dict[str, T.Type] = {}
        for group, version, plural in _resources(spec):
            root = f"apis/{group}/{version}" if group else f"api/{version}"
            try:
                served = await self._get(f"/{root}")
                kind = next((item["kind"] for item in served.get("resources") or () if item["name"] == plural), None)
                schemas = Schemas(await self._get(f"/openapi/v3/{root}")) if kind is not None else None
            except StatusError:
                continue
            type = schemas.of_kind(group, version, kind) if schemas is not None and kind is not None else None
            if type is not None and len(found) < _MOST_KINDS:
                found[f"{group}/{version}, Kind={kind}"] = type
        return sorted(found.items(), key=lambda item: item[0])

    async def _get(self, path: str) -> Object:
        result: Object = orjson.loads((await self._client.request("GET", path)).body)
        return result

    async def _params(self, spec: Object) -> T.Type:
        """The type of the policy's parameters; anything where it is not known."""
        reference = spec.get("paramKind") or {}
        api_version, kind = reference.get("apiVersion") or "", reference.get("kind") or ""
        if not kind:
            return T.DYN
        group, _, version = api_version.rpartition("/")
        try:
            schemas = Schemas(await self._get(f"/openapi/v3/{f'apis/{api_version}' if group else f'api/{version}'}"))
        except StatusError:
            return T.DYN
        found = schemas.of_kind(group, version, kind)
        return T.DYN if found is None else found

    def _problems(self, spec: Object, source: str, kinds: list[tuple[str, T.Type]], params: T.Type) -> str:
        # What an authorizer answers does not depend on the object.
        if not source or "authorizer" in source:
            return ""
        messages = []
        for shown, type in kinds:
            try:
                cel.base().compile(source, _variables(spec, type, params))
            except cel.CompileError as error:
                messages.append(f"{shown}: {error}\n")
        return "\n".join(messages)


def _resources(spec: Object) -> Iterator[tuple[str, str, str]]:
    for rule in (spec.get("matchConstraints") or {}).get("resourceRules") or ():
        for group, version, plural in itertools.product(*(rule.get(name) or [] for name in ("apiGroups", "apiVersions", "resources"))):
            if "*" not in (group, version) and not {"*", "/"} & set(plural):
                yield group, version, plural


def _variables(spec: Object, type: T.Type, params: T.Type) -> dict[str, T.Type]:
    known: dict[str, T.Type] = {"object": type, "oldObject": type, "request": REQUEST, "params": params, "namespaceObject": NAMESPACE}
    fields: dict[str, T.Type] = {}
    known["variables"] = T.ObjectType("kubernetes.variables", fields)
    for variable in spec.get("variables") or ():
        try:
            fields[variable["name"]] = cel.base().compile(variable["expression"], known).result_type
        except cel.CompileError:
            fields[variable["name"]] = T.DYN
    return known
