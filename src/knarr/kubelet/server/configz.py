"""GET /configz: the kubelet's configuration as upstream shows it. Caller: server.server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from knarr.http.server import Request
from knarr.kubelet.durations import go_duration
from knarr.kubelet.garbage import LOG_PERIOD_SECONDS
from knarr.kubelet.node_status import MAX_IMAGES

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Answer with the settings in force."""
    c = kubelet.config
    body = {
        "kind": "KubeletConfiguration",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "enableServer": bool(c.serving_cert),
        "staticPodPath": c.static_pod_path,
        "podLogsDir": c.logs_dir,
        "address": c.bind_address,
        "port": c.port,
        "tlsCertFile": c.serving_cert,
        "tlsPrivateKeyFile": c.serving_key,
        "enableDebuggingHandlers": True,
        "enableSystemLogHandler": True,
        "enableControllerAttachDetach": True,
        "seccompDefault": c.seccomp_default,
        "localStorageCapacityIsolation": True,
        "nodeStatusMaxImages": MAX_IMAGES,
        "containerLogMonitorInterval": go_duration(LOG_PERIOD_SECONDS),
        "containerLogMaxWorkers": 1,
        "authentication": {"x509": {"clientCAFile": c.client_ca}, "webhook": {"enabled": True}, "anonymous": {"enabled": c.anonymous_auth}},
        "authorization": {"mode": c.authorization_mode},
        "clusterDomain": c.cluster_domain,
        "clusterDNS": list(c.cluster_dns),
        "nodeStatusUpdateFrequency": go_duration(c.node_status_interval_seconds),
        "nodeStatusReportFrequency": go_duration(c.node_status_report_seconds),
        "nodeLeaseDurationSeconds": c.lease_duration_seconds,
        "imageMinimumGCAge": go_duration(c.image_minimum_gc_age_seconds),
        "imageMaximumGCAge": go_duration(c.image_maximum_gc_age_seconds),
        "imageGCHighThresholdPercent": c.image_gc_high_threshold_percent,
        "imageGCLowThresholdPercent": c.image_gc_low_threshold_percent,
        "cgroupRoot": c.cgroup_root,
        "cgroupsPerQOS": c.cgroups_per_qos,
        "cgroupDriver": "cgroupfs",
        "cpuManagerPolicy": c.cpu_manager_policy,
        "cpuManagerPolicyOptions": dict.fromkeys(c.cpu_manager_options, "true"),
        "memoryManagerPolicy": c.memory_manager_policy,
        "topologyManagerPolicy": c.topology_manager_policy,
        "topologyManagerScope": c.topology_manager_scope,
        "reservedSystemCPUs": c.reserved_system_cpus,
        "maxPods": c.max_pods,
        "podPidsLimit": c.pod_pids_limit or -1,
        "resolvConf": c.resolv_conf,
        "cpuCFSQuota": c.enforce_cpu_limits,
        "cpuCFSQuotaPeriod": "100ms",
        "evictionHard": c.eviction.hard,
        "evictionSoft": c.eviction.soft,
        "evictionMinimumReclaim": c.eviction.minimum_reclaim,
        "evictionPressureTransitionPeriod": go_duration(c.eviction.pressure_transition_period_seconds),
        "containerLogMaxSize": str(c.container_log_max_size_bytes),
        "containerLogMaxFiles": c.container_log_max_files,
        "configMapAndSecretChangeDetectionStrategy": "Watch",
        "systemReserved": c.system_reserved,
        "kubeReserved": c.kube_reserved,
        "enforceNodeAllocatable": list(c.enforce_node_allocatable),
        "allowedUnsafeSysctls": list(c.allowed_unsafe_sysctls),
        "serializeImagePulls": c.max_parallel_image_pulls == 1,
        "maxParallelImagePulls": c.max_parallel_image_pulls,
        "shutdownGracePeriod": go_duration(c.shutdown_grace_period_seconds),
        "shutdownGracePeriodCriticalPods": go_duration(c.shutdown_grace_period_critical_seconds),
        "shutdownGracePeriodByPodPriority": [{"priority": p, "shutdownGracePeriodSeconds": int(s)} for p, s in c.shutdown_grace_period_by_priority],
        "crashLoopBackOff": {"maxContainerRestartPeriod": go_duration(c.crash_loop_max_seconds)},
        "registerNode": c.register_node,
        "failSwapOn": False,
        "failCgroupV1": False,
    }
    request.respond(200, [("Content-Type", "application/json")], orjson.dumps({"kubeletconfig": body}))
