"""KubeletConfiguration files: what they set, what has no effect here, what is refused."""

from __future__ import annotations

import pytest

from knarr.kubelet.config import EvictionConfig, KubeletConfig
from knarr.kubelet.configfile import ConfigFileError, load, shutdown_groups, shutdown_seconds

HEAD = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
BASE = KubeletConfig(node_name="n")


def settings(text: str) -> KubeletConfig:
    return load(HEAD + text, BASE)[0]


def test_fields_become_settings() -> None:
    found = settings(
        """
maxPods: 200
podPidsLimit: -1
systemReserved: {cpu: 500m, memory: 256Mi}
cpuManagerPolicy: static
cpuManagerPolicyOptions: {full-pcpus-only: "true", strict-cpu-reservation: "false"}
topologyManagerPolicy: restricted
memoryManagerPolicy: Static
reservedMemory: [{numaNode: 0, limits: {memory: 356Mi}}]
containerLogMaxSize: 5Mi
nodeLeaseDurationSeconds: 8
serializeImagePulls: true
crashLoopBackOff: {maxContainerRestartPeriod: 5s}
allowedUnsafeSysctls: ["kernel.msg*"]
registerWithTaints: [{key: a, effect: NoSchedule}]
"""
    )
    assert (found.max_pods, found.pod_pids_limit, found.system_reserved) == (200, 0, {"cpu": "500m", "memory": "256Mi"})
    assert (found.cpu_manager_policy, found.cpu_manager_options, found.topology_manager_policy) == ("static", ("full-pcpus-only",), "restricted")
    assert found.reserved_memory == {0: {"memory": 356 << 20}}
    assert (found.container_log_max_size_bytes, found.lease_duration_seconds, found.lease_renew_seconds) == (5 << 20, 8, 2.0)
    assert (found.max_parallel_image_pulls, found.crash_loop_max_seconds, found.crash_loop_initial_seconds) == (1, 5.0, 5.0)
    assert (found.allowed_unsafe_sysctls, found.node_taints) == (("kernel.msg*",), ({"key": "a", "effect": "NoSchedule"},))


def test_fields_without_effect_here_are_named() -> None:
    found, idle = load(HEAD + "cgroupDriver: systemd\nrotateCertificates: true\nmaxPods: 5\n", BASE)
    assert (found.max_pods, idle) == (5, ["cgroupDriver", "rotateCertificates"])


def test_hard_eviction_thresholds_take_the_place_of_all_defaults_unless_they_are_to_be_merged() -> None:
    assert settings('evictionHard: {memory.available: "1Gi"}').eviction.hard == {"memory.available": "1Gi"}
    merged = settings('evictionHard: {memory.available: "1Gi"}\nmergeDefaultEvictionSettings: true').eviction.hard
    assert merged == {**EvictionConfig().hard, "memory.available": "1Gi"}
    soft = settings('evictionSoft: {memory.available: "2Gi"}\nevictionSoftGracePeriod: {memory.available: 90s}').eviction
    assert (soft.soft_grace_period_seconds, soft.hard) == ({"memory.available": 90.0}, EvictionConfig().hard)


def test_a_shutdown_has_two_groups_or_those_of_the_file() -> None:
    assert shutdown_seconds(BASE) == 0
    assert shutdown_groups(settings("shutdownGracePeriod: 30s\nshutdownGracePeriodCriticalPods: 10s")) == [(0, 20.0), (2_000_000_000, 10.0)]
    text = "shutdownGracePeriodByPodPriority: [{priority: 1000, shutdownGracePeriodSeconds: 7}, {priority: 0, shutdownGracePeriodSeconds: 3}]"
    assert shutdown_groups(settings(text)) == [(0, 3.0), (1000, 7.0)]
    assert shutdown_seconds(settings(text)) == 10.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("maxPod: 3", 'unknown field "maxPod"'),
        ("maxPods: many", "maxPods: must be a whole number"),
        ("shutdownGracePeriod: 30", "must be a duration"),
        ("cpuManagerPolicy: static", "needs CPUs for the system"),
        ("cpuManagerPolicy: dynamic", "must be one of none, static"),
        ("cpuManagerPolicyOptions: {align-by-socket: 'true'}", "not supported here"),
        ("systemReserved: {memory: lots}", "systemReserved"),
        ("shutdownGracePeriod: 5s\nshutdownGracePeriodCriticalPods: 10s", "must not be longer"),
        ("imageGCHighThresholdPercent: 50\nimageGCLowThresholdPercent: 60", "must be less"),
        ("crashLoopBackOff: {maxContainerRestartPeriod: 0s}", "between 1s and 300s"),
        ("reservedMemory: [{numaNode: 0}]", "reservedMemory"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigFileError, match=words):
        settings(text)


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(ConfigFileError, match="not a KubeletConfiguration"):
        load("apiVersion: v1\nkind: Pod\n", BASE)
