"""The configuration of one container for the runtime: image, command, environment, mounts, limits, security.

Caller: pod_sync, just before a container is created. Everything is computed anew for every start, because sources change.
Source: pkg/kubelet/kuberuntime/kuberuntime_container.go generateContainerConfig, pkg/kubelet/kubelet_pods.go makeMounts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from knarr.api.types import Object
from knarr.kubelet import expansion, identity, images, podutil, resources, sandboxes, security
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.env import EnvContext, EnvError, container_env
from knarr.kubelet.lifecycle import HASH_ANNOTATION
from knarr.kubelet.resize import RESOURCES_ANNOTATION
from knarr.kubelet.status import IMAGE_ANNOTATION
from knarr.kubelet.volumes.model import MountedVolume
from knarr.kubelet.volumes.subpath_mounts import SubPathError, SubPaths
from knarr.runtime.cri import ContainerConfig, ContainerMetadata, Device, IDMapping, Image, Mount, MountPropagation

TERMINATION_PATH_ANNOTATION = "io.kubernetes.container.terminationMessagePath"
TERMINATION_POLICY_ANNOTATION = "io.kubernetes.container.terminationMessagePolicy"
GRACE_ANNOTATION = "io.kubernetes.pod.terminationGracePeriod"
PRE_STOP_ANNOTATION = "io.kubernetes.container.preStopHandler"
RESTART_COUNT_ANNOTATION = "io.kubernetes.container.restartCount"
PORTS_ANNOTATION = "io.kubernetes.container.ports"

_PROPAGATION: dict[str, MountPropagation] = {
    "None": "PRIVATE",
    "HostToContainer": "HOST_TO_CONTAINER",
    "Bidirectional": "BIDIRECTIONAL",
}


class ConfigError(Exception):
    """The container cannot be configured; becomes CreateContainerConfigError."""


@dataclass(slots=True)
class ContainerContext:
    """What a container's configuration depends on beside the pod."""

    config: KubeletConfig
    env: EnvContext
    volumes: Mapping[str, MountedVolume]
    subpaths: SubPaths
    memory_capacity_bytes: int
    group_oom: bool = False
    swap_accounting: bool = False
    extra_groups: Sequence[int] = ()
    mappings: list[IDMapping] | None = None
    devices: list[Device] = field(default_factory=list)
    device_mounts: list[Mount] = field(default_factory=list)
    device_env: dict[str, str] = field(default_factory=dict)
    device_annotations: dict[str, str] = field(default_factory=dict)
    cdi_devices: list[str] = field(default_factory=list)
    cpuset: str = ""
    mems: str = ""
    exclusive: bool = False
    """The CPUs of `cpuset` are this container's alone."""


async def container_config(
    pod: Object, container: Object, image: Image, attempt: int, context: ContainerContext, *, target_id: str = ""
) -> ContainerConfig:
    """Make the configuration, and on disk what it needs (log folder, hosts file, termination log, subPath mounts).

    Raises:
      ConfigError: with the message that the container's state shows.
    """
    try:
        env = await container_env(pod, container, context.env)
        secure = security.container_security(
            pod,
            container,
            image,
            root_dir=context.config.root_dir,
            seccomp_default=context.config.seccomp_default,
            extra_groups=context.extra_groups,
            mappings=context.mappings,
            target_id=target_id,
        )
        env = {**env, **context.device_env}
        mounts = _volume_mounts(pod, container, env, context) + context.device_mounts
    except (EnvError, security.SecurityError, SubPathError, expansion.UndefinedVariable, ValueError) as e:
        raise ConfigError(str(e)) from e
    config, name = context.config, container["name"]
    pod_dir = os.path.join(config.pods_dir, podutil.uid(pod))
    _add_hosts(pod, context, mounts, pod_dir)
    if container.get("terminationMessagePath"):
        mounts.append(Mount(container["terminationMessagePath"], _termination_log(pod_dir, name)))
    os.makedirs(os.path.join(sandboxes.log_directory(config, pod), name), 0o755, exist_ok=True)
    lookup = expansion.mapping(env)
    limits = resources.container_limits(
        pod, container, context.memory_capacity_bytes, enforce_cpu=config.enforce_cpu_limits and not context.exclusive, group_oom=context.group_oom
    )
    limits.cpuset_cpus, limits.cpuset_mems = context.cpuset, context.mems
    if context.swap_accounting and limits.memory_limit_bytes:
        limits.memory_swap_limit_bytes = limits.memory_limit_bytes
    return ContainerConfig(
        metadata=ContainerMetadata(name, attempt),
        image=image.id,
        command=[expansion.expand(w, lookup) for w in container.get("command") or []],
        args=[expansion.expand(w, lookup) for w in container.get("args") or []],
        working_dir=container.get("workingDir") or "",
        env=list(env.items()),
        mounts=mounts,
        devices=list(context.devices),
        labels=_labels(pod, container),
        annotations=_annotations(pod, container, attempt, context),
        log_path=f"{name}/{attempt}.log",
        stdin=bool(container.get("stdin")),
        stdin_once=bool(container.get("stdinOnce")),
        tty=bool(container.get("tty")),
        resources=limits,
        security=secure,
        stop_signal=(container.get("lifecycle") or {}).get("stopSignal") or "",
        cdi_devices=list(context.cdi_devices),
    )


def _labels(pod: Object, container: Object) -> dict[str, str]:
    meta = pod["metadata"]
    return {
        podutil.POD_NAME_LABEL: meta["name"],
        podutil.POD_NAMESPACE_LABEL: meta.get("namespace", ""),
        podutil.POD_UID_LABEL: meta["uid"],
        podutil.CONTAINER_NAME_LABEL: container["name"],
    }


def _annotations(pod: Object, container: Object, attempt: int, context: ContainerContext) -> dict[str, str]:
    """Enough to stop the container and report its end when the pod object is gone."""
    out = {
        **context.device_annotations,
        HASH_ANNOTATION: podutil.container_hash(container),
        RESTART_COUNT_ANNOTATION: str(attempt),
        TERMINATION_PATH_ANNOTATION: container.get("terminationMessagePath") or "",
        TERMINATION_POLICY_ANNOTATION: container.get("terminationMessagePolicy") or "File",
        RESOURCES_ANNOTATION: orjson.dumps(container.get("resources") or {}).decode(),
        IMAGE_ANNOTATION: images.normalize(container["image"]) if container.get("image") else "",
    }
    grace = pod["spec"].get("terminationGracePeriodSeconds")
    if grace is not None:
        out[GRACE_ANNOTATION] = str(grace)
    hook = (container.get("lifecycle") or {}).get("preStop")
    if hook:
        out[PRE_STOP_ANNOTATION] = orjson.dumps(hook).decode()
    if container.get("ports"):
        out[PORTS_ANNOTATION] = orjson.dumps(container["ports"]).decode()
    return out


def _termination_log(pod_dir: str, name: str) -> str:
    """A fresh file that every user of the container may write."""
    folder = os.path.join(pod_dir, "containers", name)
    os.makedirs(folder, 0o750, exist_ok=True)
    path = os.path.join(folder, secrets.token_hex(4))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.fchmod(fd, 0o666)
    os.close(fd)
    return path


def _add_hosts(pod: Object, context: ContainerContext, mounts: list[Mount], pod_dir: str) -> None:
    """Mount the hosts file unless the container brings its own."""
    ips = context.env.ips
    if not (podutil.host_network(pod) or ips) or any(m.container_path == "/etc/hosts" for m in mounts):
        return
    content = identity.hosts_file(pod, ips, context.config.cluster_domain)
    mounts.append(Mount("/etc/hosts", identity.write_hosts_file(pod_dir, content)))


def _volume_mounts(pod: Object, container: Object, env: Mapping[str, str], context: ContainerContext) -> list[Mount]:
    out = []
    for index, mount in enumerate(container.get("volumeMounts") or []):
        volume = context.volumes.get(mount["name"])
        if volume is None:
            raise ConfigError(f'cannot find volume "{mount["name"]}" to mount into container "{container["name"]}"')
        sub_path = mount.get("subPath") or ""
        if mount.get("subPathExpr"):
            sub_path = expansion.expand(mount["subPathExpr"], expansion.strict(env))
        path = mount["mountPath"]
        readonly = bool(mount.get("readOnly"))
        result = Mount(
            path if path.startswith("/") else "/" + path,
            readonly=readonly or volume.read_only,
            recursive_read_only=readonly and mount.get("recursiveReadOnly") in ("Enabled", "IfPossible"),
            propagation=_PROPAGATION.get(mount.get("mountPropagation") or "None", "PRIVATE"),
        )
        if volume.image:
            result.image, result.image_sub_path = volume.image, sub_path
        elif sub_path:
            result.host_path = context.subpaths.prepare(podutil.uid(pod), container["name"], index, volume, sub_path, mount["name"])
        else:
            result.host_path = volume.path
        out.append(result)
    for device in container.get("volumeDevices") or []:
        volume = context.volumes.get(device["name"])
        if volume is None or not volume.block:
            raise ConfigError(f'cannot find volume "{device["name"]}" to pass into container "{container["name"]}"')
        context.devices.append(Device(device["devicePath"], volume.path, "r" if volume.read_only else "mrw"))
    return out
