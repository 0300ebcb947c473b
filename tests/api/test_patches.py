"""Patches against recorded ones: the patched object, or the status where the patch itself is at fault."""

import re
from typing import Any

import pytest

from knarr.api import defaulting, errors, patch
from knarr.api.meta import deep_copy
from knarr.api.patch import json_patch, merge_patch
from tests.api.recorded import body_bytes, differences, load, query, resource_of

CASES = [case for case in load("patches.jsonl") if any(
    s["method"] == "PATCH" and "apply-patch" not in s.get("contentType", "") for s in case["steps"])]

# What the request handler, strategies and controllers do beyond patching, and warnings of deprecated kinds.
NOT_PATCHING = re.compile(
    r"^.\.(metadata\.(generation|managedFields|resourceVersion|uid|namespace|annotations=.'node.alpha)|status\.conditions|spec\.tolerations)",
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["scenario"])
def test_patching_equals_the_recording(case: dict[str, Any]) -> None:
    current: dict[str, Any] | None = None
    for step in case["steps"]:
        resource, subresource = resource_of(step["path"])
        if step["method"] == "PATCH" and "apply-patch" not in step.get("contentType", "") and resource and subresource != "scale" and current:
            check(step, resource, current)
        if isinstance(step.get("object"), dict) and step["object"].get("kind") != "Status":
            current = step["object"]


def check(step: dict[str, Any], resource: Any, current: dict[str, Any]) -> None:
    before = deep_copy(current)
    try:
        new, warnings = patch.apply_patch(
            resource, current, body_bytes(step["body"]), step["contentType"], query(step["path"], "fieldValidation", "Warn"),
        )
    except errors.StatusError as error:
        assert (error.code, error.reason) == (step["status"], step.get("reason"))  # noqa: PT017
        return
    finally:
        assert current == before, "patching must not change the current object"
    if step["status"] >= 400:
        # The patch applies; validation, preconditions or names are refused later.
        assert step["status"] in (400, 403, 404, 409, 422)
        assert [c[1] for c in step.get("causes", [])] != ["patch"]
        return
    defaulting.default(resource, new)
    assert [d for d in differences(new, step["object"]) if not NOT_PATCHING.match(d)] == []
    if "warnings" not in step:
        assert warnings == []


def test_an_empty_list_index_and_a_number_out_of_range_fail() -> None:
    for path in ("/a/9", "/a/x", "/a/-9", "/b/c"):
        with pytest.raises(json_patch.JSONPatchError):
            json_patch.apply({"a": [1]}, [{"op": "remove", "path": path}])


def test_copies_are_bounded() -> None:
    document = {"a": "x" * 1_000_000}
    operations = [{"op": "copy", "from": "/a", "path": f"/b{i}"} for i in range(5)]
    with pytest.raises(json_patch.JSONPatchError, match="accumulated size"):
        json_patch.apply(document, operations)


def test_a_created_merge_patch_leads_from_one_object_to_the_other() -> None:
    original = {"a": 1, "b": {"c": 2, "d": [1]}, "e": True, "gone": None}
    modified = {"a": 1, "b": {"c": 3}, "e": 1, "f": {"g": {}}}
    made = merge_patch.create(original, modified)
    assert made == {"b": {"c": 3, "d": None}, "e": 1, "f": {"g": {}}, "gone": None}
    assert merge_patch.apply(deep_copy(original), made) == modified
