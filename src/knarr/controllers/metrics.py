"""Metrics of the controller manager under upstream's names, written at each scrape from what the controllers count anyway.

Caller: manager.ControllerManager.exposition. Source: component-base metrics/prometheus/workqueue, controllermanager metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import accumulate

from knarr.client.controller import LIVE, Controller, WorkTimes


def _family(name: str, kind: str, text: str, samples: Iterable[str]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]


def _per_queue(name: str, kind: str, text: str, values: Iterable[tuple[Controller, float]]) -> list[str]:
    return _family(name, kind, text, (f'{name}{{name="{controller.name}"}} {value}' for controller, value in values))


def _durations(controllers: Sequence[Controller]) -> list[str]:
    name = "workqueue_work_duration_seconds"
    lines = _family(name, "histogram", "How long in seconds processing an item from workqueue takes.", ())
    for controller in controllers:
        times, label = controller.times, f'name="{controller.name}"'
        bounds = [f"{bound:g}" for bound in WorkTimes.BOUNDS]
        sums = list(accumulate(times.counts))
        lines += [f'{name}_bucket{{{label},le="{bound}"}} {count}' for bound, count in zip([*bounds, "+Inf"], sums, strict=True)]
        lines += [f"{name}_sum{{{label}}} {times.seconds}", f"{name}_count{{{label}}} {sums[-1]}"]
    return lines


def exposition(running: Iterable[str]) -> bytes:
    """Give the text for /metrics.

    Args:
      running: names of the controllers that run.
    """
    controllers = sorted(LIVE, key=lambda controller: controller.name)
    now = time.monotonic()
    ages = [(controller, [now - since for since in controller.times.running.values()]) for controller in controllers]
    lines = [
        *_per_queue("workqueue_adds_total", "counter", "Total number of adds handled by workqueue", ((c, c.queue.adds_total) for c in controllers)),
        *_per_queue("workqueue_depth", "gauge", "Current depth of workqueue", ((c, len(c.queue)) for c in controllers)),
        *_per_queue("workqueue_retries_total", "counter", "Total number of retries handled by workqueue", ((c, c.queue.retries_total) for c in controllers)),
        *_per_queue(
            "workqueue_unfinished_work_seconds",
            "gauge",
            "How many seconds of work has done that is in progress and hasn't been observed by work_duration.",
            ((c, sum(age)) for c, age in ages),
        ),
        *_per_queue(
            "workqueue_longest_running_processor_seconds",
            "gauge",
            "How many seconds has the longest running processor for workqueue been running.",
            ((c, max(age, default=0.0)) for c, age in ages),
        ),
        *_durations(controllers),
        *_family(
            "running_managed_controllers",
            "gauge",
            "Indicates where instances of a controller are currently running",
            (f'running_managed_controllers{{manager="kube-controller-manager",name="{name}"}} 1' for name in running),
        ),
    ]
    return ("\n".join(lines) + "\n").encode()
