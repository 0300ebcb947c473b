"""Tables against recorded ones, the duration format, JSONPath and custom columns."""

from typing import Any

import pytest

from knarr.api import jsonpath, table, table_cells
from knarr.api.resources import JOBS, PODS
from knarr.api.scheme import SCHEME
from tests.api.recorded import load

CASES = load("tables.jsonl")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["scenario"])
def test_rows_and_columns_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    obj = case["object"]
    resource = SCHEME.for_kind(obj["apiVersion"], obj["kind"])
    assert resource is not None
    assert [[c["name"], c["type"], c["format"], c["priority"]] for c in table.columns(resource)] == case["columns"]
    ours, theirs = table.row(resource, obj)["cells"], case["rows"][0]
    assert len(ours) == len(theirs)
    if resource is not JOBS:  # The recording hides a job's uid in its selector, which then is none.
        assert [(a, b) for a, b in zip(ours, theirs, strict=True) if b != "*" and a != b] == []


@pytest.mark.parametrize(("seconds", "text"), [
    (-5, "<invalid>"), (-1, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (599, "9m59s"), (600, "10m"), (10799, "179m"), (10800, "3h"),
    (28799, "7h59m"), (28800, "8h"), (172799, "47h"), (172800, "2d"), (180000, "2d2h"), (691200, "8d"), (63072000, "2y"), (66000000, "2y33d"),
    (3153600000, "100y"),
])
def test_durations_are_short(seconds: int, text: str) -> None:
    assert table_cells.human_duration(seconds) == text


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}], "initContainers": [{"name": "i"}]}, "status": status}


@pytest.mark.parametrize(("status", "cells"), [
    ({"phase": "Running", "containerStatuses": [{"ready": True, "restartCount": 2, "state": {"running": {}}}]}, ["p", "1/1", "Running", "2"]),
    ({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]},
     ["p", "0/1", "Init:CrashLoopBackOff", "0"]),
    ({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}, ["p", "0/1", "Init:0/1", "0"]),
    ({"phase": "Failed", "reason": "Evicted"}, ["p", "0/1", "Evicted", "0"]),
    ({"phase": "Running", "containerStatuses": [{"state": {"terminated": {"exitCode": 3, "signal": 9}}}]}, ["p", "0/1", "Signal:9", "0"]),
    ({"phase": "Running", "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}, ["p", "0/1", "ImagePullBackOff", "0"]),
])
def test_a_pods_state_is_told_in_one_word(status: dict[str, Any], cells: list[Any]) -> None:
    assert table.row(PODS, pod(**status))["cells"][:4] == cells


def test_custom_columns_show_what_their_paths_find() -> None:
    columns = table.CustomColumns([
        {"name": "S", "type": "string", "jsonPath": ".spec.s"}, {"name": "L", "type": "string", "jsonPath": ".spec.l"},
        {"name": "I", "type": "integer", "jsonPath": ".spec.i"}, {"name": "R", "type": "string",
         "jsonPath": '.status.conditions[?(@.type=="Ready")].status'}, {"name": "D", "type": "date", "jsonPath": ".spec.d"},
        {"name": "None", "type": "string", "jsonPath": ".spec.none"},
    ])
    obj = {"metadata": {"name": "x"}, "spec": {"s": "t", "l": ["a", 1], "i": 5, "d": "bad"},
           "status": {"conditions": [{"type": "A", "status": "1"}, {"type": "Ready", "status": "True"}]}}
    assert columns.cells(obj, 0) == ["x", "t", '["a",1]', 5, "True", "<invalid>", None]


@pytest.mark.parametrize(("path", "found"), [
    (".a.b", [1]), ("{.a.b}", [1]), ("$.a.b", [1]), (".a['b']", [1]), (".l[0]", [{"n": "x", "v": 1}]), (".l[-1].n", ["y"]),
    (".l[*].n", ["x", "y"]), (".l[0:1].n", ["x"]), (".l[?(@.v>1)].n", ["y"]), (".l[?(@.n=='x')].v", [1]), ("..v", [1, 2]),
    (r".d\.e", [3]), (".none.b", []), (".l[0,1].v", [1, 2]), (".l[?(@.w)].n", []),
])
def test_json_paths(path: str, found: list[Any]) -> None:
    obj = {"a": {"b": 1}, "l": [{"n": "x", "v": 1}, {"n": "y", "v": 2}], "d.e": 3}
    assert jsonpath.compile_path(path).find(obj) == found


@pytest.mark.parametrize("path", [".a[", "[?(", ".l[x]"])
def test_broken_json_paths_are_refused(path: str) -> None:
    with pytest.raises(jsonpath.JSONPathError):
        jsonpath.compile_path(path)
