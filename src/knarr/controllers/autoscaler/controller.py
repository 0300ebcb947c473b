"""The HorizontalPodAutoscaler controller: every 15 seconds, each target's size by its metrics.

Source: pkg/controller/podautoscaler/horizontal.go.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors, meta, quantity
from knarr.api.errors import StatusError
from knarr.api.resources import HORIZONTAL_POD_AUTOSCALERS
from knarr.api.scheme import SCHEME, Resource
from knarr.api.selectors import LabelSelector, SelectorError, from_label_selector, parse_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.discovery import server_resources
from knarr.controllers.autoscaler import behavior, calculator
from knarr.controllers.autoscaler.calculator import Timing, Tolerance
from knarr.controllers.autoscaler.metrics import MetricsClient, MetricsError
from knarr.controllers.context import Context, object_key

log = get_logger(__name__)

_FAILED = {
    "Object": ("FailedGetObjectMetric", "failed to get object metric value"),
    "Pods": ("FailedGetPodsMetric", "failed to get pods metric value"),
    "Resource": ("FailedGetResourceMetric", "failed to get {name} resource metric value"),
    "ContainerResource": ("FailedGetContainerResourceMetric", "failed to get {name} container metric value"),
    "External": ("FailedGetExternalMetric", "failed to get {name} external metric value"),
}
_CONFLICT_TRIES = 5


class _Stop(Exception):
    """Nothing can be decided now; conditions say why."""


class HorizontalPodAutoscalerController:
    """Scales targets."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._config = ctx.config
        self._autoscalers = ctx.informer(HORIZONTAL_POD_AUTOSCALERS)
        self._pods = ctx.pods
        self._metrics = MetricsClient(ctx.client)
        self._recorder = ctx.recorder("horizontal-pod-autoscaler")
        self._history: dict[str, behavior.History] = {}
        self._selectors: dict[str, LabelSelector] = {}
        self._kinds: dict[tuple[str, str], Resource] = {}
        self._timing = Timing(ctx.config.hpa_cpu_initialization_seconds, ctx.config.hpa_initial_readiness_seconds)
        self.controller = Controller("horizontal-pod-autoscaler-controller", self._reconcile, workers=5)
        self._autoscalers.add_handler(self._added, self._updated, self._deleted)

    async def run(self) -> None:
        await self.controller.run()

    def _added(self, hpa: Object) -> None:
        self.controller.queue.add(object_key(hpa))

    def _updated(self, old: Object, new: Object) -> None:
        if old["spec"] != new["spec"]:
            self._added(new)

    def _deleted(self, hpa: Object) -> None:
        self._history.pop(object_key(hpa), None)
        self._selectors.pop(object_key(hpa), None)

    async def _reconcile(self, key: str) -> Result | None:
        hpa = self._autoscalers.get_key(key)
        if hpa is None:
            return None
        work = meta.deep_copy(hpa)
        before = meta.deep_copy(hpa.get("status") or {})
        try:
            await self._autoscale(key, work)
        except _Stop:
            pass
        if (work.get("status") or {}) != before:
            await self._client.update(HORIZONTAL_POD_AUTOSCALERS, work, subresource="status")
        return Result(self._config.hpa_sync_seconds)

    # One pass

    async def _autoscale(self, key: str, hpa: Object) -> None:
        resource, scale = await self._get_scale(hpa)
        spec = hpa["spec"]
        current = int((scale.get("spec") or {}).get("replicas") or 0)
        history = self._history.setdefault(key, behavior.History())
        history.start(current)
        least, most = int(spec.get("minReplicas", 1)), int(spec["maxReplicas"])
        statuses: list[Object] | None = None
        reason = ""
        if current == 0 and least != 0:
            _set_condition(
                hpa, "ScalingActive", "False", "ScalingDisabled", "scaling is disabled since the replica count of the target is zero"
            )
            self._set_status(hpa, current, 0, statuses, False)
            return
        if current > most:
            desired, reason = most, "Current number of replicas above Spec.MaxReplicas"
        elif current < least:
            desired, reason = least, "Current number of replicas below Spec.MinReplicas"
        else:
            proposed, name, statuses = await self._by_metrics(key, hpa, scale, current)
            if proposed > current:
                reason = f"{name} above target"
            elif proposed < current:
                reason = "All metrics below target"
            desired = self._limit(hpa, history, current, proposed, least, most)
        if desired != current:
            await self._rescale(hpa, resource, scale, history, desired, reason, statuses)
        self._set_status(hpa, current, desired, statuses, desired != current)

    async def _get_scale(self, hpa: Object) -> tuple[Resource, Object]:
        reference = hpa["spec"]["scaleTargetRef"]
        try:
            resource = await self._resource(reference.get("apiVersion", ""), reference["kind"])
            scale = await self._client.get(resource, reference["name"], hpa["metadata"]["namespace"], subresource="scale")
        except (StatusError, LookupError) as error:
            text = error.message if isinstance(error, StatusError) else str(error.args[0])
            self._recorder.event(hpa, "Warning", "FailedGetScale", text)
            message = f"the HPA controller was unable to get the target's current scale: {text}"
            _set_condition(hpa, "AbleToScale", "False", "FailedGetScale", message)
            raise _Stop from error
        message = "the HPA controller was able to get the target's current scale"
        _set_condition(hpa, "AbleToScale", "True", "SucceededGetScale", message)
        return resource, scale

    async def _resource(self, api_version: str, kind: str) -> Resource:
        group = api_version.rpartition("/")[0]
        found = SCHEME.for_kind(api_version, kind) or self._kinds.get((group, kind))
        if found is None:
            resources, _ = await server_resources(self._client)
            self._kinds = {(res.group, res.kind): res for res in resources}
            found = self._kinds.get((group, kind))
        if found is None:
            raise LookupError(f'no matches for kind "{kind}" in group "{group}"')
        return found

    def _limit(self, hpa: Object, history: behavior.History, current: int, proposed: int, least: int, most: int) -> int:
        rules = hpa["spec"].get("behavior")
        window = self._config.hpa_downscale_stabilization_seconds
        if rules is None:
            stable = behavior.stabilize(history, proposed, window)
            reason, message = "ScaleDownStabilized", "recent recommendations were higher than current one, applying the highest recent recommendation"
            verdict = behavior.limit(current, stable, least, most)
        else:
            stable, reason, message = behavior.stabilize_with_behavior(history, current, proposed, rules, window)
            verdict = behavior.limit_with_behavior(history, current, stable, least, most, rules)
        if stable == proposed:
            reason, message = "ReadyForNewScale", "recommended size matches current size"
        _set_condition(hpa, "AbleToScale", "True", reason, message)
        desired, reason, message = verdict
        _set_condition(hpa, "ScalingLimited", "False" if desired == stable else "True", reason, message)
        return desired

    async def _rescale(
        self, hpa: Object, resource: Resource, scale: Object, history: behavior.History, desired: int, reason: str, statuses: list[Object] | None
    ) -> None:
        current = int((scale.get("spec") or {}).get("replicas") or 0)
        name, namespace = hpa["spec"]["scaleTargetRef"]["name"], hpa["metadata"]["namespace"]
        for attempt in range(_CONFLICT_TRIES):
            try:
                scale = {**scale, "spec": {**(scale.get("spec") or {}), "replicas": desired}}
                await self._client.update(resource, scale, subresource="scale")
                break
            except StatusError as error:
                if errors.is_conflict(error) and attempt < _CONFLICT_TRIES - 1:
                    scale = await self._client.get(resource, name, namespace, subresource="scale")
                    continue
                message = f"New size: {desired}; reason: {reason}; error: {error.message}"
                self._recorder.event(hpa, "Warning", "FailedRescale", message)
                message = f"the HPA controller was unable to update the target scale: {error.message}"
                _set_condition(hpa, "AbleToScale", "False", "FailedUpdateScale", message)
                _set_counts(hpa, current, statuses)
                raise _Stop from error
        message = f"the HPA controller was able to update the target scale to {desired}"
        _set_condition(hpa, "AbleToScale", "True", "SucceededRescale", message)
        self._recorder.event(hpa, "Normal", "SuccessfulRescale", f"New size: {desired}; reason: {reason}")
        history.scaled(hpa["spec"].get("behavior"), current, desired)

    def _set_status(self, hpa: Object, current: int, desired: int, statuses: list[Object] | None, rescaled: bool) -> None:
        _set_counts(hpa, current, statuses)
        status = hpa["status"]
        status["desiredReplicas"] = desired
        if rescaled:
            status["lastScaleTime"] = clock.now_rfc3339()

    # Metrics

    def _selector(self, key: str, hpa: Object, scale: Object) -> tuple[str, LabelSelector]:
        text = (scale.get("status") or {}).get("selector") or ""
        if not text:
            self._recorder.event(hpa, "Warning", "SelectorRequired", "selector is required")
            _set_condition(hpa, "ScalingActive", "False", "InvalidSelector", "the HPA target's scale is missing a selector")
            raise MetricsError("selector is required")
        try:
            selector = parse_label_selector(text)
        except SelectorError as error:
            message = f"couldn't convert selector into a corresponding internal selector object: {error}"
            self._recorder.event(hpa, "Warning", "InvalidSelector", message)
            _set_condition(hpa, "ScalingActive", "False", "InvalidSelector", message)
            raise MetricsError(message) from error
        self._selectors[key] = selector
        namespace = hpa["metadata"]["namespace"]
        pods = self._pods.list(namespace, selector)
        rivals = [
            other
            for other, theirs in self._selectors.items()
            if other != key and other.startswith(namespace + "/") and any(theirs.matches(meta.labels(pod)) for pod in pods)
        ]
        if rivals:
            message = f"pods by selector {text} are controlled by multiple HPAs: {sorted([key, *rivals])}"
            self._recorder.event(hpa, "Warning", "AmbiguousSelector", message)
            _set_condition(hpa, "ScalingActive", "False", "AmbiguousSelector", message)
            raise MetricsError(message)
        return text, selector

    async def _by_metrics(self, key: str, hpa: Object, scale: Object, current: int) -> tuple[int, str, list[Object]]:
        """(highest proposal, the metric it is by, status of every metric)."""
        specs = hpa["spec"].get("metrics") or []
        statuses: list[Object] = []
        proposals: list[tuple[int, str]] = []
        failures: list[tuple[str, str]] = []
        try:
            text, selector = self._selector(key, hpa, scale)
        except MetricsError as error:
            self._give_up(hpa, current, [], str(error))
        pods = self._pods.list(hpa["metadata"]["namespace"], selector)
        for spec in specs:
            try:
                replicas, name, status = await self._by_metric(hpa, spec, scale, current, text, pods)
                proposals.append((replicas, name))
                statuses.append(status)
            except MetricsError as error:
                reason, prefix = _FAILED.get(spec["type"], ("InvalidMetricSourceType", ""))
                self._recorder.event(hpa, "Warning", reason, str(error))
                failures.append((reason, f"{prefix.format(name=_metric_name(spec))}: {error}"))
                first_message = f"the HPA was unable to compute the replica count: {error}"
                if len(failures) == 1:
                    failed = (reason, first_message)
                statuses.append({"type": ""})
        highest = max(proposals, default=(0, ""), key=lambda item: item[0])
        if failures and (len(failures) == len(specs) or highest[0] < current):
            _set_condition(hpa, "ScalingActive", "False", *failed)
            message = f"invalid metrics ({len(failures)} invalid out of {len(specs)}), first error is: {failures[0][1]}"
            self._give_up(hpa, current, statuses, message)
        message = f"the HPA was able to successfully calculate a replica count from {highest[1]}"
        _set_condition(hpa, "ScalingActive", "True", "ValidMetricFound", message)
        return highest[0], highest[1], statuses

    def _give_up(self, hpa: Object, current: int, statuses: list[Object], message: str) -> None:
        _set_counts(hpa, current, statuses)
        self._recorder.event(hpa, "Warning", "FailedComputeMetricsReplicas", message)
        raise _Stop

    def _tolerance(self, hpa: Object) -> Tolerance:
        rules = hpa["spec"].get("behavior") or {}
        both = []
        for name in ("scaleDown", "scaleUp"):
            own = (rules.get(name) or {}).get("tolerance")
            both.append(self._config.hpa_tolerance if own is None else float(quantity.parse(own)))
        return Tolerance(*both)

    async def _by_metric(
        self, hpa: Object, spec: Object, scale: Object, current: int, selector: str, pods: list[Object]
    ) -> tuple[int, str, Object]:
        """(proposal, name of the metric in messages, its status)."""
        kind = spec["type"]
        if kind in ("Resource", "ContainerResource"):
            return await self._by_resource(hpa, spec, current, selector, pods)
        if kind == "Pods":
            return await self._by_pods(hpa, spec, current, selector, pods)
        status_replicas = int((scale.get("status") or {}).get("replicas") or 0)
        if kind == "Object":
            return await self._by_object(hpa, spec, current, status_replicas, pods)
        if kind == "External":
            return await self._by_external(hpa, spec, current, status_replicas, pods)
        raise MetricsError(f'unknown metric source type "{kind}"')

    async def _by_resource(self, hpa: Object, spec: Object, current: int, selector: str, pods: list[Object]) -> tuple[int, str, Object]:
        kind = spec["type"]
        source = spec["containerResource" if kind == "ContainerResource" else "resource"]
        name, target, container = source["name"], source["target"], source.get("container", "")
        namespace, tolerance = hpa["metadata"]["namespace"], self._tolerance(hpa)
        shown = f"{name} container resource" if kind == "ContainerResource" else f"{name} resource"
        try:
            metrics = await self._metrics.resource(name, namespace, selector, container)
        except MetricsError as error:
            verb = "utilization" if target.get("averageValue") is None else "usage"
            raise MetricsError(f"failed to get {name} {verb}: unable to get metrics for resource {name}: {error}") from error
        value: Object
        try:
            if target.get("averageValue") is not None:
                wanted = quantity.milli_value(target["averageValue"])
                replicas, average = calculator.by_average(current, wanted, metrics, pods, name, tolerance, self._timing)
                value = {"averageValue": _milli(average, name)}
            elif target.get("averageUtilization") is not None:
                replicas, percent, average = calculator.by_utilization(
                    current, int(target["averageUtilization"]), metrics, pods, name, container, tolerance, self._timing
                )
                shown += " utilization (percentage of request)"
                value = {"averageUtilization": percent, "averageValue": _milli(average, name)}
            else:
                text = "invalid resource metric source: neither an average utilization target nor an average value (usage) target was set"
                raise MetricsError(text)
        except MetricsError as error:
            raise MetricsError(f"failed to get {name} utilization: {error}") from error
        status: Object = {"name": name, "current": value}
        if kind == "ContainerResource":
            status["container"] = container
            return replicas, shown, {"type": kind, "containerResource": status}
        return replicas, shown, {"type": kind, "resource": status}

    async def _by_pods(self, hpa: Object, spec: Object, current: int, selector: str, pods: list[Object]) -> tuple[int, str, Object]:
        source = spec["pods"]
        metric = source["metric"]
        try:
            metrics = await self._metrics.pods(metric["name"], hpa["metadata"]["namespace"], selector, _selector_text(metric))
        except MetricsError as error:
            raise MetricsError(f"unable to get metric {metric['name']}: {error}") from error
        wanted = quantity.milli_value(source["target"]["averageValue"])
        replicas, average = calculator.by_average(current, wanted, metrics, pods, "", self._tolerance(hpa), self._timing)
        status = {"metric": metric, "current": {"averageValue": _milli(average)}}
        return replicas, f"pods metric {metric['name']}", {"type": "Pods", "pods": status}

    async def _by_object(
        self, hpa: Object, spec: Object, current: int, status_replicas: int, pods: list[Object]
    ) -> tuple[int, str, Object]:
        source = spec["object"]
        metric, described, target = source["metric"], source["describedObject"], source["target"]
        namespace = hpa["metadata"]["namespace"]
        try:
            resource = await self._resource(described.get("apiVersion", ""), described["kind"])
            path = f"{resource.group_resource}/{described['name']}"
            value = await self._metrics.object(metric["name"], namespace, path, _selector_text(metric))
        except (MetricsError, LookupError) as error:
            where = f"{described['kind']} {namespace}/{described['name']}"
            raise MetricsError(f"unable to get metric {metric['name']}: {where}/{error}") from error
        shown: Object
        if target.get("value") is not None:
            ratio = value / quantity.milli_value(target["value"])
            replicas = calculator.by_value(current, ratio, pods, self._tolerance(hpa))
            shown = {"value": _milli(value)}
            name = f"{described['kind']} metric {metric['name']}"
        elif target.get("averageValue") is not None:
            replicas, share = calculator.by_share(
                status_replicas, value, quantity.milli_value(target["averageValue"]), self._tolerance(hpa)
            )
            shown = {"averageValue": _milli(share)}
            name = f"external metric {metric['name']}({_selector_text(metric) or 'nil'})"
        else:
            raise MetricsError("invalid object metric source: neither a value target nor an average value target was set")
        return replicas, name, {"type": "Object", "object": {"metric": metric, "describedObject": described, "current": shown}}

    async def _by_external(
        self, hpa: Object, spec: Object, current: int, status_replicas: int, pods: list[Object]
    ) -> tuple[int, str, Object]:
        source = spec["external"]
        metric, target = source["metric"], source["target"]
        try:
            value = sum(await self._metrics.external(metric["name"], hpa["metadata"]["namespace"], _selector_text(metric)))
        except MetricsError as error:
            namespace = hpa["metadata"]["namespace"]
            raise MetricsError(f"unable to get external metric {namespace}/{metric['name']}/{_selector_text(metric) or 'nil'}: {error}") from error
        tolerance = self._tolerance(hpa)
        shown: Object
        if target.get("averageValue") is not None:
            replicas, share = calculator.by_share(status_replicas, value, quantity.milli_value(target["averageValue"]), tolerance)
            shown = {"averageValue": _milli(share)}
        elif target.get("value") is not None:
            replicas = calculator.by_value(current, value / quantity.milli_value(target["value"]), pods, tolerance)
            shown = {"value": _milli(value)}
        else:
            raise MetricsError("invalid external metric source: neither a value target nor an average value target was set")
        name = f"external metric {metric['name']}({_selector_text(metric) or 'nil'})"
        return replicas, name, {"type": "External", "external": {"metric": metric, "current": shown}}


def _metric_name(spec: Object) -> str:
    kind = spec["type"]
    if kind == "Resource":
        return str(spec["resource"]["name"])
    if kind == "ContainerResource":
        return str(spec["containerResource"]["container"])
    return str(spec["external"]["metric"]["name"]) if kind == "External" else ""


def _selector_text(metric: Object) -> str:
    return str(from_label_selector(metric["selector"])) if metric.get("selector") is not None else ""


def _milli(value: int, resource: str = "") -> str:
    return quantity.format(Fraction(value, 1000), quantity.BINARY_SI if resource == "memory" else quantity.DECIMAL_SI)


def _set_counts(hpa: Object, current: int, statuses: list[Object] | None) -> None:
    status: dict[str, Any] = hpa.setdefault("status", {})
    status["currentReplicas"] = current
    status["desiredReplicas"] = status.get("desiredReplicas") or 0
    if statuses:
        status["currentMetrics"] = statuses
    else:
        status["currentMetrics"] = None


def _set_condition(hpa: Object, type: str, status: str, reason: str, message: str) -> None:
    conditions = hpa.setdefault("status", {}).setdefault("conditions", [])
    current = meta.get_condition(conditions, type)
    if current is None:
        current = {"type": type}
        conditions.append(current)
    if current.get("status") != status:
        current["lastTransitionTime"] = clock.now_rfc3339()
    current.update(status=status, reason=reason, message=message)
