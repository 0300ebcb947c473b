"""The pure parts of controllers: names, schedules, index sets, quotas, autoscaling."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knarr.aiokits import clock
from knarr.api.types import Object
from knarr.controllers import quota
from knarr.controllers.autoscaler import behavior, calculator
from knarr.controllers.autoscaler.metrics import PodMetric
from knarr.controllers.cronjob.schedule import ScheduleError, load_zone, parse
from knarr.controllers.hashing import revision_hash, safe_encode, template_hash
from knarr.controllers.job.indexes import Indexes
from knarr.controllers.manager import UnknownController, selected
from knarr.controllers.registry import ALIASES, CONTROLLERS, GATES, OFF_BY_DEFAULT, WITHOUT_WORK
from knarr.controllers.volume import match

# Names and selection


def test_star_selects_what_is_on_by_default() -> None:
    assert set(selected("*")) == set(CONTROLLERS) - set(OFF_BY_DEFAULT) - set(GATES)
    assert "bootstrap-signer-controller" in selected("*,bootstrap-signer-controller")


def test_minus_switches_off_and_aliases_are_names_too() -> None:
    assert "deployment-controller" not in selected("*,-deployment")
    assert selected("deployment,replicaset-controller") == ["deployment-controller", "replicaset-controller"]
    assert selected("-deployment") == []
    assert selected("*,-service,-selinux-warning-controller,storage-version-migrator-controller") == selected("*")
    assert "selinux-warning-controller" in selected("*,selinux-warning-controller")
    assert "storage-version-migrator-controller" in selected("*", {"StorageVersionMigrator": True})
    assert selected("deployment,svm", {"StorageVersionMigrator": True}) == ["deployment-controller", "storage-version-migrator-controller"]
    assert set(ALIASES.values()) <= set(CONTROLLERS) | WITHOUT_WORK


def test_unknown_controller_is_refused() -> None:
    with pytest.raises(UnknownController, match="'-typo'"):
        selected("*,-typo")


def test_template_hash_depends_on_contents_and_collisions_only() -> None:
    template = {"metadata": {"labels": {"a": "b", "c": "d"}}, "spec": {"x": 1}}
    other = {"spec": {"x": 1}, "metadata": {"labels": {"c": "d", "a": "b"}}}
    assert template_hash(template) == template_hash(other)
    assert len({template_hash(template), template_hash(template, 0), template_hash(template, 1)}) == 3
    assert revision_hash(b"x") != revision_hash(b"x", 0)
    assert not set(safe_encode("0123456789")) & set("aeiou013")


# Schedules


def _next(line: str, start: str, zone: str = "UTC") -> str:
    stamp = parse(line, load_zone(zone)).next(datetime.fromisoformat(start).replace(tzinfo=UTC).timestamp())
    assert stamp is not None
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@pytest.mark.parametrize(
    ("line", "start", "expected"),
    [
        ("* * * * *", "2026-01-01T00:00:00", "2026-01-01T00:01:00"),
        ("*/15 * * * *", "2026-01-01T00:44:59", "2026-01-01T00:45:00"),
        ("0 0 29 2 *", "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("30 4 1,15 * 5", "2026-01-01T05:00:00", "2026-01-02T04:30:00"),
        ("0 12 * * MON-wed", "2026-01-03T00:00:00", "2026-01-05T12:00:00"),
        ("5-59/20 3 * jan ?", "2026-01-01T03:05:00", "2026-01-01T03:25:00"),
        ("@hourly", "2026-01-01T00:00:30", "2026-01-01T01:00:00"),
        ("@every 1h30m", "2026-01-01T00:00:00", "2026-01-01T01:30:00"),
        ("TZ=Asia/Tokyo 0 9 * * *", "2026-01-01T00:00:00", "2026-01-02T00:00:00"),
    ],
)
def test_next_time_of_a_schedule(line: str, start: str, expected: str) -> None:
    assert _next(line, start) == expected


def test_hour_skipped_by_summer_time_does_not_come_and_the_doubled_one_comes_once() -> None:
    assert _next("30 2 * * *", "2026-03-28T12:00:00", "Europe/Berlin") == "2026-03-30T00:30:00"
    first = _next("30 2 * * *", "2026-10-24T12:00:00", "Europe/Berlin")
    assert first == "2026-10-25T00:30:00"
    assert _next("30 2 * * *", first, "Europe/Berlin") == "2026-10-26T01:30:00"


@pytest.mark.parametrize(
    "line", ["", "* * * *", "60 * * * *", "* * * * 8", "5-1 * * * *", "@never", "@every x", "TZ=No/Where * * * * *", "*/0 * * * *"]
)
def test_bad_schedules_are_refused(line: str) -> None:
    with pytest.raises(ScheduleError):
        parse(line)


def test_schedule_that_never_comes_has_no_next_time() -> None:
    assert parse("0 0 31 2 *").next(0) is None


# Index sets

_sets = st.sets(st.integers(0, 60))


@given(_sets, _sets)
def test_index_sets_are_sets(one: set[int], two: set[int]) -> None:
    a, b = Indexes.of(one), Indexes.of(two)
    assert len(a | b) == len(one | two)
    assert a.overlap(b) == len(one & two)
    assert {index for index in range(70) if index in a} == one
    assert str(Indexes.parse(str(a), 100)) == str(a)
    assert a.first_missing(5, 60) == [index for index in range(60) if index not in one][:5]


def test_written_indexes_that_make_no_sense_are_left_out() -> None:
    assert str(Indexes.parse("0-2,x,4,9-12,20", 11)) == "0-2,4,9,10"


# Quotas


def _pod(cpu: str = "100m", **spec: object) -> Object:
    container = {"name": "c", "resources": {"requests": {"cpu": cpu, "memory": "1Gi"}, "limits": {"cpu": "1"}}}
    return {"metadata": {"name": "p"}, "spec": {"containers": [container], **spec}, "status": {"phase": "Running"}}


def test_quota_adds_up_what_is_charged() -> None:
    hard = {"pods": "5", "requests.cpu": "1", "memory": "1Gi", "limits.cpu": "9", "count/pods": "9", "services": "1"}
    done = {**_pod(), "status": {"phase": "Succeeded"}}
    used = quota.total_usage({"spec": {"hard": hard}}, {"pods": [_pod(), _pod("1"), done]})
    assert used == {"pods": "2", "requests.cpu": "1100m", "memory": "2Gi", "limits.cpu": "2", "count/pods": "3"}


def test_init_containers_count_by_the_largest_and_sidecars_with_the_rest() -> None:
    def container(name: str, cpu: str, **more: object) -> Object:
        return {"name": name, "resources": {"requests": {"cpu": cpu}}, **more}

    inits = [container("side", "1", restartPolicy="Always"), container("init", "5")]
    pod = _pod("2", initContainers=inits, overhead={"cpu": "100m"})
    assert float(quota.pod_resources(pod, "requests")["cpu"]) == pytest.approx(6.1)


@pytest.mark.parametrize(
    ("scope", "pod", "within"),
    [
        ({"scopeName": "BestEffort", "operator": "Exists"}, _pod(), False),
        ({"scopeName": "NotBestEffort", "operator": "Exists"}, _pod(), True),
        ({"scopeName": "Terminating", "operator": "Exists"}, _pod(activeDeadlineSeconds=0), True),
        ({"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}, _pod(priorityClassName="high"), True),
        ({"scopeName": "PriorityClass", "operator": "NotIn", "values": ["high"]}, _pod(priorityClassName="high"), False),
        ({"scopeName": "PriorityClass", "operator": "DoesNotExist"}, _pod(), True),
    ],
)
def test_scopes_choose_pods(scope: Object, pod: Object, within: bool) -> None:
    found = quota.matches_scopes({"spec": {"scopeSelector": {"matchExpressions": [scope]}}}, "pods", pod)
    assert found == within


def test_services_and_claims_are_counted_by_kind_and_class() -> None:
    service = {"metadata": {}, "spec": {"type": "LoadBalancer", "ports": [{}, {}]}}
    assert quota.service_usage(service)["services.nodeports"] == 2
    claim = {"metadata": {}, "spec": {"storageClassName": "gold", "resources": {"requests": {"storage": "3Gi"}}}}
    assert quota.claim_usage(claim)["gold.storageclass.storage.k8s.io/requests.storage"] == 3 * 2**30
    assert quota.group_resource("gold.storageclass.storage.k8s.io/requests.storage") == "persistentvolumeclaims"
    assert quota.group_resource("count/deployments.apps") == "deployments.apps"


# Autoscaling

_TOLERANCE = calculator.Tolerance(0.1, 0.1)
_TIMING = calculator.Timing(300, 30)


def _running(name: str, *, ready: bool = True, phase: str = "Running") -> Object:
    condition = {"type": "Ready", "status": "True" if ready else "False", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    container = {"name": "c", "resources": {"requests": {"cpu": "1"}}}
    status = {"phase": phase, "startTime": "2026-01-01T00:00:00Z", "conditions": [condition]}
    return {"metadata": {"name": name}, "spec": {"containers": [container]}, "status": status}


def _share(current: int, values: dict[str, int], pods: list[Object], target: int = 50) -> int:
    metrics = {name: PodMetric(value, clock.now(), 60) for name, value in values.items()}
    return calculator.by_utilization(current, target, metrics, pods, "cpu", "", _TOLERANCE, _TIMING)[0]


@pytest.mark.parametrize(
    ("use", "replicas"),
    [([500, 500], 2), ([540, 540], 2), ([1000, 1000], 4), ([100, 100], 1), ([560, 560], 3)],
)
def test_replicas_follow_utilization_beyond_the_tolerance(use: list[int], replicas: int) -> None:
    pods = [_running("a"), _running("b")]
    assert _share(2, dict(zip("ab", use, strict=True)), pods) == replicas


def test_missing_metrics_never_make_a_change_larger() -> None:
    pods = [_running("a"), _running("b"), _running("c")]
    # Growing: the missing one uses nothing; shrinking: it uses all it asked for.
    assert _share(3, {"a": 1000, "b": 1000}, pods) == 4
    assert _share(3, {"a": 100, "b": 100}, pods) == 3


def test_pods_not_ready_count_as_idle_when_growing() -> None:
    pods = [_running("a"), _running("b", phase="Pending"), _running("c", phase="Failed")]
    assert _share(2, {"a": 2000}, pods) == 4
    assert _share(2, {"a": 1000}, pods) == 2


def test_no_metrics_at_all_is_an_error() -> None:
    with pytest.raises(calculator.MetricsError):
        _share(1, {}, [_running("a")])


def test_growth_is_limited_to_doubling_or_four() -> None:
    assert behavior.limit(1, 50, 1, 100)[:2] == (4, "ScaleUpLimit")
    assert behavior.limit(10, 50, 1, 100)[:2] == (20, "ScaleUpLimit")
    assert behavior.limit(10, 50, 1, 15)[:2] == (15, "TooManyReplicas")
    assert behavior.limit(10, 0, 3, 15)[:2] == (3, "TooFewReplicas")
    assert behavior.limit(10, 12, 3, 15)[:2] == (12, "DesiredWithinRange")


def test_policies_limit_the_rate_by_what_changed_lately() -> None:
    rules = {
        "scaleUp": {"policies": [{"type": "Pods", "value": 4, "periodSeconds": 60}, {"type": "Percent", "value": 100, "periodSeconds": 60}]}
    }
    history = behavior.History()
    assert behavior.limit_with_behavior(history, 2, 50, 1, 100, rules)[0] == 6
    history.scaled(rules, 2, 6)
    assert behavior.limit_with_behavior(history, 6, 50, 1, 100, rules)[0] == 6
    rules["scaleUp"]["selectPolicy"] = "Disabled"  # type: ignore[assignment]
    assert behavior.limit_with_behavior(behavior.History(), 6, 50, 1, 100, rules)[0] == 6
    down = {
        "scaleDown": {
            "selectPolicy": "Min",
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}, {"type": "Percent", "value": 50, "periodSeconds": 60}],
        }
    }
    assert behavior.limit_with_behavior(behavior.History(), 10, 1, 1, 100, down)[:2] == (9, "ScaleDownLimit")


def test_size_goes_down_only_to_the_highest_recommendation_of_the_window() -> None:
    history = behavior.History()
    history.start(10)
    assert behavior.stabilize(history, 2, 300) == 10
    assert behavior.stabilize_with_behavior(history, 10, 3, {}, 300)[:2] == (10, "ScaleDownStabilized")
    rules = {"scaleDown": {"stabilizationWindowSeconds": 0}}
    assert behavior.stabilize_with_behavior(history, 10, 3, rules, 300)[0] == 3


# Volumes


def _volume(name: str, size: str, **spec: object) -> Object:
    fields = {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], **spec}
    return {"metadata": {"name": name}, "spec": fields, "status": {"phase": "Available"}}


def test_smallest_volume_that_fits_is_taken() -> None:
    claim = {
        "metadata": {"name": "c", "namespace": "n", "uid": "u"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}, "storageClassName": ""},
    }
    volumes = [_volume("big", "10Gi"), _volume("small", "1Gi"), _volume("right", "3Gi"), _volume("other", "2Gi", storageClassName="x")]
    found = match.best_match(claim, volumes, False)
    assert found is not None
    assert found["metadata"]["name"] == "right"
    reserved = {"namespace": "n", "name": "c"}
    found = match.best_match(claim, [*volumes, _volume("mine", "20Gi", claimRef=reserved)], False)
    assert found is not None
    assert found["metadata"]["name"] == "mine"
    assert match.best_match(claim, [_volume("taken", "3Gi", claimRef={"namespace": "n", "name": "z"})], False) is None
