"""/metrics parses, names no series twice, and counts what happened."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from knarr.api.resources import CONFIG_MAPS
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
