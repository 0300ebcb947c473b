"""Warnings about pods and pod templates. Pure; used by this package.

Source: pkg/api/pod/warnings.go, pkg/api/node/util.go, pkg/api/persistentvolumeclaim/util.go, pkg/registry/core/pod/strategy.go.
"""

from collections.abc import Iterator

from knarr.api import quantity
from knarr.api.types import Object
from knarr.api.validation.strings import label_value_errors
from knarr.api.warnings import addresses

_NODE_LABELS = {
    "beta.kubernetes.io/arch": 'deprecated since v1.14; use "kubernetes.io/arch" instead',
    "beta.kubernetes.io/os": 'deprecated since v1.14; use "kubernetes.io/os" instead',
    "failure-domain.beta.kubernetes.io/region": 'deprecated since v1.17; use "topology.kubernetes.io/region" instead',
    "failure-domain.beta.kubernetes.io/zone": 'deprecated since v1.17; use "topology.kubernetes.io/zone" instead',
    "beta.kubernetes.io/instance-type": 'deprecated since v1.17; use "node.kubernetes.io/instance-type" instead',
    "app.kubernetes.io/created-by": "deprecated since v1.9",
    "scheduler.alpha.kubernetes.io/preferAvoidPods": "deprecated since v1.22; use Taints and Tolerations instead",
    "node-role.kubernetes.io/master": 'use "node-role.kubernetes.io/control-plane" instead',
}
_ANNOTATIONS = {
    "scheduler.alpha.kubernetes.io/critical-pod": 'non-functional in v1.16+; use the "priorityClassName" field instead',
    "security.alpha.kubernetes.io/sysctls": 'non-functional in v1.11+; use the "sysctls" field instead',
    "security.alpha.kubernetes.io/unsafe-sysctls": 'non-functional in v1.11+; use the "sysctls" field instead',
}
VOLUMES = {
    "photonPersistentDisk": "deprecated in v1.11, non-functional in v1.16+",
    "gitRepo": "deprecated in v1.11, and disabled by default in v1.33+",
    "scaleIO": "deprecated in v1.16, non-functional in v1.22+",
    "flocker": "deprecated in v1.22, non-functional in v1.25+",
    "storageos": "deprecated in v1.22, non-functional in v1.25+",
    "quobyte": "deprecated in v1.22, non-functional in v1.25+",
    "glusterfs": "deprecated in v1.25, non-functional in v1.26+",
    "cephfs": "deprecated in v1.28, non-functional in v1.31+",
    "rbd": "deprecated in v1.28, non-functional in v1.31+",
}
_VOLUME_NAMES = {"storageos": "storageOS"}  # upstream's text does not spell the field
_SECCOMP_POD = "seccomp.security.alpha.kubernetes.io/pod"
_SECCOMP_CONTAINER = "container.seccomp.security.alpha.kubernetes.io/"
_APPARMOR_CONTAINER = "container.apparmor.security.beta.kubernetes.io/"
_APPARMOR_MESSAGE = 'deprecated since v1.30; use the "appArmorProfile" field instead'
_NULL_SELECTOR = "a null labelSelector results in matching no pod"


def of_node_label(key: str) -> str | None:
    """Return what to say about a node label, None when it is a current one."""
    return _NODE_LABELS.get(key)


def of_node_term(path: str, term: Object, check_values: bool = False) -> list[str]:
    """Return warnings for a term of a node selector."""
    warnings = []
    for index, expression in enumerate(term.get("matchExpressions") or ()):
        message = _NODE_LABELS.get(expression["key"])
        if message:
            warnings.append(f"{path}.matchExpressions[{index}].key: {expression['key']} is {message}")
        if check_values:
            for position, value in enumerate(expression.get("values") or ()):
                warnings += [
                    f"{path}.matchExpressions[{index}].values[{position}]: {value} is invalid, {message}"
                    for message in label_value_errors(value)
                ]
    return warnings


def of_amounts(path: str, amounts: Object | None, *names: str) -> list[str]:
    """Return warnings for bytes that are no whole number."""
    warnings = []
    for name in names:
        text = str((amounts or {}).get(name) or "0")
        if not text.isdigit() and text[-1] != "i" and quantity.milli_value(text) % 1000:
            warnings.append(f'{path}[{name}]: fractional byte value "{text}" is invalid, must be an integer')
    return warnings


def of_claim_spec(path: str, spec: Object) -> list[str]:
    """Return warnings for the spec of a PersistentVolumeClaim."""
    resources = spec.get("resources") or {}
    return of_amounts(f"{path}.resources.requests", resources.get("requests"), "storage") + of_amounts(
        f"{path}.resources.limits", resources.get("limits"), "storage"
    )


def of_template(path: str, template: Object | None) -> list[str]:
    """Return warnings for a pod (path "") or a template at path."""
    if not template:
        return []
    spec = template.get("spec") or {}
    annotations = (template.get("metadata") or {}).get("annotations") or {}
    start = path + "." if path else ""
    at = f"{start}spec"
    noted = f"{start}metadata.annotations"
    warnings = [f"{at}.nodeSelector[{key}]: {_NODE_LABELS[key]}" for key in spec.get("nodeSelector") or () if key in _NODE_LABELS]
    affinity = spec.get("affinity") or {}
    if affinity.get("nodeAffinity"):
        warnings += _of_node_affinity(f"{at}.affinity.nodeAffinity", affinity["nodeAffinity"])
    for index, constraint in enumerate(spec.get("topologySpreadConstraints") or ()):
        key = constraint.get("topologyKey") or ""
        if key in _NODE_LABELS:
            warnings.append(f"{at}.topologySpreadConstraints[{index}].topologyKey: {key} is {_NODE_LABELS[key]}")
        if constraint.get("labelSelector") is None:
            warnings.append(f"{at}.topologySpreadConstraints[{index}].labelSelector: {_NULL_SELECTOR}")
    if annotations:
        warnings += [f"{noted}[{key}]: {message}" for key, message in _ANNOTATIONS.items() if key in annotations]
    volumes = spec.get("volumes") or ()
    for index, volume in enumerate(volumes):
        warnings += _of_volume(f"{at}.volumes[{index}]", volume)
    for volume in volumes:
        warnings += _of_paths(volume)
    warnings += _of_lists(at, spec)
    warnings += of_amounts(f"{at}.overhead", spec.get("overhead"), "memory", "ephemeral-storage")
    security = spec.get("securityContext") or {}
    if _SECCOMP_POD in annotations and not security.get("seccompProfile"):
        warnings.append(f'{noted}[{_SECCOMP_POD}]: non-functional in v1.27+; use the "seccompProfile" field instead')
    for own, container in _containers(at, spec):
        if annotations:
            name, context = container.get("name") or "", container.get("securityContext") or {}
            if _SECCOMP_CONTAINER + name in annotations and not context.get("seccompProfile"):
                key = _SECCOMP_CONTAINER + name
                warnings.append(f'{noted}[{key}]: non-functional in v1.27+; use the "seccompProfile" field instead')
            key = _APPARMOR_CONTAINER + name
            if path and key in annotations and not context.get("appArmorProfile"):
                profile = _apparmor_profile(annotations[key])
                if profile is None or profile != security.get("appArmorProfile"):
                    warnings.append(f"{noted}[{key}]: {_APPARMOR_MESSAGE}")
        warnings += _of_container(own, container)
    warnings += _of_ports(at, spec)
    if (spec.get("terminationGracePeriodSeconds") or 0) < 0:
        warnings.append(f"{at}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1")
    for kind in ("podAffinity", "podAntiAffinity"):
        if affinity.get(kind):
            warnings += _of_pod_affinity(f"{at}.affinity.{kind}", affinity[kind])
    for index, server in enumerate((spec.get("dnsConfig") or {}).get("nameservers") or ()):
        warnings += addresses.of_ip(f"{at}.dnsConfig.nameservers[{index}]", server)
    for index, alias in enumerate(spec.get("hostAliases") or ()):
        warnings += addresses.of_ip(f"{at}.hostAliases[{index}].ip", alias.get("ip") or "")
    return warnings


def take_apparmor_annotations(pod: Object) -> list[str]:
    """Turn a new pod's AppArmor annotations into the fields they stand for (in place); return warnings about them."""
    spec, annotations = pod.get("spec") or {}, (pod.get("metadata") or {}).get("annotations")
    if not annotations or (spec.get("os") or {}).get("name") == "windows":
        return []
    warnings = []
    of_pod = (spec.get("securityContext") or {}).get("appArmorProfile")
    for _, container in _containers("spec", spec):
        key = f"{_APPARMOR_CONTAINER}{container.get('name') or ''}"
        if key not in annotations or (container.get("securityContext") or {}).get("appArmorProfile"):
            continue
        profile = _apparmor_profile(annotations[key])
        if profile is not None and profile != of_pod:
            container["securityContext"] = (container.get("securityContext") or {}) | {"appArmorProfile": profile}
        if profile is None or profile != of_pod:
            warnings.append(f"metadata.annotations[{key}]: {_APPARMOR_MESSAGE}")
    return warnings


def _apparmor_profile(annotation: str) -> Object | None:
    if annotation == "unconfined":
        return {"type": "Unconfined"}
    if annotation == "runtime/default":
        return {"type": "RuntimeDefault"}
    if annotation.startswith("localhost/") and annotation != "localhost/":
        return {"type": "Localhost", "localhostProfile": annotation.removeprefix("localhost/")}
    return None


def _containers(at: str, spec: Object) -> Iterator[tuple[str, Object]]:
    for key in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(key) or ()):
            yield f"{at}.{key}[{index}]", container


def _of_node_affinity(path: str, affinity: Object) -> list[str]:
    warnings: list[str] = []
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    own = f"{path}.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    for index, term in enumerate(required.get("nodeSelectorTerms") or ()):
        warnings += of_node_term(f"{own}[{index}]", term)
    own = f"{path}.preferredDuringSchedulingIgnoredDuringExecution"
    for index, preferred in enumerate(affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or ()):
        warnings += of_node_term(f"{own}[{index}].preference", preferred.get("preference") or {}, check_values=True)
    return warnings


def _of_pod_affinity(path: str, affinity: Object) -> list[str]:
    warnings = []
    for index, term in enumerate(affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or ()):
        if term.get("labelSelector") is None:
            warnings.append(f"{path}.requiredDuringSchedulingIgnoredDuringExecution[{index}].labelSelector: {_NULL_SELECTOR}")
    for index, weighted in enumerate(affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or ()):
        if (weighted.get("podAffinityTerm") or {}).get("labelSelector") is None:
            own = f"{path}.preferredDuringSchedulingIgnoredDuringExecution[{index}]"
            warnings.append(f"{own}.podAffinityTerm.labelSelector: {_NULL_SELECTOR}")
    return warnings


def _of_volume(path: str, volume: Object) -> list[str]:
    warnings = []
    for key in volume:
        if key in VOLUMES:
            warnings.append(f"{path}.{_VOLUME_NAMES.get(key, key)}: {VOLUMES[key]}")
    claim = (volume.get("ephemeral") or {}).get("volumeClaimTemplate")
    if claim:
        warnings += of_claim_spec(f"{path}.ephemeral.volumeClaimTemplate.spec", claim.get("spec") or {})
    return warnings


def _of_lists(at: str, spec: Object) -> list[str]:
    warnings = []
    aliases = spec.get("hostAliases") or ()
    seen: set[str] = set()
    for index, alias in enumerate(aliases):
        address = alias.get("ip") or ""
        if address in seen:
            warnings.append(f'{at}.hostAliases[{index}].ip: duplicate ip "{address}"')
        seen.add(address)
    secrets = spec.get("imagePullSecrets") or ()
    seen = set()
    for index, secret in enumerate(secrets):
        name = secret.get("name") or ""
        if name in seen:
            warnings.append(f'{at}.imagePullSecrets[{index}].name: duplicate name "{name}"')
        seen.add(name)
    for index, secret in enumerate(secrets):
        if not secret.get("name"):
            warnings.append(f'{at}.imagePullSecrets[{index}].name: invalid empty name ""')
    return warnings


def _of_container(path: str, container: Object) -> list[str]:
    warnings: list[str] = []
    resources = container.get("resources")
    if resources:
        for name in ("memory", "ephemeral-storage"):
            for key in ("limits", "requests"):
                if resources.get(key):
                    warnings += of_amounts(f"{path}.resources.{key}", resources[key], name)
    variables = container.get("env") or ()
    if len(variables) > 1:
        seen: set[str] = set()
        for index, variable in enumerate(variables):
            name = variable.get("name") or ""
            if name not in seen:
                seen.add(name)
                continue
            # A new value may build on the old one, anything else loses it.
            value, reference = variable.get("value") or "", f"$({name})"
            if variable.get("valueFrom") is not None or value == reference or reference not in value:
                warnings.append(f'{path}.env[{index}]: hides previous definition of "{name}", which may be dropped when using apply')
    return warnings


def _of_ports(at: str, spec: Object) -> list[str]:
    warnings: list[str] = []
    seen: dict[tuple[int, str], list[tuple[str, Object]]] = {}
    names: dict[str, str] = {}
    repeated: list[str] = []
    for own, container in _containers(at, spec):
        for index, port in enumerate(container.get("ports") or ()):
            path = f"{own}.ports[{index}]"
            host, host_port = port.get("hostIP") or "", port.get("hostPort") or 0
            if host and not host_port:
                shown = (
                    f"{{Name:{port.get('name') or ''} HostPort:0 ContainerPort:{port.get('containerPort') or 0} "
                    f"Protocol:{port.get('protocol') or ''} HostIP:{host}}}"
                )
                warnings.append(f"{path}: hostIP set without hostPort: {shown}")
            others = seen.setdefault((port.get("containerPort") or 0, port.get("protocol") or ""), [])
            for other_path, other in others:
                other_host, other_port = other.get("hostIP") or "", other.get("hostPort") or 0
                if host == other_host and host_port == other_port:
                    warnings.append(f"{path}: duplicate port definition with {other_path}")
                elif not host_port or not other_port:
                    warnings.append(f"{path}: overlapping port definition with {other_path}")
                elif host_port == other_port and (not host) != (not other_host):
                    warnings.append(f"{path}: dangerously ambiguous port definition with {other_path}")
            others.append((path, port))
            name = port.get("name")
            if name:
                first = names.setdefault(name, path)
                if first is not path:
                    repeated.append(
                        f'{path}: duplicate port name "{name}" with {first}, services and probes that select ports by name will use {first}'
                    )
    return warnings + repeated


# --- paths in volumes that hide each other ---------------------------------------------------------------------------


def _of_paths(volume: Object) -> list[str]:
    name = volume.get("name") or ""
    for key, label, field in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName"), ("downwardAPI", "DownwardAPI", "")):
        source = volume.get(key)
        if source and source.get("items"):
            described = f'{label} "{source.get(field) or ""}"' if field else label
            found = _overlaps([(item.get("path") or "", "") for item in source["items"]])
            return [f'volume "{name}" ({described}): overlapping paths: {overlap}' for overlap in found]
    projected = volume.get("projected")
    if not projected:
        return []
    warnings = []
    paths: list[tuple[str, str]] = []
    for source in projected.get("sources") or ():
        if not source:
            warnings.append(f'volume "{name}" (Projected) has no sources provided')
            continue
        paths += _projected_paths(source)
    return warnings + [f'volume "{name}" (Projected): overlapping paths: {overlap}' for overlap in _overlaps(paths)]


def _projected_paths(source: Object) -> list[tuple[str, str]]:
    for key, label in (("configMap", "ConfigMap"), ("secret", "Secret"), ("downwardAPI", "DownwardAPI")):
        given = source.get(key)
        if given and given.get("items"):
            described = label if key == "downwardAPI" else f'{label} "{given.get("name") or ""}"'
            return [(item.get("path") or "", described) for item in given["items"]]
    if source.get("serviceAccountToken"):
        return [(source["serviceAccountToken"].get("path") or "", "ServiceAccountToken")]
    bundle = source.get("clusterTrustBundle")
    if bundle:
        return [(bundle.get("path") or "", f'ClusterTrustBundle "{bundle.get("name") or bundle.get("signerName") or ""}"')]
    certificate = source.get("podCertificate") or {}
    labels = {"certificateChainPath": "chain", "keyPath": "key", "credentialBundlePath": "credential bundle"}
    return [(certificate[key], f"PodCertificate {label}") for key, label in labels.items() if certificate.get(key)]


def _overlaps(paths: list[tuple[str, str]]) -> list[str]:
    def shown(path: str, source: str) -> str:
        return f'"{path}" ({source})' if source else f'"{path}"'

    found = []
    seen: list[tuple[str, str]] = []
    for given, source in paths:
        path = given.rstrip("/")
        if path:
            for other, other_source in seen:
                if other and (f"{other}/".startswith(f"{path}/") or f"{path}/".startswith(f"{other}/")):
                    found.append(f"{shown(path, source)} with {shown(other, other_source)}")
        seen.append((path, source))
    return found
