"""/metrics parses, names no series twice, and counts what happened."""

from __future__ import annotations

from collections import Counter

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from knarr.api.errors import StatusError
from knarr.api.resources import (
    CONFIG_MAPS,
    ENDPOINTS,
    PODS,
    VALIDATING_ADMISSION_POLICIES,
    VALIDATING_ADMISSION_POLICY_BINDINGS,
    VALIDATING_WEBHOOK_CONFIGURATIONS,
)
from knarr.testing.apiserver import RunningAPIServer


async def test_exposition_is_well_formed_and_counts_requests(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await client.create(CONFIG_MAPS, {"metadata": {"name": "a"}}, "default")
    for _ in range(3):
        await client.get(CONFIG_MAPS, "a", "default")
    await client.list(CONFIG_MAPS, "default")
    await client.list(CONFIG_MAPS)
    text = (await client.request("GET", "/metrics")).body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = [(sample.name, *sorted(sample.labels.items())) for family in families.values() for sample in family.samples]
    assert [name for name, count in Counter(samples).items() if count > 1] == []

    def count(verb: str, scope: str) -> float:
        wanted = {"verb": verb, "scope": scope, "resource": "configmaps"}
        return sum(s.value for s in families["apiserver_request"].samples if wanted.items() <= s.labels.items())

    assert (count("POST", "resource"), count("GET", "resource"), count("LIST", "namespace"), count("LIST", "cluster")) == (1, 3, 1, 1)
    buckets = [
        s.value for s in families["apiserver_request_sli_duration_seconds"].samples
        if s.name.endswith("_bucket") and s.labels["verb"] == "GET" and s.labels["resource"] == "configmaps"
    ]  # fmt: skip
    assert buckets == sorted(buckets)
    assert buckets[-1] == 3
    stored = {s.labels["resource"]: s.value for s in families["apiserver_storage_objects"].samples}
    assert stored["configmaps"] >= 1
    assert stored["flowschemas.flowcontrol.apiserver.k8s.io"] > 1
    assert b'kubernetes_healthcheck{name="ping",type="healthz"} 1' in (await client.request("GET", "/metrics/slis")).body


async def test_every_stable_metric_of_a_quiet_server_has_upstreams_name_and_labels(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await client.create(CONFIG_MAPS, {"metadata": {"name": "b"}}, "default")
    await client.create(CONFIG_MAPS, {"metadata": {"name": "c"}}, "default", dry_run=True)
    await client.list(ENDPOINTS, "default")
    with pytest.raises(StatusError):  # a namespace that is not there: NamespaceLifecycle refuses
        await client.create(CONFIG_MAPS, {"metadata": {"name": "b"}}, "absent")
    families = await _families(apiserver)
    wanted = {
        "apiserver_admission_controller_admission_duration_seconds": {"name", "operation", "rejected", "type"},
        "apiserver_admission_step_admission_duration_seconds": {"operation", "rejected", "type"},
        "apiserver_request_duration_seconds": {"component", "dry_run", "group", "resource", "scope", "subresource", "verb", "version"},
        "apiserver_response_sizes": {"component", "group", "resource", "scope", "subresource", "verb", "version"},
        "apiserver_requested_deprecated_apis": {"group", "removed_release", "resource", "subresource", "version"},
        "apiserver_storage_size_bytes": {"storage_cluster_id"}, "apiserver_current_inflight_requests": {"request_kind"},
        "apiserver_cel_compilation_duration_seconds": set(), "apiserver_cel_evaluation_duration_seconds": set(),
        "kubernetes_feature_enabled": {"name", "stage"}, "registered_metrics": {"deprecated_version", "stability_level"},
    }  # fmt: skip
    for name, labels in wanted.items():
        assert set(families[name].samples[0].labels) - {"le"} == labels, name

    def counted(metric: str, **labels: str) -> float:
        return sum(s.value for s in families[metric].samples if s.name.endswith(("_count", "_total")) and labels.items() <= s.labels.items())

    controller = "apiserver_admission_controller_admission_duration_seconds"
    assert counted(controller, name="NamespaceLifecycle", operation="CREATE", rejected="true", type="admit") == 1
    assert counted(controller, name="NamespaceLifecycle", operation="CREATE", rejected="false", type="admit") >= 2
    assert counted("apiserver_admission_step_admission_duration_seconds", operation="CREATE", rejected="true", type="admit") == 1
    assert counted("apiserver_request", dry_run="All", resource="configmaps", verb="POST", code="201") == 1
    assert [s.labels["resource"] for s in families["apiserver_requested_deprecated_apis"].samples] == ["endpoints"]
    bounds = [s.labels["le"] for s in families[controller].samples if s.name.endswith("_bucket")][:7]
    assert bounds == ["0.005", "0.025", "0.1", "0.5", "1", "2.5", "+Inf"]


async def test_what_webhooks_and_policies_decide_is_counted(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    rules = [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}]
    policy = {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": rules}, "validations": [{"expression": "object.metadata.name != 'forbidden'"}]}
    await client.create(VALIDATING_ADMISSION_POLICIES, {"metadata": {"name": "names"}, "spec": policy})
    binding = {"policyName": "names", "validationActions": ["Deny"]}
    await client.create(VALIDATING_ADMISSION_POLICY_BINDINGS, {"metadata": {"name": "everywhere"}, "spec": binding})
    hook = {
        "name": "deaf.example.com", "rules": rules, "clientConfig": {"url": "https://127.0.0.1:1/"}, "failurePolicy": "Ignore", "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }  # fmt: skip
    await client.create(VALIDATING_WEBHOOK_CONFIGURATIONS, {"metadata": {"name": "deaf"}, "webhooks": [hook]})
    with pytest.raises(StatusError):
        await client.create(CONFIG_MAPS, {"metadata": {"name": "forbidden"}}, "default")
    await client.create(CONFIG_MAPS, {"metadata": {"name": "allowed"}}, "default")
    families = await _families(apiserver)
    checks = families["apiserver_validating_admission_policy_check"].samples
    assert [(s.labels, s.value) for s in checks] == [
        ({"policy": "names", "policy_binding": "everywhere", "error_type": "no_error", "enforcement_action": "deny"}, 1)
    ]
    asked = families["apiserver_admission_webhook_request"].samples
    assert [(s.labels["name"], s.labels["code"], s.labels["rejected"], s.labels["type"]) for s in asked] == [("deaf.example.com", "0", "false", "validate")]
    assert families["apiserver_admission_webhook_fail_open_count"].samples[0].value == asked[0].value
    assert "apiserver_admission_webhook_admission_duration_seconds" in families


async def _families(apiserver: RunningAPIServer) -> dict[str, Metric]:
    text = (await apiserver.client.request("GET", "/metrics")).body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


async def test_who_comes_in_and_what_they_are_sent_is_counted(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    made = await client.create(CONFIG_MAPS, {"metadata": {"name": "d"}, "data": {"text": "x" * 3000}}, "default")
    seen = 0
    async for _ in client.watch(CONFIG_MAPS, "default", resource_version="0", field_selector="metadata.name=d", timeout_seconds=1):
        seen += 1
        if seen == 1:
            await client.update(CONFIG_MAPS, made)
            await client.delete(CONFIG_MAPS, "d", "default")
        if seen == 2:
            break
    with pytest.raises(StatusError):
        await client.create(PODS, {"metadata": {"name": "p"}, "spec": {}}, "default")
    families = await _families(apiserver)

    def value(metric: str, name: str = "", **labels: str) -> float:
        wanted = name or metric
        return sum(s.value for s in families[metric].samples if s.name == wanted and labels.items() <= s.labels.items())

    of_maps = {"group": "", "resource": "configmaps"}
    assert value("apiserver_watch_events", "apiserver_watch_events_total", version="v1", **of_maps) == 2
    assert value("apiserver_watch_events_sizes", "apiserver_watch_events_sizes_bucket", le="2048", **of_maps) == 0
    assert value("apiserver_watch_events_sizes", "apiserver_watch_events_sizes_bucket", le="4096", **of_maps) == 2
    assert value("etcd_requests", "etcd_requests_total", operation="create", **of_maps) >= 1
    assert value("etcd_request_duration_seconds", "etcd_request_duration_seconds_count", operation="delete", **of_maps) >= 1
    assert value("apiserver_request_body_size_bytes", "apiserver_request_body_size_bytes_bucket", le="50000", verb="create", **of_maps) >= 1
    assert value("apiserver_storage_events_received", "apiserver_storage_events_received_total", **of_maps) >= 2
    assert value("authentication_attempts", "authentication_attempts_total", result="success") == value("authorization_attempts", "authorization_attempts_total", result="allowed")
    assert value("apiserver_client_certificate_expiration_seconds", "apiserver_client_certificate_expiration_seconds_count") >= 4
    assert value("kube_apiserver_clusterip_allocator_allocated_ips", cidr="10.96.0.0/16") == 1
    assert value("aggregator_unavailable_apiservice", name="v1.apps") == 0
    assert value("version_info", binary="1.35.0") == 1


async def test_a_watch_is_a_request_as_long_as_it_lasts(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    begin = apiserver.server.loop.time()
    events = [event async for event in client.watch(ENDPOINTS, "default", resource_version="0", timeout_seconds=1, allow_bookmarks=False)]
    assert [type for type, _ in events] == ["ADDED"]
    lasted = apiserver.server.loop.time() - begin
    families = await _families(apiserver)
    (told,) = [
        s.value for s in families["apiserver_request_duration_seconds"].samples if s.name.endswith("_sum") and s.labels["verb"] == "WATCH"
    ]  # fmt: skip
    assert 0.9 < told <= lasted
    assert "apiserver_request_sli_duration_seconds" not in families, "it says nothing of the server's work"
