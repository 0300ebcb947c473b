"""What the server makes of fields before it stores them: dropped, shortened, judged again on update."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from knarr.api.errors import StatusError
from knarr.api.resources import (
    CSI_DRIVERS,
    DEPLOYMENTS,
    INGRESS_CLASSES,
    IP_ADDRESSES,
    PERSISTENT_VOLUMES,
    RESOURCE_CLAIM_TEMPLATES,
    SERVICE_ACCOUNTS,
)
from knarr.testing.apiserver import RunningAPIServer


def fields(error: pytest.ExceptionInfo[StatusError]) -> list[str]:
    return [cause["field"] for cause in (error.value.status().get("details") or {})["causes"]]


async def test_references_to_an_accounts_secrets_are_names_alone(apiserver: RunningAPIServer) -> None:
    secrets = [{"name": "a", "kind": "Secret", "namespace": "elsewhere"}]
    made = await apiserver.client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "x"}, "secrets": secrets}, "default")
    assert made["secrets"] == [{"name": "a"}]
    changed = await apiserver.client.update(SERVICE_ACCOUNTS, {**made, "secrets": [*secrets, {"name": "b", "uid": "u"}]})
    assert changed["secrets"] == [{"name": "a"}, {"name": "b"}]


async def test_a_field_behind_a_gate_is_neither_stored_nor_judged(apiserver: RunningAPIServer) -> None:
    made = await apiserver.client.create(
        CSI_DRIVERS, {"metadata": {"name": "d.example"}, "spec": {"nodeAllocatableUpdatePeriodSeconds": 1}}
    )
    assert "nodeAllocatableUpdatePeriodSeconds" not in made["spec"]


@pytest.mark.parametrize("name", ["10.0.0.1", "iqn.x:y", "eui.0", "naa.0"])
async def test_initiators_have_qualified_names(apiserver: RunningAPIServer, name: str) -> None:
    target = {"targetPortal": "192.0.2.1:3260", "iqn": "iqn.2001-04.com.example:x", "lun": 0}
    volume: dict[str, Any] = {
        "metadata": {"name": "v"},
        "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "iscsi": {**target, "initiatorName": name}},
    }
    with pytest.raises(StatusError) as error:
        await apiserver.client.create(PERSISTENT_VOLUMES, volume)
    assert fields(error) == ["spec.iscsi.initiatorname"]
    volume["spec"]["iscsi"]["initiatorName"] = "iqn.2001-04.com.example:host"
    await apiserver.client.create(PERSISTENT_VOLUMES, volume)


async def test_specs_that_may_not_change_are_judged_whole_when_they_do(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    reference = {"resource": "services", "namespace": "default", "name": "s"}
    address = await client.create(IP_ADDRESSES, {"metadata": {"name": "192.0.2.9"}, "spec": {"parentRef": reference}})
    with pytest.raises(StatusError) as error:
        await client.update(IP_ADDRESSES, {**address, "spec": {"parentRef": {}}})
    assert fields(error) == ["spec.parentRef.resource", "spec.parentRef.name", "spec.parentRef"]
    requests = [{"name": "r", "exactly": {"deviceClassName": "c"}}]
    template = {"metadata": {"name": "t"}, "spec": {"spec": {"devices": {"requests": requests}}}}
    made = await client.create(RESOURCE_CLAIM_TEMPLATES, template, "default")
    with pytest.raises(StatusError) as error:
        await client.update(RESOURCE_CLAIM_TEMPLATES, {**made, "spec": {"spec": {"devices": {"requests": requests * 2}}}})
    assert fields(error) == ["spec.spec.devices.requests[1].name", "spec"]


async def test_fields_behind_gates_are_checked_and_owned_but_not_kept(apiserver: RunningAPIServer) -> None:
    """As kube-apiserver answers: their types count, and who set them is noted before they are dropped."""
    http, headers = apiserver.client.http, [*await apiserver.client.headers(), ("Content-Type", "application/json")]
    templates, autoscalers = "/api/v1/namespaces/default/podtemplates", "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers"
    spec: dict[str, Any] = {"hostnameOverride": "x", "containers": [{"name": "c", "image": "i"}]}
    body = {"metadata": {"name": "p"}, "template": {"spec": spec}}
    made = orjson.loads((await http.request("POST", templates, headers, orjson.dumps(body))).body)
    assert "hostnameOverride" not in made["template"]["spec"]
    assert "f:hostnameOverride" in made["metadata"]["managedFields"][0]["fieldsV1"]["f:template"]["f:spec"]
    spec["hostnameOverride"] = 5
    wrong = await http.request("POST", templates, headers, orjson.dumps(body))
    words = b"cannot unmarshal number into Go struct field PodSpec.template.spec.hostnameOverride of type string"
    assert (wrong.status, words in wrong.body) == (400, True)
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d"}
    scaler = {"metadata": {"name": "h"}, "spec": {"scaleTargetRef": target, "maxReplicas": 3, "behavior": {"scaleUp": {"tolerance": "0.1"}}}}
    made = orjson.loads((await http.request("POST", autoscalers, headers, orjson.dumps(scaler))).body)
    assert "tolerance" not in made["spec"]["behavior"]["scaleUp"]


async def test_an_empty_list_is_owned_though_it_is_stored_as_none(apiserver: RunningAPIServer) -> None:
    http, headers = apiserver.client.http, [*await apiserver.client.headers(), ("Content-Type", "application/json")]
    path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    for name, given, owned in (("a", {"endpoints": []}, True), ("b", {"endpoints": None}, False), ("c", {}, False)):
        made = orjson.loads((await http.request("POST", path, headers, orjson.dumps({"metadata": {"name": name}, "addressType": "IPv4", **given}))).body)
        assert (made["endpoints"], "f:endpoints" in made["metadata"]["managedFields"][0]["fieldsV1"]) == (None, owned)


async def test_of_when_a_scale_was_written_its_parent_knows_nothing(apiserver: RunningAPIServer) -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": {"a": "b"}}, "template": template}
    await apiserver.client.create(DEPLOYMENTS, {"metadata": {"name": "d"}, "spec": spec}, "default")
    await apiserver.client.patch(DEPLOYMENTS, "d", "default", {"spec": {"replicas": 3}}, subresource="scale")
    managers = (await apiserver.client.get(DEPLOYMENTS, "d", "default"))["metadata"]["managedFields"]
    assert [(one.get("subresource"), "time" in one) for one in managers] == [("scale", False), (None, True)]


async def test_what_may_not_change_is_judged_for_itself_too(apiserver: RunningAPIServer) -> None:
    made = await apiserver.client.create(INGRESS_CLASSES, {"metadata": {"name": "c"}, "spec": {"controller": "example.com/c"}})
    with pytest.raises(StatusError) as refused:
        await apiserver.client.update(INGRESS_CLASSES, {**made, "spec": {"controller": "None"}})
    assert fields(refused) == ["spec.controller"] * 2
