"""Reads metrics.k8s.io, custom.metrics.k8s.io and external.metrics.k8s.io. All values are in thousandths.

Source: pkg/controller/podautoscaler/metrics/client.go, k8s.io/metrics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import orjson

from knarr.aiokits import clock
from knarr.api import quantity
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.client.rest import Client

_DEFAULT_WINDOW_SECONDS = 60.0
_PART = re.compile(r"([0-9.]+)(h|m|s|ms|us|µs|ns)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


class MetricsError(Exception):
    """Metrics could not be had."""


@dataclass(frozen=True, slots=True)
class PodMetric:
    """A pod's value, when it was measured, over how long."""

    value: int
    timestamp: float = 0.0
    window_seconds: float = _DEFAULT_WINDOW_SECONDS


def _seconds(text: str) -> float:
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text)) or _DEFAULT_WINDOW_SECONDS


def _time(text: str | None) -> float:
    return clock.parse_rfc3339(text) if text else 0.0


class MetricsClient:
    """Asks through the aggregated API."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def _get(self, what: str, path: str, query: dict[str, str]) -> Object:
        try:
            response = await self._client.request("GET", path, query)
        except StatusError as error:
            raise MetricsError(f"unable to fetch metrics from {what} metrics API: {error.message}") from error
        answer: Object = orjson.loads(response.body)
        return answer

    async def resource(self, name: str, namespace: str, selector: str, container: str = "") -> dict[str, PodMetric]:
        """Usage of a resource by pod; of one container when given."""
        path = f"/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods"
        answer = await self._get("resource", path, {"labelSelector": selector})
        if not answer.get("items"):
            raise MetricsError("no metrics returned from resource metrics API")
        result: dict[str, PodMetric] = {}
        for item in answer["items"]:
            containers = item.get("containers") or []
            if container:
                containers = [entry for entry in containers if entry["name"] == container]
            values = [(entry.get("usage") or {}).get(name) for entry in containers]
            if not containers or any(value is None for value in values):
                continue
            total = sum(quantity.milli_value(value) for value in values if value is not None)
            result[item["metadata"]["name"]] = PodMetric(total, _time(item.get("timestamp")), _seconds(item.get("window", "")))
        return result

    async def _custom(self, namespace: str, path: str, query: dict[str, str]) -> list[Object]:
        error: MetricsError | None = None
        for version in ("v1beta2", "v1beta1"):
            try:
                answer = await self._get("custom", f"/apis/custom.metrics.k8s.io/{version}/namespaces/{namespace}/{path}", query)
                return answer.get("items") or []
            except MetricsError as failed:
                error = error or failed
        assert error is not None
        raise error

    async def pods(self, metric: str, namespace: str, selector: str, metric_selector: str) -> dict[str, PodMetric]:
        """A custom metric of every pod."""
        items = await self._custom(namespace, f"pods/*/{metric}", {"labelSelector": selector, "metricLabelSelector": metric_selector})
        if not items:
            raise MetricsError("no metrics returned from custom metrics API")
        result = {}
        for item in items:
            window = float(item.get("windowSeconds") or item.get("window") or _DEFAULT_WINDOW_SECONDS)
            name = item["describedObject"]["name"]
            result[name] = PodMetric(quantity.milli_value(item["value"]), _time(item.get("timestamp")), window)
        return result

    async def object(self, metric: str, namespace: str, path: str, metric_selector: str) -> int:
        """A custom metric of one object; `path` is e.g. "ingresses.networking.k8s.io/main"."""
        items = await self._custom(namespace, f"{path}/{metric}", {"metricLabelSelector": metric_selector})
        if not items:
            raise MetricsError("no metrics returned from custom metrics API")
        return quantity.milli_value(items[0]["value"])

    async def external(self, metric: str, namespace: str, selector: str) -> list[int]:
        """All values of an external metric."""
        path = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{metric}"
        answer = await self._get("external", path, {"labelSelector": selector})
        if not answer.get("items"):
            raise MetricsError("no metrics returned from external metrics API")
        return [quantity.milli_value(item["value"]) for item in answer["items"]]
