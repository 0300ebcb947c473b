"""Stages: what becomes of a simulated pod or node, after which time, when it is in a certain state.

Pure: reads documents, says which stage an object is due for. `simulator` carries stages out. The idea and the selectors are
KWOK's (kwok.sigs.k8s.io, kind Stage); what a stage does is said by a phase and a piece of status instead of a template.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.api import yamldoc
from knarr.api.types import Object

API_VERSION = "simulate.knarr.dev/v1alpha1"

Test = Callable[[Object], bool]


class BadStage(ValueError):
    """A stage cannot be understood; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Next:
    """What a stage does."""

    phase: str = ""
    """For pods: "Running", "Succeeded" or "Failed", with all that a kubelet reports with it."""
    ready: bool = True
    """Whether a running pod is ready."""
    exit_code: int | None = None
    """Of the containers of a pod that ends; None is 0 for Succeeded and 1 for Failed."""
    reason: str = ""
    """Of the pod and its containers' ends, e.g. "OOMKilled"."""
    status: Object = field(default_factory=dict)
    """Merged over the object's status; conditions by their type."""
    delete: bool = False
    event: Object | None = None
    """{type, reason, message}"""


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    resource: str
    """"pods" or "nodes"."""
    tests: tuple[Test, ...]
    next: Next
    weight: int = 1
    delay_seconds: float = 0.0
    longest_seconds: float = 0.0
    """The delay is drawn between both."""

    def matches(self, obj: Object) -> bool:
        return all(test(obj) for test in self.tests)

    def delay(self) -> float:
        return random.uniform(self.delay_seconds, self.longest_seconds) if self.longest_seconds > self.delay_seconds else self.delay_seconds


def due(stages: Iterable[Stage], obj: Object) -> Stage | None:
    """The stage that an object goes to next: of those that match, one by their weights; None when it stays as it is."""
    found = [stage for stage in stages if stage.matches(obj)]
    if len(found) < 2:
        return found[0] if found else None
    return random.choices(found, [stage.weight for stage in found])[0] if any(stage.weight for stage in found) else found[0]


DEFAULT = """
apiVersion: simulate.knarr.dev/v1alpha1
kind: Stage
metadata: {name: pod-runs}
spec:
  resource: pods
  selector:
    matchExpressions:
    - {path: metadata.deletionTimestamp, operator: DoesNotExist}
    - {path: status.phase, operator: In, values: [Pending]}
  next: {phase: Running}
---
apiVersion: simulate.knarr.dev/v1alpha1
kind: Stage
metadata: {name: job-pod-completes}
spec:
  resource: pods
  selector:
    matchExpressions:
    - {path: metadata.deletionTimestamp, operator: DoesNotExist}
    - {path: status.phase, operator: In, values: [Running]}
    - {path: "metadata.ownerReferences[controller=true].kind", operator: In, values: [Job]}
  delay: {seconds: 1}
  next: {phase: Succeeded}
---
apiVersion: simulate.knarr.dev/v1alpha1
kind: Stage
metadata: {name: pod-goes}
spec:
  resource: pods
  selector:
    matchExpressions:
    - {path: metadata.deletionTimestamp, operator: Exists}
  next: {delete: true}
"""
"""The stages without a file: pods run at once, those of Jobs complete after a second, deleted ones are gone at once."""

_KUBELETS = """
apiVersion: simulate.knarr.dev/v1alpha1
kind: Stage
metadata: {name: pod-ready-again}
spec:
  resource: pods
  selector:
    matchExpressions:
    - {path: metadata.deletionTimestamp, operator: DoesNotExist}
    - {path: spec.readinessGates, operator: DoesNotExist}
    - {path: status.phase, operator: In, values: [Running]}
    - {path: "status.conditions[type=Ready].status", operator: In, values: ["False"]}
    - {path: "status.conditions[type=Ready].reason", operator: DoesNotExist}
    - {path: "status.conditions[type=ContainersReady].status", operator: In, values: ["True"]}
  delay: {seconds: 1}
  next: {phase: Running}
"""
"""What a kubelet does whatever becomes of its pods, and so belongs to every set of stages.

A node whose Lease came late has its pods marked as not ready by the node controller, which gives no reason; a kubelet then tells
their status again."""


def read(text: str) -> list[Stage]:
    """Read stages from YAML documents.

    Raises:
      BadStage: one is not as it should be.
    """
    try:
        documents = [yamldoc.load(part)[0] for part in re.split(r"^---\s*$", text, flags=re.MULTILINE) if part.strip()]
    except ValueError as error:
        raise BadStage(f"not YAML: {error}") from error
    return [_stage(document) for document in documents if document is not None]


def whole(text: str) -> list[Stage]:
    """What a file holds and, unless it has a stage of that name itself, pod-ready-again.

    Raises:
      BadStage: as `read`.
    """
    found = read(text)
    names = {stage.name for stage in found}
    return found + [stage for stage in read(_KUBELETS) if stage.name not in names]


_KEYS: Mapping[str, frozenset[str]] = {
    "spec": frozenset({"resource", "selector", "weight", "delay", "next"}),
    "selector": frozenset({"matchLabels", "matchAnnotations", "matchExpressions"}),
    "delay": frozenset({"seconds", "jitterSeconds"}),
    "next": frozenset({"phase", "ready", "exitCode", "reason", "status", "delete", "event"}),
}
_PHASES = ("", "Running", "Succeeded", "Failed")


def _part(name: str, holder: Object, key: str) -> Object:
    found = holder.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadStage(f"stage {name!r}: {key} must be a mapping")
    unknown = sorted(set(found) - _KEYS[key])
    if unknown:
        raise BadStage(f"stage {name!r}: unknown field {key}.{unknown[0]}; known: {', '.join(sorted(_KEYS[key]))}")
    return found


def _stage(document: Any) -> Stage:
    if not isinstance(document, dict) or document.get("kind") != "Stage" or document.get("apiVersion") != API_VERSION:
        raise BadStage(f"every document must be of kind Stage, apiVersion {API_VERSION}")
    name = str((document.get("metadata") or {}).get("name") or "")
    if not name:
        raise BadStage("a stage needs metadata.name")
    spec = _part(name, document, "spec")
    if spec.get("resource") not in ("pods", "nodes"):
        raise BadStage(f"stage {name!r}: spec.resource must be pods or nodes")
    selector, delay, following = (_part(name, spec, key) for key in ("selector", "delay", "next"))
    if following.get("phase", "") not in _PHASES:
        raise BadStage(f"stage {name!r}: next.phase must be one of {', '.join(_PHASES[1:])}")
    try:
        seconds = float(delay.get("seconds", 0))
        longest = float(delay.get("jitterSeconds", 0))
        weight = int(spec.get("weight", 1))
    except (TypeError, ValueError) as error:
        raise BadStage(f"stage {name!r}: {error}") from error
    code = following.get("exitCode")
    what = Next(
        phase=following.get("phase", ""),
        ready=bool(following.get("ready", True)),
        exit_code=None if code is None else int(code),
        reason=str(following.get("reason", "")),
        status=following.get("status") or {},
        delete=bool(following.get("delete", False)),
        event=following.get("event"),
    )
    return Stage(name, spec["resource"], tuple(_tests(name, selector)), what, weight, seconds, longest)


def _tests(name: str, selector: Object) -> Iterable[Test]:
    for kind, place in (("matchLabels", "labels"), ("matchAnnotations", "annotations")):
        for key, value in (selector.get(kind) or {}).items():
            yield _equals(place, str(key), str(value))
    for item in selector.get("matchExpressions") or ():
        path, operator, values = item.get("path"), item.get("operator"), [str(value) for value in item.get("values") or ()]
        if not isinstance(path, str) or operator not in ("In", "NotIn", "Exists", "DoesNotExist"):
            raise BadStage(f"stage {name!r}: an expression needs a path and an operator In, NotIn, Exists or DoesNotExist")
        yield _expression(_steps(name, path), operator, frozenset(values))


def _equals(place: str, key: str, value: str) -> Test:
    return lambda obj: (obj["metadata"].get(place) or {}).get(key) == value


_STEP = re.compile(r"\.?([A-Za-z0-9_/-]+)|\[(\w+)=([^\]]+)\]|\[\"([^\"]+)\"\]")


def _steps(name: str, path: str) -> tuple[str | tuple[str, str], ...]:
    steps: list[str | tuple[str, str]] = []
    position = 0
    while position < len(path):
        found = _STEP.match(path, position)
        if found is None:
            raise BadStage(f'stage {name!r}: path {path!r} is not of the form a.b[type=Ready].c or a["b.c/d"]')
        steps.append((found[2], found[3]) if found[2] else (found[1] or found[4]))
        position = found.end()
    return tuple(steps)


def _look_up(obj: Any, steps: tuple[str | tuple[str, str], ...]) -> Any:
    for step in steps:
        if isinstance(step, tuple):
            key, value = step
            listed = obj if isinstance(obj, list) else ()
            obj = next((item for item in listed if isinstance(item, dict) and _text(item.get(key)) == value), None)
        else:
            obj = obj.get(step) if isinstance(obj, dict) else None
        if obj is None:
            return None
    return obj


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _expression(steps: tuple[str | tuple[str, str], ...], operator: str, values: frozenset[str]) -> Test:
    if operator == "Exists":
        return lambda obj: _look_up(obj, steps) is not None
    if operator == "DoesNotExist":
        return lambda obj: _look_up(obj, steps) is None
    if operator == "In":
        return lambda obj: _text(_look_up(obj, steps)) in values
    return lambda obj: _text(_look_up(obj, steps)) not in values
