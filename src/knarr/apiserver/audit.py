"""The audit log: an event for each stage of a request, as its policy wants it.

Owner: APIServer, when a policy is configured. Watches are told of twice: when they begin (ResponseStarted) and when they end.

Source: audit.k8s.io/v1, apiserver pkg/audit, pkg/endpoints/filters/audit.go.
"""

from __future__ import annotations

from typing import Protocol

import orjson

from knarr.aiokits import clock
from knarr.api import decode as decoding
from knarr.api.defaulting import default as default_builtin
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.apiserver.attributes import Decision, UserInfo
from knarr.apiserver.auditbackends import LogBackend, WebhookBackend
from knarr.apiserver.auditpolicy import Policy, Wanted
from knarr.apiserver.call import Call, audit_id
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.instruments import Counters
from knarr.apiserver.metrics import family
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.errors import BodyTooLarge
from knarr.http.server import Request

RECEIVED, STARTED, COMPLETE = "RequestReceived", "ResponseStarted", "ResponseComplete"


class Backend(Protocol):
    """Takes events; they may change afterwards."""

    def write(self, event: Object) -> None: ...

    async def close(self) -> None: ...


class Trace:
    """One request's audit event in the making."""

    def __init__(self, audit: Audit, event: Object, wanted: Wanted, info: RequestInfo) -> None:
        self._audit = audit
        self._event = event
        self._wanted = wanted
        self._info = info
        self._error: StatusError | None = None
        event["annotations"] = {}

    def authorized(self, decision: Decision, reason: str) -> None:
        """Note what the authorizer said."""
        allowed = "allow" if decision is Decision.ALLOW else "forbid"
        self._event["annotations"].update({"authorization.k8s.io/decision": allowed, "authorization.k8s.io/reason": reason})

    def failed(self, error: StatusError) -> None:
        self._error = error

    def received(self) -> None:
        self._tell(RECEIVED, self._event["requestReceivedTimestamp"])

    def finish(self, request: Request) -> None:
        """The request has been answered; a watch only begins now."""
        code = self._error.code if self._error is not None else request.status or 200
        status: Object = {"metadata": {}, "code": code}
        if self._error is not None:
            status.update(status="Failure", message=self._error.message, reason=self._error.reason)
        self._event["responseStatus"] = status
        self._add_objects(request)
        if self._info.verb == "watch" and self._error is None:
            self._tell(STARTED)
            self._audit.open_watches[id(request)] = self
        else:
            self.complete()

    def complete(self) -> None:
        """Nothing more will come of this request."""
        self._tell(COMPLETE)

    def _tell(self, stage: str, at: str = "") -> None:
        if stage not in self._wanted.omitted:
            self._event["stage"] = stage
            self._event["stageTimestamp"] = at or clock.now_micro()
            self._audit.write(self._event)

    def _add_objects(self, request: Request) -> None:
        """What was sent and answered, as far as the level wants it."""
        call = request.context
        if not isinstance(call, Call):
            return
        self._event["annotations"].update(call.annotations)
        if self._wanted.reaches("Request"):
            sent = _sent(call)
            if sent is not None:
                self._event["requestObject"] = self._shown(sent)
        if self._wanted.reaches("RequestResponse") and call.response_body:
            self._event["responseObject"] = self._shown(orjson.loads(call.response_body))

    def _shown(self, obj: Object) -> Object:
        if not self._wanted.omits_managed_fields or not isinstance(obj, dict):
            return obj
        items = obj.get("items")
        if isinstance(items, list):
            return {**obj, "items": [_without_managed_fields(item) for item in items]}
        return _without_managed_fields(obj)


def _sent(call: Call) -> Object | None:
    """The request's body: a patch as it is, an object decoded once more, since what was decoded has become what is stored."""
    method, info = call.request.method, call.info
    if method not in ("POST", "PUT", "PATCH") or info.subresource not in ("", "status"):
        return call.log_object
    content_type = call.request.headers.get("content-type", "")
    try:
        body = call.request.whole_body()
        if method == "PATCH":
            patch: Object = orjson.loads(body)
            return patch
        resource, schema = call.endpoint.resource, call.endpoint.schema
        sent = decoding.decode(resource, body, content_type, "Ignore")[0]
        if schema is not None:
            schema.complete(sent)
        else:
            default_builtin(resource, sent)
        return sent
    except (StatusError, BodyTooLarge, orjson.JSONDecodeError):
        return None


def _without_managed_fields(obj: Object) -> Object:
    metadata = obj.get("metadata")
    if isinstance(metadata, dict) and "managedFields" in metadata:
        return {**obj, "metadata": {key: value for key, value in metadata.items() if key != "managedFields"}}
    return obj


class Audit:
    """See the module's docstring."""

    def __init__(self, config: APIServerConfig) -> None:
        """Raises ValueError, OSError: the policy or the webhook's configuration cannot be read."""
        self._policy = Policy(config.audit_policy)
        self._backends: list[Backend] = []
        if config.audit_log_path:
            self._backends.append(LogBackend(config.audit_log_path, max_bytes=config.audit_log_max_megabytes << 20, backups=config.audit_log_backups))
        if config.audit_webhook_config:
            self._backends.append(WebhookBackend(
                config.audit_webhook_config, batch_events=config.audit_webhook_batch_events, batch_seconds=config.audit_webhook_batch_seconds))  # fmt: skip
        self.open_watches: dict[int, Trace] = {}
        """By the identity of their requests, which last as long."""
        self._events = Counters("apiserver_audit_event_total", "[ALPHA] Counter of audit events generated and sent to the audit backend.")
        self._levels = Counters("apiserver_audit_level_total", "[ALPHA] Counter of policy levels for audit events (1 per request).", ("level",))

    def begin(self, request: Request, info: RequestInfo, original: UserInfo, user: UserInfo) -> Trace | None:
        """Note a request; None when the policy does not want it."""
        wanted = self._policy.wanted(info, request.path, original)
        self._levels.add(wanted.level if wanted is not None else "None")
        if wanted is None:
            return None
        # The answer's header names the same id.
        request.headers["audit-id"] = identity = audit_id(request)
        event: Object = {
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": wanted.level, "auditID": identity,
            "requestURI": request.raw_path + (f"?{request.query_string}" if request.query_string else ""), "verb": info.verb,
            "user": original.to_object(), "sourceIPs": [request.peer[0]], "userAgent": request.headers.get("user-agent", ""),
            "requestReceivedTimestamp": clock.now_micro(),
        }  # fmt: skip
        if user is not original:
            event["impersonatedUser"] = user.to_object()
        if info.is_resource:
            reference = {
                "resource": info.resource, "namespace": info.namespace, "name": info.name, "apiGroup": info.group, "apiVersion": info.version,
                "subresource": info.subresource,
            }  # fmt: skip
            event["objectRef"] = {key: value for key, value in reference.items() if value}
        trace = Trace(self, event, wanted, info)
        trace.received()
        return trace

    def watch_ended(self, request: Request) -> None:
        trace = self.open_watches.pop(id(request), None)
        if trace is not None:
            trace.complete()

    def write(self, event: Object) -> None:
        self._events.add()
        for backend in self._backends:
            backend.write(event)

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        return [*self._events.lines(), *self._levels.lines()]

    async def close(self) -> None:
        for trace in self.open_watches.values():
            trace.complete()
        self.open_watches.clear()
        for backend in self._backends:
            await backend.close()


def no_audit() -> list[str]:
    """Return the metrics of a server that notes nothing."""
    return [
        *family("apiserver_audit_event_total", "counter", "[ALPHA] Counter of audit events generated and sent to the audit backend.", [("", 0)]),
        *family("apiserver_audit_requests_rejected_total", "counter",
                "[ALPHA] Counter of apiserver requests rejected due to an error in audit logging backend.", [("", 0)]),
    ]  # fmt: skip
