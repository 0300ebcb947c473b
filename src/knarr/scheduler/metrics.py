"""Metrics of the scheduler under upstream's names. Source: pkg/scheduler/metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_ATTEMPT_BUCKETS = [0.001 * 2**i for i in range(15)]
_WAIT_BUCKETS = [0.01 * 2**i for i in range(20)]


class Metrics:
    """One registry per scheduler, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._attempts = Counter(
            "scheduler_schedule_attempts", "Attempts to schedule pods, by result.", ["profile", "result"], registry=self.registry
        )
        self._attempt_seconds = Histogram(
            "scheduler_scheduling_attempt_duration_seconds",
            "Seconds of one scheduling cycle.",
            ["profile", "result"],
            buckets=_ATTEMPT_BUCKETS,
            registry=self.registry,
        )
        self._wait_seconds = Histogram(
            "scheduler_pod_scheduling_sli_duration_seconds",
            "Seconds from the queue to the binding.",
            ["attempts"],
            buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )
        self._attempts_per_pod = Histogram(
            "scheduler_pod_scheduling_attempts", "Attempts until a pod was bound.", buckets=[1, 2, 4, 8, 16], registry=self.registry
        )
        self.preemption_attempts = Counter("scheduler_preemption_attempts", "Preemption attempts.", registry=self.registry)
        self.preemption_victims = Histogram(
            "scheduler_preemption_victims", "Victims per preemption.", buckets=[2**i for i in range(7)], registry=self.registry
        )
        self._algorithm_seconds = Histogram(
            "scheduler_scheduling_algorithm_duration_seconds",
            "Seconds of choosing a node.",
            buckets=_ATTEMPT_BUCKETS,
            registry=self.registry,
        )
        self._unschedulable = Gauge(
            "scheduler_unschedulable_pods", "Pods that a plugin holds back.", ["plugin", "profile"], registry=self.registry
        )
        self.pending_pods = Gauge("scheduler_pending_pods", "Pending pods by queue.", ["queue"], registry=self.registry)
        self.cache_size = Gauge("scheduler_cache_size", "Nodes, pods and assumed pods.", ["type"], registry=self.registry)
        # Children are looked up once: the label lookup costs more than the observation.
        self._children: dict[tuple[str, str], tuple[Counter, Histogram]] = {}

    def _observe(self, profile: str, result: str, seconds: float) -> None:
        pair = self._children.get((profile, result))
        if pair is None:
            pair = (self._attempts.labels(profile, result), self._attempt_seconds.labels(profile, result))
            self._children[profile, result] = pair
        pair[0].inc()
        pair[1].observe(seconds)

    def scheduled(self, profile: str, seconds: float) -> None:
        self._observe(profile, "scheduled", seconds)

    def unschedulable(self, profile: str, seconds: float) -> None:
        self._observe(profile, "unschedulable", seconds)

    def errors(self, profile: str) -> None:
        self._observe(profile, "error", 0.0)

    def bound(self, profile: str, seconds: float, attempts: int) -> None:
        """A pod reached its node, `seconds` after it entered the queue."""
        self._wait_seconds.labels(str(attempts) if attempts < 15 else "15+").observe(seconds)
        self._attempts_per_pod.observe(attempts)

    def chosen(self, seconds: float) -> None:
        """The algorithm has given its answer, a node or none."""
        self._algorithm_seconds.observe(seconds)

    def exposition(
        self,
        pending: Mapping[str, int],
        sizes: Mapping[str, int],
        held_back: Mapping[tuple[str, str], int],
        incoming: Mapping[tuple[str, str], int],
    ) -> bytes:
        """Give the text for /metrics.

        Args:
          pending: pods per part of the queue.
          sizes: nodes, pods and assumed pods that the scheduler holds.
          held_back: waiting pods by (plugin, profile).
          incoming: pods that entered a part of the queue, by (part, what happened).
        """
        for queue, number in pending.items():
            self.pending_pods.labels(queue).set(number)
        for kind, number in sizes.items():
            self.cache_size.labels(kind).set(number)
        self._unschedulable.clear()
        for (plugin, profile), number in held_back.items():
            self._unschedulable.labels(plugin, profile).set(number)
        name = "scheduler_queue_incoming_pods_total"
        lines = [f"# HELP {name} Pods added to scheduling queues, by event and queue.", f"# TYPE {name} counter"]
        lines += [f'{name}{{event="{event}",queue="{queue}"}} {number}' for (queue, event), number in sorted(incoming.items())]
        return bytes(generate_latest(self.registry)) + ("\n".join(lines) + "\n").encode()
