"""The audit log says who did what, as far as the policy wants to know."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
import pytest

from knarr.api.resources import CONFIG_MAPS, SECRETS
from knarr.apiserver.auditbackends import LogBackend
from knarr.apiserver.auditpolicy import Policy
from knarr.http.server import HTTPServer, Request
from knarr.testing.apiserver import running_apiserver

POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, nonResourceURLs: ["/healthz*"]}
- {level: Metadata, resources: [{group: "", resources: [secrets]}]}
- {level: RequestResponse, verbs: [create], resources: [{group: "", resources: [configmaps]}]}
- {level: None}
"""


EVERYTHING = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitManagedFields: true
rules:
- {level: None, users: ["system:apiserver"]}
- {level: Request, verbs: [create, patch], resources: [{group: "", resources: [configmaps]}]}
- {level: Metadata, resources: [{group: "", resources: [configmaps]}]}
"""


async def test_each_stage_of_a_request_is_an_event_with_what_was_sent(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(EVERYTHING)
    log = tmp_path / "audit.log"
    async with running_apiserver(audit_policy=str(tmp_path / "policy.yaml"), audit_log_path=str(log)) as server:
        body = {"metadata": {"name": "a"}, "data": {"k": "v"}}
        answer = await server.client.request("POST", "/api/v1/namespaces/default/configmaps", body=body)
        version = orjson.loads(answer.body)["metadata"]["resourceVersion"]
        await server.client.patch(CONFIG_MAPS, "a", "default", {"data": {"k": "w"}})
        async for _ in server.client.watch(CONFIG_MAPS, "default", resource_version=version):
            break
        told = (await server.client.request("GET", "/metrics")).body.decode()
    events = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    assert [(e["verb"], e["stage"]) for e in events] == [
        ("create", "RequestReceived"), ("create", "ResponseComplete"), ("patch", "RequestReceived"), ("patch", "ResponseComplete"),
        ("watch", "RequestReceived"), ("watch", "ResponseStarted"), ("watch", "ResponseComplete"),
    ]  # fmt: skip
    assert events[0]["auditID"] == events[1]["auditID"] == answer.headers["audit-id"]
    # As sent and defaulted, not as stored.
    assert events[1]["requestObject"] == {"kind": "ConfigMap", "apiVersion": "v1", **body}
    assert events[3]["requestObject"] == {"data": {"k": "w"}}
    assert "responseObject" not in events[1]
    assert events[1]["annotations"] == {"authorization.k8s.io/decision": "allow", "authorization.k8s.io/reason": ""}
    assert 'apiserver_audit_level_total{level="Request"} 2' in told


async def test_events_are_sent_to_a_webhook_in_lists(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(EVERYTHING.replace("rules:", "omitStages: [RequestReceived]\nrules:"))
    received: list[dict[str, Any]] = []

    async def take(request: Request) -> None:
        received.append(orjson.loads(await request.body()))
        # The first batch is refused for now: it comes again.
        request.respond(503 if len(received) == 1 else 200, [("Content-Type", "application/json")], b"{}")

    receiver = HTTPServer(take)
    port = await receiver.listen("127.0.0.1", 0)
    kubeconfig = tmp_path / "webhook.yaml"
    kubeconfig.write_text(
        f"apiVersion: v1\nkind: Config\nclusters: [{{name: a, cluster: {{server: 'http://127.0.0.1:{port}/audit'}}}}]\n"
        "users: [{name: u, user: {}}]\ncontexts: [{name: c, context: {cluster: a, user: u}}]\ncurrent-context: c\n"
    )
    settings = {"audit_policy": str(tmp_path / "policy.yaml"), "audit_webhook_config": str(kubeconfig), "audit_webhook_batch_events": 3}
    with mock.patch("knarr.apiserver.auditbackends.FIRST_PAUSE_SECONDS", 0.01):
        async with running_apiserver(**settings) as server:
            for name in "abcde":
                await server.client.create(CONFIG_MAPS, {"metadata": {"name": name}}, "default")
            async with asyncio.timeout(20):
                while len(received) < 2:
                    await asyncio.sleep(0.01)
    await receiver.close()
    assert all(batch["kind"] == "EventList" and batch["apiVersion"] == "audit.k8s.io/v1" for batch in received)
    assert received[0] == received[1]
    # What was not yet a batch went when the server ended.
    names = [event["requestObject"]["metadata"]["name"] for batch in received[1:] for event in batch["items"]]
    assert names == list("abcde")
    assert len(received[0]["items"]) == 3


def test_a_log_that_is_full_is_put_aside(tmp_path: Path) -> None:
    backend = LogBackend(str(tmp_path / "audit.log"), max_bytes=120, backups=2)
    for number in range(12):
        backend.write({"number": number, "text": "x" * 30})
    asyncio.run(backend.close())
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert b"".join(path.read_bytes() for path in files).count(b"\n") == 6
    assert all(path.stat().st_size <= 120 for path in files)


@pytest.mark.parametrize("text", ["kind: Policy", "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: All}]", "rules: ["])
def test_a_policy_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"policy\.yaml"):
        Policy(str(tmp_path / "policy.yaml"))


async def test_policy_decides_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    log = tmp_path / "audit.log"
    async with running_apiserver(audit_policy=str(tmp_path / "policy.yaml"), audit_log_path=str(log)) as server:
        await server.client.create(CONFIG_MAPS, {"metadata": {"name": "a"}, "data": {"k": "v"}}, "default")
        await server.client.create(SECRETS, {"metadata": {"name": "s"}, "stringData": {"k": "hidden"}}, "default")
        await server.client.get(CONFIG_MAPS, "a", "default")
    events = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    mine = [e for e in events if e["userAgent"].startswith("knarr-test")]
    assert [(e["verb"], e["objectRef"]["resource"], e["level"]) for e in mine] == [
        ("create", "configmaps", "RequestResponse"), ("create", "secrets", "Metadata"),
    ]
    assert mine[0]["requestObject"]["data"] == {"k": "v"}
    assert mine[0]["responseObject"]["metadata"]["uid"]
    assert mine[0]["user"]["username"] == "kubernetes-admin"
    assert mine[0]["responseStatus"]["code"] == 201
    assert b"hidden" not in log.read_bytes()
