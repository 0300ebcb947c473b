"""Mutating and validating webhooks and policies, with a real webhook server behind TLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from knarr.api import resources as R
from knarr.api.types import Object
from knarr.http.server import Request
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import make_namespace, refused
from tests.servers import https_server

Answer = Callable[[str, Object], Object]


class Hooks:
    """A webhook server that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Object]] = []
        self.port = 0
        self.ca = base64.b64encode((Path(testing._folder().name) / "ca.crt").read_bytes()).decode()

    async def handle(self, request: Request) -> None:
        review = json.loads(await request.body())["request"]
        path = request.path
        self.asked.append((path, review))
        answer: Object = {"uid": review["uid"], "allowed": True}
        if path.startswith("/add/"):
            patch = [{"op": "add", "path": f"/data/{path.removeprefix('/add/')}-{len(review['object']['data'])}", "value": "yes"}]
            answer.update(patchType="JSONPatch", patch=base64.b64encode(json.dumps(patch).encode()).decode())
        elif path == "/deny":
            answer.update(allowed=False, status={"reason": "the configmap contains unwanted key and value"})
        elif path == "/warn":
            answer.update(warnings=["take care"])
        elif path == "/slow":
            await asyncio.sleep(1.5)
        elif path == "/wrong-uid":
            answer["uid"] = "x"
        body = {"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": answer}
        request.respond(200, [("Content-Type", "application/json")], json.dumps(body).encode())

    def hook(self, name: str, path: str, *, operations: tuple[str, ...] = ("CREATE",), **more: object) -> Object:
        rule = {"operations": list(operations), "apiGroups": [""], "apiVersions": ["v1"], "resources": ["configmaps"]}
        return {
            "name": f"{name}.example.com", "clientConfig": {"url": f"https://127.0.0.1:{self.port}{path}", "caBundle": self.ca}, "rules": [rule],
            "sideEffects": "None", "admissionReviewVersions": ["v1"], **more,
        }  # fmt: skip


@contextlib.asynccontextmanager
async def _serving(hooks: Hooks) -> AsyncIterator[Hooks]:
    async with https_server(hooks.handle) as hooks.port:
        yield hooks


@pytest.fixture
async def hooks(apiserver: RunningAPIServer) -> AsyncIterator[Hooks]:
    async with _serving(Hooks()) as made:
        await make_namespace(apiserver.client, "t", {"kind": "test"})
        yield made


def _map(name: str, **data: str) -> Object:
    return {"metadata": {"name": name, "namespace": "t"}, "data": data or {"a": "b"}}


async def _configure(server: RunningAPIServer, mutating: bool, *specs: Object) -> None:
    resource = R.MUTATING_WEBHOOK_CONFIGURATIONS if mutating else R.VALIDATING_WEBHOOK_CONFIGURATIONS
    await server.client.create(resource, {"metadata": {"name": "w"}, "webhooks": list(specs)})


async def test_mutating_webhooks_run_in_order_each_on_what_the_one_before_made(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    await _configure(apiserver, True, hooks.hook("one", "/add/first"), hooks.hook("two", "/add/second"))
    made = await apiserver.client.create(R.CONFIG_MAPS, _map("x"), "t")
    assert made["data"] == {"a": "b", "first-1": "yes", "second-2": "yes"}


async def test_a_webhook_that_asks_for_it_is_run_again_after_a_later_change(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    await _configure(
        apiserver, True, hooks.hook("one", "/add/first", reinvocationPolicy="IfNeeded"), hooks.hook("two", "/add/second"),
        hooks.hook("three", "/warn", reinvocationPolicy="IfNeeded"),
    )  # fmt: skip
    made = await apiserver.client.create(R.CONFIG_MAPS, _map("x"), "t")
    assert made["data"] == {"a": "b", "first-1": "yes", "second-2": "yes", "first-3": "yes"}
    assert [path for path, _ in hooks.asked] == ["/add/first", "/add/second", "/warn", "/add/first", "/warn"]


async def test_match_conditions_and_selectors_choose_the_requests(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    conditions = [{"name": "skip", "expression": "object.metadata.name != 'skip-me'"}]
    await _configure(
        apiserver, True, hooks.hook("one", "/add/first", matchConditions=conditions),
        hooks.hook("other", "/add/never", namespaceSelector={"matchLabels": {"kind": "other"}}),
    )  # fmt: skip
    assert "first-1" in (await apiserver.client.create(R.CONFIG_MAPS, _map("x"), "t"))["data"]
    assert (await apiserver.client.create(R.CONFIG_MAPS, _map("skip-me"), "t"))["data"] == {"a": "b"}


async def test_a_refusal_carries_name_reason_and_the_old_object_on_delete(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    client = apiserver.client
    await client.create(R.CONFIG_MAPS, _map("x"), "t")
    await _configure(apiserver, False, hooks.hook("d", "/deny", operations=("CREATE", "UPDATE", "DELETE")))
    words = 'admission webhook "d.example.com" denied the request: the configmap contains unwanted key and value'
    with refused(400, words):
        await client.create(R.CONFIG_MAPS, _map("y"), "t")
    with refused(400, words):
        await client.patch(R.CONFIG_MAPS, "x", "t", {"data": {"c": "d"}})
    with refused(400, words):
        await client.delete(R.CONFIG_MAPS, "x", "t")
    deleted = hooks.asked[-1][1]
    assert (deleted["operation"], deleted["name"], deleted["object"], deleted["oldObject"]["data"]) == ("DELETE", "x", None, {"a": "b"})
    assert deleted["userInfo"]["groups"] == ["system:masters", "system:authenticated"]


async def test_failure_policy_decides_when_a_webhook_cannot_be_asked(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    client = apiserver.client
    await _configure(apiserver, False, hooks.hook("s", "/slow", timeoutSeconds=1))
    with refused(500, "Internal error occurred: failed calling webhook", "/slow?timeout=1s", "context deadline exceeded"):
        await client.create(R.CONFIG_MAPS, _map("x"), "t")
    await client.delete(R.VALIDATING_WEBHOOK_CONFIGURATIONS, "w")
    unverified = hooks.hook("u", "/warn")
    del unverified["clientConfig"]["caBundle"]
    await _configure(apiserver, False, hooks.hook("s", "/slow", timeoutSeconds=1, failurePolicy="Ignore"), {**unverified, "failurePolicy": "Ignore"})
    await client.create(R.CONFIG_MAPS, _map("x"), "t")
    assert [path for path, _ in hooks.asked] == ["/slow", "/slow"]
    await client.delete(R.VALIDATING_WEBHOOK_CONFIGURATIONS, "w")
    await _configure(apiserver, False, hooks.hook("u", "/wrong-uid"))
    with refused(500, "received invalid webhook response: expected response.uid="):
        await client.create(R.CONFIG_MAPS, _map("y"), "t")


async def test_dry_run_needs_a_webhook_without_side_effects_and_warnings_reach_the_client(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    client = apiserver.client
    await _configure(apiserver, False, hooks.hook("w", "/warn"))
    answer = await client.request("POST", "/api/v1/namespaces/t/configmaps", query={"dryRun": "All"}, body=_map("x"))
    assert "take care" in answer.headers["warning"]
    assert hooks.asked[-1][1]["dryRun"] is True


async def test_configurations_of_admission_itself_are_exempt(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    everything = {"operations": ["*"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*/*"]}
    await _configure(apiserver, False, {**hooks.hook("d", "/deny"), "rules": [everything]})
    with refused(400, "denied the request"):
        await apiserver.client.create(R.SECRETS, {"metadata": {"name": "s", "namespace": "t"}}, "t")
    await apiserver.client.delete(R.VALIDATING_WEBHOOK_CONFIGURATIONS, "w")


async def test_bad_expressions_are_refused_when_written(apiserver: RunningAPIServer, hooks: Hooks) -> None:
    bad = hooks.hook("x", "/warn", matchConditions=[{"name": "x", "expression": "... [] bad expression"}])
    with refused(422, "webhooks[0].matchConditions[0].expression: Invalid value", "compilation failed"):
        await _configure(apiserver, False, bad)


async def test_a_policys_expressions_must_be_known_to_have_their_type(apiserver: RunningAPIServer) -> None:
    for expression, words in (
        ("object.spec.paused", "must evaluate to bool but got dyn"), ("variables.any", "must evaluate to bool but got dyn"),
        ("namespaceObject.metadata.name == 1", "applied to '(string, int)'"), ("namespaceObject.metadata.uid == ''", "undefined field 'uid'"),
    ):  # fmt: skip
        variables = [{"name": "any", "expression": "object.spec.paused"}]
        with refused(422, "spec.validations[0].expression: Invalid value", words):
            await apiserver.client.create(R.VALIDATING_ADMISSION_POLICIES, _policy("p", variables=variables, validations=[{"expression": expression}]))
    fine = ["namespaceObject == null || namespaceObject.metadata.labels['a'] == 'b'", "bool(object.spec.paused)", "variables.any == true"]
    await apiserver.client.create(
        R.VALIDATING_ADMISSION_POLICIES, _policy("p", variables=variables, validations=[{"expression": expression} for expression in fine]))


def _policy(name: str, **spec: object) -> Object:
    rules = [{"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["deployments"]}]
    return {"metadata": {"name": name}, "spec": {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": rules}, **spec}}


def _deployment(name: str, replicas: int) -> Object:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    return {"metadata": {"name": name, "namespace": "t"}, "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}}


async def _bind(server: RunningAPIServer, policy: Object, *actions: str, **spec: object) -> None:
    await server.client.create(R.VALIDATING_ADMISSION_POLICIES, policy)
    binding = {"metadata": {"name": "b"}, "spec": {"policyName": policy["metadata"]["name"], "validationActions": list(actions or ("Deny",)), **spec}}
    await server.client.create(R.VALIDATING_ADMISSION_POLICY_BINDINGS, binding)


async def test_a_policy_refuses_with_invalid_and_falls_back_when_its_message_fails(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    validations = [
        {"expression": "object.spec.replicas > 1", "messageExpression": "'wants ' + object.spec.replicas"},
        {"expression": "namespaceObject.metadata.name == 't'"},
    ]
    await _bind(apiserver, _policy("p", validations=validations))
    with refused(422, "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: failed expression: object.spec.replicas > 1") as caught:
        await client.create(R.DEPLOYMENTS, _deployment("x", 1), "t")
    assert caught.value.reason == "Invalid"
    await client.create(R.DEPLOYMENTS, _deployment("x", 2), "t")


async def test_variables_build_on_each_other_and_are_lazy(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    variables = [
        {"name": "replicas", "expression": "object.spec.replicas"}, {"name": "odd", "expression": "variables.replicas % 2 == 1"},
        {"name": "broken", "expression": "object.spec.nothing.at.all"},
    ]  # fmt: skip
    validations = [{"expression": "variables.replicas > 1"}, {"expression": "variables.odd"}]
    await _bind(apiserver, _policy("p", variables=variables, validations=validations))
    with refused(422, "failed expression: variables.replicas > 1"):
        await client.create(R.DEPLOYMENTS, _deployment("x", 1), "t")
    with refused(422, "failed expression: variables.odd"):
        await client.create(R.DEPLOYMENTS, _deployment("x", 2), "t")
    await client.create(R.DEPLOYMENTS, _deployment("x", 3), "t")


async def test_parameters_and_warnings(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    await client.create(R.CONFIG_MAPS, _map("limits", most="3"), "t")
    policy = _policy(
        "p", paramKind={"apiVersion": "v1", "kind": "ConfigMap"},
        validations=[{"expression": "object.spec.replicas <= int(params.data.most)", "message": "too many"}],
    )  # fmt: skip
    await _bind(apiserver, policy, "Warn", paramRef={"name": "limits", "namespace": "t", "parameterNotFoundAction": "Deny"})
    answer = await client.request("POST", "/apis/apps/v1/namespaces/t/deployments", body=_deployment("x", 5))
    assert "Validation failed for ValidatingAdmissionPolicy 'p' with binding 'b': too many" in answer.headers["warning"]


async def test_a_policy_that_cannot_compile_is_refused_when_written(apiserver: RunningAPIServer) -> None:
    with refused(422, "spec.validations[0].expression: Invalid value", "undeclared reference to 'nonsense'"):
        await apiserver.client.create(R.VALIDATING_ADMISSION_POLICIES, _policy("p", validations=[{"expression": "nonsense > 1"}]))
