"""The audit log: one JSON line per event, by policy (first rule that matches decides).

Owner: APIServer, when a policy is configured. Lines are written to a file (or standard output) as they come; the file is
opened for appending, so that it can be rotated by renaming.

Source: audit.k8s.io/v1, apiserver pkg/audit, pkg/endpoints/filters/audit.go.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import orjson
import yaml

from knarr.aiokits import clock
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.call import Call, audit_id
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request

LEVELS = {"None": 0, "Metadata": 1, "Request": 2, "RequestResponse": 3}


class Trace:
    """One request's audit event in the making."""

    def __init__(self, audit: Audit, event: Object, level: int, omit: frozenset[str]) -> None:
        self._audit = audit
        self._event = event
        self._level = level
        self._omit = omit
        self._error: StatusError | None = None

    def failed(self, error: StatusError) -> None:
        self._error = error

    def finish(self, request: Request) -> None:
        """Write the last event of the request."""
        event = self._event
        code = self._error.code if self._error is not None else request.status or 200
        status: Object = {"metadata": {}, "code": code}
        if self._error is not None:
            status.update(status="Failure", message=self._error.message, reason=self._error.reason)
        event["responseStatus"] = status
        event["stage"] = "ResponseComplete"
        event["stageTimestamp"] = clock.now_micro()
        event["annotations"] = {"authorization.k8s.io/decision": "forbid" if code == 403 else "allow", "authorization.k8s.io/reason": ""}
        self._add_objects(request)
        if "ResponseComplete" not in self._omit:
            self._audit.write(event)

    def _add_objects(self, request: Request) -> None:
        """What was sent and answered, as far as the level wants it; managed fields say little and are long."""
        call = request.context
        if not isinstance(call, Call):
            return
        self._event["annotations"].update(call.annotations)
        if self._level >= LEVELS["Request"] and call.log_object is not None:
            self._event["requestObject"] = _without_managed_fields(call.log_object)
        if self._level >= LEVELS["RequestResponse"] and call.response_body:
            self._event["responseObject"] = _without_managed_fields(orjson.loads(call.response_body))

    def received(self) -> None:
        if "RequestReceived" not in self._omit:
            self._audit.write({**self._event, "stage": "RequestReceived", "stageTimestamp": self._event["requestReceivedTimestamp"]})


def _without_managed_fields(obj: Object) -> Object:
    metadata = obj.get("metadata")
    if isinstance(metadata, dict) and "managedFields" in metadata:
        return {**obj, "metadata": {key: value for key, value in metadata.items() if key != "managedFields"}}
    return obj


class Audit:
    """See the module's docstring."""

    def __init__(self, config: APIServerConfig) -> None:
        policy = yaml.safe_load(Path(config.audit_policy).read_text(encoding="utf-8")) or {}
        self._rules: list[Object] = policy.get("rules") or []
        self._omit = frozenset(policy.get("omitStages") or [])
        self._path = config.audit_log_path
        self._file: IO[bytes] | None = None

    def begin(self, request: Request, info: RequestInfo, original: UserInfo, user: UserInfo) -> Trace | None:
        """Note a request; None when the policy does not want it."""
        rule = next((rule for rule in self._rules if _matches(rule, info, request.path, original)), None)
        level = LEVELS.get((rule or {}).get("level") or "None", 0)
        if rule is None or level == 0:
            return None
        event: Object = {
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": rule["level"], "auditID": audit_id(request),
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
        trace = Trace(self, event, level, self._omit | frozenset(rule.get("omitStages") or []))
        trace.received()
        return trace

    def write(self, event: Any) -> None:
        if self._file is None:
            self._file = sys.stdout.buffer if self._path == "-" else open(self._path, "ab", buffering=0)
        self._file.write(orjson.dumps(event) + b"\n")

    def close(self) -> None:
        if self._file is not None and self._path != "-":
            self._file.close()
        self._file = None


def _matches(rule: Object, info: RequestInfo, path: str, user: UserInfo) -> bool:
    if rule.get("users") and user.name not in rule["users"]:
        return False
    if rule.get("userGroups") and not set(rule["userGroups"]) & set(user.groups):
        return False
    if rule.get("verbs") and info.verb not in rule["verbs"]:
        return False
    if rule.get("resources") or rule.get("namespaces"):
        return info.is_resource and _matches_resource(rule, info)
    if rule.get("nonResourceURLs"):
        return not info.is_resource and any(_matches_path(pattern, path) for pattern in rule["nonResourceURLs"])
    return True


def _matches_resource(rule: Object, info: RequestInfo) -> bool:
    if rule.get("namespaces") and info.namespace not in rule["namespaces"]:
        return False
    wanted = rule.get("resources")
    if not wanted:
        return True
    combined = f"{info.resource}/{info.subresource}" if info.subresource else info.resource
    for entry in wanted:
        if (entry.get("group") or "") != info.group:
            continue
        names = entry.get("resources") or []
        hit = not names or any(
            name in ("*", combined) or (name.endswith("/*") and name[:-2] == info.resource)
            or (name.startswith("*/") and name[2:] == info.subresource) for name in names
        )  # fmt: skip
        if hit and (not entry.get("resourceNames") or info.name in entry["resourceNames"]):
            return True
    return False


def _matches_path(pattern: str, path: str) -> bool:
    return pattern in ("*", path) or (pattern.endswith("*") and path.startswith(pattern[:-1]))
