"""EventRateLimit: so many events a second for the whole server, per namespace, per user, or per source and object.

Configuration: `limits: [{type: Server|Namespace|User|SourceAndObject, qps, burst, cacheSize}]`.

Source: kubernetes plugin/pkg/admission/eventratelimit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from knarr.aiokits.ratelimit import RateLimit
from knarr.api import errors
from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin
from knarr.apiserver.attributes import AdmissionRequest

_BUCKETS = 4096


class _Limit:
    """One limit: a token bucket per key, the least used ones forgotten."""

    def __init__(self, kind: str, per_second: float, burst: int, most: int) -> None:
        self.kind = kind
        self._key = _KEYS[kind]
        self._per_second, self._burst, self._most = per_second, burst, most
        self._buckets: OrderedDict[str, RateLimit] = OrderedDict()

    def refused(self, request: AdmissionRequest) -> str:
        """Take a token; return why there is none, "" when there was."""
        key = self._key(request)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = RateLimit(self._per_second, self._burst)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return "" if bucket.try_take() else f"limit reached on type {self.kind} for key {key}"


def _source_and_object(request: AdmissionRequest) -> str:
    event = request.object or {}
    source = event.get("source") or event.get("deprecatedSource") or {}
    involved = event.get("involvedObject") or event.get("regarding") or {}
    parts = [source.get("component"), source.get("host"), *(involved.get(key) for key in ("kind", "namespace", "name", "uid", "apiVersion"))]
    return "".join(str(part or "") for part in parts)


_KEYS: dict[str, Callable[[AdmissionRequest], str]] = {
    "Server": lambda request: "", "Namespace": lambda request: request.namespace, "User": lambda request: request.user.name,
    "SourceAndObject": _source_and_object,
}  # fmt: skip


class EventRateLimit(Plugin):
    name = "EventRateLimit"
    by_default = False

    def __init__(self, configuration: object) -> None:
        """Raises ValueError for a type of limit that does not exist."""
        self._limits: list[_Limit] = []
        for limit in (configuration.get("limits") or ()) if isinstance(configuration, dict) else ():
            if limit.get("type") not in _KEYS:
                raise ValueError(f"EventRateLimit: unknown event rate limit type: {limit.get('type')}")
            self._limits.append(_Limit(limit["type"], float(limit["qps"]), int(limit["burst"]), int(limit.get("cacheSize") or _BUCKETS)))

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return resource.plural == "events" and resource.group in ("", "events.k8s.io") and operation in (CREATE, UPDATE)

    def validate(self, request: AdmissionRequest) -> None:
        if request.dry_run:
            return
        refused = [why for limit in self._limits if (why := limit.refused(request))]
        if refused:
            raise errors.too_many_requests(refused[0] if len(refused) == 1 else f"[{', '.join(refused)}]", 0)
