"""OpenAPI v3 documents turned into Swagger 2.0, losing what that cannot say. Pure; used by documents.py.

Source: kube-openapi openapiconv, apiextensions-apiserver controller/openapi/v2/conversion.go.
"""

from typing import Any

from knarr.api.openapi.definitions import REF

_DEFINITIONS = "#/definitions/"
_INT_OR_STRING = "io.k8s.apimachinery.pkg.util.intstr.IntOrString"
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"


def convert(document: dict[str, Any], info: dict[str, Any], security: dict[str, Any]) -> dict[str, Any]:
    """The Swagger 2.0 form of a v3 document."""
    schemas = document["components"]["schemas"]
    return {
        "swagger": "2.0", "info": info,
        "paths": {path: _path_item(item) for path, item in sorted(document["paths"].items())},
        "definitions": {name: _definition(name, schema) for name, schema in sorted(schemas.items())},
        "securityDefinitions": security, "security": [{"BearerToken": []}],
    }


def _definition(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    if name == _INT_OR_STRING:
        return {"type": "string", "format": "int-or-string"}
    if name == _QUANTITY:
        return {"type": "string"}
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        # A custom kind that takes anything: with properties, kubectl would refuse the unknown ones.
        kept = ("description", "type", "x-kubernetes-group-version-kind")
        return {key: schema[key] for key in kept if key in schema}
    return to_v2(schema)


def to_v2(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema in the words of Swagger 2.0: references plain, alternatives dropped, nullable fields untyped."""
    if schema.get("x-kubernetes-int-or-string"):
        kept = {key: value for key, value in schema.items() if key in ("description", "default", "x-kubernetes-int-or-string")}
        return kept
    all_of = schema.get("allOf")
    if isinstance(all_of, list) and len(all_of) == 1 and "$ref" in all_of[0]:
        made = {key: value for key, value in schema.items() if key not in ("allOf", "default")}
        made["$ref"] = _DEFINITIONS + all_of[0]["$ref"].removeprefix(REF)
        return made
    if "$ref" in schema:
        return {"$ref": _DEFINITIONS + schema["$ref"].removeprefix(REF)}
    dropped = {"oneOf", "anyOf", "allOf", "not", "nullable", "x-kubernetes-validations"}
    made = {key: value for key, value in schema.items() if key not in dropped}
    if schema.get("nullable"):
        for key in ("type", "items", "properties", "format"):
            made.pop(key, None)
        return made
    if schema.get("x-kubernetes-preserve-unknown-fields") and "properties" not in schema:
        made.pop("items", None)
        made.pop("additionalProperties", None)
    if isinstance(made.get("properties"), dict):
        made["properties"] = {key: to_v2(value) for key, value in made["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = to_v2(made[key])
    return made


def _path_item(item: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in item.items():
        made[key] = [_parameter(one) for one in value] if key == "parameters" else _operation(value)
    return made


def _parameter(parameter: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in parameter.items() if key != "schema"}
    made.update(parameter.get("schema", {}))
    return made


def _operation(operation: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in operation.items() if key not in ("requestBody", "responses", "parameters")}
    parameters = [_parameter(one) for one in operation.get("parameters", ())]
    body = operation.get("requestBody")
    if body:
        content = body["content"]
        made["consumes"] = list(content)
        schema = next(iter(content.values()))["schema"]
        entry: dict[str, Any] = {"name": "body", "in": "body", "schema": to_v2(schema)}
        if body.get("required"):
            entry["required"] = True
        parameters.append(entry)
    if parameters:
        made["parameters"] = parameters
    produces: list[str] = []
    responses: dict[str, Any] = {}
    for code, response in operation["responses"].items():
        content = response.get("content") or {}
        produces.extend(kind for kind in content if kind not in produces)
        responses[code] = {"description": response["description"]}
        if content:
            responses[code]["schema"] = to_v2(next(iter(content.values()))["schema"])
    if produces:
        made["produces"] = produces
    made["responses"] = responses
    return made
