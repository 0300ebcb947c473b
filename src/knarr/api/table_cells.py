"""The cells of a table row, per built-in kind. Pure; used by table.py, and its duration format by anyone who shows ages.

One function per kind, all wide columns included: clients hide them by priority. Longer than usual since it is a flat
list of small printers.

Source: pkg/printers/internalversion/printers.go, apimachinery util/duration.
"""

from collections.abc import Callable, Mapping
from typing import Any

from knarr.api import selectors, times
from knarr.api.types import Object

Cells = tuple[list[Any], list[Object] | None]
_NOTHING: Mapping[str, Any] = {}


def human_duration(seconds: float) -> str:
    """A duration for people: "5s", "3m20s", "2d4h"."""
    whole = int(seconds)
    if whole < -1:
        return "<invalid>"
    if whole < 0:
        return "0s"
    if whole < 120:
        return f"{whole}s"
    minutes, hours = whole // 60, whole // 3600
    if minutes < 10:
        return f"{minutes}m{whole % 60}s" if whole % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if hours < 192:
        return f"{hours // 24}d{hours % 24}h" if hours % 24 else f"{hours // 24}d"
    if hours < 24 * 365 * 2:
        return f"{hours // 24}d"
    if hours < 24 * 365 * 8:
        days = hours // 24 % 365
        return f"{hours // 24 // 365}y{days}d" if days else f"{hours // 24 // 365}y"
    return f"{hours // 24 // 365}y"


def since(text: str | None, now: float) -> str:
    """How long ago a time was; "<unknown>" for none."""
    if not text:
        return "<unknown>"
    try:
        return human_duration(now - times.to_epoch(text)[0])
    except ValueError:
        return "<unknown>"


class _View:
    """Short ways into an object."""

    __slots__ = ("meta", "now", "obj", "spec", "status")

    def __init__(self, obj: Object, now: float) -> None:
        self.obj = obj
        self.now = now
        self.meta: Mapping[str, Any] = obj.get("metadata") or _NOTHING
        self.spec: Mapping[str, Any] = obj.get("spec") or _NOTHING
        self.status: Mapping[str, Any] = obj.get("status") or _NOTHING

    @property
    def name(self) -> str:
        return self.meta.get("name") or ""

    @property
    def age(self) -> str:
        return since(self.meta.get("creationTimestamp"), self.now)


def cells(group: str, kind: str, obj: Object, now: float) -> Cells:
    """(cells, row conditions or None) of an object; the printer of the resource decides which columns."""
    view = _View(obj, now)
    if group == "" and kind == "Pod":
        return _pod(view)
    printer = _PRINTERS.get((group, kind))
    if printer is None:
        return [view.name, view.meta.get("creationTimestamp")], None
    return printer(view), None


# --- pieces -----------------------------------------------------------------------------------------------------------


def _or(text: Any, otherwise: str) -> str:
    return text or otherwise


def _labels(labels: Mapping[str, str] | None) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(labels.items())) if labels else "<none>"


def _selector(selector: Mapping[str, Any] | None) -> str:
    try:
        return str(selectors.from_label_selector(selector)) or "<none>"
    except selectors.SelectorError:
        return "<error>"


def _containers(template: Mapping[str, Any] | None) -> list[str]:
    containers = ((template or _NOTHING).get("spec") or _NOTHING).get("containers") or ()
    return [",".join(c.get("name") or "" for c in containers), ",".join(c.get("image") or "" for c in containers)]


def _more(items: list[str], total: int, most: int) -> str:
    return f"{','.join(items[:most])} + {total - most} more..." if total > most else ",".join(items)


def _flag(value: Any) -> str:
    return "<unset>" if value is None else "True" if value else "False"


def _load_balancer(status: Mapping[str, Any]) -> str:
    addresses = {i.get("ip") or i.get("hostname") for i in (status.get("loadBalancer") or _NOTHING).get("ingress") or ()}
    return ",".join(sorted(a for a in addresses if a))


def _access_modes(modes: list[str] | None) -> str:
    short = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}
    present = set(modes or ())
    return ",".join(word for mode, word in short.items() if mode in present)


# --- workloads --------------------------------------------------------------------------------------------------------


def _pod(v: _View) -> Cells:
    spec, status = v.spec, v.status
    phase = status.get("phase") or ""
    conditions = status.get("conditions") or ()
    reason = status.get("reason") or phase
    if any(c.get("type") == "PodScheduled" and c.get("reason") == "SchedulingGated" for c in conditions):
        reason = "SchedulingGated"
    init_containers = {c.get("name"): c for c in spec.get("initContainers") or ()}
    restartable = {name for name, c in init_containers.items() if c.get("restartPolicy") == "Always"}
    total = len(spec.get("containers") or ()) + len(restartable)
    initializing, reason, ready, restarts, last = _init_state(status, len(init_containers), restartable, reason)
    initialized = any(c.get("type") == "Initialized" and c.get("status") == "True" for c in conditions)
    if not initializing or initialized:
        side = [s for s in status.get("initContainerStatuses") or () if s.get("name") in restartable]
        restarts, last = _restarts(side)
        reason, main_ready = _main_state(status, conditions, reason)
        ready += main_ready
        more, later = _restarts(status.get("containerStatuses") or ())
        restarts, last = restarts + more, max(last, later)
    if v.meta.get("deletionTimestamp"):
        if status.get("reason") == "NodeLost":
            reason = "Unknown"
        elif phase not in ("Succeeded", "Failed"):
            reason = "Terminating"
    restarts_text = f"{restarts} ({since(last, v.now)} ago)" if restarts and last else str(restarts)
    row_conditions: list[Object] | None = None
    if phase in ("Succeeded", "Failed"):
        message = "The pod has completed successfully." if phase == "Succeeded" else "The pod failed."
        row_conditions = [{"type": "Completed", "status": "True", "reason": phase, "message": message}]
    pod_ips = status.get("podIPs") or ()
    return [
        v.name, f"{ready}/{total}", reason, restarts_text, v.age, _or(pod_ips and pod_ips[0].get("ip"), "<none>"),
        _or(spec.get("nodeName"), "<none>"), _or(status.get("nominatedNodeName"), "<none>"), _readiness_gates(spec, conditions),
    ], row_conditions


def _readiness_gates(spec: Mapping[str, Any], conditions: Any) -> str:
    gates = spec.get("readinessGates") or ()
    if not gates:
        return "<none>"
    true = {c.get("type") for c in conditions if c.get("status") == "True"}
    return f"{sum(g.get('conditionType') in true for g in gates)}/{len(gates)}"


def _restarts(statuses: Any) -> tuple[int, str]:
    """(restarts, the latest end of an earlier run)."""
    count, last = 0, ""
    for status in statuses:
        count += status.get("restartCount") or 0
        finished = ((status.get("lastState") or _NOTHING).get("terminated") or _NOTHING).get("finishedAt") or ""
        last = max(last, finished)
    return count, last


def _init_state(status: Mapping[str, Any], count: int, restartable: set[Any], reason: str) -> tuple[bool, str, int, int, str]:
    """(still initializing, reason, ready sidecars, restarts, their last time)."""
    ready, seen = 0, []
    for index, container in enumerate(status.get("initContainerStatuses") or ()):
        seen.append(container)
        state = container.get("state") or _NOTHING
        terminated, waiting = state.get("terminated"), state.get("waiting")
        if terminated is not None and not terminated.get("exitCode"):
            continue
        if container.get("name") in restartable and container.get("started"):
            ready += bool(container.get("ready"))
            continue
        if terminated is not None:
            if terminated.get("reason"):
                reason = f"Init:{terminated['reason']}"
            elif terminated.get("signal"):
                reason = f"Init:Signal:{terminated['signal']}"
            else:
                reason = f"Init:ExitCode:{terminated.get('exitCode') or 0}"
        elif waiting is not None and waiting.get("reason") and waiting["reason"] != "PodInitializing":
            reason = f"Init:{waiting['reason']}"
        else:
            reason = f"Init:{index}/{count}"
        return (True, reason, ready, *_restarts(seen))
    return (False, reason, ready, *_restarts(seen))


def _main_state(status: Mapping[str, Any], conditions: Any, reason: str) -> tuple[str, int]:
    """(reason, ready containers)."""
    ready, running, error = 0, False, ""
    for container in reversed(status.get("containerStatuses") or ()):
        state = container.get("state") or _NOTHING
        terminated, waiting = state.get("terminated"), state.get("waiting")
        if waiting is not None and waiting.get("reason"):
            reason = waiting["reason"]
        elif terminated is not None:
            if terminated.get("reason"):
                reason = terminated["reason"]
            elif terminated.get("signal"):
                reason = f"Signal:{terminated['signal']}"
            else:
                reason = f"ExitCode:{terminated.get('exitCode') or 0}"
            if terminated.get("exitCode"):
                error = reason
        elif container.get("ready") and state.get("running") is not None:
            running = True
            ready += 1
    if reason == "Completed":
        if running and any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions):
            reason = "Running"
        elif error:
            reason = error
        elif running:
            reason = "NotReady"
    return reason, ready


def _pod_template(v: _View) -> list[Any]:
    template = v.obj.get("template") or _NOTHING
    return [v.name, *_containers(template), _labels((template.get("metadata") or _NOTHING).get("labels"))]


def _replication_controller(v: _View) -> list[Any]:
    return [v.name, v.spec.get("replicas") or 0, v.status.get("replicas") or 0, v.status.get("readyReplicas") or 0, v.age,
            *_containers(v.spec.get("template")), _labels(v.spec.get("selector"))]


def _replica_set(v: _View) -> list[Any]:
    return [v.name, v.spec.get("replicas") or 0, v.status.get("replicas") or 0, v.status.get("readyReplicas") or 0, v.age,
            *_containers(v.spec.get("template")), _selector(v.spec.get("selector"))]


def _deployment(v: _View) -> list[Any]:
    try:
        selector = str(selectors.from_label_selector(v.spec.get("selector")))
    except selectors.SelectorError:
        selector = "<invalid>"
    return [v.name, f"{v.status.get('readyReplicas') or 0}/{v.spec.get('replicas') or 0}", v.status.get("updatedReplicas") or 0,
            v.status.get("availableReplicas") or 0, v.age, *_containers(v.spec.get("template")), selector]


def _stateful_set(v: _View) -> list[Any]:
    return [v.name, f"{v.status.get('readyReplicas') or 0}/{v.spec.get('replicas') or 0}", v.age, *_containers(v.spec.get("template"))]


def _daemon_set(v: _View) -> list[Any]:
    counts = [v.status.get(key) or 0 for key in (
        "desiredNumberScheduled", "currentNumberScheduled", "numberReady", "updatedNumberScheduled", "numberAvailable")]
    template = v.spec.get("template") or _NOTHING
    return [v.name, *counts, _labels((template.get("spec") or _NOTHING).get("nodeSelector")), v.age, *_containers(template),
            _selector(v.spec.get("selector"))]


def _job(v: _View) -> list[Any]:
    succeeded = v.status.get("succeeded") or 0
    if v.spec.get("completions") is not None:
        completions = f"{succeeded}/{v.spec['completions']}"
    elif (v.spec.get("parallelism") or 0) > 1:
        completions = f"{succeeded}/1 of {v.spec['parallelism']}"
    else:
        completions = f"{succeeded}/1"
    started, ended = v.status.get("startTime"), v.status.get("completionTime")
    duration = ""
    if started:
        duration = human_duration((times.to_epoch(ended)[0] if ended else v.now) - times.to_epoch(started)[0])
    true = {c.get("type") for c in v.status.get("conditions") or () if c.get("status") == "True"}
    status = "Running"
    for condition, word in (("Complete", "Complete"), ("Failed", "Failed"), ("", "Terminating"), ("Suspended", "Suspended"),
                            ("FailureTarget", "FailureTarget"), ("SuccessCriteriaMet", "SuccessCriteriaMet")):
        if condition in true or (not condition and v.meta.get("deletionTimestamp")):
            status = word
            break
    return [v.name, status, completions, duration, v.age, *_containers(v.spec.get("template")), _selector(v.spec.get("selector"))]


def _cron_job(v: _View) -> list[Any]:
    last = v.status.get("lastScheduleTime")
    job = (v.spec.get("jobTemplate") or _NOTHING).get("spec") or _NOTHING
    return [v.name, v.spec.get("schedule") or "", v.spec.get("timeZone") or "<none>", _flag(v.spec.get("suspend")),
            len(v.status.get("active") or ()), since(last, v.now) if last else "<none>", v.age, *_containers(job.get("template")),
            _selector(job.get("selector"))]


def _pod_disruption_budget(v: _View) -> list[Any]:
    limits = [str(v.spec[key]) if v.spec.get(key) is not None else "N/A" for key in ("minAvailable", "maxUnavailable")]
    return [v.name, *limits, v.status.get("disruptionsAllowed") or 0, v.age]


def _metric(spec: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    kind = spec.get("type") or ""
    key = kind[:1].lower() + kind[1:]
    given, current = spec.get(key), (status.get(key) or _NOTHING).get("current") or _NOTHING
    if given is None:
        return "<unknown type>"
    target = given.get("target") or _NOTHING
    average = target.get("averageValue")
    if kind in ("Resource", "ContainerResource"):
        if average is not None:
            return f"{given.get('name')}: {current.get('averageValue') or '<unknown>'}/{average}"
        shown = [f"{side['averageUtilization']}%" if side.get("averageUtilization") is not None else word
                 for side, word in ((current, "<unknown>"), (target, "<auto>"))]
        return f"{given.get('name')}: {shown[0]}/{shown[1]}"
    if kind == "Pods":
        return f"{current.get('averageValue') or '<unknown>'}/{average or ''}"
    if average is not None:
        return f"{current.get('averageValue') or '<unknown>'}/{average} (avg)"
    return f"{current.get('value') or '<unknown>'}/{target.get('value') or ''}"


def _autoscaler(v: _View) -> list[Any]:
    reference = v.spec.get("scaleTargetRef") or _NOTHING
    metrics, statuses = v.spec.get("metrics") or [], v.status.get("currentMetrics") or []
    if not metrics and v.spec.get("targetCPUUtilizationPercentage") is not None:
        current = v.status.get("currentCPUUtilizationPercentage")
        shown = f"cpu: {'<unknown>' if current is None else f'{current}%'}/{v.spec['targetCPUUtilizationPercentage']}%"
    elif metrics:
        texts = [_metric(spec, statuses[i] if i < len(statuses) else _NOTHING) for i, spec in enumerate(metrics)]
        shown = ", ".join(texts[:2]) + (f" + {len(texts) - 2} more..." if len(texts) > 2 else "")
    else:
        shown = "<none>"
    minimum = v.spec.get("minReplicas")
    return [v.name, f"{reference.get('kind') or ''}/{reference.get('name') or ''}", shown, "<unset>" if minimum is None else str(minimum),
            v.spec.get("maxReplicas") or 0, v.status.get("currentReplicas") or 0, v.age]


def _controller_revision(v: _View) -> list[Any]:
    owner = next((r for r in v.meta.get("ownerReferences") or () if r.get("controller")), None)
    controller = "<none>"
    if owner is not None:
        group = (owner.get("apiVersion") or "").rpartition("/")[0]
        kind = (owner.get("kind") or "").lower()
        controller = f"{kind}.{group}/{owner.get('name')}" if group else f"{kind}/{owner.get('name')}"
    return [v.name, controller, v.obj.get("revision") or 0, v.age]


# --- core -------------------------------------------------------------------------------------------------------------


def _node(v: _View) -> list[Any]:
    ready = next((c for c in v.status.get("conditions") or () if c.get("type") == "Ready"), None)
    state = "Unknown" if ready is None else "Ready" if ready.get("status") == "True" else "NotReady"
    if v.spec.get("unschedulable"):
        state += ",SchedulingDisabled"
    roles = set()
    for label, value in (v.meta.get("labels") or _NOTHING).items():
        if label.startswith("node-role.kubernetes.io/"):
            roles.add(label.removeprefix("node-role.kubernetes.io/"))
        elif label == "kubernetes.io/role":
            roles.add(value)
    info = v.status.get("nodeInfo") or _NOTHING
    addresses: dict[str, str] = {}
    for address in v.status.get("addresses") or ():
        addresses.setdefault(address.get("type") or "", address.get("address") or "")
    return [v.name, state, ",".join(sorted(r for r in roles if r)) or "<none>", v.age, info.get("kubeletVersion") or "",
            addresses.get("InternalIP", "<none>"), addresses.get("ExternalIP", "<none>"),
            *(_or(info.get(key), "<unknown>") for key in ("osImage", "kernelVersion", "containerRuntimeVersion"))]


def _service_external(v: _View) -> str:
    external = v.spec.get("externalIPs") or []
    match v.spec.get("type"):
        case "ClusterIP" | "NodePort":
            return ",".join(external) or "<none>"
        case "LoadBalancer":
            balanced = _load_balancer(v.status)
            if external:
                return ",".join([*(balanced.split(",") if balanced else ()), *external])
            return balanced or "<pending>"
        case "ExternalName":
            return v.spec.get("externalName") or ""
    return "<unknown>"


def _service(v: _View) -> list[Any]:
    ports = []
    for port in v.spec.get("ports") or ():
        node_port = f":{port['nodePort']}" if port.get("nodePort") else ""
        ports.append(f"{port.get('port') or 0}{node_port}/{port.get('protocol') or ''}")
    addresses = v.spec.get("clusterIPs") or ["<none>"]
    return [v.name, v.spec.get("type") or "", addresses[0], _service_external(v), ",".join(ports) or "<none>", v.age,
            _labels(v.spec.get("selector"))]


def _endpoints(v: _View) -> list[Any]:
    subsets = v.obj.get("subsets") or ()
    found: list[str] = []
    for subset in subsets:
        addresses = [a.get("ip") or "" for a in subset.get("addresses") or ()]
        if not subset.get("ports"):
            found += addresses
        for port in subset.get("ports") or ():
            found += [f"[{a}]:{port.get('port') or 0}" if ":" in a else f"{a}:{port.get('port') or 0}" for a in addresses]
    return [v.name, _more(found, len(found), 3) if subsets else "<none>", v.age]


def _endpoint_slice(v: _View) -> list[Any]:
    ports = [str(p["port"]) if p.get("port") is not None else p["name"] if p.get("name") is not None else "*"
             for p in v.obj.get("ports") or ()]
    addresses = [a for e in v.obj.get("endpoints") or () for a in e.get("addresses") or ()]
    return [v.name, v.obj.get("addressType") or "", _more(ports, len(ports), 3) or "<unset>",
            _more(addresses, len(addresses), 3) or "<unset>", v.age]


def _config_map(v: _View) -> list[Any]:
    return [v.name, len(v.obj.get("data") or ()) + len(v.obj.get("binaryData") or ()), v.age]


def _secret(v: _View) -> list[Any]:
    return [v.name, v.obj.get("type") or "", len(v.obj.get("data") or ()), v.age]


def _event(v: _View) -> list[Any]:
    obj = v.obj
    involved = obj.get("involvedObject") or obj.get("regarding") or _NOTHING
    first_time = obj.get("firstTimestamp") or obj.get("deprecatedFirstTimestamp")
    first = since(first_time or obj.get("eventTime"), v.now)
    last_time = obj.get("lastTimestamp") or obj.get("deprecatedLastTimestamp")
    last = since(last_time, v.now) if last_time else first
    count = obj.get("count") or obj.get("deprecatedCount") or 0
    series = obj.get("series")
    if series:
        last, count = since(series.get("lastObservedTime"), v.now), series.get("count") or 0
    elif not count:
        count = 1
    kind = (involved.get("kind") or "").lower()
    source = obj.get("source") or obj.get("deprecatedSource") or _NOTHING
    component = source.get("component") or obj.get("reportingComponent") or obj.get("reportingController") or ""
    instance = source.get("host") or obj.get("reportingInstance") or ""
    return [last, obj.get("type") or "", obj.get("reason") or "", f"{kind}/{involved['name']}" if involved.get("name") else kind,
            involved.get("fieldPath") or "", f"{component}, {instance}" if instance else component,
            (obj.get("message") or obj.get("note") or "").strip(), first, count, v.name]


def _persistent_volume(v: _View) -> list[Any]:
    claim = v.spec.get("claimRef")
    annotations = v.meta.get("annotations") or _NOTHING
    class_name = annotations.get("volume.beta.kubernetes.io/storage-class", v.spec.get("storageClassName") or "")
    return [v.name, (v.spec.get("capacity") or _NOTHING).get("storage") or "0", _access_modes(v.spec.get("accessModes")),
            v.spec.get("persistentVolumeReclaimPolicy") or "",
            "Terminating" if v.meta.get("deletionTimestamp") else v.status.get("phase") or "",
            f"{claim.get('namespace') or ''}/{claim.get('name') or ''}" if claim else "", class_name,
            v.spec.get("volumeAttributesClassName") or "<unset>", v.status.get("reason") or "", v.age, v.spec.get("volumeMode") or "<unset>"]


def _persistent_volume_claim(v: _View) -> list[Any]:
    annotations = v.meta.get("annotations") or _NOTHING
    class_name = annotations.get("volume.beta.kubernetes.io/storage-class", v.spec.get("storageClassName") or "")
    capacity = modes = ""
    if v.spec.get("volumeName"):
        capacity = (v.status.get("capacity") or _NOTHING).get("storage") or "0"
        modes = _access_modes(v.status.get("accessModes"))
    return [v.name, "Terminating" if v.meta.get("deletionTimestamp") else v.status.get("phase") or "", v.spec.get("volumeName") or "",
            capacity, modes, class_name, v.spec.get("volumeAttributesClassName") or "<unset>", v.age, v.spec.get("volumeMode") or "<unset>"]


def _resource_quota(v: _View) -> list[Any]:
    hard, used = v.status.get("hard") or _NOTHING, v.status.get("used") or _NOTHING
    requests: list[str] = []
    limits: list[str] = []
    for name in sorted(hard):
        target = limits if name.split(".")[0] == "limits" and "." in name else requests
        target.append(f"{name}: {used.get(name, '0')}/{hard[name]}")
    return [v.name, ", ".join(requests), ", ".join(limits), v.age]


def _component_status(v: _View) -> list[Any]:
    for condition in v.obj.get("conditions") or ():
        if condition.get("type") == "Healthy":
            healthy = "Healthy" if condition.get("status") == "True" else "Unhealthy"
            return [v.name, healthy, condition.get("message") or "", condition.get("error") or ""]
    return [v.name, "Unknown", "", ""]


# --- the other groups -------------------------------------------------------------------------------------------------


def _ingress(v: _View) -> list[Any]:
    rules = v.spec.get("rules") or ()
    hosts: list[str] = []
    more = False
    for rule in rules:
        more = more or len(hosts) == 3
        if not more and rule.get("host"):
            hosts.append(rule["host"])
    shown = ",".join(hosts) or "*"
    if more:
        shown = f"{shown} + {len(rules) - 3} more..."
    return [v.name, v.spec.get("ingressClassName") or "<none>", shown, _load_balancer(v.status), "80, 443" if v.spec.get("tls") else "80",
            v.age]


def _ingress_class(v: _View) -> list[Any]:
    parameters = v.spec.get("parameters")
    shown = "<none>"
    if parameters:
        group = f".{parameters['apiGroup']}" if parameters.get("apiGroup") is not None else ""
        shown = f"{parameters.get('kind') or ''}{group}/{parameters.get('name') or ''}"
    return [v.name, v.spec.get("controller") or "", shown, v.age]


def _ip_address(v: _View) -> list[Any]:
    parent = v.spec.get("parentRef")
    shown = "<none>"
    if parent:
        group = f".{parent['group']}" if parent.get("group") else ""
        parts = [f"{parent.get('resource') or ''}{group}".lower(), parent.get("namespace"), parent.get("name") or ""]
        shown = "/".join(p for p in parts if p is not None and (p or p is parts[2]))
    return [v.name, shown, v.age]


def _role_binding(v: _View) -> list[Any]:
    reference = v.obj.get("roleRef") or _NOTHING
    subjects: dict[str, list[str]] = {"User": [], "Group": [], "ServiceAccount": []}
    for subject in v.obj.get("subjects") or ():
        name = subject.get("name") or ""
        if subject.get("kind") == "ServiceAccount" and subject.get("namespace"):
            name = f"{subject['namespace']}/{name}"
        subjects.get(subject.get("kind") or "", []).append(name)
    return [v.name, f"{reference.get('kind') or ''}/{reference.get('name') or ''}", v.age, *(", ".join(names) for names in subjects.values())]


def _signing_request(v: _View) -> list[Any]:
    present = {c.get("type") for c in v.status.get("conditions") or ()}
    state = "Denied" if "Denied" in present else "Approved" if "Approved" in present else "Pending"
    state += (",Failed" if "Failed" in present else "") + (",Issued" if v.status.get("certificate") else "")
    seconds = v.spec.get("expirationSeconds")
    return [v.name, v.age, v.spec.get("signerName") or "<none>", v.spec.get("username") or "",
            "<none>" if seconds is None else human_duration(seconds), state]


def _csi_driver(v: _View) -> list[Any]:
    spec = v.spec
    requests = spec.get("tokenRequests")
    tokens = "<unset>" if requests is None else ",".join(r.get("audience") or "" for r in requests)
    attach = spec.get("attachRequired")
    return [v.name, True if attach is None else attach, bool(spec.get("podInfoOnMount")), bool(spec.get("storageCapacity")), tokens,
            bool(spec.get("requiresRepublish")), ",".join(spec.get("volumeLifecycleModes") or ()) or "<none>", v.age]


def _storage_class(v: _View) -> list[Any]:
    annotations = v.meta.get("annotations") or _NOTHING
    is_default = any(annotations.get(key) == "true" for key in (
        "storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"))
    return [v.name + (" (default)" if is_default else ""), v.obj.get("provisioner") or "", v.obj.get("reclaimPolicy") or "Delete",
            v.obj.get("volumeBindingMode") or "Immediate", bool(v.obj.get("allowVolumeExpansion")), v.age]


def _volume_attachment(v: _View) -> list[Any]:
    return [v.name, v.spec.get("attacher") or "", (v.spec.get("source") or _NOTHING).get("persistentVolumeName") or "",
            v.spec.get("nodeName") or "", bool(v.status.get("attached")), v.age]


def _param_kind(v: _View) -> str:
    kind = v.spec.get("paramKind")
    return f"{kind.get('apiVersion') or ''}/{kind.get('kind') or ''}" if kind else "<unset>"


def _param_ref(v: _View) -> str:
    reference = v.spec.get("paramRef")
    if not reference:
        return "<unset>"
    if reference.get("name"):
        return f"{reference.get('namespace') or '*'}/{reference['name']}"
    return _selector(reference["selector"]) if reference.get("selector") is not None else "<unset>"


def _api_service(v: _View) -> list[Any]:
    service = v.spec.get("service")
    available = next((c for c in v.status.get("conditions") or () if c.get("type") == "Available"), None)
    state = "Unknown"
    if available is not None:
        state = available.get("status") or ""
        if state != "True" and available.get("reason"):
            state = f"{state} ({available['reason']})"
    return [v.name, f"{service.get('namespace') or ''}/{service.get('name') or ''}" if service else "Local", state, v.age]


def _flow_schema(v: _View) -> list[Any]:
    dangling = next((c.get("status") for c in v.status.get("conditions") or () if c.get("type") == "Dangling"), "?")
    method = v.spec.get("distinguisherMethod")
    return [v.name, (v.spec.get("priorityLevelConfiguration") or _NOTHING).get("name") or "", v.spec.get("matchingPrecedence") or 0,
            method.get("type") or "" if method else "<none>", v.age, dangling]


def _priority_level(v: _View) -> list[Any]:
    limited = v.spec.get("limited")
    shares: Any = "<none>"
    queuing: list[Any] = ["<none>"] * 3
    if limited:
        shares = limited.get("nominalConcurrencyShares") or 0
        given = (limited.get("limitResponse") or _NOTHING).get("queuing")
        if given:
            queuing = [given.get(key) or 0 for key in ("queues", "handSize", "queueLengthLimit")]
    return [v.name, v.spec.get("type") or "", shares, *queuing, v.age]


def _resource_claim(v: _View) -> list[Any]:
    deleted = bool(v.meta.get("deletionTimestamp"))
    states = ["deleted"] if deleted else []
    if v.status.get("allocation") is None:
        states += [] if deleted else ["pending"]
    else:
        states += ["allocated", *(["reserved"] if v.status.get("reservedFor") else [])]
    return [v.name, ",".join(states), v.age]


def _device_taint_rule(v: _View) -> list[Any]:
    taint = v.spec.get("taint") or _NOTHING
    added = since(taint["timeAdded"], v.now) if taint.get("timeAdded") else ""
    return [v.name, taint.get("key") or "", taint.get("value") or "", taint.get("effect") or "", added, v.age]


def _name_age(v: _View) -> list[Any]:
    return [v.name, v.age]


def _counting(key: str) -> Callable[[_View], list[Any]]:
    return lambda v: [v.name, len(v.obj.get(key) or ()), v.age]


_RBAC, _ADMISSION, _FLOW = "rbac.authorization.k8s.io", "admissionregistration.k8s.io", "flowcontrol.apiserver.k8s.io"
_PRINTERS: dict[tuple[str, str], Callable[[_View], list[Any]]] = {
    ("", "PodTemplate"): _pod_template,
    ("", "ReplicationController"): _replication_controller,
    ("", "Service"): _service,
    ("", "Endpoints"): _endpoints,
    ("", "Node"): _node,
    ("", "Event"): _event,
    ("", "Namespace"): lambda v: [v.name, v.status.get("phase") or "", v.age],
    ("", "Secret"): _secret,
    ("", "ServiceAccount"): _name_age,
    ("", "ConfigMap"): _config_map,
    ("", "PersistentVolume"): _persistent_volume,
    ("", "PersistentVolumeClaim"): _persistent_volume_claim,
    ("", "ResourceQuota"): _resource_quota,
    ("", "ComponentStatus"): _component_status,
    ("apps", "ReplicaSet"): _replica_set,
    ("apps", "Deployment"): _deployment,
    ("apps", "StatefulSet"): _stateful_set,
    ("apps", "DaemonSet"): _daemon_set,
    ("apps", "ControllerRevision"): _controller_revision,
    ("batch", "Job"): _job,
    ("batch", "CronJob"): _cron_job,
    ("policy", "PodDisruptionBudget"): _pod_disruption_budget,
    ("autoscaling", "HorizontalPodAutoscaler"): _autoscaler,
    ("autoscaling", "Scale"): lambda v: [v.name, v.spec.get("replicas") or 0, v.status.get("replicas") or 0, v.age],
    ("discovery.k8s.io", "EndpointSlice"): _endpoint_slice,
    ("events.k8s.io", "Event"): _event,
    ("networking.k8s.io", "Ingress"): _ingress,
    ("networking.k8s.io", "IngressClass"): _ingress_class,
    ("networking.k8s.io", "NetworkPolicy"): lambda v: [v.name, _selector(v.spec.get("podSelector") or {}), v.age],
    ("networking.k8s.io", "ServiceCIDR"): lambda v: [v.name, ",".join(v.spec.get("cidrs") or ()), v.age],
    ("networking.k8s.io", "IPAddress"): _ip_address,
    (_RBAC, "RoleBinding"): _role_binding,
    (_RBAC, "ClusterRoleBinding"): _role_binding,
    ("certificates.k8s.io", "CertificateSigningRequest"): _signing_request,
    ("storage.k8s.io", "CSINode"): lambda v: [v.name, len(v.spec.get("drivers") or ()), v.age],
    ("storage.k8s.io", "CSIDriver"): _csi_driver,
    ("storage.k8s.io", "StorageClass"): _storage_class,
    ("storage.k8s.io", "VolumeAttachment"): _volume_attachment,
    ("storage.k8s.io", "VolumeAttributesClass"): lambda v: [v.name, v.obj.get("driverName") or "", v.age],
    (_ADMISSION, "MutatingWebhookConfiguration"): _counting("webhooks"),
    (_ADMISSION, "ValidatingWebhookConfiguration"): _counting("webhooks"),
    (_ADMISSION, "ValidatingAdmissionPolicy"): lambda v: [v.name, len(v.spec.get("validations") or ()), _param_kind(v), v.age],
    (_ADMISSION, "ValidatingAdmissionPolicyBinding"): lambda v: [v.name, v.spec.get("policyName") or "", _param_ref(v), v.age],
    ("apiregistration.k8s.io", "APIService"): _api_service,
    ("coordination.k8s.io", "Lease"): lambda v: [v.name, v.spec.get("holderIdentity") or "", v.age],
    ("scheduling.k8s.io", "PriorityClass"): lambda v: [
        v.name, v.obj.get("value") or 0, bool(v.obj.get("globalDefault")), v.age, v.obj.get("preemptionPolicy") or ""],
    ("node.k8s.io", "RuntimeClass"): lambda v: [v.name, v.obj.get("handler") or "", v.age],
    (_FLOW, "FlowSchema"): _flow_schema,
    (_FLOW, "PriorityLevelConfiguration"): _priority_level,
    ("resource.k8s.io", "DeviceClass"): _name_age,
    ("resource.k8s.io", "ResourceClaim"): _resource_claim,
    ("resource.k8s.io", "ResourceClaimTemplate"): _name_age,
    ("resource.k8s.io", "ResourceSlice"): lambda v: [
        v.name, v.spec.get("nodeName") or "", v.spec.get("driver") or "", (v.spec.get("pool") or _NOTHING).get("name") or "", v.age],
    ("resource.k8s.io", "DeviceTaintRule"): _device_taint_rule,
    ("storagemigration.k8s.io", "StorageVersionMigration"): lambda v: [
        v.name, ".".join((v.spec.get("resource") or _NOTHING).get(key) or "" for key in ("resource", "version", "group"))],
}
