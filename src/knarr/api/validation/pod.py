"""Pods: create, update (little may change), status, ephemeral containers, resize; pod templates.

Source: pkg/apis/core/validation ValidatePodCreate, ValidatePodUpdate, ValidatePodStatusUpdate, ValidatePodResize.
"""

from __future__ import annotations

from typing import Any

from knarr.api.errors import duplicate, field_forbidden, invalid_value, required
from knarr.api.validation.containers import image_whitespace
from knarr.api.validation.metadata import Errors, Object, add, immutable, validate_annotations, validate_labels
from knarr.api.validation.podspec import MAXIMUM_INT32, validate_legacy_ip, validate_pod_spec
from knarr.api.validation.qos import pod_qos
from knarr.api.validation.scheduling import validate_tolerations
from knarr.api.validation.strings import dns_subdomain, label_key_errors, range_message

MIRROR = "kubernetes.io/config.mirror"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
APP_ARMOR = "container.apparmor.security.beta.kubernetes.io/"
SECCOMP_POD = "seccomp.security.alpha.kubernetes.io/pod"
SECCOMP_CONTAINER = "container.seccomp.security.alpha.kubernetes.io/"
_UPDATABLE = (
    "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,"
    "`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
_CONTAINERS = ("initContainers", "containers", "ephemeralContainers")


def _is_int32(text: str) -> bool:
    digits = text[1:] if text[:1] == "-" else text
    if not digits.isdigit() or not digits.isascii() or (len(digits) > 1 and digits[0] == "0"):
        return False
    return -(2**31) <= int(text) <= 2**31 - 1


def _annotations(annotations: dict[str, str], spec: Object, path: str, errors: Errors) -> None:
    if MIRROR in annotations and not spec.get("nodeName"):
        message = "must set spec.nodeName if mirror pod annotation is set"
        errors.append(invalid_value(f"{path}[{MIRROR}]", annotations[MIRROR], message))
    cost = annotations.get(DELETION_COST)
    if cost is not None and not _is_int32(cost):
        errors.append(invalid_value(f"{path}[{DELETION_COST}]", cost, "must be a 32bit integer"))
    for key, value in annotations.items():
        if key == SECCOMP_POD or key.startswith(SECCOMP_CONTAINER):
            _seccomp_annotation(value, f"{path}.{key}", errors)
        elif key.startswith(APP_ARMOR):
            name = key[len(APP_ARMOR) :]
            if not any(c.get("name") == name for kind in _CONTAINERS for c in spec.get(kind) or ()):
                errors.append(invalid_value(f"{path}[{key}]", name, "container not found"))
            if value not in ("", "runtime/default", "unconfined") and not value.startswith("localhost/"):
                errors.append(invalid_value(f"{path}[{key}]", value, f'invalid AppArmor profile name: "{value}"'))


def _seccomp_annotation(value: str, path: str, errors: Errors) -> None:
    if value in ("runtime/default", "docker/default", "unconfined"):
        return
    if not value.startswith("localhost/"):
        errors.append(invalid_value(path, value, "must be a valid seccomp profile"))
        return
    target = value.removeprefix("localhost/")
    if target.startswith("/"):
        errors.append(invalid_value(path, target, "must be a relative path"))
    if ".." in target.split("/"):
        errors.append(invalid_value(path, target, "must not contain '..'"))


def _metadata_and_spec(pod: Object, errors: Errors) -> None:
    metadata, spec = pod["metadata"], pod.get("spec") or {}
    if metadata.get("annotations"):
        _annotations(metadata["annotations"], spec, "metadata.annotations", errors)
    validate_pod_spec(spec, "spec", errors, pod_name=metadata.get("name") or "", is_pod=True)
    if not spec.get("serviceAccountName"):
        for index, volume in enumerate(spec.get("volumes") or ()):
            for position, source in enumerate((volume.get("projected") or {}).get("sources") or ()):
                if source.get("serviceAccountToken") is not None:
                    own = f"spec.volumes[{index}].projected.sources[{position}].serviceAccountToken"
                    errors.append(field_forbidden(own, "must not be specified when serviceAccountName is not set"))
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(spec.get(kind) or ()):
            image_whitespace(container, f"spec.{kind}[{index}]", errors)


def create_pod(pod: Object, errors: Errors) -> None:
    """A new pod."""
    _metadata_and_spec(pod, errors)
    spec = pod.get("spec") or {}
    if spec.get("ephemeralContainers"):
        errors.append(field_forbidden("spec.ephemeralContainers", "cannot be set on create"))
    if spec.get("nodeName") and spec.get("schedulingGates"):
        errors.append(field_forbidden("spec.nodeName", "cannot be set until all schedulingGates have been cleared"))
    annotations = pod["metadata"].get("annotations")
    if annotations:
        _matching_profiles(annotations, spec, errors)


def _matching_profiles(annotations: dict[str, str], spec: Object, errors: Errors) -> None:
    """Deprecated annotations must say the same as the fields that replaced them."""
    context = spec.get("securityContext") or {}
    if SECCOMP_POD in annotations and context.get("seccompProfile") is not None:
        _same_profile(annotations[SECCOMP_POD], context["seccompProfile"], "spec.securityContext.seccompProfile", "seccomp", errors)
    for kind in _CONTAINERS:
        for index, container in enumerate(spec.get(kind) or ()):
            own, name = f"spec.{kind}[{index}].securityContext", container.get("name") or ""
            inner = container.get("securityContext") or {}
            if SECCOMP_CONTAINER + name in annotations and inner.get("seccompProfile") is not None:
                _same_profile(annotations[SECCOMP_CONTAINER + name], inner["seccompProfile"], f"{own}.seccompProfile", "seccomp", errors)
            profile = inner.get("appArmorProfile") or context.get("appArmorProfile")
            if APP_ARMOR + name in annotations and profile is not None:
                _same_profile(annotations[APP_ARMOR + name], profile, f"{own}.appArmorProfile", "apparmor", errors)


def _same_profile(annotation: str, profile: Object, path: str, what: str, errors: Errors) -> None:
    kind = profile.get("type")
    fits = {"Unconfined": ("unconfined",), "RuntimeDefault": ("runtime/default", "docker/default")}.get(kind or "")
    if fits is not None:
        if annotation not in fits:
            errors.append(field_forbidden(f"{path}.type", f"{what} type in annotation and field must match"))
    elif kind == "Localhost":
        if not annotation.startswith("localhost/"):
            errors.append(field_forbidden(f"{path}.type", f"{what} type in annotation and field must match"))
        elif annotation.removeprefix("localhost/") != profile.get("localhostProfile"):
            errors.append(field_forbidden(f"{path}.localhostProfile", f"{what} profile in annotation and field must match"))


def _annotation_updates(new: Object, old: Object, errors: Errors) -> None:
    after, before = new["metadata"].get("annotations") or {}, old["metadata"].get("annotations") or {}
    for verb, keys in (
        ("remove or update", [k for k in before if after.get(k) != before[k]]),
        ("add", [k for k in after if k not in before]),
    ):
        for key in keys:
            if key.startswith(APP_ARMOR):
                errors.append(field_forbidden(f"metadata.annotations[{key}]", f"may not {verb} AppArmor annotations"))
            if key == MIRROR:
                errors.append(field_forbidden(f"metadata.annotations[{key}]", f"may not {verb} mirror pod annotation"))


def _container_updates(new: list[Object], old: list[Object], path: str, errors: Errors) -> bool:
    if len(new) != len(old):
        errors.append(field_forbidden(path, "pod updates may not add or remove containers"))
        return False
    for index, container in enumerate(new):
        if not container.get("image"):
            errors.append(required(f"{path}[{index}].image"))
        image_whitespace(container, f"{path}[{index}]", errors)
    return True


def _deadline(new: Object, old: Object, errors: Errors) -> bool:
    after, before, path = new.get("activeDeadlineSeconds"), old.get("activeDeadlineSeconds"), "spec.activeDeadlineSeconds"
    if after is None:
        if before is not None:
            errors.append(invalid_value(path, None, "must not update from a positive integer to nil value"))
        return True
    if not 0 <= after <= MAXIMUM_INT32:
        errors.append(invalid_value(path, after, range_message(0, MAXIMUM_INT32)))
        return False
    if before is not None and before < after:
        errors.append(invalid_value(path, after, "must be less than or equal to previous value"))
        return False
    return True


def _without_seconds(toleration: Object) -> Object:
    return {key: value for key, value in toleration.items() if key != "tolerationSeconds"}


def _only_added_tolerations(new: list[Object], old: list[Object], errors: Errors) -> None:
    kept = [_without_seconds(t) for t in new]
    if any(_without_seconds(t) not in kept for t in old):
        message = "existing toleration can not be modified except its tolerationSeconds"
        errors.append(field_forbidden("spec.tolerations", message))
        return
    validate_tolerations(new, "spec.tolerations", errors)


def _only_removed_gates(new: list[Object], old: list[Object], errors: Errors) -> None:
    known = {gate.get("name") for gate in old}
    for index, gate in enumerate(new):
        if gate.get("name") not in known:
            message = f"only deletion is allowed, but found new scheduling gate '{gate.get('name')}'"
            errors.append(field_forbidden(f"spec.schedulingGates[{index}].name", message))


_NODE_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def _gated_changes(munged: Object, old: Object, errors: Errors) -> None:
    """A gated pod may narrow where it can go."""
    selector, before = munged.get("nodeSelector") or {}, old.get("nodeSelector") or {}
    if selector != before:
        if any(selector.get(key) != value for key, value in before.items()):
            message = "only additions to spec.nodeSelector are allowed (no mutations or deletions)"
            errors.append(invalid_value("spec.nodeSelector", selector, message))
        _put(munged, "nodeSelector", old.get("nodeSelector"))
    affinity, old_affinity = munged.get("affinity") or {}, old.get("affinity") or {}
    node, old_node = affinity.get("nodeAffinity"), old_affinity.get("nodeAffinity")
    if node == old_node:
        return
    _narrowed_affinity(node, old_node, errors)
    merged = {key: value for key, value in affinity.items() if key != "nodeAffinity"}
    if old_node is not None:
        merged["nodeAffinity"] = old_node
    _put(munged, "affinity", merged or old.get("affinity"))


def _narrowed_affinity(node: Any, old_node: Any, errors: Errors) -> None:
    old_terms = ((old_node or {}).get(_NODE_REQUIRED) or {}).get("nodeSelectorTerms") or []
    if not (old_node or {}).get(_NODE_REQUIRED):
        return
    terms = ((node or {}).get(_NODE_REQUIRED) or {}).get("nodeSelectorTerms") or []
    path = f"spec.affinity.nodeAffinity.{_NODE_REQUIRED}.nodeSelectorTerms"
    if old_terms and len(terms) != len(old_terms):
        errors.append(invalid_value(path, terms, "no additions/deletions to non-empty NodeSelectorTerms list are allowed"))
        return
    for index, (term, before) in enumerate(zip(terms, old_terms, strict=False)):
        wanted = [(term.get(key) or [], before.get(key) or []) for key in ("matchExpressions", "matchFields")]
        was_empty = not any(old for _, old in wanted)
        if (was_empty and any(new for new, _ in wanted)) or any(new[: len(old)] != old for new, old in wanted):
            errors.append(invalid_value(f"{path}[{index}]", term, "only additions are allowed (no mutations or deletions)"))


def _put(obj: Object, key: str, value: Any) -> None:
    if value is None:
        obj.pop(key, None)
    else:
        obj[key] = value


def _munged(new: Object, old: Object) -> Object:
    """The new spec with everything that may change set back."""
    munged = dict(new)
    for kind in ("containers", "initContainers"):
        if new.get(kind):
            pairs = zip(new[kind], old.get(kind) or (), strict=False)
            munged[kind] = [{**container, "image": before.get("image")} for container, before in pairs]
    for key in ("activeDeadlineSeconds", "schedulingGates", "tolerations"):
        _put(munged, key, old.get(key))
    if (old.get("terminationGracePeriodSeconds") or 0) < 0 and new.get("terminationGracePeriodSeconds") == 1:
        munged["terminationGracePeriodSeconds"] = old["terminationGracePeriodSeconds"]
    return munged


def _differences(old: Object, new: Object) -> str:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines.append(f"- {key}: {old.get(key)}\n+ {key}: {new.get(key)}")
    return "\n".join(lines)


def update_pod(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    """Dispatch on the subresource."""
    if subresource == "status":
        _update_status(new, old, errors)
    elif subresource == "ephemeralcontainers":
        _update_ephemeral(new, old, errors)
    elif subresource == "resize":
        _resize(new, old, errors)
    else:
        _update(new, old, errors)


def _update(new: Object, old: Object, errors: Errors) -> None:
    _metadata_and_spec(new, errors)
    _annotation_updates(new, old, errors)
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    for kind in ("containers", "initContainers"):
        if not _container_updates(spec.get(kind) or [], before.get(kind) or [], f"spec.{kind}", errors):
            return
    if not _deadline(spec, before, errors):
        return
    _only_added_tolerations(spec.get("tolerations") or [], before.get("tolerations") or [], errors)
    _only_removed_gates(spec.get("schedulingGates") or [], before.get("schedulingGates") or [], errors)
    if spec == before:
        return
    munged = _munged(spec, before)
    if before.get("schedulingGates"):
        _gated_changes(munged, before, errors)
    if munged != before:
        message = f"pod updates may not change fields other than {_UPDATABLE}\n{_differences(before, munged)}"
        errors.append(field_forbidden("spec", message))


def _update_ephemeral(new: Object, old: Object, errors: Errors) -> None:
    _metadata_and_spec(new, errors)
    _annotation_updates(new, old, errors)
    if MIRROR in (old["metadata"].get("annotations") or {}):
        errors[:] = [field_forbidden("", "static pods do not support ephemeral containers")]
        return
    by_name = {c.get("name"): c for c in (new.get("spec") or {}).get("ephemeralContainers") or ()}
    for container in (old.get("spec") or {}).get("ephemeralContainers") or ():
        name, path = container.get("name"), "spec.ephemeralContainers"
        if name not in by_name:
            errors.append(field_forbidden(path, f'existing ephemeral containers "{name}" may not be removed\n'))
        elif by_name[name] != container:
            message = f'existing ephemeral containers "{name}" may not be changed\n{_differences(container, by_name[name])}'
            errors.append(field_forbidden(path, message))


def _same_names(new: Object, old: Object, errors: Errors) -> bool:
    before = len(errors)
    for kind in ("containers", "initContainers"):
        after, earlier = new.get(kind) or [], old.get(kind) or []
        if len(after) != len(earlier):
            errors.append(field_forbidden(f"spec.{kind}", f"{kind} may not be added or removed on resize"))
            continue
        for index, container in enumerate(earlier):
            if after[index].get("name") != container.get("name"):
                errors.append(field_forbidden(f"spec.{kind}[{index}].name", f"{kind} may not be renamed or reordered on resize"))
    return len(errors) == before


def _resources_kept(container: Object, old: Object) -> Object:
    """The container with cpu and memory set back to the old amounts."""
    resources = dict(container.get("resources") or {})
    before = old.get("resources") or {}
    for kind in ("limits", "requests"):
        if kind not in before:
            resources.pop(kind, None)
            continue
        amounts = {name: text for name, text in (resources.get(kind) or {}).items() if name not in ("cpu", "memory")}
        amounts.update({name: before[kind][name] for name in ("cpu", "memory") if name in before[kind]})
        resources[kind] = amounts
    return {**container, "resources": resources}


def _resize_list(kind: str, new: Object, old: Object, errors: Errors) -> list[Object]:
    result = []
    for index, (container, before) in enumerate(zip(new.get(kind) or (), old.get(kind) or (), strict=True)):
        sidecar = kind == "initContainers" and container.get("restartPolicy") == "Always"
        if kind == "containers" or sidecar:
            for part in ("requests", "limits"):
                given, had = (container.get("resources") or {}).get(part) or {}, (before.get("resources") or {}).get(part) or {}
                if not had.keys() <= given.keys():
                    errors.append(field_forbidden(f"spec.{kind}[{index}].resources.{part}", f"resource {part} cannot be removed"))
            kept = _resources_kept(container, before)
            if kept != {**before, "resources": before.get("resources") or {}}:
                what = "resources for sidecar containers are" if sidecar else "resources are"
                errors.append(field_forbidden("spec", f"only cpu and memory {what} mutable"))
            result.append(kept)
        else:
            if container != before:
                errors.append(field_forbidden("spec", "resources for non-sidecar init containers are immutable"))
            result.append(container)
    return result


def _resize(new: Object, old: Object, errors: Errors) -> None:
    _metadata_and_spec(new, errors)
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    whole = None
    if any((s.get("resources") or {}).get("requests") or (s.get("resources") or {}).get("limits") for s in (spec, before)):
        whole = "pods with pod-level resources cannot be resized"
    elif MIRROR in (old["metadata"].get("annotations") or {}):
        whole = "static pods cannot be resized"
    elif (before.get("os") or {}).get("name") == "windows":
        whole = "windows pods cannot be resized"
    if whole is not None:
        errors[:] = [field_forbidden("", whole)]
        return
    if pod_qos(before) != pod_qos(spec):
        value = (new.get("status") or {}).get("qosClass") or ""
        errors.append(invalid_value("spec", value, "Pod QOS Class may not change as a result of resizing"))
    for status in (old.get("status") or {}).get("containerStatuses") or ():
        if (status.get("state") or {}).get("running") is not None:
            if status.get("resources") is None:
                errors.append(field_forbidden("spec", "Pod running on node without support for resize"))
            break
    if not _same_names(spec, before, errors):
        return
    munged = dict(spec)
    for kind in ("initContainers", "containers"):
        if kind in spec or kind in before:
            munged[kind] = _resize_list(kind, spec, before, errors)
    if errors:
        return
    for kind in ("initContainers", "containers"):
        munged.pop(kind, None)
    if munged != {key: value for key, value in before.items() if key not in ("initContainers", "containers")}:
        errors.append(field_forbidden("spec", "only cpu and memory resources are mutable"))


_SYSTEM_CONDITIONS = frozenset({"PodScheduled", "Ready", "Initialized"})


def _update_status(new: Object, old: Object, errors: Errors) -> None:
    status, before = new.get("status") or {}, old.get("status") or {}
    for index, condition in enumerate(status.get("conditions") or ()):
        own, kind = f"status.conditions[{index}]", condition.get("type") or ""
        if (condition.get("observedGeneration") or 0) < 0:
            message = "must be a non-negative integer"
            errors.append(invalid_value(f"{own}.observedGeneration", condition["observedGeneration"], message))
        if kind not in _SYSTEM_CONDITIONS:
            add(errors, f"{own}.Type", kind, label_key_errors(kind))
    if (new.get("spec") or {}).get("nodeName") != (old.get("spec") or {}).get("nodeName"):
        errors.append(field_forbidden("status.nodeName", "may not be changed directly"))
    nominated = status.get("nominatedNodeName") or ""
    if nominated:
        add(errors, "status.nominatedNodeName", nominated, dns_subdomain(nominated))
    if (old.get("spec") or {}).get("nodeName") and nominated and nominated != before.get("nominatedNodeName"):
        errors.append(field_forbidden("status.nominatedNodeName", "may not be set on pods that are already bound to a node"))
    if (status.get("observedGeneration") or 0) < 0:
        errors.append(invalid_value("status.observedGeneration", status["observedGeneration"], "must be a non-negative integer"))
    immutable(errors, "status.qosClass", status.get("qosClass"), before.get("qosClass"))
    spec = old.get("spec") or {}
    if spec.get("restartPolicy") != "Always":
        _no_resurrection(status, before, "containerStatuses", spec, errors)
    _no_resurrection(status, before, "initContainerStatuses", spec, errors)
    _claim_statuses(status, new.get("spec") or {}, errors)
    for key in ("podIPs", "hostIPs"):
        for index, entry in enumerate(status.get(key) or ()):
            validate_legacy_ip(entry.get("ip") or "", f"status.{key}[{index}]", errors)


def _claim_statuses(status: Object, spec: Object, errors: Errors) -> None:
    names: set[str] = set()
    known = {c.get("name") for c in spec.get("resourceClaims") or ()}
    for index, entry in enumerate(status.get("resourceClaimStatuses") or ()):
        own, name = f"status.resourceClaimStatuses[{index}]", entry.get("name") or ""
        if name not in known:
            errors.append(invalid_value(f"{own}.name", name, "must match the name of an entry in `spec.resourceClaims`"))
        if name in names:
            errors.append(duplicate(f"{own}.name", name))
        names.add(name)
        if entry.get("resourceClaimName") is not None:
            add(errors, f"{own}.name", entry["resourceClaimName"], dns_subdomain(entry["resourceClaimName"]))


def _may_restart(container: Object, exit_code: int, spec: Object, is_init: bool) -> bool:
    """Whether a container that ended with this code may be started again."""
    for rule in container.get("restartPolicyRules") or ():
        codes = rule.get("exitCodes") or {}
        if (exit_code in (codes.get("values") or ())) == (codes.get("operator") == "In"):
            return bool(rule.get("action") == "Restart")
    policy = container.get("restartPolicy") or spec.get("restartPolicy")
    if is_init and policy == "Always" and not container.get("restartPolicy"):
        policy = "OnFailure"
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)


def _no_resurrection(status: Object, before: Object, kind: str, spec: Object, errors: Errors) -> None:
    after = {s.get("name"): s for s in status.get(kind) or ()}
    is_init = kind == "initContainerStatuses"
    containers = {c.get("name"): c for c in spec.get("initContainers" if is_init else "containers") or ()}
    for index, entry in enumerate(before.get(kind) or ()):
        ended = (entry.get("state") or {}).get("terminated")
        current = after.get(entry.get("name"))
        if ended is None or current is None or (current.get("state") or {}).get("terminated") is not None:
            continue
        container = containers.get(entry.get("name"))
        if container is not None and not _may_restart(container, ended.get("exitCode") or 0, spec, is_init):
            errors.append(field_forbidden(f"status.{kind}[{index}].state", "may not be transitioned to non-terminated state"))


def validate_pod_template(template: Object, path: str, errors: Errors) -> None:
    """A PodTemplateSpec."""
    metadata, spec = template.get("metadata") or {}, template.get("spec") or {}
    validate_labels(metadata.get("labels"), f"{path}.labels", errors)
    validate_annotations(metadata.get("annotations"), f"{path}.annotations", errors)
    if metadata.get("annotations"):
        _annotations(metadata["annotations"], spec, f"{path}.annotations", errors)
    validate_pod_spec(spec, f"{path}.spec", errors)
    if metadata.get("annotations"):
        _matching_profiles(metadata["annotations"], spec, errors)
    if spec.get("ephemeralContainers"):
        message = "ephemeral containers not allowed in pod template"
        errors.append(field_forbidden(f"{path}.spec.ephemeralContainers", message))


def create_pod_template(obj: Object, errors: Errors) -> None:
    validate_pod_template(obj.get("template") or {}, "template", errors)
