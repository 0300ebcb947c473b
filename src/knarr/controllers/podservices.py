"""Which Services a pod belongs to, and the ports it gives them; shared by both endpoint controllers.

Source: endpointslice/util/controller_utils.go, endpointslice/utils.go (FindPort).
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.api.selectors import LabelSelector, from_map
from knarr.api.types import Object
from knarr.client.informer import Informer
from knarr.client.leanpods import pod_ips
from knarr.controllers import podutil
from knarr.controllers.context import label_index, matching, object_key
from knarr.controllers.selectorcache import SelectorCache


class PodServices:
    """Finds the Services of pods by their selectors."""

    def __init__(self, services: Informer, pods: Informer) -> None:
        self._services = services
        self._pods = pods
        self._selectors = SelectorCache(from_map)
        services.add_index("selected", _first_requirement)

    def selector(self, service: Object) -> LabelSelector:
        return self._selectors.get(service, service["spec"].get("selector"))

    def forget(self, service: Object) -> None:
        self._selectors.forget(service)

    def pods_of(self, service: Object) -> list[Object]:
        return matching(self._pods, service["metadata"]["namespace"], service["spec"].get("selector"), self.selector(service))

    def services_of(self, pod: Object) -> set[str]:
        """Keys of the Services that select the pod."""
        labels = pod["metadata"].get("labels") or {}
        return {
            object_key(service)
            for requirement in label_index(pod)
            for service in self._services.by_index("selected", requirement)
            if self.selector(service).matches(labels)
        }

    def changed(self, old: Object, new: Object) -> set[str]:
        """Keys of the Services whose endpoints an update of a pod may change."""
        moved = _identity(old) != _identity(new)
        altered = _endpoint_state(old) != _endpoint_state(new)
        if not moved and not altered:
            return set()
        services = self.services_of(new)
        if moved:
            before = self.services_of(old)
            services = services | before if altered or _placed(old) != _placed(new) else services ^ before
        return services


def _first_requirement(service: Object) -> list[str]:
    """A label that every pod of the Service has."""
    selector = service["spec"].get("selector")
    if not selector:
        return []
    name = min(selector)
    return [f"{service['metadata']['namespace']}/{name}={selector[name]}"]


def _placed(pod: Object) -> tuple[object, ...]:
    spec = pod["spec"]
    return (spec.get("hostname"), spec.get("subdomain"))


def _identity(pod: Object) -> tuple[object, ...]:
    return (pod["metadata"].get("labels"), *_placed(pod))


def _endpoint_state(pod: Object) -> tuple[object, ...]:
    status = pod.get("status") or {}
    finished = status.get("phase") in ("Succeeded", "Failed")
    return (pod["metadata"].get("deletionTimestamp"), podutil.is_ready(pod), pod_ips(pod), finished)


def belongs_in_endpoints(pod: Object, include_terminating: bool) -> bool:
    """Whether a pod can be an endpoint at all: it has an address and is not over."""
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed") or not pod_ips(pod):
        return False
    return include_terminating or "deletionTimestamp" not in pod["metadata"]


def needs_hostname(pod: Object, service: Object) -> bool:
    """Whether the pod's own name is to be found in the DNS of this Service."""
    return bool(pod["spec"].get("hostname")) and pod["spec"].get("subdomain") == service["metadata"]["name"]


def find_port(pod: Object, service_port: Object) -> int | None:
    """Resolve a Service's target port in a pod; None when the pod has no port of that name."""
    target = service_port.get("targetPort") or service_port["port"]
    if isinstance(target, int):
        return target
    protocol = service_port.get("protocol", "TCP")
    spec = pod["spec"]
    sidecars = [item for item in spec.get("initContainers") or () if item.get("restartPolicy") == "Always"]
    for container in [*(spec.get("containers") or ()), *sidecars]:
        for port in container.get("ports") or ():
            if port.get("name") == target and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def is_headless(service: Object) -> bool:
    return service["spec"].get("clusterIP", "") in ("", "None")


class TriggerTimes:
    """When did what changed the endpoints happen? For the annotation that latency is measured by."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, dict[str, str]]] = {}

    def compute(self, key: str, service: Object, pods: list[Object]) -> str | None:
        """Give the earliest change since the last call for this Service, or None."""
        created = service["metadata"].get("creationTimestamp", "")
        before = self._known.get(key)
        times: dict[str, str] = {}
        changes: list[str] = []
        for pod in pods:
            condition = podutil.condition(pod, "Ready")
            stamp = (condition or {}).get("lastTransitionTime")
            if stamp:
                name = pod["metadata"]["name"]
                times[name] = stamp
                if before is not None and stamp > before[1].get(name, ""):
                    changes.append(stamp)
        if before is None or created > before[0]:
            changes.append(created or clock.now_rfc3339())
        self._known[key] = (created, times)
        return min(changes) if changes else None

    def forget(self, key: str) -> None:
        self._known.pop(key, None)
