"""HTTP extenders: filters, scores, preemption and binding that live in another process.

On the wire the fields of requests have their Go names ("NodeNames"), since upstream's types say nothing else; answers are
read as Go reads them, without regard to case, because extenders in other languages write them in many ways.

Source: pkg/scheduler/extender.go; kube-scheduler extender v1.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
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
from knarr.scheduler.plugins.preemption import Candidate, by_importance
from knarr.scheduler.podinfo import PodInfo

log = get_logger(__name__)

# Extenders score 0..10, the framework 0..100.
_SCALE = 10


def _lowered(answer: Any) -> Any:
    """An object with the names of its own fields in lower case; anything else as it is."""
    return {key.lower(): value for key, value in answer.items()} if isinstance(answer, dict) else answer


@contextlib.contextmanager
def _understood(extender: Extender) -> Iterator[None]:
    """Turn what a badly formed answer causes into a PluginError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PluginError(f"extender {extender.config.url_prefix}: an answer that makes no sense: {error!r}") from error


class Extender:
    """One extender; raises PluginError unless it is ignorable."""

    def __init__(self, config: ExtenderConfig) -> None:
        self.config = config
        scheme, _, rest = config.url_prefix.partition("://")
        host, slash, path = rest.partition("/")
        self._path = slash + path
        tls = config.tls
        context = tls.ssl_context() if tls is not None else None
        self._http = HTTPClient(f"{scheme}://{host}", context, server_hostname=(tls.tls_server_name or None) if tls is not None else None)

    def concerns(self, pod: PodInfo) -> bool:
        managed = self.config.managed_resources
        return not managed or any(name in managed for name in pod.shape.requests)

    async def call(self, verb: str, body: dict[str, Any]) -> Any:
        """POST to a verb and decode the answer; the names of its own fields come in lower case.

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
            return _lowered(orjson.loads(answer.body))
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
            return {"Pod": pod.pod, "Nodes": None, "NodeNames": [info.name for info in infos]}
        nodes = {"metadata": {}, "items": [info.node for info in infos]}
        return {"Pod": pod.pod, "Nodes": nodes, "NodeNames": None}

    async def filter(self, pod: PodInfo, rows: Rows, diagnosis: Diagnosis) -> Rows:
        """Give the rows that all extenders accept; notes the others in the diagnosis.

        Raises:
          PluginError: an extender failed that may not be ignored.
        """
        for extender in self._extenders:
            if not rows.size or not extender.config.filter_verb or not extender.concerns(pod):
                continue
            try:
                rows = await self._filter_one(extender, pod, rows, diagnosis)
            except PluginError as error:
                if not extender.config.ignorable:
                    raise
                log.warning("extender ignored", extender=extender.config.url_prefix, error=error)
        return rows

    async def _filter_one(self, extender: Extender, pod: PodInfo, rows: Rows, diagnosis: Diagnosis) -> Rows:
        sent = {self._table.name(row): row for row in rows.tolist()}
        answer = await extender.call(extender.config.filter_verb, self._arguments(extender, pod, rows))
        with _understood(extender):
            if answer.get("error"):
                raise PluginError(str(answer["error"]))
            names = answer.get("nodenames") if extender.config.node_cache_capable else None
            if names is None:
                names = [node["metadata"]["name"] for node in (answer.get("nodes") or {}).get("items") or ()]
            if unknown := next((name for name in names if name not in sent), None):
                url = extender.config.url_prefix
                raise PluginError(f'extender "{url}" claims a filtered node "{unknown}" which is not found in the input node list')
            failed = {name: (str(reason), False) for name, reason in (answer.get("failednodes") or {}).items()}
            failed |= {name: (str(reason), True) for name, reason in (answer.get("failedandunresolvablenodes") or {}).items()}
        # While it was asked, nodes may have gone, and others may have taken their rows.
        there = {name: row for name, row in sent.items() if self._table.rows.get(name) == row}
        for name, why in failed.items():
            if name in there:
                diagnosis.extender_reasons[there[name]] = why
        accepted = set(names)
        return np.array([row for name, row in there.items() if name in accepted], dtype=np.intp)

    async def scores(self, pod: PodInfo, rows: Rows) -> Ints | None:
        """Give the sum of the extenders' weighted scores per row; one that fails is left out."""
        names = [self._table.name(row) for row in rows.tolist()]
        asked = [e for e in self._extenders if e.config.prioritize_verb and e.concerns(pod)]
        if not asked:
            return None
        answers = await asyncio.gather(*(self._scores_one(extender, pod, rows) for extender in asked))
        total = np.zeros(rows.shape, dtype=np.int64)
        for extender, by_name in zip(asked, answers, strict=True):
            total += np.array([by_name.get(name, 0) for name in names], dtype=np.int64) * (extender.config.weight * _SCALE)
        return total

    async def _scores_one(self, extender: Extender, pod: PodInfo, rows: Rows) -> dict[str, int]:
        try:
            answer = await extender.call(extender.config.prioritize_verb, self._arguments(extender, pod, rows))
            with _understood(extender):
                return {item["host"]: int(item["score"]) for item in map(_lowered, answer or ())}
        except PluginError as error:
            log.warning("extender gave no scores", extender=extender.config.url_prefix, error=error)
            return {}

    async def preempt(self, pod: PodInfo, candidates: list[Candidate]) -> list[Candidate]:
        """Let extenders drop candidates or change their victims.

        Raises:
          PluginError: an extender failed that may not be ignored.
        """
        for extender in self._extenders:
            if not candidates or not extender.config.preempt_verb or not extender.concerns(pod):
                continue
            try:
                candidates = await self._preempt_one(extender, pod, candidates)
            except PluginError as error:
                if not extender.config.ignorable:
                    raise
                log.warning("extender ignored", extender=extender.config.url_prefix, error=error)
        return candidates

    async def _preempt_one(self, extender: Extender, pod: PodInfo, candidates: list[Candidate]) -> list[Candidate]:
        by_identity = extender.config.node_cache_capable
        victims = {
            c.node_name: {"Pods": [{"UID": v.uid} if by_identity else v.pod for v in c.victims], "NumPDBViolations": c.violations}
            for c in candidates
        }
        body = {"Pod": pod.pod, "NodeNameToVictims": None, "NodeNameToMetaVictims": None}
        body["NodeNameToMetaVictims" if by_identity else "NodeNameToVictims"] = victims
        answer = await extender.call(extender.config.preempt_verb, body)
        kept = []
        with _understood(extender):
            for name, told in (answer.get("nodenametometavictims") or {}).items():
                found = _lowered(told or {})
                chosen = [self._victim(extender, name, _lowered(one)["uid"]) for one in found.get("pods") or ()]
                if chosen:
                    kept.append(Candidate(name, by_importance(chosen), int(found.get("numpdbviolations") or 0)))
                elif not extender.config.ignorable:
                    raise PluginError(f'expected at least one victim pod on node "{name}"')
        return kept

    def _victim(self, extender: Extender, node_name: str, uid: str) -> PodInfo:
        info = self._table.get(node_name)
        victim = info.pods.get(uid) if info is not None else None
        if victim is None:
            url = extender.config.url_prefix
            raise PluginError(f"extender: {url} claims to preempt pod (UID: {uid}) on node: {node_name}, but the pod is not found on that node")
        return victim

    async def bind(self, pod: PodInfo, node_name: str) -> bool:
        """Let an extender bind the pod; False when none does.

        Raises:
          PluginError: the extender could not.
        """
        for extender in self._extenders:
            if not extender.config.bind_verb or not extender.concerns(pod):
                continue
            body = {"PodName": pod.name, "PodNamespace": pod.namespace, "PodUID": pod.uid, "Node": node_name}
            try:
                answer = await extender.call(extender.config.bind_verb, body)
                with _understood(extender):
                    if answer.get("error"):
                        raise PluginError(str(answer["error"]))
            except PluginError as error:
                if not extender.config.ignorable:
                    raise
                log.warning("extender ignored", extender=extender.config.url_prefix, error=error)
                continue
            return True
        return False

    async def close(self) -> None:
        for extender in self._extenders:
            await extender.close()
