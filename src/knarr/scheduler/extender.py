"""HTTP extenders: filters, scores, preemption and binding that live in another process.

Source: pkg/scheduler/extender.go; kube-scheduler extender v1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from knarr.aiokits.log import get_logger
from knarr.http.client import HTTPClient
from knarr.http.errors import HTTPError
from knarr.scheduler.columns import Ints, Rows
from knarr.scheduler.config import ExtenderConfig
from knarr.scheduler.framework import Diagnosis, PluginError
from knarr.scheduler.nodes import NodeTable
from knarr.scheduler.plugins.preemption import Candidate
from knarr.scheduler.podinfo import PodInfo

log = get_logger(__name__)

# Extenders score 0..10, the framework 0..100.
_SCALE = 10


class Extender:
    """One extender; raises PluginError unless it is ignorable."""

    def __init__(self, config: ExtenderConfig) -> None:
        self.config = config
        scheme, _, rest = config.url_prefix.partition("://")
        host, slash, path = rest.partition("/")
        self._path = slash + path
        self._http = HTTPClient(f"{scheme}://{host}")

    def concerns(self, pod: PodInfo) -> bool:
        managed = self.config.managed_resources
        return not managed or any(name in managed for name in pod.shape.requests)

    async def call(self, verb: str, body: dict[str, Any]) -> Any:
        """POST to a verb and decode the answer.

        Raises:
          PluginError: no answer in time, or not a good one.
        """
        path = f"{self._path}/{verb.lstrip('/')}"
        try:
            async with asyncio.timeout(self.config.http_timeout_seconds):
                answer = await self._http.request("POST", path, [("Content-Type", "application/json")], orjson.dumps(body))
        except (HTTPError, OSError, TimeoutError) as error:
            raise PluginError(f"extender {self.config.url_prefix}: {error!r}") from error
        if answer.status != 200:
            raise PluginError(f"extender {self.config.url_prefix}: failed {verb} with code {answer.status}")
        try:
            return orjson.loads(answer.body)
        except orjson.JSONDecodeError as error:
            raise PluginError(f"extender {self.config.url_prefix}: {error}") from error

    async def close(self) -> None:
        await self._http.close()


class Extenders:
    """All extenders of a scheduler, asked one after another."""

    def __init__(self, configs: Sequence[ExtenderConfig], table: NodeTable) -> None:
        self._extenders = [Extender(config) for config in configs]
        self._table = table

    @property
    def filters(self) -> bool:
        return any(e.config.filter_verb for e in self._extenders)

    def _arguments(self, extender: Extender, pod: PodInfo, rows: Rows) -> dict[str, Any]:
        infos = [self._table.info(row) for row in rows.tolist()]
        if extender.config.node_cache_capable:
            return {"pod": pod.pod, "nodenames": [info.name for info in infos]}
        return {"pod": pod.pod, "nodes": {"apiVersion": "v1", "kind": "NodeList", "items": [info.node for info in infos]}}

    async def filter(self, pod: PodInfo, rows: Rows, diagnosis: Diagnosis) -> Rows:
        """Give the rows that all extenders accept; notes the others in the diagnosis.

        Raises:
          PluginError: an extender failed that may not be ignored.
        """
        for extender in self._extenders:
            if not rows.size or not extender.config.filter_verb or not extender.concerns(pod):
                continue
            try:
                answer = await extender.call(extender.config.filter_verb, self._arguments(extender, pod, rows))
                if answer.get("error"):
                    raise PluginError(answer["error"])
            except PluginError as error:
                if extender.config.ignorable:
                    log.warning("extender ignored", extender=extender.config.url_prefix, error=error)
                    continue
                raise
            names = answer.get("nodenames")
            if names is None:
                names = [node["metadata"]["name"] for node in (answer.get("nodes") or {}).get("items") or ()]
            unresolvable = answer.get("failedAndUnresolvableNodes") or {}
            for failed, final in ((answer.get("failedNodes") or {}, False), (unresolvable, True)):
                for name, reason in failed.items():
                    row = self._table.rows.get(name)
                    if row is not None:
                        diagnosis.extender_reasons[row] = (reason, final)
            rows = rows[np.isin(rows, self._table.rows_of(names))]
        return rows

    async def scores(self, pod: PodInfo, rows: Rows) -> Ints | None:
        """Give the sum of the extenders' weighted scores per row; one that fails is left out."""
        total: Ints | None = None
        for extender in self._extenders:
            if not extender.config.prioritize_verb or not extender.concerns(pod):
                continue
            try:
                answer = await extender.call(extender.config.prioritize_verb, self._arguments(extender, pod, rows))
            except PluginError as error:
                log.warning("extender gave no scores", extender=extender.config.url_prefix, error=error)
                continue
            by_name = {item["host"]: item["score"] for item in answer or ()}
            scores = np.array([by_name.get(self._table.name(row), 0) for row in rows.tolist()], dtype=np.int64)
            part = scores * (extender.config.weight * _SCALE)
            total = part if total is None else total + part
        return total

    async def preempt(self, pod: PodInfo, candidates: list[Candidate]) -> list[Candidate]:
        """Let extenders drop candidates or change their victims."""
        for extender in self._extenders:
            if not candidates or not extender.config.preempt_verb or not extender.concerns(pod):
                continue
            by_name = {c.node_name: c for c in candidates}
            victims = {c.node_name: {"pods": [{"uid": v.uid} for v in c.victims], "numPDBViolations": c.violations} for c in candidates}
            try:
                answer = await extender.call(extender.config.preempt_verb, {"pod": pod.pod, "nodeNameToMetaVictims": victims})
            except PluginError:
                if extender.config.ignorable:
                    continue
                raise
            candidates = []
            for name, meta in (answer.get("nodeNameToMetaVictims") or {}).items():
                wanted = {v["uid"] for v in (meta or {}).get("pods") or ()}
                if name in by_name and wanted:
                    chosen = [v for v in by_name[name].victims if v.uid in wanted]
                    candidates.append(Candidate(name, chosen, int(meta.get("numPDBViolations") or 0)))
        return candidates

    async def bind(self, pod: PodInfo, node_name: str) -> bool:
        """Let an extender bind the pod; False when none does.

        Raises:
          PluginError: the extender could not.
        """
        for extender in self._extenders:
            if not extender.config.bind_verb or not extender.concerns(pod):
                continue
            body = {"podName": pod.name, "podNamespace": pod.namespace, "podUID": pod.uid, "node": node_name}
            try:
                answer = await extender.call(extender.config.bind_verb, body)
                if answer.get("error"):
                    raise PluginError(answer["error"])
            except PluginError:
                if extender.config.ignorable:
                    continue
                raise
            return True
        return False

    async def close(self) -> None:
        for extender in self._extenders:
            await extender.close()
