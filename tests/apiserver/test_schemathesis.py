"""Requests that schemathesis makes from our own OpenAPI v3: none may break the server.

A bounded number by default; KNARR_SCHEMATHESIS_REQUESTS=10000 makes the long run, which prints what it met.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from bench.servers import TOKEN
from schemathesis import GenerationMode

from tests.faults.server import Server

REQUESTS = int(os.environ.get("KNARR_SCHEMATHESIS_REQUESTS", "200"))
GROUPS = (
    "api/v1", "apis/apps/v1", "apis/batch/v1", "apis/autoscaling/v2", "apis/networking.k8s.io/v1", "apis/rbac.authorization.k8s.io/v1",
    "apis/storage.k8s.io/v1", "apis/discovery.k8s.io/v1", "apis/policy/v1", "apis/coordination.k8s.io/v1", "apis/scheduling.k8s.io/v1",
    "apis/authorization.k8s.io/v1", "apis/authentication.k8s.io/v1", "apis/apiextensions.k8s.io/v1", "apis/certificates.k8s.io/v1",
    "apis/node.k8s.io/v1", "apis/flowcontrol.apiserver.k8s.io/v1", "apis/events.k8s.io/v1", "apis/resource.k8s.io/v1",
)  # fmt: skip
# Groups whose schemas are small: making requests costs far more than answering them.
QUICK = ("apis/coordination.k8s.io/v1", "apis/rbac.authorization.k8s.io/v1", "apis/policy/v1", "apis/discovery.k8s.io/v1")
# Streams and proxies lead to other servers; there are none here.
ELSEWHERE = re.compile(r"/(proxy|exec|attach|portforward|log)(/|$)")
# What kube-apiserver 1.35, asked the same, answers with 500 as well (test_bad_requests.py has each): wrong configurations in apply
# patches, versions that are no numbers or where there must be none, bindings to nothing; and 503 where a Service or extension server
# is not there.
KNOWN = re.compile(
    r"target\.(name|kind): |failed to create typed patch object|failed to convert new object"
    r"|strconv\.ParseUint|resourceVersion should not be set|is not present|service unavailable|error trying to reach service"
)
ANSWER_SECONDS = 10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("schemathesis"))
    asyncio.run(made.start())
    yield made
    made.kill()


def document(server: Server, group: str) -> dict[str, Any]:
    request = urllib.request.Request(f"https://127.0.0.1:{server.port}/openapi/v3/{group}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, context=server.context, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    found["paths"] = {path: item for path, item in found["paths"].items() if "/watch/" not in path and not ELSEWHERE.search(path)}
    return found


def resident_bytes(server: Server) -> int:
    assert server.process is not None
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.timeout(120 + REQUESTS)
def test_no_request_made_from_our_openapi_breaks_the_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    session = requests.Session()
    session.verify = str(server.folder / "ca.crt")
    session.headers["Authorization"] = f"Bearer {TOKEN}"
    session.trust_env = False
    statuses: collections.Counter[int] = collections.Counter()
    before = resident_bytes(server)

    def send(case: schemathesis.Case) -> None:
        # A parameter without a value is true as well.
        if case.query and ("watch" in case.query or "follow" in case.query):
            case.query["timeoutSeconds"] = 1
        answer = case.call(base_url=f"https://127.0.0.1:{server.port}", session=session, timeout=ANSWER_SECONDS, verify=session.verify)
        statuses[answer.status_code] += 1
        if answer.status_code >= 500 and not KNOWN.search(answer.content.decode("utf-8", "replace")):
            pytest.fail(f"{answer.status_code} {answer.content[:2000]!r}\n{case.as_curl_command()[:2000]}", pytrace=False)

    groups = GROUPS if REQUESTS >= 1000 else QUICK
    for group in groups:
        schema = schemathesis.openapi.from_dict(document(server, group))
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            limits = hypothesis.settings(
                max_examples=max(1, REQUESTS // len(groups) // 2), deadline=None, database=None, derandomize=True,
                phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            limits(hypothesis.given(case=schema.as_strategy(mode))(send))()
    after = resident_bytes(server)
    with capsys.disabled():
        if REQUESTS >= 1000:
            print(f"\n{sum(statuses.values())} requests, {dict(sorted(statuses.items()))}, memory {before >> 20} -> {after >> 20} MiB")
    assert sum(statuses.values()) >= REQUESTS // 2
    assert after - before < (64 << 20) + REQUESTS * 20_000
