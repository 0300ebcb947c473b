"""CustomResourceDefinitions.

Upstream's internal version keeps what all versions have in common at the top, and its paths show that: the schema of a single
version is spec.validation. Where an update leaves a version's schema alone, the schema is not judged again.

Source: apiextensions-apiserver pkg/apis/apiextensions/validation/validation.go, v1/conversion.go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from knarr.api.errors import duplicate, field_forbidden, go_quote, invalid_value, not_supported, required, too_many
from knarr.api.validation.admissionregistration import validate_webhook_client
from knarr.api.validation.metadata import Errors, Object, add, immutable
from knarr.api.validation.schemas import schema_at, validate_schema
from knarr.api.validation.strings import dns_1035_label, dns_subdomain

APPROVED = "api-approved.kubernetes.io"
_PROPOSAL = "see https://github.com/kubernetes/enhancements/pull/1111"
_COLUMN_TYPES = ("boolean", "date", "integer", "number", "string")
_COLUMN_FORMATS = ("byte", "date", "date-time", "double", "float", "int32", "int64", "password")
_REVIEW_VERSIONS = ("v1", "v1beta1")
_MAX_SELECTABLE = 8


def create_definition(obj: Object, errors: Errors) -> None:
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    expected = f"{(spec.get('names') or {}).get('plural') or ''}.{spec.get('group') or ''}"
    for key in ("generateName", "name"):
        name = metadata.get(key) or ""
        if name and name != expected:
            errors.append(invalid_value(f"metadata.{key}", name, 'must be spec.names.plural+"."+spec.group'))
    _spec(spec, None, errors)
    _status(obj, errors)
    _approval(obj, None, errors)
    if spec.get("preserveUnknownFields"):
        _no_preserving(errors)


def update_definition(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    spec, stored = new.get("spec") or {}, old.get("spec") or {}
    if subresource:
        _names((new.get("status") or {}).get("acceptedNames") or {}, "status.acceptedNames", errors)
        return
    _spec(spec, stored, errors)
    names, stored_names = spec.get("names") or {}, stored.get("names") or {}
    conditions = (old.get("status") or {}).get("conditions") or ()
    if any(one.get("type") == "Established" and one.get("status") == "True" for one in conditions):
        immutable(errors, "spec.scope", spec.get("scope"), stored.get("scope"))
        immutable(errors, "spec.names.kind", names.get("kind"), stored_names.get("kind"))
    immutable(errors, "spec.group", spec.get("group"), stored.get("group"))
    immutable(errors, "spec.names.plural", names.get("plural"), stored_names.get("plural"))
    _status(new, errors)
    _approval(new, old, errors)
    if spec.get("preserveUnknownFields") and not stored.get("preserveUnknownFields"):
        _no_preserving(errors)


def _no_preserving(errors: Errors) -> None:
    message = "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead"
    errors.append(invalid_value("spec.preserveUnknownFields", True, message))


def _common(versions: list[Object], key: str) -> bool:
    """Whether all versions have the same of something, which upstream then moves to the top."""
    return bool(versions) and all(version.get(key) == versions[0].get(key) for version in versions)


def _places(versions: list[Object], key: str, top: str) -> Iterator[tuple[str, Object, Any]]:
    """Where upstream sees one field of the versions: (path, version, value)."""
    if _common(versions, key):
        if versions[0].get(key) is not None:
            yield f"spec.{top}", versions[0], versions[0][key]
        return
    for index, version in enumerate(versions):
        if version.get(key) is not None:
            yield f"spec.versions[{index}].{key}", version, version[key]


def schemas(spec: Object) -> Iterator[tuple[str, Object, Object]]:
    """Yield (path, version, schema) of the schemas of a definition."""
    for path, version, holder in _places(spec.get("versions") or [], "schema", "validation"):
        if holder.get("openAPIV3Schema") is not None:
            yield f"{path}.openAPIV3Schema", version, holder["openAPIV3Schema"]


def _spec(spec: Object, stored: Object | None, errors: Errors) -> None:
    group, scope, versions = spec.get("group") or "", spec.get("scope") or "", spec.get("versions") or []
    if not group:
        errors.append(required("spec.group"))
    elif messages := dns_subdomain(group):
        errors.append(invalid_value("spec.group", group, ",".join(messages)))
    elif "." not in group:
        errors.append(invalid_value("spec.group", group, "should be a domain with at least one dot"))
    if not scope:
        errors.append(required("spec.scope"))
    elif scope not in ("Cluster", "Namespaced"):
        errors.append(not_supported("spec.scope", scope, ("Cluster", "Namespaced")))
    before = {version.get("name"): version for version in (stored or {}).get("versions") or ()}
    for index, version in enumerate(versions):
        if not (version.get("schema") or {}).get("openAPIV3Schema") and (version.get("schema") or {}).get("openAPIV3Schema") != {}:
            old_schema = (before.get(version.get("name")) or {}).get("schema")
            if stored is None or old_schema:
                errors.append(required(f"spec.versions[{index}].schema.openAPIV3Schema"))
    for index, version in enumerate(versions):
        name = version.get("name") or ""
        if messages := dns_1035_label(name):
            errors.append(invalid_value(f"spec.versions[{index}].name", name, ",".join(messages)))
        _deprecation(version, f"spec.versions[{index}].deprecationWarning", errors)
    names = [version.get("name") or "" for version in versions]
    if len(set(names)) != len(names):
        errors.append(invalid_value("spec.versions", versions, "must contain unique version names"))
    if sum(bool(version.get("storage")) for version in versions) != 1:
        errors.append(invalid_value("spec.versions", versions, "must have exactly one version marked as storage version"))
    if versions and names[0] and (messages := dns_1035_label(names[0])):
        errors.append(invalid_value("spec.version", names[0], ",".join(messages)))
    given = spec.get("names") or {}
    for key in ("plural", "singular", "kind", "listKind"):
        if not given.get(key):
            errors.append(required(f"spec.names.{key}"))
    _names(given, "spec.names", errors)
    any_status = any((version.get("subresources") or {}).get("status") is not None for version in versions)
    for path, version, schema in schemas(spec):
        if version.get("name") in before and (before[version.get("name")].get("schema") or {}).get("openAPIV3Schema") == schema:
            continue
        alone = not path.startswith("spec.versions")
        has_status = any_status if alone else (version.get("subresources") or {}).get("status") is not None
        validate_schema(schema, path, errors, has_status=has_status)
    for path, _, subresources in _places(versions, "subresources", "subresources"):
        _scale(subresources.get("scale"), f"{path}.scale", errors)
    for path, _, columns in _places(versions, "additionalPrinterColumns", "additionalPrinterColumns"):
        for index, column in enumerate(columns):
            _column(column, f"{path}[{index}]", errors)
    for path, version, fields in _places(versions, "selectableFields", "selectableFields"):
        _selectable(fields, version, path, errors)
    if spec.get("conversion") is not None:
        _conversion(spec["conversion"], "spec.conversion", errors)


def _deprecation(version: Object, path: str, errors: Errors) -> None:
    text = version.get("deprecationWarning")
    if text is None:
        return
    if not version.get("deprecated"):
        errors.append(invalid_value(path, text, "can only be set for deprecated versions"))
        return
    if len(text.encode()) > 256:
        errors.append(invalid_value(path, text, "must be <= 256 characters long"))
    if not text:
        errors.append(invalid_value(path, text, "must not be an empty string"))
    for index, character in enumerate(text):
        if not character.isprintable():
            position = len(text[:index].encode())
            message = f"must only contain printable UTF-8 characters; non-printable character found at index {position}"
            errors.append(invalid_value(path, text, message))
            break


def _names(names: Object, path: str, errors: Errors) -> None:
    for key in ("plural", "singular"):
        value = names.get(key) or ""
        if value and (messages := dns_1035_label(value)):
            errors.append(invalid_value(f"{path}.{key}", value, ",".join(messages)))
    for key in ("kind", "listKind"):
        value = names.get(key) or ""
        if value and (messages := dns_1035_label(value.lower())):
            message = f"may have mixed case, but should otherwise match: {','.join(messages)}"
            errors.append(invalid_value(f"{path}.{key}", value, message))
    _labels(names.get("shortNames"), f"{path}.shortNames", errors)
    kind = names.get("kind")
    if kind and kind == names.get("listKind"):
        errors.append(invalid_value(f"{path}.listKind", kind, "kind and listKind may not be the same"))
    _labels(names.get("categories"), f"{path}.categories", errors)


def _labels(values: list[str] | None, path: str, errors: Errors) -> None:
    for index, value in enumerate(values or ()):
        if messages := dns_1035_label(value):
            errors.append(invalid_value(f"{path}[{index}]", value, ",".join(messages)))


def _scale(scale: Object | None, path: str, errors: Errors) -> None:
    if scale is None:
        return
    for key, roots, words in (
        ("specReplicasPath", (".spec.",), "should be a json path under .spec"),
        ("statusReplicasPath", (".status.",), "should be a json path under .status"),
        ("labelSelectorPath", (".spec.", ".status."), "should be a json path under either .spec or .status"),
    ):
        value, own = scale.get(key) or "", f"{path}.{key}"
        if not value:
            if key != "labelSelectorPath":
                errors.append(required(own))
        elif not value.startswith("."):
            errors.append(invalid_value(own, value, "must be a simple json path starting with ."))
        elif not value.startswith(roots):
            errors.append(invalid_value(own, value, words))


def _column(column: Object, path: str, errors: Errors) -> None:
    kind, form, field = column.get("type") or "", column.get("format") or "", column.get("jsonPath") or ""
    if not column.get("name"):
        errors.append(required(f"{path}.name"))
    types = f"must be one of {','.join(_COLUMN_TYPES)}"
    if not kind:
        errors.append(required(f"{path}.type", types))
    elif kind not in _COLUMN_TYPES:
        errors.append(invalid_value(f"{path}.type", kind, types))
    if form and form not in _COLUMN_FORMATS:
        errors.append(invalid_value(f"{path}.format", form, f"must be one of {','.join(_COLUMN_FORMATS)}"))
    if not field:
        errors.append(required(f"{path}.JSONPath"))
    elif not field.startswith("."):
        errors.append(invalid_value(f"{path}.JSONPath", field, "must be a simple json path starting with ."))


def _selectable(fields: list[Object], version: Object, path: str, errors: Errors) -> None:
    schema = (version.get("schema") or {}).get("openAPIV3Schema") or {}
    seen: set[str] = set()
    for index, field in enumerate(fields):
        own, text = f"{path}[{index}].jsonPath", field.get("jsonPath") or ""
        if not text:
            errors.append(required(own))
            continue
        found = schema_at(schema, text, root=False)
        if "[" in text or found is None:
            why = "array notation is not allowed" if "[" in text else "does not refer to a valid field"
            if not text.startswith("."):
                why = f"expected [ or . but got: {text.partition('.')[0]}"
            elif text.endswith("."):
                why = "unexpected end of JSON path"
            errors.append(invalid_value(own, text, f"is an invalid path: {why}"))
            continue
        if text.startswith(".metadata"):
            errors.append(invalid_value(own, text, "must not point to fields in metadata"))
        if found.get("type") not in ("string", "boolean", "integer"):
            message = "must point to a field of type string, boolean or integer. Enum string fields and strings with formats are allowed."
            errors.append(invalid_value(own, text, message))
        if text in seen:
            errors.append(duplicate(own, text))
        seen.add(text)
    if len(seen) > _MAX_SELECTABLE:
        errors.append(too_many(path, len(seen), _MAX_SELECTABLE))


def _conversion(conversion: Object, path: str, errors: Errors) -> None:
    strategy, webhook = conversion.get("strategy") or "", conversion.get("webhook") or {}
    client, versions = webhook.get("clientConfig"), webhook.get("conversionReviewVersions") or []
    if not strategy:
        errors.append(required(f"{path}.strategy"))
    elif strategy not in ("None", "Webhook"):
        errors.append(not_supported(f"{path}.strategy", strategy, ("None", "Webhook")))
    if strategy != "Webhook":
        for given, key in ((client, "webhookClientConfig"), (versions, "conversionReviewVersions")):
            if given:
                errors.append(field_forbidden(f"{path}.{key}", "should not be set when strategy is not set to Webhook"))
        return
    if client is None:
        errors.append(required(f"{path}.webhookClientConfig", "required when strategy is set to Webhook"))
    else:
        validate_webhook_client(client, f"{path}.webhookClientConfig", errors)
    own = f"{path}.conversionReviewVersions"
    if not versions:
        errors.append(required(own))
        return
    for index, version in enumerate(versions):
        if version in versions[:index]:
            errors.append(invalid_value(f"{own}[{index}]", version, "duplicate version"))
        else:
            add(errors, f"{own}[{index}]", version, dns_1035_label(version))
    if not set(versions) & set(_REVIEW_VERSIONS):
        errors.append(invalid_value(own, versions, f"must include at least one of {', '.join(_REVIEW_VERSIONS)}"))


def _status(obj: Object, errors: Errors) -> None:
    status, versions = obj.get("status") or {}, (obj.get("spec") or {}).get("versions") or []
    _names(status.get("acceptedNames") or {}, "status.acceptedNames", errors)
    path, stored = "status.storedVersions", status.get("storedVersions") or []
    if not stored:
        errors.append(invalid_value(path, stored, "must have at least one stored version"))
        return
    names = [version.get("name") for version in versions]
    for version in versions:
        if version.get("storage") and version.get("name") not in stored:
            errors.append(invalid_value(path, stored, f"must have the storage version {version.get('name')}"))
    for index, name in enumerate(stored):
        if name not in names:
            message = (
                f"missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage "
                f"migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"
            )
            errors.append(invalid_value(f"{path}[{index}]", name, message))


def _approval(new: Object, old: Object | None, errors: Errors) -> None:
    """Groups of the community's own need a word that their APIs were reviewed."""
    group = (new.get("spec") or {}).get("group") or ""
    if not f".{group}".endswith((".k8s.io", ".kubernetes.io")):
        return
    state, text = _approval_of(new), (new["metadata"].get("annotations") or {}).get(APPROVED) or ""
    if state == "ok" or (old is not None and _approval_of(old) == state):
        return
    path = f"metadata.annotations[{APPROVED}]"
    if state == "missing":
        errors.append(required(path, f"protected groups must have approval annotation {go_quote(APPROVED)}, {_PROPOSAL}"))
    else:
        message = (
            f'protected groups must have approval annotation {go_quote(APPROVED)} with either a URL or a reason starting with "unapproved"'
        )
        errors.append(invalid_value(path, text, f"{message}, {_PROPOSAL}"))


def _approval_of(obj: Object) -> str:
    text = (obj["metadata"].get("annotations") or {}).get(APPROVED) or ""
    if not text:
        return "missing"
    try:
        url = urlsplit(text)
    except ValueError:
        return "invalid"
    return "ok" if text.startswith("unapproved") or (url.scheme and url.netloc) else "invalid"
