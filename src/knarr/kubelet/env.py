"""The environment of a container: services, envFrom, env with all its sources, $(VAR) expansion.

Caller: containers. Order of precedence, lowest first: service variables, envFrom in order, env in order.
Source: pkg/kubelet/kubelet_pods.go makeEnvironmentVariables, pkg/kubelet/envvars.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from knarr.api import errors
from knarr.api.resources import CONFIG_MAPS, SECRETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.kubelet import downward, envfile, expansion, podutil
from knarr.kubelet.objects import ReferencedObjects


class EnvError(Exception):
    """The environment cannot be made; becomes CreateContainerConfigError."""


@dataclass(slots=True)
class EnvContext:
    """What the environment of one container is made from, beside its spec."""

    objects: ReferencedObjects
    services: Iterable[Object]
    """Services of the pod's namespace and of "default"."""
    ips: Sequence[str] = ()
    host_ips: Sequence[str] = ()
    allocatable: Mapping[str, str] = field(default_factory=dict)
    volume_paths: Mapping[str, str] = field(default_factory=dict)


async def container_env(pod: Object, container: Object, context: EnvContext) -> dict[str, str]:
    """Make the environment.

    Raises:
      EnvError: a source that is not optional is missing.
    """
    namespace = pod["metadata"].get("namespace", "")
    links = pod["spec"].get("enableServiceLinks") is not False
    service_env = service_variables(context.services, namespace, links=links)
    values: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        prefix = source.get("prefix") or ""
        values.update({prefix + key: text for key, text in (await _env_from(pod, source, context)).items()})
    lookup = expansion.mapping(values, service_env)
    for entry in container.get("env") or []:
        raw = entry.get("value")
        if raw:
            value: str | None = expansion.expand(raw, lookup)
        elif entry.get("valueFrom"):
            value = await _value_from(pod, container, entry["valueFrom"], context)
        else:
            value = ""
        if value is not None:
            values[entry["name"]] = value
    return {**service_env, **values}


async def _load(pod: Object, resource: Resource, name: str, context: EnvContext, *, optional: bool) -> Object | None:
    try:
        return await context.objects.get(resource, pod["metadata"].get("namespace", ""), name, podutil.uid(pod))
    except errors.StatusError as e:
        if optional and errors.is_not_found(e):
            return None
        raise EnvError(e.message) from e


def _secret_text(secret: Object) -> dict[str, str]:
    data = secret.get("data") or {}
    return {k: base64.b64decode(v or "").decode(errors="surrogateescape") for k, v in data.items()}


async def _env_from(pod: Object, source: Object, context: EnvContext) -> Mapping[str, str]:
    if "configMapRef" in source:
        reference = source["configMapRef"]
        found = await _load(pod, CONFIG_MAPS, reference.get("name", ""), context, optional=bool(reference.get("optional")))
        return (found or {}).get("data") or {}
    if "secretRef" in source:
        reference = source["secretRef"]
        found = await _load(pod, SECRETS, reference.get("name", ""), context, optional=bool(reference.get("optional")))
        return _secret_text(found) if found else {}
    return {}


async def _value_from(pod: Object, container: Object, source: Object, context: EnvContext) -> str | None:
    """The value, None when an optional source is missing (the variable is then not set)."""
    try:
        if source.get("fieldRef"):
            return downward.field(pod, source["fieldRef"]["fieldPath"], ips=context.ips, host_ips=context.host_ips)
        if source.get("resourceFieldRef"):
            return downward.resource(pod, container, source["resourceFieldRef"], context.allocatable)
    except downward.DownwardError as e:
        raise EnvError(str(e)) from e
    namespace = pod["metadata"].get("namespace", "")
    for kind, resource, word in (("configMapKeyRef", CONFIG_MAPS, "ConfigMap"), ("secretKeyRef", SECRETS, "Secret")):
        reference = source.get(kind)
        if not reference:
            continue
        optional = bool(reference.get("optional"))
        found = await _load(pod, resource, reference.get("name", ""), context, optional=optional)
        if found is None:
            return None
        data = _secret_text(found) if resource is SECRETS else (found.get("data") or {})
        if reference["key"] in data:
            return data[reference["key"]]
        if optional:
            return None
        raise EnvError(f"couldn't find key {reference['key']} in {word} {namespace}/{reference.get('name', '')}")
    if source.get("fileKeyRef"):
        return _from_file(source["fileKeyRef"], context)
    return ""


def _from_file(reference: Object, context: EnvContext) -> str | None:
    root = context.volume_paths.get(reference["volumeName"])
    if root is None:
        raise EnvError(f'cannot find the volume "{reference["volumeName"]}" referenced by FileKeyRef')
    key = reference["key"]
    if len(key) > 128:
        raise EnvError(f'environment variable key "{key}" exceeds maximum length of 128 characters')
    try:
        value = envfile.read(root, reference["path"], key)
    except (OSError, envfile.EnvFileError) as e:
        raise EnvError("couldn't parse env file") from e
    if len(value) > 32 * 1024:
        raise EnvError(f'environment variable value for key "{key}" exceeds maximum size of 32KB')
    if not value:
        if reference.get("optional"):
            return None
        raise EnvError(f'environment variable key "{key}" not found in file "{os.path.join(root, reference["path"])}"')
    return value


def service_variables(services: Iterable[Object], namespace: str, *, links: bool) -> dict[str, str]:
    """Variables of the services that a pod in this namespace sees; the API's own service always."""
    seen: dict[str, Object] = {}
    for service in services:
        meta, spec = service["metadata"], service.get("spec") or {}
        address = spec.get("clusterIP")
        if not address or address == "None" or not spec.get("ports"):
            continue
        name = meta["name"]
        if meta.get("namespace") == "default" and name == "kubernetes":
            seen.setdefault(name, service)
        elif links and meta.get("namespace") == namespace:
            seen[name] = service
    out: dict[str, str] = {}
    for service in seen.values():
        out.update(_variables_of(service))
    return out


def _variables_of(service: Object) -> dict[str, str]:
    prefix = service["metadata"]["name"].replace("-", "_").upper()
    address = service["spec"]["clusterIP"]
    host = f"[{address}]" if ":" in address else address
    ports = service["spec"]["ports"]
    out = {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(ports[0]["port"])}
    for port in ports:
        if port.get("name"):
            out[f"{prefix}_SERVICE_PORT_{port['name'].replace('-', '_').upper()}"] = str(port["port"])
    for index, port in enumerate(ports):
        protocol = port.get("protocol") or "TCP"
        url = f"{protocol.lower()}://{host}:{port['port']}"
        if index == 0:
            out[f"{prefix}_PORT"] = url
        base = f"{prefix}_PORT_{port['port']}_{protocol.upper()}"
        out[base] = url
        out[base + "_PROTO"] = protocol.lower()
        out[base + "_PORT"] = str(port["port"])
        out[base + "_ADDR"] = address
    return out
