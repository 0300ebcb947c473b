"""Security context of a pod and a container, put together for the runtime. Pure.

Caller: containers, sandboxes. Container settings win over the pod's.
Source: pkg/kubelet/kuberuntime/security_context.go, pkg/securitycontext, kuberuntime/helpers.go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.runtime.cri import ContainerSecurity, IDMapping, Image, NamespaceOptions, SeccompProfile


class SecurityError(Exception):
    """The container may not run so; becomes CreateContainerConfigError."""


def _effective(pod: Object, container: Object, name: str) -> Any:
    own = (container.get("securityContext") or {}).get(name)
    return own if own is not None else (pod["spec"].get("securityContext") or {}).get(name)


def namespaces(pod: Object, mappings: list[IDMapping] | None = None, target_id: str = "") -> NamespaceOptions:
    """Which namespaces a pod shares with the host, or its containers with each other."""
    spec = pod["spec"]
    if target_id:
        pid: Any = "TARGET"
    elif spec.get("hostPID"):
        pid = "NODE"
    else:
        pid = "POD" if spec.get("shareProcessNamespace") else "CONTAINER"
    return NamespaceOptions(
        network="NODE" if spec.get("hostNetwork") else "POD",
        pid=pid,
        ipc="NODE" if spec.get("hostIPC") else "POD",
        target_id=target_id,
        user_mappings=mappings,
    )


def supplemental_groups(pod: Object, extra: Sequence[int] = ()) -> list[int]:
    """Groups that every process of the pod has, in upstream's order."""
    context = pod["spec"].get("securityContext") or {}
    groups = [context["fsGroup"]] if context.get("fsGroup") is not None else []
    groups += [g for g in extra if g not in groups]
    groups += list(context.get("supplementalGroups") or [])
    return groups


def verify_non_root(pod: Object, container: Object, image: Image) -> None:
    """Hold a container to runAsNonRoot.

    Raises:
      SecurityError: it would, or might, run as root.
    """
    if not _effective(pod, container, "runAsNonRoot"):
        return
    where = f'(pod: "{podutil.full_name(pod)}", container: {container["name"]})'
    user = _effective(pod, container, "runAsUser")
    if user is not None:
        if user == 0:
            raise SecurityError(f"container's runAsUser breaks non-root policy {where}")
        return
    if image.uid is None and image.username:
        raise SecurityError(
            f"container has runAsNonRoot and image has non-numeric user ({image.username}), cannot verify user is non-root {where}"
        )
    if not image.uid:
        raise SecurityError(f"container has runAsNonRoot and image will run as root {where}")


def seccomp(profile: Object | None, root_dir: str, *, default: bool) -> SeccompProfile:
    """Translate a seccompProfile; none means Unconfined unless the node defaults to RuntimeDefault.

    Raises:
      SecurityError: Localhost without a file.
    """
    if not profile:
        return SeccompProfile("RuntimeDefault" if default else "Unconfined")
    kind = profile.get("type")
    if kind == "Localhost":
        name = profile.get("localhostProfile")
        if not name:
            raise SecurityError("localhostProfile must be set if seccompProfile type is Localhost.")
        return SeccompProfile("Localhost", os.path.join(root_dir, "seccomp", name))
    return SeccompProfile("RuntimeDefault" if kind == "RuntimeDefault" else "Unconfined")


def host_has_selinux() -> bool:
    """Whether the kernel enforces or at least knows SELinux labels."""
    return os.path.exists("/sys/fs/selinux/enforce")


def host_has_apparmor() -> bool:
    """Whether the kernel confines by AppArmor profiles."""
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="ascii") as file:
            return file.read().startswith("Y")
    except OSError:
        return False


def _selinux_label(options: Object) -> str:
    """user:role:type:level; nothing on a host without SELinux, where options are accepted and have no effect."""
    if not any(options.values()) or not host_has_selinux():
        return ""
    return ":".join(options.get(k, "") for k in ("user", "role", "type", "level"))


def container_security(
    pod: Object,
    container: Object,
    image: Image,
    *,
    root_dir: str,
    seccomp_default: bool,
    extra_groups: Sequence[int] = (),
    mappings: list[IDMapping] | None = None,
    target_id: str = "",
) -> ContainerSecurity:
    """Make the security part of a container's configuration.

    Raises:
      SecurityError: the container may not run so.
    """
    verify_non_root(pod, container, image)
    own = container.get("securityContext") or {}
    shared = pod["spec"].get("securityContext") or {}
    privileged = bool(own.get("privileged"))
    capabilities = own.get("capabilities") or {}
    user = _effective(pod, container, "runAsUser")
    username = ""
    if user is None:
        user, username = image.uid, image.username if image.uid is None else ""
    apparmor = _effective(pod, container, "appArmorProfile") or {}
    selinux = _effective(pod, container, "seLinuxOptions") or {}
    out = ContainerSecurity(
        run_as_user=user,
        run_as_username=username,
        run_as_group=_effective(pod, container, "runAsGroup"),
        supplemental_groups=supplemental_groups(pod, extra_groups),
        supplemental_groups_policy="Strict" if shared.get("supplementalGroupsPolicy") == "Strict" else "Merge",
        privileged=privileged,
        readonly_rootfs=bool(own.get("readOnlyRootFilesystem")),
        no_new_privs=own.get("allowPrivilegeEscalation") is False,
        add_capabilities=list(capabilities.get("add") or []),
        drop_capabilities=list(capabilities.get("drop") or []),
        apparmor_profile=(apparmor.get("localhostProfile") or apparmor.get("type") or "") if host_has_apparmor() else "",
        selinux_label=_selinux_label(selinux),
        namespaces=namespaces(pod, mappings, target_id),
    )
    profile = own.get("seccompProfile") or shared.get("seccompProfile")
    out.seccomp = SeccompProfile() if privileged else seccomp(profile, root_dir, default=seccomp_default)
    if privileged or own.get("procMount") == "Unmasked":
        out.masked_paths, out.readonly_paths = [], []
    return out
