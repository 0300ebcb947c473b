"""API errors: everything that a server answers as a `Status`, and the field errors inside of it.

Used by the API server (raised anywhere below the request handler, rendered once at the top), by validation
(FieldError) and by the client (StatusError.from_status on every answer outside 2xx).

    Exception
      StatusError      an answer with a Status body; told apart by reason with the is_* predicates

Source: apimachinery api/errors and util/validation/field.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from knarr.api.types import Object


class _OmitValue:
    """Marks a FieldError without a value to show."""


OMIT_VALUE = _OmitValue()

_TYPE_WORDS = {
    "FieldValueNotFound": "Not found",
    "FieldValueRequired": "Required value",
    "FieldValueDuplicate": "Duplicate value",
    "FieldValueInvalid": "Invalid value",
    "FieldValueNotSupported": "Unsupported value",
    "FieldValueForbidden": "Forbidden",
    "FieldValueTooLong": "Too long",
    "FieldValueTooMany": "Too many",
    "InternalError": "Internal error",
    "FieldValueTypeInvalid": "Invalid value",
}
_TYPES_WITHOUT_VALUE = {"FieldValueRequired", "FieldValueForbidden", "FieldValueTooLong", "InternalError"}


def go_quote(text: str) -> str:
    """Quote as Go's %q does: double quotes, backslash escapes, printable Unicode kept."""
    if text.isalnum() and text.isascii():
        return f'"{text}"'
    out = ['"']
    for character in text:
        code = ord(character)
        if character in '"\\':
            out.append("\\" + character)
        elif character in _GO_ESCAPES:
            out.append(_GO_ESCAPES[character])
        elif character.isprintable():
            out.append(character)
        elif code < 0x80:
            out.append(f"\\x{code:02x}")
        elif code < 0x10000:
            out.append(f"\\u{code:04x}")
        else:
            out.append(f"\\U{code:08x}")
    out.append('"')
    return "".join(out)


_GO_ESCAPES = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}


def go_json(value: Any) -> str:
    """JSON as Go's encoder writes it: compact, <, > and & escaped."""
    text = orjson.dumps(value).decode()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def go_map(value: Any) -> str:
    """A JSON value as Go's %v shows it."""
    match value:
        case dict():
            return f"map[{' '.join(f'{k}:{go_map(v)}' for k, v in sorted(value.items()))}]"
        case list():
            return f"[{' '.join(go_map(v) for v in value)}]"
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
    return str(value)


@dataclass(frozen=True, slots=True)
class FieldError:
    """One broken rule of one field.

    Args:
      type: "FieldValueInvalid" and the like, see the module's table.
      field: Path such as "spec.containers[0].name".
      detail: The rule in words; may be empty.
      bad_value: What was given; not shown by Required, Forbidden, TooLong. OMIT_VALUE shows none.
    """

    type: str
    field: str
    detail: str = ""
    bad_value: Any = ""

    def body(self) -> str:
        """The message without the field, as it stands in a cause."""
        words = _TYPE_WORDS.get(self.type, self.type)
        if self.type not in _TYPES_WITHOUT_VALUE and self.bad_value is not OMIT_VALUE:
            value = self.bad_value
            if isinstance(value, str):
                shown = go_quote(value)
            elif isinstance(value, bool):
                shown = "true" if value else "false"
            elif isinstance(value, int | float):
                shown = str(value)
            else:
                shown = go_json(value)
            words = f"{words}: {shown}"
        return f"{words}: {self.detail}" if self.detail else words

    def __str__(self) -> str:
        return f"{self.field}: {self.body()}"


def required(field: str, detail: str = "") -> FieldError:
    return FieldError("FieldValueRequired", field, detail)


def invalid_value(field: str, value: Any, detail: str = "") -> FieldError:
    return FieldError("FieldValueInvalid", field, detail, value)


def type_invalid(field: str, value: Any, detail: str = "") -> FieldError:
    return FieldError("FieldValueTypeInvalid", field, detail, value)


def not_supported(field: str, value: Any, valid_values: Iterable[str]) -> FieldError:
    values = ", ".join(go_quote(v) for v in valid_values)
    return FieldError("FieldValueNotSupported", field, f"supported values: {values}" if values else "", value)


def duplicate(field: str, value: Any) -> FieldError:
    return FieldError("FieldValueDuplicate", field, "", value)


def field_forbidden(field: str, detail: str = "") -> FieldError:
    return FieldError("FieldValueForbidden", field, detail)


def field_not_found(field: str, value: Any) -> FieldError:
    return FieldError("FieldValueNotFound", field, "", value)


def too_long(field: str, max_length: int) -> FieldError:
    """The value is longer than max_length bytes; a negative length shows no number."""
    if max_length < 0:
        return FieldError("FieldValueTooLong", field, "value is too long")
    return FieldError("FieldValueTooLong", field, f"may not be more than {max_length} {'byte' if max_length == 1 else 'bytes'}")


def too_many(field: str, actual: int, maximum: int) -> FieldError:
    """More items than maximum; negative numbers are not shown."""
    detail = f"must have at most {maximum} {'item' if maximum == 1 else 'items'}" if maximum >= 0 else "has too many items"
    return FieldError("FieldValueTooMany", field, detail, actual if actual >= 0 else OMIT_VALUE)


class StatusError(Exception):
    """An API answer that is not a success; `code` is the HTTP status, `reason` the machine-readable word.

    `headers` are extra response headers (name, value), such as Retry-After.
    """

    def __init__(
        self, code: int, reason: str, message: str, details: Object | None = None, headers: list[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details: Object = details or {}
        self._shows_details = details is not None
        self.headers: list[tuple[str, str]] = headers or []
        self.extra_metadata: Object = {}

    def status(self) -> Object:
        """The Status object to send. `extra_metadata` (e.g. a continue token) goes into its metadata."""
        status: Object = {"kind": "Status", "apiVersion": "v1", "metadata": dict(self.extra_metadata), "status": "Failure"}
        if self.message:
            status["message"] = self.message
        if self.reason:
            status["reason"] = self.reason
        if self.details or self._shows_details:
            status["details"] = self.details
        status["code"] = self.code
        return status

    @classmethod
    def from_status(cls, status: Object, headers: list[tuple[str, str]] | None = None) -> "StatusError":
        """Rebuild the error from a Status object of an answer."""
        error = cls(
            int(status.get("code") or 500), status.get("reason") or "", status.get("message") or "", status.get("details"), headers,
        )
        error.extra_metadata = status.get("metadata") or {}
        return error

    @property
    def causes(self) -> list[Object]:
        return self.details.get("causes") or []

    @property
    def retry_after_seconds(self) -> int:
        """The delay the server asked for; 0 if none."""
        return int(self.details.get("retryAfterSeconds") or 0)


def split_group(dotted: str) -> tuple[str, str]:
    """("deployments", "apps") of "deployments.apps"; ("pods", "") of "pods"."""
    name, _, group = dotted.partition(".")
    return name, group


def _details(resource: Any, name: str = "", **extra: Any) -> Object:
    """Details of a resource (a Resource, or text such as "deployments.apps"), keys in upstream's order."""
    plural, group = split_group(_dotted(resource))
    details: Object = {}
    if name:
        details["name"] = name
    if group:
        details["group"] = group
    if plural:
        details["kind"] = plural
    details.update({k: v for k, v in extra.items() if v})
    return details


def _dotted(resource: Any) -> str:
    return resource if isinstance(resource, str) else str(resource.group_resource)


def not_found(resource: Any, name: str) -> StatusError:
    """404; resource is a Resource or text such as "deployments.apps"."""
    return StatusError(404, "NotFound", f"{_dotted(resource)} {go_quote(name)} not found", _details(resource, name))


def route_not_found() -> StatusError:
    """404 for a path that names nothing."""
    return StatusError(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(resource: Any, name: str) -> StatusError:
    return StatusError(409, "AlreadyExists", f"{_dotted(resource)} {go_quote(name)} already exists", _details(resource, name))


def generate_name_conflict(resource: Any, name: str, retry_after_seconds: int = 1) -> StatusError:
    message = f"{_dotted(resource)} {go_quote(name)} already exists, the server was not able to generate a unique name for the object"
    details = _details(resource, name, retryAfterSeconds=retry_after_seconds)
    return StatusError(409, "AlreadyExists", message, details, [("Retry-After", str(retry_after_seconds))])


def conflict(resource: Any, name: str, why: str) -> StatusError:
    message = f"Operation cannot be fulfilled on {_dotted(resource)} {go_quote(name)}: {why}"
    return StatusError(409, "Conflict", message, _details(resource, name))


def apply_conflict(causes: list[Object], message: str) -> StatusError:
    """409 of a server-side apply; causes are {reason: FieldManagerConflict, message, field}."""
    return StatusError(409, "Conflict", message, {"causes": causes} if causes else {})


def invalid(group_kind: Any, name: str, causes: "list[FieldError]") -> StatusError:
    """422; group_kind is a Resource or text such as "Deployment.apps"."""
    dotted = group_kind if isinstance(group_kind, str) else str(group_kind.group_kind)
    kind, group = split_group(dotted)
    details: Object = {}
    if name:
        details["name"] = name
    if group:
        details["group"] = group
    if kind:
        details["kind"] = kind
    if causes:
        details["causes"] = [_cause(e) for e in causes]
    message = f"{dotted} {go_quote(name)} is invalid"
    text = _aggregate(causes)
    return StatusError(422, "Invalid", f"{message}: {text}" if text else message, details)


def _cause(error: FieldError) -> Object:
    cause: Object = {"reason": error.type, "message": error.body()}
    if error.field:
        cause["field"] = error.field
    return cause


def _aggregate(errors: "list[FieldError]") -> str:
    texts = list(dict.fromkeys(str(e) for e in errors))
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]" if texts else ""


def bad_request(message: str) -> StatusError:
    return StatusError(400, "BadRequest", message)


def unauthorized(message: str = "Unauthorized") -> StatusError:
    return StatusError(401, "Unauthorized", message or "not authorized")


def forbidden(resource: Any, name: str, why: str) -> StatusError:
    """403; an empty resource gives the message `forbidden: why`."""
    dotted = _dotted(resource)
    if not dotted:
        message = f"forbidden: {why}"
    elif not name:
        message = f"{dotted} is forbidden: {why}"
    else:
        message = f"{dotted} {go_quote(name)} is forbidden: {why}"
    return StatusError(403, "Forbidden", message, _details(resource, name))


def method_not_supported(resource: Any, action: str) -> StatusError:
    message = f"{action} is not supported on resources of kind {go_quote(_dotted(resource))}"
    return StatusError(405, "MethodNotAllowed", message, _details(resource))


def method_not_allowed() -> StatusError:
    """405 for a method that a route does not have."""
    return StatusError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource", {})


def rejected_by_router(code: int, available: Iterable[str] = ()) -> StatusError:
    """406 or 415 of a route whose media types do not match at all, which is found out before the resource is asked."""
    if code == 415:
        return StatusError(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})
    return StatusError(406, "NotAcceptable", f"406: Not Acceptable\n\nAvailable representations: {', '.join(available)}", {})


def unsupported_media_type(accepted: Iterable[str]) -> StatusError:
    """415; accepted are the media types that would do."""
    message = f"the body of the request was in an unknown format - accepted media types include: {', '.join(accepted)}"
    return StatusError(415, "UnsupportedMediaType", message)


def not_acceptable(accepted: Iterable[str]) -> StatusError:
    """406; accepted are the media types that would do."""
    message = f"only the following media types are accepted: {', '.join(accepted)}"
    return StatusError(406, "NotAcceptable", message)


def not_that_shape(asked: str, is_list: bool, go_type: str) -> StatusError:
    """406 for metadata of a list asked as of one object, or the other way round."""
    what = "a list" if is_list else "not a list"
    return StatusError(406, "NotAcceptable", f"you requested {asked}, but the requested object is {what} (*{go_type})")


def gone(message: str) -> StatusError:
    return StatusError(410, "Gone", message)


def expired(message: str, continue_token: str = "") -> StatusError:
    """410 Expired; a continue token lets the client go on at the newest revision."""
    error = StatusError(410, "Expired", message)
    if continue_token:
        error.extra_metadata = {"continue": continue_token}
    return error


def too_many_requests(message: str, retry_after_seconds: int) -> StatusError:
    return StatusError(
        429, "TooManyRequests", message, {"retryAfterSeconds": retry_after_seconds} if retry_after_seconds else {},
        [("Retry-After", str(retry_after_seconds))] if retry_after_seconds else [],
    )


def service_unavailable(message: str) -> StatusError:
    return StatusError(503, "ServiceUnavailable", message)


def server_timeout(resource: Any, operation: str, retry_after_seconds: int = 0) -> StatusError:
    message = f"The {operation} operation against {_dotted(resource)} could not be completed at this time, please try again."
    headers = [("Retry-After", str(retry_after_seconds))] if retry_after_seconds else []
    return StatusError(500, "ServerTimeout", message, _details(resource, operation, retryAfterSeconds=retry_after_seconds), headers)


def internal(message: str) -> StatusError:
    return StatusError(500, "InternalError", f"Internal error occurred: {message}", {"causes": [{"message": message}]})


def timeout(message: str, retry_after_seconds: int = 0) -> StatusError:
    details = {"retryAfterSeconds": retry_after_seconds} if retry_after_seconds else {}
    headers = [("Retry-After", str(retry_after_seconds))] if retry_after_seconds else []
    return StatusError(504, "Timeout", f"Timeout: {message}", details, headers)


def too_large(message: str) -> StatusError:
    return StatusError(413, "RequestEntityTooLarge", f"Request entity too large: {message}")


def _reason(error: BaseException) -> str:
    return error.reason if isinstance(error, StatusError) else ""


def is_not_found(error: BaseException) -> bool:
    return isinstance(error, StatusError) and (error.reason == "NotFound" or (error.code == 404 and not error.reason))


def is_already_exists(error: BaseException) -> bool:
    return _reason(error) == "AlreadyExists"


def is_conflict(error: BaseException) -> bool:
    return _reason(error) == "Conflict"


def is_invalid(error: BaseException) -> bool:
    return _reason(error) == "Invalid"


def is_bad_request(error: BaseException) -> bool:
    return _reason(error) == "BadRequest"


def is_forbidden(error: BaseException) -> bool:
    return _reason(error) == "Forbidden"


def is_unauthorized(error: BaseException) -> bool:
    return _reason(error) == "Unauthorized"


def is_gone(error: BaseException) -> bool:
    return _reason(error) == "Gone"


def is_expired(error: BaseException) -> bool:
    """True if the asked revision is no longer kept: list again."""
    return _reason(error) in ("Expired", "Gone")


def is_too_many_requests(error: BaseException) -> bool:
    return isinstance(error, StatusError) and (error.reason == "TooManyRequests" or error.code == 429)


def is_timeout(error: BaseException) -> bool:
    return _reason(error) in ("Timeout", "ServerTimeout")


def is_internal(error: BaseException) -> bool:
    return _reason(error) == "InternalError"


def is_service_unavailable(error: BaseException) -> bool:
    return _reason(error) == "ServiceUnavailable"


def is_unsupported_media_type(error: BaseException) -> bool:
    return _reason(error) == "UnsupportedMediaType"


def is_namespace_terminating(error: BaseException) -> bool:
    """True if a create was refused because its namespace is being deleted."""
    return isinstance(error, StatusError) and any(c.get("reason") == "NamespaceTerminating" for c in error.causes)
