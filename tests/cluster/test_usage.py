"""What nodes and pods use: rates between readings of the kubelets, taken only when somebody asks."""

from __future__ import annotations

import pytest

from knarr.aiokits import clock
from knarr.cluster.usage import collector
from knarr.cluster.usage.collector import Collector, Counter, Reading, read_summary, usage

SECOND = 1_000_000_000


def test_a_rate_is_what_was_used_between_two_readings() -> None:
    found = usage(Counter(5 * SECOND, 1, 10.0), Counter(8 * SECOND, 2048, 10.0), 100.0, 106.0)
    assert found == collector.Usage(106.0, 6.0, SECOND // 2, 2048)


def test_a_container_that_started_between_two_readings_is_measured_since_its_start() -> None:
    found = usage(None, Counter(2 * SECOND, 1, 102.0), 100.0, 106.0)
    assert found is not None
    assert (found.window_seconds, found.cpu_ns) == (4.0, SECOND // 2)


def test_a_container_that_started_a_moment_ago_has_no_rate_yet() -> None:
    assert usage(None, Counter(SECOND, 1, 105.5), 100.0, 106.0) is None


def test_a_restarted_container_is_not_measured_against_its_former_life() -> None:
    found = usage(Counter(90 * SECOND, 1, 10.0), Counter(SECOND, 1, 104.0), 100.0, 106.0)
    assert found is not None
    assert found.cpu_ns == SECOND // 2


def test_a_summary_is_read_without_containers_that_have_no_numbers() -> None:
    reading = read_summary(
        {
            "node": {"cpu": {"usageCoreNanoSeconds": 7}, "memory": {"workingSetBytes": 9}},
            "pods": [
                {
                    "podRef": {"name": "p", "namespace": "ns"},
                    "containers": [
                        {"name": "a", "startTime": "1970-01-01T00:00:05Z", "cpu": {"usageCoreNanoSeconds": 1}, "memory": {"workingSetBytes": 2}},
                        {"name": "b", "cpu": {}, "memory": {}},
                    ],
                }
            ],
        },
        50.0,
    )
    assert reading == Reading(50.0, Counter(7, 9), {("ns", "p"): {"a": Counter(1, 2, 5.0)}})


async def test_readings_are_taken_when_somebody_asks_and_not_more_often_than_useful() -> None:
    taken: list[float] = []

    async def read(name: str) -> Reading:
        now = clock.now()
        taken.append(now)
        return Reading(now, Counter(int(now * SECOND / 4), 4096))

    found = Collector(read)
    await found.refresh(["n"])
    assert len(taken) == 2
    first = found.node("n")
    assert first is not None
    assert first.cpu_ns == pytest.approx(SECOND / 4, rel=0.05)
    await found.refresh(["n"])
    assert len(taken) == 2
    await found.refresh([], all_nodes=True)
    assert found.node("n") is None
