"""Request bodies in: JSON, YAML or protobuf to a pruned, type-checked object in the form Go would write it.

Callers: the API server's handlers (every create, update, options body, and the result of a patch). Pure. Defaulting
and validation come after. The fast path parses once and walks once; unknown fields, duplicates and type errors send the
body to explain.py.

Source: apiserver endpoints/handlers (create.go, rest.go transformDecodeError), apimachinery serializer/json.
"""

import re
from typing import Any

import orjson

from knarr.api import explain, typeinfo, yamldoc
from knarr.api.errors import StatusError, bad_request, go_quote, unsupported_media_type
from knarr.api.scheme import SCHEME, Resource
from knarr.api.types import Object

JSON, YAML, PROTOBUF = "application/json", "application/yaml", "application/vnd.kubernetes.protobuf"
ACCEPTED = (JSON, YAML, PROTOBUF)
IGNORE, WARN, STRICT = "Ignore", "Warn", "Strict"

_META = "k8s.io.apimachinery.pkg.apis.meta.v1."


def media_type(content_type: str) -> str:
    """The media type of a Content-Type header; JSON for none, as upstream takes it.

    Raises:
      StatusError: 415, not one of JSON, YAML and protobuf.
    """
    if content_type == JSON:
        return JSON
    plain = content_type.partition(";")[0].strip().lower()
    if not plain or plain == JSON:
        return JSON
    if plain in (YAML, PROTOBUF):
        return plain
    raise unsupported_media_type(ACCEPTED)


def decode(
    resource: "Resource | tuple[str, str]", body: bytes, content_type: str = JSON, field_validation: str = WARN,
    later: typeinfo.Later | None = None,
) -> tuple[Object, list[str]]:
    """Decode a body for a resource.

    Args:
      resource: The Resource, or (api_version, kind) of a type without one, e.g. ("autoscaling/v1", "Scale"),
        ("v1", "DeleteOptions"). A body without apiVersion and kind gets these.
      content_type: The header; empty means JSON.
      field_validation: IGNORE, WARN or STRICT; what to do about unknown and duplicate fields.
      later: Takes what `typeinfo.settle` has to do once the owners of the fields are known; without it that is done here.

    Returns:
      (object, warnings); apiVersion and kind are those of the resource. A custom resource is returned as it is, but for
      its metadata, which is typed.

    Raises:
      StatusError: 400 in upstream's words, or 415.
    """
    api_version, kind = (resource.api_version, resource.kind) if isinstance(resource, Resource) else resource
    if isinstance(resource, Resource) and resource.custom:
        return _decode_custom(resource, body, media_type(content_type), field_validation)
    message_name = typeinfo.message_name(api_version, kind)
    strict = field_validation in (WARN, STRICT)
    kind_of_body = media_type(content_type)
    duplicates = ""
    if kind_of_body == PROTOBUF:
        from knarr.api import protobuf

        try:
            obj = protobuf.decode(body, default=(api_version, kind))
        except protobuf.ProtobufError as error:
            raise _unrecognized(kind, str(error), body) from None
        strict = False
    else:
        obj, duplicates = _parse(body, kind_of_body, kind, strict)
    given_version, given_kind = _identity(obj, api_version, kind, body)
    if given_kind != kind or given_version != api_version:
        _refuse_kind(given_version, given_kind, api_version, kind)
    if kind_of_body == PROTOBUF:
        return obj, []
    warnings = _check(obj, message_name, body, kind_of_body, given_version, given_kind, strict, duplicates, later)
    if warnings and field_validation == STRICT:
        raise bad_request(_cannot_handle(given_kind, given_version, kind, f"strict decoding error: {', '.join(warnings)}"))
    return obj, warnings


def _check(
    obj: Object, message_name: str, body: bytes, kind_of_body: str, given_version: str, given_kind: str, strict: bool, duplicates: str,
    later: typeinfo.Later | None,
) -> list[str]:
    """Prune in place; the strict errors, if asked for."""
    info = typeinfo.message(message_name)
    state = typeinfo.State()
    meta: Object = {}
    if not info.type_meta:
        # Options and reviews: apiVersion and kind are no fields of the message.
        meta = {"apiVersion": obj.pop("apiVersion"), "kind": obj.pop("kind")}
        state.keys = 2
    try:
        typeinfo.pruner(message_name)(obj, state)
    except typeinfo.Mismatch:
        findings = explain.explain(_parse_again(body, kind_of_body), message_name)
        text = findings.type_error or "json: cannot unmarshal body"
        raise bad_request(_cannot_handle(given_kind, given_version, given_kind, text)) from None
    if meta:
        obj.update(meta)
    if state.later:
        if later is None:
            typeinfo.settle(state.later)
        else:
            later += state.later
    if not strict:
        return []
    if kind_of_body == YAML:
        if not state.unknown:
            return [duplicates] if duplicates else []
        found = explain.explain(_parse_again(body, kind_of_body), message_name).strict
        return [duplicates, *found] if duplicates else found
    missing = 2 - (b'"apiVersion"' in body) - (b'"kind"' in body)
    if state.unknown or _may_repeat_keys(body, state.keys - missing):
        return explain.explain(explain.parse_with_duplicates(body), message_name).strict
    return []


def _may_repeat_keys(body: bytes, keys: int) -> bool:
    """Whether the body may have more keys than the parsed object, without parsing it again; may err towards yes."""
    return body.count(b'":') != keys or b" :" in body or b"\n:" in body or b"\t:" in body or b"\r:" in body


def may_repeat_keys(body: bytes, value: Any) -> bool:
    """Whether JSON may have more keys than what was parsed of it; may err towards yes."""
    try:
        return _may_repeat_keys(body, orjson.dumps(value).count(b'":'))
    except orjson.JSONEncodeError:
        return True  # nested deeper than it writes


def parse_json(body: bytes) -> Any:
    """Parse JSON.

    Raises:
      ValueError: the message is close to Go's.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(_go_syntax_error(body, error)) from None


def _go_syntax_error(body: bytes, error: orjson.JSONDecodeError) -> str:
    text = body.decode("utf-8", "replace")
    if not text.strip():
        return "unexpected end of JSON input"
    position = error.pos
    if position >= len(text.rstrip()):
        return "unexpected end of JSON input"
    character = text[position]
    shown = {"'": "'\\''", '"': "'\"'"}.get(character, f"'{character}'")
    before = text[:position].rstrip()[-1:]
    after = {
        "{": "looking for beginning of object key string", ",": "looking for beginning of value", ":": "looking for beginning of value",
        "": "looking for beginning of value", "[": "looking for beginning of value",
    }.get(before, "after object key:value pair" if "{" in text[:position] else "after top-level value")
    return f"invalid character {shown} {after}"


def _parse(body: bytes, kind_of_body: str, kind: str, strict: bool) -> tuple[Object, str]:
    duplicates = ""
    try:
        if kind_of_body == YAML:
            obj, duplicates = yamldoc.load(body, strict=strict)
        else:
            obj = parse_json(body)
    except yamldoc.YAMLError as error:
        raise _unrecognized(kind, str(error), body) from None
    except ValueError as error:
        raise _unrecognized(kind, f"couldn't get version/kind; json parse error: {error}", body) from None
    except RecursionError:
        raise _unrecognized(kind, "couldn't get version/kind; json parse error: exceeded max depth", body) from None
    if obj is None:
        obj = {}
    if obj.__class__ is not dict:
        word = explain._json_word(obj)
        text = (
            f"couldn't get version/kind; json parse error: json: cannot unmarshal {word} into Go value of type struct "
            '{ APIVersion string "json:\\"apiVersion,omitempty\\""; Kind string "json:\\"kind,omitempty\\"" }'
        )
        raise _unrecognized(kind, text, body)
    return obj, duplicates


def _parse_again(body: bytes, kind_of_body: str) -> Any:
    """The body anew (the first copy was changed by pruning)."""
    if kind_of_body == YAML:
        return yamldoc.load(body)[0]
    return explain.parse_with_duplicates(body)


def _identity(obj: Object, api_version: str, kind: str, body: bytes) -> tuple[str, str]:
    """(apiVersion, kind) of the body, filled in from the resource where missing; written back into obj."""
    given_version, given_kind = obj.get("apiVersion"), obj.get("kind")
    if given_version == api_version and given_kind == kind:
        return api_version, kind
    for value, name in ((given_version, "apiVersion"), (given_kind, "kind")):
        if value is not None and not isinstance(value, str):
            text = f"json: cannot unmarshal {explain._json_word(value)} into Go struct field .{name} of type string"
            raise _unrecognized(kind, f"couldn't get version/kind; json parse error: {text}", body)
    if isinstance(given_version, str) and given_version.count("/") > 1:
        raise _unrecognized(kind, f"unexpected GroupVersion string: {given_version}", body)
    obj["apiVersion"], obj["kind"] = given_version or api_version, given_kind or kind
    return obj["apiVersion"], obj["kind"]


_GO_SCHEMES = {
    "apiextensions.k8s.io": "k8s.io/apiextensions-apiserver/pkg/apiserver/apiserver.go:55",
    "apiregistration.k8s.io": "k8s.io/kube-aggregator/pkg/apiserver/scheme/scheme.go:28",
}
"""Group -> what its registry of types is called in messages; one for all others."""


def no_such_kind(given_version: str, given_kind: str, api_version: str) -> str:
    """What is said of a kind that is not known where the objects of api_version are."""
    scheme = _GO_SCHEMES.get(api_version.rpartition("/")[0], "pkg/api/legacyscheme/scheme.go:30")
    return f"no kind {go_quote(given_kind)} is registered for version {go_quote(given_version)} in scheme {go_quote(scheme)}"


def _refuse_kind(given_version: str, given_kind: str, api_version: str, kind: str) -> None:
    """A body of another type: meta options are registered everywhere, any other difference is an error."""
    if given_kind == kind and kind in typeinfo._META_KINDS:
        return
    _group, _, version = given_version.rpartition("/")
    try:
        typeinfo.message_name(given_version, given_kind)
    except KeyError:
        text = no_such_kind(given_version, given_kind, api_version)
        raise bad_request(f"{given_kind} in version {go_quote(version)} cannot be handled as a {kind}: {text}") from None
    if given_kind == kind:
        raise bad_request(
            f"the API version in the data ({given_version}) does not match the expected API version ({api_version})"
        )
    internal = api_version.rpartition("/")[0].split(".")[0] or "core"
    text = f"converting ({version}.{given_kind}) to ({internal}.{kind}): unknown conversion"
    raise bad_request(f"{given_kind} in version {go_quote(version)} cannot be handled as a {kind}: {text}")


def _cannot_handle(given_kind: str, given_version: str, kind: str, why: str) -> str:
    return f"{given_kind} in version {go_quote(given_version.rpartition('/')[2])} cannot be handled as a {kind}: {why}"


def _unrecognized(kind: str, why: str, body: bytes) -> StatusError:
    if not body:
        summary = "<empty>"
    elif body[:1] == b"{":
        summary = body[:30].decode("utf-8", "replace") + (" ..." if len(body) > 30 else "")
    else:
        summary = body[:30].hex() + (" ..." if len(body) > 30 else "")
    return bad_request(f"the object provided is unrecognized (must be of type {kind}): {why} ({summary})")


def check_object(api_version: str, kind: str, obj: Object) -> list[str]:
    """Bring an object made by a patch or a webhook into canonical form, in place.

    Returns:
      The strict errors (unknown fields), each such as `unknown field "spec.foo"`.

    Raises:
      StatusError: 400 if a value has the wrong type.
    """
    name = typeinfo.message_name(api_version, kind)
    copy = orjson.dumps(obj)
    meta: Object = {}
    info = typeinfo.message(name)
    if not info.type_meta:
        meta = {k: obj.pop(k) for k in ("apiVersion", "kind") if k in obj}
    state = typeinfo.State()
    try:
        typeinfo.pruner(name)(obj, state)
    except typeinfo.Mismatch:
        findings = explain.explain(orjson.loads(copy), name)
        raise bad_request(_cannot_handle(kind, api_version, kind, findings.type_error)) from None
    obj.update(meta)
    typeinfo.settle(state.later)
    return explain.explain(orjson.loads(copy), name).strict if state.unknown else []


_CUSTOM_META = _META + "ObjectMeta"


def _decode_custom(resource: Resource, body: bytes, kind_of_body: str, field_validation: str) -> tuple[Object, list[str]]:
    if kind_of_body == PROTOBUF:
        raise unsupported_media_type((JSON, YAML))
    strict = field_validation in (WARN, STRICT)
    obj, duplicates = _parse(body, kind_of_body, resource.kind, strict)
    if not obj.get("kind"):
        raise _unrecognized(resource.kind, f"Object 'Kind' is missing in '{body.decode('utf-8', 'replace')}'", body)
    given_version, given_kind = _identity(obj, resource.api_version, resource.kind, body)
    # A wrong kind is for validation to refuse, as upstream does with custom objects.
    if given_version != resource.api_version:
        raise bad_request(
            f"the API version in the data ({given_version}) does not match the expected API version ({resource.api_version})"
        )
    if _FRACTION.search(body) is not None:
        canonical_numbers(obj)
    warnings: list[str] = [duplicates] if duplicates else []
    if strict and kind_of_body == JSON and re.search(rb'"\s*:', body) is not None:
        if may_repeat_keys(body, obj):
            findings = explain.Findings()
            explain.explain_untyped(explain.parse_with_duplicates(body), findings)
            warnings.extend(findings.strict)
    try:
        warnings.extend(check_metadata(obj))
    except StatusError as error:
        raise bad_request(_cannot_handle(given_kind, given_version, resource.kind, error.message)) from None
    if warnings and field_validation == STRICT:
        raise bad_request(_cannot_handle(given_kind, given_version, resource.kind, f"strict decoding error: {', '.join(warnings)}"))
    return obj, warnings


_FRACTION = re.compile(rb"[0-9][.eE]")


def canonical_numbers(value: Any) -> Any:
    """Rewrite whole floats as integers in place, as Go's encoder writes them: 1.0 becomes 1."""
    if value.__class__ is float:
        return int(value) if value.is_integer() and abs(value) < 1e21 else value
    if value.__class__ is dict:
        for key, item in value.items():
            if item.__class__ in (float, dict, list):
                value[key] = canonical_numbers(item)
    elif value.__class__ is list:
        for index, item in enumerate(value):
            if item.__class__ in (float, dict, list):
                value[index] = canonical_numbers(item)
    return value


def check_metadata(obj: Object, path: str = "metadata") -> list[str]:
    """Type-check and prune the metadata of a custom object in place.

    Returns:
      The unknown fields, e.g. `unknown field "metadata.foo"`.

    Raises:
      StatusError: 400 if it has the wrong type.
    """
    given = obj.get("metadata")
    if given is None:
        obj["metadata"] = {}
        return []
    original = orjson.dumps(given)
    state = typeinfo.State()
    try:
        pruned = typeinfo.pruner(_CUSTOM_META)(given, state)
    except typeinfo.Mismatch:
        holder = {"metadata": orjson.loads(original)}
        findings = explain.explain(holder, _META + "PartialObjectMetadata")
        raise bad_request(findings.type_error.replace("ObjectMeta.metadata.", "ObjectMeta.")) from None
    obj["metadata"] = pruned if pruned is not typeinfo.DROP else {}
    if not state.unknown:
        return []
    holder = {"metadata": orjson.loads(original)}
    prefix = path.rpartition("metadata")[0]
    return [text.replace('"metadata', f'"{prefix}metadata', 1) for text in explain.explain(holder, _META + "PartialObjectMetadata").strict]


def resource_of(api_version: str, kind: str) -> Resource | None:
    """The built-in resource of an object's apiVersion and kind, None if it is not one."""
    return SCHEME.for_kind(api_version, kind)
