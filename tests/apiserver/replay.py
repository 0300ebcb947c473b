"""Replays recorded exchanges against a running server and compares the answers.

The recordings (tests/apiserver/recorded/*.jsonl.gz) hold what a real API server 1.35 answered to requests of our own; their
format and normalisation are described in recorded/README.md. Used by test_recorded.py, and by hand:

    python -m tests.apiserver.replay FILE.jsonl [scenario-prefix] [-v]
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from knarr.http.client import HTTPClient, Response
from knarr.testing.apiserver import RunningAPIServer, running_apiserver

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
ADDRESS = re.compile(r"\b10\.0\.\d{1,3}\.\d{1,3}\b")
TOKEN_VOLUME = re.compile(r"kube-api-access-[a-z0-9]{5}")
NODE_PORT = re.compile(r"\b(\d+:)(3\d{4})(?=/(?:TCP|UDP|SCTP)\b)")
AGE = re.compile(r"^(?:\d+[smhdy])+$")
REFERENCE = re.compile(r"\{\{(\d+):([^}]*)\}\}")
SERVICE_CIDR = "10.0.0.0/16"


@dataclass
class Difference:
    """One step that was answered otherwise."""

    scenario: str
    step: int
    what: str
    request: str = ""


@dataclass
class Outcome:
    """How a file's replay went."""

    steps: int = 0
    equal: int = 0
    differences: list[Difference] = field(default_factory=list)


def load(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [orjson.loads(line) for line in data.splitlines() if line.strip()]


def lookup(value: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(value, list):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return None
    return value


def fill(value: Any, answers: list[Any]) -> Any:
    """Put live values of earlier answers into a request."""
    if isinstance(value, str):
        whole = REFERENCE.fullmatch(value)
        if whole:
            found = lookup(answers[int(whole[1])], whole[2])
            return found if found is not None else ""
        return REFERENCE.sub(lambda m: str(lookup(answers[int(m[1])], m[2]) or ""), value)
    if isinstance(value, dict):
        return {fill(key, answers): fill(each, answers) for key, each in value.items()}
    if isinstance(value, list):
        return [fill(each, answers) for each in value]
    return value


class Normaliser:
    """Applies the recording's normalisation to live answers of one scenario."""

    def __init__(self, scenario: dict[str, Any]) -> None:
        text = orjson.dumps([{k: s.get(k) for k in ("path", "body")} for s in scenario["steps"]]).decode()
        self.known_times = set(RFC3339.findall(text))
        self.known_addresses = set(ADDRESS.findall(text))
        self.known_ports = {int(p) for p in re.findall(r'"(?:nodePort|healthCheckNodePort)\\?":\s*(\d+)', text)}
        self.known_text = text
        self.keep_managed = bool(scenario.get("keepManagedFields"))
        self.generated: set[str] = set()
        self.bases = set(re.findall(r'generateName\\?":\s*\\?"([^"\\]*)', text))

    def object(self, value: Any, parent: str = "", top: bool = True) -> Any:
        if isinstance(value, dict):
            return self._dict(value, parent)
        if isinstance(value, list):
            return [self.object(each, parent, False) for each in value]
        if isinstance(value, str):
            return self.text(value)
        return value

    def _dict(self, value: dict[str, Any], parent: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, each in value.items():
            if parent == "metadata" and key in ("uid", "resourceVersion", "creationTimestamp", "selfLink"):
                continue
            if key == "managedFields":
                if self.keep_managed:
                    out[key] = [{k: v for k, v in entry.items() if k != "time"} for entry in each or []]
                continue
            if key == "message" and isinstance(each, str):
                continue
            if key == "extra" and parent == "spec" and isinstance(each, dict):
                # The recording's caller had a token, ours has a certificate.
                each = {k: v for k, v in each.items() if k != "authentication.kubernetes.io/credential-id"}
                if not each:
                    continue
            if key == "continue" and parent == "metadata" and each:
                out[key] = "*"
                continue
            if key in ("resourceVersion", "uid") and parent != "metadata" and each:
                out[key] = "*"
                continue
            if key in ("nodePort", "healthCheckNodePort") and isinstance(each, int) and each and each not in self.known_ports:
                out[key] = "*"
                continue
            if key == "name" and parent == "metadata" and isinstance(each, str) and self._is_generated(each):
                self.generated.add(each)
                out[key] = "*"
                continue
            out[key] = self.object(each, key, False)
        return out

    def _is_generated(self, name: str) -> bool:
        return any(base and name.startswith(base) and len(name) == len(base) + 5 for base in self.bases)

    def cell(self, value: Any) -> Any:
        """A table's cell: as `object`; node ports that nobody asked for are "*" in lists of ports."""
        if isinstance(value, str):
            value = NODE_PORT.sub(lambda m: m[0] if int(m[2]) in self.known_ports else f"{m[1]}*", value)
        return self.object(value)

    def text(self, value: str) -> str:
        if RFC3339.fullmatch(value):
            return value if value in self.known_times else "*"
        if value in self.generated:
            return "*"
        value = UUID.sub("*", value)
        value = TOKEN_VOLUME.sub("*", value)
        return ADDRESS.sub(lambda m: m[0] if m[0] in self.known_addresses else "*", value)


def drop_path(value: Any, path: str) -> None:
    """Remove a volatile path, in place."""
    parts = re.findall(r"[^.\[\]]+|\[\d+\]|\[\]", path)
    _drop(value, parts)


def _drop(value: Any, parts: list[str]) -> None:
    if not parts:
        return
    head, rest = parts[0], parts[1:]
    if isinstance(value, list):
        if head.strip("[]").isdigit():
            index = int(head.strip("[]"))
            if index < len(value):
                if rest:
                    _drop(value[index], rest)
                else:
                    value[index] = "*"
        else:
            for each in value:
                _drop(each, rest if head in ("[]", "*") else parts)
    elif isinstance(value, dict):
        for size in range(len(parts), 0, -1):
            # Keys may hold dots themselves.
            key = ".".join(parts[:size])
            if key in value:
                if size == len(parts):
                    del value[key]
                else:
                    _drop(value[key], parts[size:])
                return


def expected_result(step: dict[str, Any]) -> dict[str, Any]:
    keys = ("status", "object", "columns", "rows", "rowObjectKind", "events", "text", "reason", "code", "causes", "details", "retryAfter", "warnings")
    return {key: step[key] for key in keys if key in step}


def actual_result(step: dict[str, Any], response: Response, normaliser: Normaliser, events: list[Any] | None) -> dict[str, Any]:
    out: dict[str, Any] = {"status": response.status}
    warnings = response.header_values("warning")
    if warnings:
        out["warnings"] = [len(warnings), int(warnings[0].split(" ", 1)[0])]
    if events is not None:
        out["events"] = [_event(event, normaliser) for event in events]
        return out
    try:
        body = orjson.loads(response.body)
    except orjson.JSONDecodeError:
        out["text"] = True
        return out
    if response.status >= 400:
        return out | _error(body, response, normaliser)
    kind = body.get("kind") if isinstance(body, dict) else None
    if kind == "Table":
        return out | _table(body, normaliser)
    if kind in ("SubjectAccessReview", "SelfSubjectAccessReview", "LocalSubjectAccessReview", "SelfSubjectRulesReview", "TokenReview"):
        if kind.endswith("AccessReview"):
            body = {key: body[key] for key in ("apiVersion", "kind", "status") if key in body}
        status = body.get("status") or {}
        for key in ("reason", "evaluationError", "error"):
            if status.get(key) and " " in str(status[key]):
                status[key] = "*"
        for key in ("resourceRules", "nonResourceRules"):
            if status.get(key):
                status[key] = sorted(status[key], key=lambda rule: orjson.dumps(rule, option=orjson.OPT_SORT_KEYS))
    out["object"] = normaliser.object(body)
    return out


def _event(event: dict[str, Any], normaliser: Normaliser) -> dict[str, Any]:
    obj = event.get("object") or {}
    if event.get("type") == "ERROR":
        return {"type": "ERROR", "reason": obj.get("reason"), "code": obj.get("code")}
    if obj.get("kind") == "Table":
        out = {"type": event["type"], **_table(obj, normaliser)}
        if not out["columns"]:
            del out["columns"]
        return out
    return {"type": event["type"], "object": normaliser.object(obj)}


def _error(body: Any, response: Response, normaliser: Normaliser) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if not isinstance(body, dict):
        return out
    out["reason"] = body.get("reason", "")
    out["code"] = body.get("code")
    details = body.get("details") or {}
    causes = details.get("causes") or []
    if causes:
        out["causes"] = sorted([cause.get("reason", ""), cause.get("field", "")] for cause in causes)
    named = {key: details[key] for key in ("name", "kind", "group") if details.get(key)}
    if named.get("name") and (normaliser._is_generated(named["name"]) or named["name"] in normaliser.generated):
        named["name"] = "*"
    if named:
        out["details"] = named
    if "retry-after" in response.headers or details.get("retryAfterSeconds"):
        out["retryAfter"] = True
    return out


def _table(body: dict[str, Any], normaliser: Normaliser) -> dict[str, Any]:
    rows = body.get("rows") or []
    cells = [["*" if isinstance(c, str) and AGE.match(c) else normaliser.cell(c) for c in row["cells"]] for row in rows]
    kind = next((f"{row['object'].get('apiVersion')}/{row['object'].get('kind')}" for row in rows if row.get("object")), None)
    columns = [[c["name"], c["type"], c.get("format", ""), c.get("priority", 0)] for c in body.get("columnDefinitions") or []]
    return {"columns": columns, "rows": cells, "rowObjectKind": kind}


def first_difference(expected: Any, actual: Any, path: str = "") -> str:
    """Return where two values differ first, "" if nowhere. "*" in the expectation takes anything."""
    if expected == "*":
        return ""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted(expected.keys() | actual.keys()):
            if key not in actual:
                return f"{path}.{key}: missing, expected {str(expected[key])[:150]}"
            if key not in expected:
                return f"{path}.{key}: unexpected {str(actual[key])[:150]}"
            found = first_difference(expected[key], actual[key], f"{path}.{key}")
            if found:
                return found
        return ""
    if isinstance(expected, list) and isinstance(actual, list):
        for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
            found = first_difference(one, other, f"{path}[{index}]")
            if found:
                return found
        return "" if len(expected) == len(actual) else f"{path}: {len(actual)} items, expected {len(expected)}: {str(actual)[:150]} / {str(expected)[:150]}"
    return "" if expected == actual and type(expected) is type(actual) else f"{path}: {str(actual)[:120]!r}, expected {str(expected)[:120]!r}"


class Replayer:
    """Runs scenarios against one server."""

    def __init__(self, server: RunningAPIServer) -> None:
        self._server = server
        config = server.client_config
        self._admin = HTTPClient(server.url, ssl_context=config.ssl_context(), headers={"User-Agent": "rec/1"})
        import ssl

        bare = ssl.create_default_context(cadata=(config.ca_data or b"").decode())
        self._nobody = HTTPClient(server.url, ssl_context=bare, headers={"User-Agent": "rec/1"})

    async def close(self) -> None:
        await self._admin.close()
        await self._nobody.close()

    async def prepare(self) -> None:
        """Namespace rec with what controllers would put there."""
        await self.send("POST", "/api/v1/namespaces", {"metadata": {"name": "rec"}})
        for namespace in ("rec", "default", "kube-system"):
            await self._furnish(namespace)

    async def _furnish(self, namespace: str) -> None:
        """Make what controllers put into a namespace."""
        await self.send("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "default"}})
        await self.send("POST", f"/api/v1/namespaces/{namespace}/configmaps", {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": "x"}})

    async def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, auth: bool = True) -> Response:
        data = body if isinstance(body, bytes) or body is None else orjson.dumps(body)
        client = self._admin if auth else self._nobody
        return await client.request(method, path, {"Content-Type": "application/json", **(headers or {})}, data, timeout_seconds=30)

    async def watch(self, path: str, headers: dict[str, str]) -> tuple[Response, list[Any] | None]:
        async with self._admin.stream("GET", path, headers) as stream:
            response = Response(stream.status, stream.headers, b"", stream.header_list)
            if stream.status != 200:
                response.body = await stream.read()
                return response, None
            events: list[Any] = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(8):
                    async for line in stream.iter_lines():
                        if line.strip():
                            event = orjson.loads(line)
                            if event.get("type") != "BOOKMARK":
                                events.append(event)
            return response, events

    async def run(self, scenario: dict[str, Any], *, no_sleep: bool = True) -> list[tuple[int, str, str]]:
        """Run one scenario; returns (step, difference, request) for each step that differs."""
        normaliser = Normaliser(scenario)
        answers: list[Any] = []
        out: list[tuple[int, str, str]] = []
        for index, step in enumerate(scenario["steps"]):
            path = fill(step["path"], answers)
            body = step.get("body")
            data: bytes | None = None
            if body is not None:
                filled = fill(body, answers)
                data = filled.encode("utf-8", "surrogateescape") if isinstance(filled, str) else orjson.dumps(filled)
            headers = {str(k): str(v) for k, v in (step.get("headers") or {}).items()}
            headers["Content-Type"] = step.get("contentType", "application/json") if body is not None else headers.get("Content-Type", "application/json")
            headers["Accept"] = step.get("accept", "application/json")
            if step.get("sleep"):
                before = scenario["steps"][index - 1] if index else {}
                if before.get("method") == "POST" and before.get("path") == "/api/v1/namespaces" and before.get("status") == 201:
                    await self._furnish(before["body"]["metadata"]["name"])
                await asyncio.sleep(min(step["sleep"], 0.3) if no_sleep else step["sleep"])
            events: list[Any] | None = None
            if "events" in step:
                response, events = await self.watch(path, headers)
            else:
                client = self._nobody if step.get("auth") is False else self._admin
                response = await client.request(step["method"], path, headers, data, timeout_seconds=30)
            try:
                answers.append(orjson.loads(response.body))
            except orjson.JSONDecodeError:
                answers.append(None)
            difference = self._compare(step, response, normaliser, events)
            if difference:
                out.append((index, difference, f"{step['method']} {path} {(data or b'')[:300]!r} -> {response.body[:300]!r}"))
        return out

    @staticmethod
    def _compare(step: dict[str, Any], response: Response, normaliser: Normaliser, events: list[Any] | None) -> str:
        expected = expected_result(step)
        actual = actual_result(step, response, normaliser, events)
        if step.get("statusOnly"):
            expected, actual = {"status": expected["status"]}, {"status": actual["status"]}
        for path in step.get("volatile") or []:
            for side in (expected, actual):
                drop_path(side.get("object", side), path)
                drop_path(side, path)
        if expected.get("rowObjectKind") is None and actual.get("rowObjectKind") is None:
            expected.pop("rowObjectKind", None)
            actual.pop("rowObjectKind", None)
        return first_difference(expected, actual)

    async def clean(self, scenario: dict[str, Any]) -> None:
        """Delete what the scenario made."""
        made: list[str] = []
        for step in scenario["steps"]:
            if step["method"] in ("POST", "PUT", "PATCH") and step["status"] < 300 and "dryRun=All" not in step["path"]:
                path = step["path"].split("?")[0]
                if "{{" in path:
                    continue
                if step["method"] == "POST":
                    body = step.get("body")
                    name = ((body or {}).get("metadata") or {}).get("name") if isinstance(body, dict) else None
                    if name:
                        path = f"{path}/{name}"
                    elif isinstance(body, dict) and (body.get("metadata") or {}).get("generateName"):
                        path = path
                    else:
                        continue
                made.append(path)
        for path in dict.fromkeys(made):
            await self._remove(path)

    async def _remove(self, path: str) -> None:
        response = await self.send("DELETE", f"{path}?gracePeriodSeconds=0")
        if response.status >= 400:
            return
        check = await self.send("GET", path)
        if check.status == 200:
            obj = orjson.loads(check.body)
            if obj.get("metadata", {}).get("finalizers"):
                await self.send("PATCH", path, {"metadata": {"finalizers": None}}, {"Content-Type": "application/merge-patch+json"})
            if obj.get("kind") == "Namespace":
                obj["spec"] = {}
                await self.send("PUT", f"{path}/finalize", obj)


@contextlib.asynccontextmanager
async def replayer() -> AsyncIterator[Replayer]:
    async with running_apiserver(service_cidrs=(SERVICE_CIDR,), anonymous_paths=("*",)) as server:
        made = Replayer(server)
        await made.prepare()
        try:
            yield made
        finally:
            await made.close()


async def replay(scenarios: Iterable[dict[str, Any]], *, no_sleep: bool = True, servers: int = 4) -> Outcome:
    """Replay scenarios, one after another on each of several fresh servers."""
    outcome = Outcome()
    waiting = list(scenarios)[::-1]

    async def one_server() -> None:
        async with replayer() as made:
            while waiting:
                await _replay_one(made, waiting.pop(), outcome, no_sleep=no_sleep)

    await asyncio.gather(*[one_server() for _ in range(servers)])
    return outcome


async def _replay_one(made: Replayer, scenario: dict[str, Any], outcome: Outcome, *, no_sleep: bool) -> None:
    steps = len(scenario["steps"])
    try:
        found = await made.run(scenario, no_sleep=no_sleep)
    except Exception as error:
        found = [(-1, f"failed: {error!r}", "")] * steps
    with contextlib.suppress(Exception):
        await made.clean(scenario)
    outcome.steps += steps
    outcome.equal += steps - len(found)
    outcome.differences += [Difference(scenario["scenario"], index, what, request) for index, what, request in found]


def main() -> None:
    path = Path(sys.argv[1])
    prefix = sys.argv[2] if len(sys.argv) > 2 and not sys.argv[2].startswith("-") else ""
    scenarios = [s for s in load(path) if s["scenario"].startswith(prefix)]
    outcome = asyncio.run(replay(scenarios))
    unstable = {s["scenario"] for s in scenarios if s.get("unstable")}
    for difference in outcome.differences:
        mark = " (unstable)" if difference.scenario in unstable else ""
        print(f"{difference.scenario}[{difference.step}]{mark} {difference.what}")
        if "-v" in sys.argv:
            print(f"    {difference.request}")
    print(f"{outcome.equal} of {outcome.steps} equal ({100 * outcome.equal / max(1, outcome.steps):.1f} %)")


if __name__ == "__main__":
    main()
