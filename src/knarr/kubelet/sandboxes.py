"""The configuration of a pod's sandbox. Pure but for the host's resolv.conf.

Caller: pod_sync. Source: pkg/kubelet/kuberuntime/kuberuntime_sandbox.go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from knarr.api.types import Object
from knarr.kubelet import identity, podutil, resources, security
from knarr.kubelet.config import KubeletConfig
from knarr.runtime.cri import IDMapping, LinuxResources, PodSandboxConfig, PodSandboxMetadata, PortMapping, SeccompProfile

_INTERNAL_ANNOTATIONS = ("kubernetes.io/config.seen", "kubernetes.io/config.source")


def log_directory(config: KubeletConfig, pod: Object) -> str:
    """Where the runtime writes the logs of this pod's containers."""
    meta = pod["metadata"]
    return os.path.join(config.logs_dir, f"{meta.get('namespace', '')}_{meta['name']}_{meta['uid']}")


def sandbox_config(
    pod: Object,
    config: KubeletConfig,
    attempt: int,
    cgroup_parent: str,
    *,
    extra_groups: Sequence[int] = (),
    mappings: list[IDMapping] | None = None,
) -> tuple[PodSandboxConfig, list[str]]:
    """Make the configuration; the second part are notes about cut resolver settings, for events.

    Raises:
      identity.IdentityError: no host name can be made.
    """
    meta, spec = pod["metadata"], pod["spec"]
    dns, notes = identity.pod_dns(pod, config)
    context = spec.get("securityContext") or {}
    labels = {
        **(meta.get("labels") or {}),
        podutil.POD_NAME_LABEL: meta["name"],
        podutil.POD_NAMESPACE_LABEL: meta.get("namespace", ""),
        podutil.POD_UID_LABEL: meta["uid"],
    }
    ports = []
    for container in (*podutil.containers(pod), *(c for c in podutil.init_containers(pod) if podutil.is_sidecar(c))):
        for port in container.get("ports") or []:
            if port.get("hostPort"):
                protocol = port.get("protocol") or "TCP"
                ports.append(PortMapping(protocol, port["containerPort"], port["hostPort"], port.get("hostIP") or ""))
    overhead = resources.amount({"requests": spec.get("overhead") or {}}, "requests", "memory")
    out = PodSandboxConfig(
        metadata=PodSandboxMetadata(meta["name"], meta["uid"], meta.get("namespace", ""), attempt),
        hostname="" if podutil.host_network(pod) else identity.kernel_host_name(pod, config.cluster_domain),
        log_directory=log_directory(config, pod),
        dns=dns,
        port_mappings=[] if podutil.host_network(pod) else ports,
        labels=labels,
        annotations=dict(meta.get("annotations") or {}),
        cgroup_parent=cgroup_parent,
        sysctls={s["name"].replace("/", "."): str(s.get("value", "")) for s in context.get("sysctls") or []},
        namespaces=security.namespaces(pod, mappings),
        privileged=any((c.get("securityContext") or {}).get("privileged") for c in podutil.all_containers(pod)),
        seccomp=SeccompProfile("RuntimeDefault"),
        run_as_user=context.get("runAsUser"),
        run_as_group=context.get("runAsGroup"),
        supplemental_groups=security.supplemental_groups(pod, extra_groups),
        overhead=LinuxResources(memory_limit_bytes=overhead) if overhead else None,
        resources=resources.pod_cgroup_limits(pod, enforce_cpu=config.enforce_cpu_limits),
    )
    return out, notes
