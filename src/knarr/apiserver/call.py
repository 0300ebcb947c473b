"""One API request on its way through the verbs: what was asked, by whom, of which endpoint; and the answer's rendering.

Made by the pipeline after authorization. The rendering functions here are the only ones that write answers of resources.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any

import orjson

from knarr.api import errors, typeinfo
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.cache import CachedObject
from knarr.apiserver.endpoint import Endpoint
from knarr.apiserver.forms import Form
from knarr.apiserver.requestinfo import RequestInfo
from knarr.apiserver.store import new_uid
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

GZIP_BYTES = 128 * 1024
GZIP_THREAD_BYTES = 512 * 1024
TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
INCLUDE_OBJECT = ("", "None", "Metadata", "Object")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_LOOKS_OTHER = re.compile(r"[yYnN]|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
"""What Go's YAML puts quotes around, and Python's does not."""
FIELD_VALIDATION = ("", "Ignore", "Strict", "Warn")


class Call:
    """See the module's docstring."""

    __slots__ = (
        "_form", "annotations", "audit_id", "dry_run", "endpoint", "field_manager", "field_validation", "info", "later", "log_object", "namespace",
        "query", "request", "response_body", "server", "user", "warnings",
    )  # fmt: skip

    def __init__(self, server: APIServer, request: Request, info: RequestInfo, endpoint: Endpoint, user: UserInfo) -> None:
        self.server = server
        self.request = request
        self.info = info
        self.endpoint = endpoint
        self.user = user
        self.query = request.query
        self.namespace = info.namespace if endpoint.resource.namespaced else ""
        self.warnings: list[str] = list(endpoint.warnings) if endpoint.warnings else []
        self.dry_run = False
        self.field_manager = ""
        self.field_validation = "Warn"
        self.audit_id = audit_id(request)
        self.annotations: dict[str, str] = {}
        self.later: typeinfo.Later = []
        """What is done to the object being written once the owners of its fields are known."""
        self._form: tuple[Form, bool, bool] | None = None
        self.response_body = b""
        """Kept for the audit log, when there is one."""
        self.log_object: Object | None = None
        """The decoded request body, for the audit log."""

    def start_over(self) -> typeinfo.Later:
        """Return `later`, empty: the object is about to be read anew."""
        self.later.clear()
        return self.later

    # -- parameters ----------------------------------------------------------------------------------------------------------
    def parameter(self, name: str) -> str:
        values = self.query.get(name)
        return values[0] if values else ""

    def boolean(self, name: str) -> bool | None:
        """Return a boolean parameter, None if absent. As in Go's conversion, anything but false and 0 is true."""
        values = self.query.get(name)
        if not values:
            return None
        return values[0].lower() not in ("false", "0")

    def integer(self, name: str) -> int | None:
        """Return an integer parameter, None if absent.

        Raises:
          StatusError: 400 with Go's words.
        """
        values = self.query.get(name)
        if not values:
            return None
        text = values[0]
        if _INTEGER.fullmatch(text) is None:
            raise errors.bad_request(f"strconv.ParseInt: parsing {errors.go_quote(text)}: invalid syntax")
        number = int(text)
        if not -(1 << 63) <= number < 1 << 63:
            raise errors.bad_request(f"strconv.ParseInt: parsing {errors.go_quote(text)}: value out of range")
        return number

    def write_options(self, kind: str) -> None:
        """Read dryRun, fieldManager and fieldValidation from the query.

        Args:
          kind: "CreateOptions" and so on, for the message.

        Raises:
          StatusError: 422.
        """
        if not self.query:
            return
        found: list[errors.FieldError] = []
        dry = self.query.get("dryRun")
        if dry:
            found += check_dry_run(dry)
            self.dry_run = True
        manager = self.parameter("fieldManager")
        if manager:
            raw = manager.encode("utf-8", "surrogateescape")
            manager = raw.decode("utf-8", "replace")
            if len(raw) > 128:
                found.append(errors.too_long("fieldManager", 128))
            for index, character in enumerate(manager):
                if not character.isprintable():
                    found.append(errors.invalid_value("fieldManager", manager, f"invalid character U+{ord(character):04X} (at position {index})"))
                    break
            self.field_manager = manager
        validation = self.parameter("fieldValidation")
        if validation:
            if validation not in FIELD_VALIDATION:
                found.append(errors.not_supported("fieldValidation", validation, FIELD_VALIDATION))
            self.field_validation = validation
        if found:
            raise errors.invalid(f"{kind}.meta.k8s.io", "", found)

    @property
    def manager(self) -> str:
        """Return the field manager: as given, else the first word of the user agent."""
        if self.field_manager:
            return self.field_manager
        agent = self.request.headers.get("user-agent", "")
        return agent.partition("/")[0][:128] if agent else "unknown"

    def form(self, *, many: bool = False, watch: bool = False) -> tuple[Form, bool, bool]:
        """Return (form, as YAML, pretty) of the answer. Raises 406."""
        if self._form is None:
            self._form = self._choose_form(many=many, watch=watch)
        return self._form

    def _choose_form(self, *, many: bool, watch: bool) -> tuple[Form, bool, bool]:
        accept = self.request.headers.get("accept", "")
        include = self.parameter("includeObject") if self.query else ""
        if include not in INCLUDE_OBJECT and "as=Table" in accept:
            raise errors.bad_request(f"unrecognized includeObject value: {errors.go_quote(include)}")
        form, yaml, pretty = self.endpoint.form_for(accept, include, many=many, watch=watch)
        if not yaml and not pretty and not watch:
            pretty = wants_pretty(self.request)
        return form, yaml, pretty

    # -- answers -------------------------------------------------------------------------------------------------------------
    def answer_cached(self, status: int, cached: CachedObject) -> None:
        """Answer with a stored object in the form asked for."""
        form, yaml, pretty = self.form()
        self.answer_bytes(status, form.single(cached), form.content_type, yaml, pretty)

    def answer_object(self, status: int, obj: Object) -> None:
        """Answer with a plain object of the endpoint's kind, with kind and apiVersion (dry runs, reviews, scales)."""
        form, yaml, pretty = self.form()
        self.answer_bytes(status, form.body_of(obj), form.content_type, yaml, pretty)

    def answer_status(self, status: Object) -> None:
        """Answer with a Status object."""
        respond_status(self.request, status, status.get("code") or 200, self.warnings, self.audit_id)

    def answer_bytes(self, status: int, body: bytes, content_type: str, yaml: bool = False, pretty: bool = False) -> None:
        """Answer with a rendered body."""
        if self.server.auditing and content_type == "application/json":
            self.response_body = body
        if yaml:
            body, content_type = to_yaml(body), "application/yaml"
        elif pretty and content_type == "application/json":
            body = to_pretty(body)
        request = self.request
        if len(body) >= GZIP_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
            self._answer_gzip(status, body, content_type)
            return
        request.respond_rendered(status, self._header_lines(content_type), body)

    def _header_lines(self, content_type: str) -> bytes:
        head = b"Audit-Id: %b\r\nCache-Control: no-cache, private\r\nContent-Type: %b\r\n" % (self.audit_id.encode(), content_type.encode())
        if self.warnings:
            head += warning_lines(self.warnings)
        return head

    def _answer_gzip(self, status: int, body: bytes, content_type: str) -> None:
        lines = self._header_lines(content_type) + b"Content-Encoding: gzip\r\nVary: Accept-Encoding\r\n"
        if len(body) < GZIP_THREAD_BYTES:
            self.request.respond_rendered(status, lines, gzipped(body))
            return

        async def compress() -> None:
            # zlib releases the interpreter's lock: other requests go on meanwhile.
            packed = await asyncio.get_running_loop().run_in_executor(None, gzipped, body)
            self.request.respond_rendered(status, lines, packed)

        self.request.later = self.server.tasks.spawn(compress(), "gzip-answer")


def gzipped(body: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(body) + packer.flush()


def audit_id(request: Request) -> str:
    """Return the request's audit id: the client's if it is short enough, else a new one."""
    given = request.headers.get("audit-id")
    return given if given and len(given) <= 64 and given.isascii() and given.isprintable() else new_uid()


def check_dry_run(values: list[str]) -> list[errors.FieldError]:
    out = []
    for index, value in enumerate(values):
        if value != "All":
            out.append(errors.not_supported(f"dryRun[{index}]" if len(values) > 1 else "dryRun", values if len(values) == 1 else value, ["All"]))
    return out[:1]


def wants_pretty(request: Request) -> bool:
    """Return whether JSON is to be indented: the pretty parameter, else for people's user agents."""
    if "pretty" in request.query_string:
        value = request.query.get("pretty", [""])[0]
        if value:
            return value in TRUE
    return request.headers.get("user-agent", "").startswith(("curl", "Wget", "Mozilla/5.0"))


def to_pretty(body: bytes) -> bytes:
    return orjson.dumps(orjson.loads(body), option=orjson.OPT_INDENT_2)


@cache
def _dumper() -> Any:
    """A dumper that writes texts as Go's does: double quotes around what would be read as something else, lines as lines."""
    import yaml

    tag = "tag:yaml.org,2002:str"

    def represent(dumper: Any, text: str) -> Any:
        if "\n" in text:
            return dumper.represent_scalar(tag, text, style="|")
        other = dumper.resolve(yaml.ScalarNode, text, (True, False)) != tag or _LOOKS_OTHER.fullmatch(text) is not None
        return dumper.represent_scalar(tag, text, style='"' if other else None)

    made: Any = type("Dumper", (getattr(yaml, "CSafeDumper", yaml.SafeDumper),), {})
    made.add_representer(str, represent)
    return made


def to_yaml(body: bytes) -> bytes:
    import yaml

    text: str = yaml.dump(orjson.loads(body), Dumper=_dumper(), default_flow_style=False, allow_unicode=True, sort_keys=True)
    return text.encode()


def warning_lines(warnings: list[str]) -> bytes:
    """Render Warning headers: each text once, the whole bounded."""
    out = []
    total = 0
    for text in dict.fromkeys(warnings):
        clean = "".join(c if c.isprintable() else " " for c in text).replace("\\", "\\\\").replace('"', '\\"')
        total += len(clean)
        if total > 4096:
            break
        out.append(f'Warning: 299 - "{clean}"\r\n')
    return "".join(out).encode()


def respond_status(request: Request, status: Object, code: int, warnings: list[str] | None = None, audit: str = "", extra: list[tuple[str, str]] | None = None) -> None:
    """Answer with a Status in the encoding the client accepts (JSON unless it wants protobuf or YAML first)."""
    content_type = "application/json"
    body = orjson.dumps(status) + b"\n"
    accept = request.headers.get("accept", "")
    if "protobuf" in accept or "yaml" in accept:
        from knarr.apiserver.negotiation import PROTOBUF, YAML, parse_accept

        clauses = parse_accept(accept)
        first = next((clause for clause in clauses if not clause.as_kind), None)
        if first is not None and first.media_type == PROTOBUF and status.get("apiVersion") == "v1":
            from knarr.apiserver.protoforms import encode_envelope

            body, content_type = encode_envelope(status), PROTOBUF
        elif first is not None and first.media_type == YAML:
            body, content_type = to_yaml(body), YAML
    if content_type == "application/json" and wants_pretty(request):
        body = to_pretty(body)
    head = b"Audit-Id: %b\r\nCache-Control: no-cache, private\r\nContent-Type: %b\r\n" % ((audit or new_uid()).encode(), content_type.encode())
    if warnings:
        head += warning_lines(warnings)
    for name, value in extra or ():
        head += f"{name}: {value}\r\n".encode()
    request.respond_rendered(code, head, body)


def respond_error(request: Request, error: StatusError, warnings: list[str] | None = None, audit: str = "") -> None:
    """Answer with an error's Status."""
    respond_status(request, error.status(), error.code, warnings, audit, error.headers)


def respond_no_such_path(request: Request, code: int = 404) -> None:
    """Answer as Go's mux does where no API group is in sight: plain text."""
    text = b"404 page not found\n" if code == 404 else b"405: Method Not Allowed"
    request.respond(code, [
        ("Audit-Id", audit_id(request)), ("Cache-Control", "no-cache, private"), ("Content-Type", "text/plain; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
    ], text)  # fmt: skip
