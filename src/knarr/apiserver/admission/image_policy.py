"""ImagePolicyWebhook: a web server says whether a pod's images may run. Off by default; it needs a configuration.

Configuration: `imagePolicy: {kubeConfigFile, allowTTL, denyTTL (seconds), retryBackoff (milliseconds), defaultAllow}`.

Source: kubernetes plugin/pkg/admission/imagepolicy.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest
from knarr.apiserver.auth.webhooks import ReviewCaller
from knarr.http.errors import HTTPError

log = get_logger(__name__)

_MOST_CACHED = 1024
_TRIES = 5
_MARK = ".image-policy.k8s.io/"
_FAILED_OPEN = "alpha.image-policy.k8s.io/failed-open"
_AUDIT_PREFIX = "imagepolicywebhook" + _MARK
# Name, least, most, default: as upstream normalises them.
_SECONDS = {"allowTTL": (1, 1800, 300), "denyTTL": (1, 1800, 30)}
_BACKOFF = (1, 300_000, 500)


def _bounded(given: Object, name: str, bounds: tuple[int, int, int]) -> int:
    least, most, default = bounds
    value = given.get(name)
    if not value:
        return default
    if value == -1:
        return 0
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"ImagePolicyWebhook: valid value for {name} is between {least} and {most}, got {value}")
    return value


class ImagePolicyWebhook(Plugin):
    name = "ImagePolicyWebhook"
    by_default = False

    def __init__(self, configuration: Any) -> None:
        """Raises ValueError: the configuration is there, but not valid."""
        given = (configuration or {}).get("imagePolicy") if isinstance(configuration, dict) else None
        self._caller: ReviewCaller | None = None
        if given is None:
            return
        self._caller = ReviewCaller(str(given.get("kubeConfigFile") or ""))
        self._allow_seconds, self._deny_seconds = (_bounded(given, name, bounds) for name, bounds in _SECONDS.items())
        self._backoff_seconds = _bounded(given, "retryBackoff", _BACKOFF) / 1000
        self._default_allow = bool(given.get("defaultAllow"))
        self._known: dict[bytes, tuple[float, Object]] = {}

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return operation in (CREATE, UPDATE) and is_resource(resource, "", "pods") and subresource in ("", "ephemeralcontainers")

    async def start(self) -> None:
        if self._caller is None:
            raise ValueError("ImagePolicyWebhook: no config specified")

    async def validate(self, request: AdmissionRequest) -> None:
        pod = request.object or {}
        status = await self._reviewed(_spec(pod, request), pod, request)
        if status is None:
            return
        for key, value in (status.get("auditAnnotations") or {}).items():
            request.audit_annotations[_AUDIT_PREFIX + str(key)] = str(value)
        if not status.get("allowed"):
            reason = status.get("reason")
            why = f"image policy webhook backend denied one or more images: {reason}" if reason else "one or more images rejected by webhook backend"
            raise refuse(request, why)

    async def _reviewed(self, spec: Object, pod: Object, request: AdmissionRequest) -> Object | None:
        """The answer's status; None: there was none, and the pod is let in all the same. Raises StatusError."""
        key = orjson.dumps(spec, option=orjson.OPT_SORT_KEYS)
        known = self._known.get(key)
        if known is not None and clock.now() < known[0]:
            return known[1]
        try:
            status = await self._ask(spec)
        except (HTTPError, StatusError, ValueError) as error:
            log.warning("image policy webhook failed", error=str(error), allowed=self._default_allow)
            if not self._default_allow:
                raise refuse(request, str(error)) from error
            request.audit_annotations[_AUDIT_PREFIX + "failed-open"] = "true"
            annotations = pod["metadata"].get("annotations") or {}
            pod["metadata"]["annotations"] = {**annotations, _FAILED_OPEN: "true"}
            return None
        if len(self._known) >= _MOST_CACHED:
            self._known.clear()
        self._known[key] = (clock.now() + (self._allow_seconds if status.get("allowed") else self._deny_seconds), status)
        return status

    async def _ask(self, spec: Object) -> Object:
        assert self._caller is not None
        review = {"apiVersion": "imagepolicy.k8s.io/v1alpha1", "kind": "ImageReview", "metadata": {}, "spec": spec, "status": {"allowed": False}}
        pause = self._backoff_seconds
        for left in range(_TRIES - 1, -1, -1):
            try:
                status: Object = (await self._caller.post(review))["status"]
                return status
            except (HTTPError, StatusError) as error:
                if not left or (isinstance(error, StatusError) and error.code < 500 and error.code != 429):
                    raise
            await asyncio.sleep(pause)
            pause *= 1.5
        raise AssertionError

    async def close(self) -> None:
        if self._caller is not None:
            await self._caller.close()


def _spec(pod: Object, request: AdmissionRequest) -> Object:
    spec, annotations = pod.get("spec") or {}, (pod.get("metadata") or {}).get("annotations") or {}
    kinds = ("ephemeralContainers",) if request.subresource else ("containers", "initContainers")
    images = [{"image": container["image"]} if container.get("image") else {} for kind in kinds for container in spec.get(kind) or ()]
    marked = {key: value for key, value in annotations.items() if _MARK in key}
    found: Object = {"containers": images, "annotations": marked, "namespace": request.namespace}
    return {key: value for key, value in found.items() if value}
