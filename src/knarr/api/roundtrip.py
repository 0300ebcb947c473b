"""What upstream's conversion to the internal version and back changes in an object. In place, pure, per kind.

Used by defaulting.py as the last step. Conversions between two served versions of one kind are in conversion.py.

Source: pkg/apis/core/v1/conversion.go, pkg/apis/apps/v1/conversion.go.
"""

from base64 import b64encode
from collections.abc import Callable

from knarr.api.types import Object


def _pod_spec(spec: Object | None) -> None:
    if not spec:
        return
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account
    # The gate ContainerRestartRules is off: only an init container has a restart policy of its own, Always.
    for group in ("containers", "initContainers", "ephemeralContainers"):
        for container in spec.get(group) or ():
            if "restartPolicy" in container and (group != "initContainers" or container["restartPolicy"] != "Always"):
                del container["restartPolicy"]
            # The signal is behind a gate that is off: without it there is nothing left.
            if "lifecycle" in container and not container["lifecycle"].keys() - {"stopSignal"}:
                del container["lifecycle"]


_INIT_ANNOTATIONS = tuple(f"pod.{stage}.kubernetes.io/init-container{part}" for stage in ("beta", "alpha") for part in ("s", "-statuses"))


def _annotated(obj: Object) -> None:
    """Drop the annotations that held init containers before they were a field."""
    annotations = (obj.get("metadata") or {}).get("annotations")
    if annotations:
        for key in _INIT_ANNOTATIONS:
            annotations.pop(key, None)


def _pod(obj: Object) -> None:
    _pod_spec(obj.get("spec"))
    _annotated(obj)
    spec = obj.get("spec")
    if spec and (spec.get("terminationGracePeriodSeconds") or 0) < 0:
        spec["terminationGracePeriodSeconds"] = 1
    status = obj.get("status")
    if status:
        _first_and_all(status, "podIP", "podIPs", "ip")
        _first_and_all(status, "hostIP", "hostIPs", "ip")


def _first_and_all(holder: Object, single: str, plural: str, key: str) -> None:
    """Keep a single field and a list whose first entry repeats it in step; the single one wins."""
    first, entries = holder.get(single), holder.get(plural)
    if first and (not entries or entries[0].get(key) != first):
        if plural == "hostIPs":
            return
        holder[plural] = [{key: first}]
    elif not first and entries and plural == "podIPs" and entries[0].get(key):
        holder[single] = entries[0][key]


def _node(obj: Object) -> None:
    spec = obj.get("spec")
    if spec:
        first, entries = spec.get("podCIDR"), spec.get("podCIDRs")
        if first and (not entries or entries[0] != first):
            spec["podCIDRs"] = [first]
        elif not first and entries:
            spec["podCIDR"] = entries[0]


def _template(obj: Object) -> None:
    _pod_template(obj.get("spec") or {})


def _pod_template(obj: Object) -> None:
    template = obj.get("template")
    if template:
        _pod_spec(template.get("spec"))
        _annotated(template)


def _daemon_set(obj: Object) -> None:
    """The internal version has a field for what is an annotation here, so every object has one."""
    _template(obj)
    metadata = obj.setdefault("metadata", {})
    annotations = metadata.get("annotations")
    if annotations is None:
        annotations = metadata["annotations"] = {}
    annotations.setdefault("deprecated.daemonset.template.generation", "0")


def _cron_job(obj: Object) -> None:
    _template((obj.get("spec") or {}).get("jobTemplate") or {})


def _stateful_set(obj: Object) -> None:
    _template(obj)
    for claim in (obj.get("spec") or {}).get("volumeClaimTemplates") or ():
        claim["apiVersion"], claim["kind"] = "v1", "PersistentVolumeClaim"


def _secret(obj: Object) -> None:
    texts = obj.pop("stringData", None)
    if texts:
        data = obj["data"] = dict(obj.get("data") or {})
        for key, text in texts.items():
            data[key] = b64encode(text.encode("utf-8", "surrogatepass")).decode()


def _definition(obj: Object) -> None:
    """A default that is null is none."""
    for version in (obj.get("spec") or {}).get("versions") or ():
        _without_null_defaults((version.get("schema") or {}).get("openAPIV3Schema"))


def _without_null_defaults(schema: object) -> None:
    if not isinstance(schema, dict):
        return
    if schema.get("default", 0) is None:
        del schema["default"]
    for key in ("items", "additionalProperties"):
        _without_null_defaults(schema.get(key))
    for part in (schema.get("properties") or {}).values():
        _without_null_defaults(part)


STEPS: dict[tuple[str, str], tuple[Callable[[Object], None], ...]] = {
    ("v1", "Pod"): (_pod,),
    ("v1", "Node"): (_node,),
    ("v1", "PodTemplate"): (_pod_template,),
    ("v1", "ReplicationController"): (_template,),
    ("v1", "Secret"): (_secret,),
    ("apps/v1", "Deployment"): (_template,),
    ("apps/v1", "ReplicaSet"): (_template,),
    ("apps/v1", "DaemonSet"): (_daemon_set,),
    ("apps/v1", "StatefulSet"): (_stateful_set,),
    ("batch/v1", "Job"): (_template,),
    ("batch/v1", "CronJob"): (_cron_job,),
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"): (_definition,),
}
