"""The audit log says who did what, as far as the policy wants to know."""

from __future__ import annotations

from pathlib import Path

import orjson

from knarr.api.resources import CONFIG_MAPS, SECRETS
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
