"""PodTolerationRestriction: default tolerations of a namespace, and a list of those its pods may have.

Both are JSON in annotations of the namespace, or else `default` and `whitelist` of the plugin's configuration.

Source: kubernetes plugin/pkg/admission/podtolerationrestriction, pkg/util/tolerations.
"""

from __future__ import annotations

from typing import Any

import orjson

from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource
from knarr.apiserver.attributes import AdmissionRequest, Store

_DEFAULTS = "scheduler.alpha.kubernetes.io/defaultTolerations"
_ALLOWED = "scheduler.alpha.kubernetes.io/tolerationsWhitelist"
_MEMORY_PRESSURE = {"key": "node.kubernetes.io/memory-pressure", "operator": "Exists", "effect": "NoSchedule"}


class PodTolerationRestriction(Plugin):
    name = "PodTolerationRestriction"
    by_default = False

    def __init__(self, namespaces: Store, configuration: object) -> None:
        self._namespaces = namespaces
        known = configuration if isinstance(configuration, dict) else {}
        self._default: list[Object] = list(known.get("default") or ())
        self._allowed: list[Object] = list(known.get("whitelist") or ())

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation in (CREATE, UPDATE)

    def admit(self, request: AdmissionRequest) -> None:
        spec = (request.object or {})["spec"]
        extra: list[Object] = []
        if request.operation == CREATE:
            found = self._annotated(request.namespace, _DEFAULTS)
            extra = list(self._default if found is None else found)
        if not _is_best_effort(spec):
            extra.append(dict(_MEMORY_PRESSURE))
        if extra:
            spec["tolerations"] = merged([*(spec.get("tolerations") or ()), *extra])
        self.validate(request)

    def validate(self, request: AdmissionRequest) -> None:
        tolerations = (request.object or {})["spec"].get("tolerations") or ()
        if not tolerations:
            return
        allowed, scope = self._annotated(request.namespace, _ALLOWED), "namespace"
        if allowed is None:
            allowed, scope = self._allowed, "cluster"
        if allowed and not all(any(includes(one, toleration) for one in allowed) for toleration in tolerations):
            raise StatusError(500, "", f"pod tolerations (possibly merged with namespace default tolerations) conflict with its {scope} whitelist")

    def _annotated(self, namespace: str, key: str) -> list[Object] | None:
        found = self._namespaces.get_nowait("", namespace) or {}
        text = ((found.get("metadata") or {}).get("annotations") or {}).get(key)
        if text is None:
            return None
        try:
            return list(orjson.loads(text)) if text else []
        except (orjson.JSONDecodeError, TypeError) as error:
            raise StatusError(500, "", str(error)) from error


def merged(tolerations: list[Object]) -> list[Object]:
    """Leave out those that another one includes; of equal ones the first stays."""
    kept: list[Object] = []
    for index, one in enumerate(tolerations):
        later = tolerations[index + 1 :]
        if not any(includes(other, one) for other in kept) and not any(other != one and includes(other, one) for other in later):
            kept.append(one)
    return kept


def includes(larger: Object, toleration: Object) -> bool:
    """Whether one toleration tolerates all that the other does."""
    if larger == toleration:
        return True

    def of(one: Object, key: str) -> Any:
        return one.get(key) or ""

    if of(toleration, "key") != of(larger, "key") and (of(larger, "key") or of(larger, "operator") != "Exists"):
        return False
    if of(toleration, "effect") != of(larger, "effect") and of(larger, "effect"):
        return False
    limit = larger.get("tolerationSeconds")
    if of(larger, "effect") == "NoExecute" and limit is not None:
        own = toleration.get("tolerationSeconds")
        if own is None or own > limit:
            return False
    if of(larger, "operator") in ("", "Equal"):
        return bool(of(toleration, "operator") == "Equal" and of(toleration, "value") == of(larger, "value"))
    return bool(of(larger, "operator") == "Exists")


def _is_best_effort(spec: Object) -> bool:
    """Whether no container asks for, or is limited in, CPU or memory."""
    for container in (*(spec.get("containers") or ()), *(spec.get("initContainers") or ())):
        resources = container.get("resources") or {}
        for amounts in (resources.get("requests") or {}, resources.get("limits") or {}):
            if any(str(amounts.get(name) or "0") != "0" for name in ("cpu", "memory")):
                return False
    return True
