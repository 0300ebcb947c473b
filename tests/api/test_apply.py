"""Server-side apply and ownership tracking against recorded exchanges: managedFields, objects, conflicts."""

import re
from typing import Any

import pytest

from knarr.api import apply, conversion, decode, defaulting, errors, patch
from knarr.api.apply import fieldset as fs
from knarr.api.meta import deep_copy
from knarr.api.resources import CONFIG_MAPS, DEPLOYMENTS, HORIZONTAL_POD_AUTOSCALERS
from tests.api.recorded import body_bytes, differences, load, query, resource_of

CASES = [case for case in load("patches.jsonl") if case["scenario"].startswith(("apply", "managedfields"))]

NOT_APPLYING = re.compile(
    r"^.\.(metadata\.(generation|resourceVersion|uid|namespace|creationTimestamp|finalizers|labels=.'batch)|status"
    r"|spec\.(preemptionPolicy|priority|tolerations|serviceAccount\w*|clusterIPs?|ipFamil\w+|taints|selector=.'matchLabels'|groups|uid|username"
    r"|template\.metadata\.labels))",
)


def in_any_order(entries: Any) -> Any:
    """Entries without their times, which the recording lacks and which decide their order."""
    plain = [{k: v for k, v in entry.items() if k != "time"} for entry in entries or ()]
    return sorted(plain, key=repr)


def of_others(entries: Any) -> list[Any]:
    """Entries that the controllers of the recorded cluster made."""
    return [entry for entry in entries or () if entry.get("manager") != "kube-controller-manager"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["scenario"])
def test_ownership_equals_the_recording(case: dict[str, Any]) -> None:
    live: dict[str, Any] | None = None
    for step in case["steps"]:
        resource, subresource = resource_of(step["path"])
        if resource is None or subresource == "scale" or step["method"] not in ("PATCH", "POST", "PUT"):
            return
        manager = query(step["path"], "fieldManager", "" if "apply" in step.get("contentType", "") else "rec")
        if not manager or len(manager) > 128:
            return
        try:
            obj = write(step, apply.manager_for(resource, subresource), resource, live, manager)
        except errors.StatusError as error:
            if step["status"] in (400, 409, 500):
                assert error.code == step["status"]  # noqa: PT017
                causes = sorted([c["reason"], c["field"]] for c in error.details.get("causes", []))
                assert causes == step.get("causes", [])
            continue
        if step["status"] >= 400:
            # Names, preconditions and validation are the request handler's.
            assert step.get("reason") in ("Invalid", "BadRequest", "NotFound") or "Conflict" in step.get("reason", "")
            continue
        want = step["object"]
        entries = want["metadata"].get("managedFields")
        if entries != "*":
            assert in_any_order(of_others(obj["metadata"].get("managedFields"))) == in_any_order(of_others(entries))
        ours, theirs = strip(obj), strip(want)
        if case["scenario"].startswith("apply.") and not subresource:
            assert [d for d in differences(ours, theirs) if not NOT_APPLYING.match(d)] == []
        if "dryRun" not in step["path"]:
            live = deep_copy(want)
            live["metadata"]["uid"] = "u"
            if entries == "*":
                live["metadata"]["managedFields"] = obj["metadata"].get("managedFields", [])


def strip(obj: dict[str, Any]) -> dict[str, Any]:
    return {**obj, "metadata": {k: v for k, v in obj["metadata"].items() if k != "managedFields"}}


def write(step: dict[str, Any], manager: apply.FieldManager, resource: Any, live: Any, name: str) -> dict[str, Any]:
    body, kind = body_bytes(step["body"]), step.get("contentType", "application/json")
    validation = query(step["path"], "fieldValidation", "Warn")
    if "apply-patch" in kind:
        force = query(step["path"], "force", "") == "true"
        return apply.apply_body(manager, deep_copy(live), body, name, force=force, field_validation=validation)[0]
    if step["method"] == "PATCH":
        new, _ = patch.apply_patch(resource, live, body, kind, validation)
    else:
        new, _ = decode.decode(resource, body, kind, validation)
        if step["method"] == "PUT" and live:
            for key in ("uid", "creationTimestamp", "namespace", "generation"):
                if key in live["metadata"]:
                    new["metadata"][key] = live["metadata"][key]
    defaulting.default(resource, new)
    manager.update(live if step["method"] != "POST" else None, new, name)
    return new


def test_a_conflict_names_manager_and_field() -> None:
    manager = apply.manager_for(CONFIG_MAPS)
    first = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "1"}}
    live = manager.apply(None, first, "m1")
    live["metadata"]["uid"] = "u"
    with pytest.raises(errors.StatusError) as caught:
        manager.apply(live, {**first, "data": {"a": "2"}}, "m2")
    assert caught.value.message == 'Apply failed with 1 conflict: conflict with "m1": .data.a'
    assert caught.value.code == 409
    taken = manager.apply(live, {**first, "data": {"a": "2"}}, "m2", force=True)
    assert [e["manager"] for e in taken["metadata"]["managedFields"]] == ["m2"]


def test_a_client_side_applied_object_can_be_taken_over_by_kubectl() -> None:
    manager = apply.manager_for(CONFIG_MAPS)
    config = '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"x"},"data":{"a":"1"}}'
    live = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "1"}, "metadata": {
        "name": "x", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": config}}}
    manager.update(None, live, "kubectl-client-side-apply")
    live["metadata"]["uid"] = "u"
    patch_body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "2"}}
    new = manager.apply(live, patch_body, "kubectl")
    assert new["data"] == {"a": "2"}
    assert '"a":"2"' in new["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"]


def test_an_unchanged_apply_keeps_its_time() -> None:
    manager = apply.manager_for(CONFIG_MAPS)
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "1"}}
    live = manager.apply(None, config, "m", now="2026-01-01T00:00:00Z")
    live["metadata"]["uid"] = "u"
    again = manager.apply(live, config, "m", now="2026-01-02T00:00:00Z")
    assert again == live


def test_more_than_ten_updaters_become_ancient_changes() -> None:
    manager = apply.manager_for(CONFIG_MAPS)
    live = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"k0": "v"}}
    manager.update(None, live, "m0", now="2026-01-01T00:00:00Z")
    live["metadata"]["uid"] = "u"
    for number in range(1, 14):
        new = deep_copy(live)
        new.setdefault("data", {})[f"k{number}"] = "v"
        manager.update(live, new, f"m{number}", now=f"2026-01-01T00:00:{number:02d}Z")
        live = new
    entries = live["metadata"]["managedFields"]
    assert len(entries) == 10
    assert entries[0]["manager"] == "ancient-changes"


def test_an_empty_list_of_managed_fields_resets_tracking() -> None:
    manager = apply.manager_for(CONFIG_MAPS)
    live = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "1"}}
    manager.update(None, live, "m")
    live["metadata"]["uid"] = "u"
    obj, _ = decode.decode(CONFIG_MAPS, b'{"metadata":{"name":"x","uid":"u","managedFields":[]},"data":{"a":"1"}}')
    manager.update(live, obj, "m")
    assert "managedFields" not in obj["metadata"]


def test_fields_of_the_other_autoscaler_version_stay_owned() -> None:
    manager = apply.manager_for(HORIZONTAL_POD_AUTOSCALERS)
    v1 = {"apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "h"},
          "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 50, "scaleTargetRef": {"kind": "Deployment", "name": "d"}}}
    v2 = conversion.convert(deep_copy(v1), "autoscaling/v2")
    assert v2["spec"]["metrics"][0]["resource"]["target"] == {"type": "Utilization", "averageUtilization": 50}
    back = conversion.convert(v2, "autoscaling/v1")
    assert back["spec"] == v1["spec"]
    live = deep_copy(v2)
    live["metadata"] = {"name": "h", "uid": "u", "managedFields": [{
        "manager": "old", "operation": "Apply", "apiVersion": "autoscaling/v1", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:spec": {"f:targetCPUUtilizationPercentage": {}}}}]}
    with pytest.raises(errors.StatusError) as caught:
        manager.apply(live, {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "h"}, "spec": {
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 60}}}]}}, "new")
    assert caught.value.causes[0]["field"] == ".spec.targetCPUUtilizationPercentage"


def test_scale_hands_over_the_ownership_of_replicas() -> None:
    config = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {
        "replicas": 1, "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {
            "containers": [{"name": "c", "image": "i"}]}}}}
    entries = apply.manager_for(DEPLOYMENTS).apply(None, config, "m1")["metadata"]["managedFields"]
    scale_entries = apply.scale_from_parent(entries)
    assert scale_entries[0]["fieldsV1"] == {"f:spec": {"f:replicas": {}}}
    live = {"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "d", "uid": "u", "managedFields": scale_entries},
            "spec": {"replicas": 1}, "status": {"replicas": 1}}
    scaled = deep_copy(live)
    scaled["spec"]["replicas"] = 5
    apply.manager_for(DEPLOYMENTS, "scale").update(live, scaled, "scaler")
    result = apply.scale_to_parent(entries, scaled["metadata"]["managedFields"], "apps/v1")
    owners = {e["manager"]: e for e in result}
    assert "f:replicas" not in owners["m1"]["fieldsV1"]["f:spec"]
    assert owners["scaler"]["fieldsV1"] == {"f:spec": {"f:replicas": {}}}
    assert owners["scaler"]["subresource"] == "scale"


def test_sets_obey_their_laws() -> None:
    a = fs.from_json({"f:a": {".": {}, "f:b": {}, "f:c": {}}, "f:d": {}})
    b = fs.from_json({"f:a": {"f:b": {}}, "f:e": {}})
    assert fs.union(fs.difference(a, b), fs.intersection(a, b)) == a
    assert fs.to_json(fs.difference(a, b)) == {"f:a": {".": {}, "f:c": {}}, "f:d": {}}
    assert fs.to_json(fs.recursive_difference(a, fs.from_json({"f:a": {}}))) == {"f:d": {}}
    assert fs.path_text(("f:a", 'k:{"name":"x","port":1}', 'v:"s"', "i:0")) == '.a[name="x",port=1][="s"][0]'
