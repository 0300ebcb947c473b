"""A KubeletConfiguration file (kubelet.config.k8s.io/v1beta1) as settings of this kubelet. Pure.

Callers: the cluster's node process (file of `--kubelet-config`), and `knarr up` to refuse a bad file at once. Fields that upstream
has and that have nothing to act on here are taken and named by `load`, so that a file written for another node serves; a field
that upstream does not have is an error, as in upstream's strict decoding.
Source: staging kubelet/config/v1beta1/types.go, pkg/kubelet/apis/config/validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from knarr.api import quantity, times, yamldoc
from knarr.kubelet.affinity import hints
from knarr.kubelet.affinity.cpus import OPTIONS
from knarr.kubelet.affinity.machine import parse_cpus
from knarr.kubelet.config import SIGNALS, EvictionConfig, KubeletConfig
from knarr.kubelet.credentials import records

API_VERSION, KIND = "kubelet.config.k8s.io/v1beta1", "KubeletConfiguration"


class ConfigFileError(Exception):
    """The file cannot be used; the text names the field."""


Values = dict[str, Any]


def _seconds(value: Any) -> float:
    if not isinstance(value, str):
        raise ValueError("must be a duration such as 30s")
    return times.parse_duration(value) / 1e9


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list")
    return tuple(_text(item) for item in value)


def _map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("must be a map")
    return {str(key): str(item) for key, item in value.items()}


def _quantities(value: Any) -> dict[str, str]:
    found = _map(value)
    for item in found.values():
        quantity.parse(item)
    return found


def _thresholds(value: Any) -> dict[str, str]:
    found = _map(value)
    for signal, item in found.items():
        if signal not in SIGNALS:
            raise ValueError(f"unknown eviction signal {signal!r}")
        if item.endswith("%"):
            if not 0 <= float(item[:-1]) <= 100:
                raise ValueError(f"{signal} must be between 0% and 100%")
        elif quantity.parse(item) < 0:
            raise ValueError(f"{signal} must not be negative")
    return found


def _one_of(*names: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return str(value)

    return check


def _bytes(value: Any) -> int:
    return quantity.value(_text(value))


def _pids(value: Any) -> int:
    return max(0, _whole(value))


def _cpus(value: Any) -> str:
    parse_cpus(_text(value))
    return str(value)


def _enforcements(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    for name in found:
        if name not in _ENFORCEMENTS:
            raise ValueError(f"{name!r} is none of {', '.join(_ENFORCEMENTS)}")
    return () if "none" in found else found


def _image_patterns(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    for pattern in found:
        records.check_pattern(pattern)
    return found


def _cpu_options(value: Any) -> tuple[str, ...]:
    found = _map(value)
    for name in found:
        if name not in OPTIONS:
            raise ValueError(f"option {name!r} is not supported here (known: {', '.join(OPTIONS)})")
    return tuple(name for name, item in found.items() if item.lower() == "true")


def _reserved_memory(value: Any) -> dict[int, dict[str, int]]:
    if not isinstance(value, list):
        raise ValueError("must be a list")
    return {_whole(item["numaNode"]): {kind: quantity.value(amount) for kind, amount in _map(item["limits"]).items()} for item in value}


def _priorities(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list")
    found = [(_whole(item["priority"]), float(_whole(item["shutdownGracePeriodSeconds"]))) for item in value]
    return tuple(sorted(found))


_ENFORCEMENTS = ("none", "pods", "system-reserved", "kube-reserved", "system-reserved-compressible", "kube-reserved-compressible")
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "staticPodPath": ("static_pod_path", _text),
    "podLogsDir": ("pod_logs_dir", _text),
    "clusterDomain": ("cluster_domain", _text),
    "clusterDNS": ("cluster_dns", _texts),
    "nodeStatusUpdateFrequency": ("node_status_interval_seconds", _seconds),
    "nodeStatusReportFrequency": ("node_status_report_seconds", _seconds),
    "nodeLeaseDurationSeconds": ("lease_duration_seconds", _whole),
    "imageMinimumGCAge": ("image_minimum_gc_age_seconds", _seconds),
    "imageMaximumGCAge": ("image_maximum_gc_age_seconds", _seconds),
    "imageGCHighThresholdPercent": ("image_gc_high_threshold_percent", _whole),
    "imageGCLowThresholdPercent": ("image_gc_low_threshold_percent", _whole),
    "cgroupsPerQOS": ("cgroups_per_qos", _flag),
    "cpuManagerPolicy": ("cpu_manager_policy", _one_of("none", "static")),
    "cpuManagerPolicyOptions": ("cpu_manager_options", _cpu_options),
    "memoryManagerPolicy": ("memory_manager_policy", _one_of("None", "Static")),
    "reservedMemory": ("reserved_memory", _reserved_memory),
    "topologyManagerPolicy": ("topology_manager_policy", _one_of(*hints.POLICIES)),
    "topologyManagerScope": ("topology_manager_scope", _one_of(*hints.SCOPES)),
    "maxPods": ("max_pods", _whole),
    "podPidsLimit": ("pod_pids_limit", _pids),
    "resolvConf": ("resolv_conf", _text),
    "cpuCFSQuota": ("enforce_cpu_limits", _flag),
    "maxParallelImagePulls": ("max_parallel_image_pulls", _whole),
    "containerLogMaxSize": ("container_log_max_size_bytes", _bytes),
    "containerLogMaxFiles": ("container_log_max_files", _whole),
    "systemReserved": ("system_reserved", _quantities),
    "kubeReserved": ("kube_reserved", _quantities),
    "enforceNodeAllocatable": ("enforce_node_allocatable", _enforcements),
    "systemReservedCgroup": ("system_reserved_cgroup", _text),
    "kubeReservedCgroup": ("kube_reserved_cgroup", _text),
    "reservedSystemCPUs": ("reserved_system_cpus", _cpus),
    "allowedUnsafeSysctls": ("allowed_unsafe_sysctls", _texts),
    "providerID": ("provider_id", _text),
    "shutdownGracePeriod": ("shutdown_grace_period_seconds", _seconds),
    "shutdownGracePeriodCriticalPods": ("shutdown_grace_period_critical_seconds", _seconds),
    "shutdownGracePeriodByPodPriority": ("shutdown_grace_period_by_priority", _priorities),
    "seccompDefault": ("seccomp_default", _flag),
    "imagePullCredentialsVerificationPolicy": ("image_verification_policy", _one_of(*records.POLICIES)),
    "preloadedImagesVerificationAllowlist": ("image_verification_allowlist", _image_patterns),
    "registerNode": ("register_node", _flag),
}
_EVICTION: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "evictionSoft": ("soft", _thresholds),
    "evictionSoftGracePeriod": ("soft_grace_period_seconds", lambda value: {key: _seconds(item) for key, item in _map(value).items()}),
    "evictionPressureTransitionPeriod": ("pressure_transition_period_seconds", _seconds),
    "evictionMinimumReclaim": ("minimum_reclaim", _thresholds),
    "evictionMaxPodGracePeriod": ("max_pod_grace_period_seconds", _whole),
}
_HANDLED = ("apiVersion", "kind", "evictionHard", "mergeDefaultEvictionSettings", "serializeImagePulls", "registerWithTaints", "crashLoopBackOff", "authentication", "authorization")
_IDLE = frozenset(
    """enableServer syncFrequency fileCheckFrequency httpCheckFrequency staticPodURL staticPodURLHeader address port readOnlyPort
    tlsCertFile tlsPrivateKeyFile tlsCipherSuites tlsMinVersion rotateCertificates serverTLSBootstrap registryPullQPS registryBurst
    eventRecordQPS eventBurst enableDebuggingHandlers
    enableContentionProfiling healthzPort healthzBindAddress oomScoreAdj streamingConnectionIdleTimeout
    volumeStatsAggPeriod kubeletCgroups systemCgroups cgroupRoot cgroupDriver singleProcessOOMKill cpuManagerReconcilePeriod
    topologyManagerPolicyOptions qosReserved runtimeRequestTimeout hairpinMode podCIDR runOnce cpuCFSQuotaPeriod nodeStatusMaxImages
    maxOpenFiles contentType kubeAPIQPS kubeAPIBurst podsPerCore enableControllerAttachDetach
    protectKernelDefaults makeIPTablesUtilChains iptablesMasqueradeBit iptablesDropBit featureGates failSwapOn memorySwap
    containerLogMaxWorkers containerLogMonitorInterval configMapAndSecretChangeDetectionStrategy showHiddenMetricsForVersion
    volumePluginDir kernelMemcgNotification logging
    enableSystemLogHandler enableSystemLogQuery enableProfilingHandler enableDebugFlagsHandler memoryThrottlingFactor tracing
    localStorageCapacityIsolation containerRuntimeEndpoint imageServiceEndpoint failCgroupV1 userNamespaces""".split()
)


def load(text: str | bytes, config: KubeletConfig) -> tuple[KubeletConfig, list[str]]:
    """(the settings with those of the file in their place, the file's fields that have no effect here).

    Raises:
      ConfigFileError: not such a file, an unknown field, a value that the field cannot have.
    """
    try:
        document, duplicates = yamldoc.load(text, strict=True)
    except ValueError as error:
        raise ConfigFileError(f"not YAML: {error}") from error
    if duplicates:
        raise ConfigFileError(duplicates)
    if not isinstance(document, dict) or document.get("apiVersion") != API_VERSION or document.get("kind") != KIND:
        raise ConfigFileError(f"not a {KIND} of {API_VERSION}")
    changes: Values = {}
    idle: list[str] = []
    for name, value in document.items():
        if value is None:
            continue
        if name in _FIELDS:
            attribute, convert = _FIELDS[name]
            changes[attribute] = _converted(name, convert, value)
        elif name in _IDLE:
            idle.append(name)
        elif name not in _HANDLED and name not in _EVICTION:
            raise ConfigFileError(f'unknown field "{name}"')
    changes.update(_special(document, config))
    result = replace(config, **changes)
    _check(result)
    return result, idle


def _converted(name: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigFileError(f"{name}: {error if str(error) else 'not valid'} (is {value!r})") from error


def _special(document: Values, config: KubeletConfig) -> Values:
    """Fields that are not one setting each."""
    out: Values = {}
    eviction: Values = {attribute: _converted(name, convert, document[name]) for name, (attribute, convert) in _EVICTION.items() if document.get(name) is not None}
    if document.get("evictionHard") is not None:
        hard = _converted("evictionHard", _thresholds, document["evictionHard"])
        # As upstream: thresholds in the file take the place of all defaults, not only of the same signals, unless merging is asked for.
        eviction["hard"] = {**(EvictionConfig().hard if document.get("mergeDefaultEvictionSettings") else {}), **hard}
    if eviction:
        out["eviction"] = replace(config.eviction, **eviction)
    if document.get("nodeLeaseDurationSeconds") is not None:
        out["lease_renew_seconds"] = _converted("nodeLeaseDurationSeconds", _whole, document["nodeLeaseDurationSeconds"]) / 4
    if document.get("serializeImagePulls") is True:
        out["max_parallel_image_pulls"] = 1
    if document.get("registerWithTaints"):
        out["node_taints"] = (*config.node_taints, *document["registerWithTaints"])
    if (most := (document.get("crashLoopBackOff") or {}).get("maxContainerRestartPeriod")) is not None:
        out["crash_loop_max_seconds"] = _converted("crashLoopBackOff.maxContainerRestartPeriod", _seconds, most)
        out["crash_loop_initial_seconds"] = min(config.crash_loop_initial_seconds, out["crash_loop_max_seconds"])
    anonymous = ((document.get("authentication") or {}).get("anonymous") or {}).get("enabled")
    if anonymous is not None:
        out["anonymous_auth"] = _converted("authentication.anonymous.enabled", _flag, anonymous)
    if (mode := (document.get("authorization") or {}).get("mode")) is not None:
        out["authorization_mode"] = _converted("authorization.mode", _one_of("Webhook", "AlwaysAllow"), mode)
    return out


def _check(config: KubeletConfig) -> None:
    """What single fields cannot tell. Raises ConfigFileError."""
    if config.shutdown_grace_period_critical_seconds > config.shutdown_grace_period_seconds:
        raise ConfigFileError("shutdownGracePeriodCriticalPods must not be longer than shutdownGracePeriod")
    if config.shutdown_grace_period_by_priority and (config.shutdown_grace_period_seconds or config.shutdown_grace_period_critical_seconds):
        raise ConfigFileError("shutdownGracePeriodByPodPriority and shutdownGracePeriod exclude each other")
    if config.cpu_manager_policy == "static" and not config.reserved_system_cpus and not any("cpu" in r for r in (config.system_reserved, config.kube_reserved)):
        raise ConfigFileError("cpuManagerPolicy static needs CPUs for the system: kubeReserved, systemReserved or reservedSystemCPUs")
    for kind, group in (("system", config.system_reserved_cgroup), ("kube", config.kube_reserved_cgroup)):
        if not group and any(name.startswith(f"{kind}-reserved") for name in config.enforce_node_allocatable):
            raise ConfigFileError(f"{kind}ReservedCgroup must be given when enforceNodeAllocatable contains {kind}-reserved")
    for signal in config.eviction.soft:
        if signal not in config.eviction.soft_grace_period_seconds:
            raise ConfigFileError(f"evictionSoft: grace period must be specified for the soft eviction threshold {signal}")
    if config.image_gc_low_threshold_percent >= config.image_gc_high_threshold_percent:
        raise ConfigFileError("imageGCLowThresholdPercent must be less than imageGCHighThresholdPercent")
    if config.image_verification_allowlist and config.image_verification_policy != records.ALLOWLISTED:
        raise ConfigFileError(f"preloadedImagesVerificationAllowlist is only for imagePullCredentialsVerificationPolicy {records.ALLOWLISTED}")
    if config.crash_loop_max_seconds < 1 or config.crash_loop_max_seconds > 300:
        raise ConfigFileError("crashLoopBackOff.maxContainerRestartPeriod must be between 1s and 300s")


def shutdown_groups(config: KubeletConfig) -> list[tuple[int, float]]:
    """(lowest priority, seconds) of each group of pods that a shutdown ends together, in the order in which they end."""
    if config.shutdown_grace_period_by_priority:
        return list(config.shutdown_grace_period_by_priority)
    critical = config.shutdown_grace_period_critical_seconds
    return [(0, max(0.0, config.shutdown_grace_period_seconds - critical)), (2_000_000_000, critical)]


def shutdown_seconds(config: KubeletConfig) -> float:
    """How long an orderly shutdown may take; 0 when none is configured."""
    return math.fsum(seconds for _, seconds in shutdown_groups(config))
