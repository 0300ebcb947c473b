"""Controllers that do one small thing."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, NAMESPACES, NODES, SECRETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers import legacytokencleaner
from knarr.controllers.bootstrap import detached_signature
from knarr.testing.apiserver import RunningAPIServer
from tests.controllers.test_controllers import _is_gone, _resource, controllers, until


def _policy(name: str, *expressions: str, **more: Any) -> Object:
    rule = {"apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["deployments"], "operations": ["CREATE"]}
    validations = [{"expression": expression} for expression in expressions]
    return {"metadata": {"name": name}, "spec": {"matchConstraints": {"resourceRules": [rule]}, "validations": validations, **more}}


async def _warnings(client: Client, policy: Object) -> list[Object]:
    policies = _resource("validatingadmissionpolicies")
    name = (await client.create(policies, policy))["metadata"]["name"]
    found: list[Object] = []

    async def checked() -> bool:
        status = (await client.get(policies, name)).get("status") or {}
        found[:] = (status.get("typeChecking") or {}).get("expressionWarnings") or []
        return "typeChecking" in status and status["observedGeneration"] == 1

    await until(checked)
    return found


async def test_policies_are_told_what_their_expressions_get_wrong(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, "validatingadmissionpolicy-status-controller") as client:
        variables = [{"name": "wanted", "expression": "object.spec.replicas"}]
        right = ["object.spec.replicas > 1", "variables.wanted < 5", "object.spec.template.spec.containers.all(c, c.image != '')"]
        right += [
            "has(object.metadata.labels) && 'a' in object.metadata.labels",
            "authorizer.group('').resource('pods').check('get').allowed()",
        ]
        assert await _warnings(client, _policy("right", *right, variables=variables)) == []
        confused = _policy("confused", "object.spec.replicas > '1'", "object.spec.nothing == 1")
        confused["spec"]["validations"][0]["messageExpression"] = "'wants replicas > 1, got ' + object.spec.replicas"
        found = await _warnings(client, confused)
        places = ["spec.validations[0].expression", "spec.validations[0].messageExpression", "spec.validations[1].expression"]
        assert [item["fieldRef"] for item in found] == places
        assert "apps/v1, Kind=Deployment" in found[0]["warning"]
        assert "found no matching overload for '_>_' applied to '(int, string)'" in found[0]["warning"]
        assert "found no matching overload for '_+_' applied to '(string, int)'" in found[1]["warning"]
        assert "undefined field 'nothing'" in found[2]["warning"]


async def test_roles_are_aggregated_by_label(apiserver: RunningAPIServer) -> None:
    roles = _resource("clusterroles")
    async with controllers(apiserver, "clusterrole-aggregation-controller") as client:
        rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}
        selectors = [{"matchLabels": {"team": "x"}}]
        await client.create(roles, {"metadata": {"name": "all"}, "aggregationRule": {"clusterRoleSelectors": selectors}, "rules": []})
        for name in ("b", "a", "c"):
            own = {**rule, "verbs": [name]}
            await client.create(roles, {"metadata": {"name": name, "labels": {"team": "x"}}, "rules": [own, rule]})

        async def verbs(expected: list[str]) -> bool:
            return [item["verbs"][0] for item in (await client.get(roles, "all")).get("rules") or ()] == expected

        await until(lambda: verbs(["a", "get", "b", "c"]))
        await client.delete(roles, "a")
        await until(lambda: verbs(["b", "get", "c"]))


async def _ensure(client: Client, resource: Resource, obj: Object) -> None:
    try:
        await client.create(resource, obj)
    except StatusError as error:
        if not errors.is_already_exists(error):
            raise


def _token(name: str, expires: float) -> Object:
    values = {
        "token-id": name,
        "token-secret": "0123456789abcdef",
        "usage-bootstrap-signing": "true",
        "expiration": clock.rfc3339(expires),
    }
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {
        "metadata": {"name": f"bootstrap-token-{name}", "namespace": "kube-system"},
        "type": "bootstrap.kubernetes.io/token",
        "data": data,
    }


async def test_cluster_information_is_signed_by_valid_tokens(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, "bootstrapsigner,tokencleaner") as client:
        await _ensure(client, NAMESPACES, {"metadata": {"name": "kube-public"}})
        await client.create(SECRETS, _token("abcdef", clock.now() + 2))
        await client.create(
            CONFIG_MAPS, {"metadata": {"name": "cluster-info", "namespace": "kube-public"}, "data": {"kubeconfig": "content"}}
        )

        async def data() -> Any:
            return (await client.get(CONFIG_MAPS, "cluster-info", "kube-public"))["data"]

        async def signed() -> bool:
            return bool((await data()).get("jws-kubeconfig-abcdef") == detached_signature("content", "abcdef", "0123456789abcdef"))

        async def unsigned() -> bool:
            return bool(await data() == {"kubeconfig": "content"})

        await until(signed)
        await until(lambda: _is_gone(client, SECRETS, "bootstrap-token-abcdef", "kube-system"))
        await until(unsigned)


async def test_nodes_are_told_how_long_to_cache(apiserver: RunningAPIServer) -> None:
    async with controllers(apiserver, "ttl") as client:
        await client.create(NODES, {"metadata": {"name": "n"}})

        async def told() -> bool:
            return bool((await client.get(NODES, "n"))["metadata"].get("annotations", {}).get("node.alpha.kubernetes.io/ttl") == "0")

        await until(told)


@pytest.mark.parametrize("period_days", [365, -1])
async def test_token_that_nobody_used_for_long_is_marked(
    apiserver: RunningAPIServer, period_days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, accounts = apiserver.client, _resource("serviceaccounts")
    account = await client.create(accounts, {"metadata": {"name": "a", "namespace": "default"}, "secrets": [{"name": "t"}]})
    annotations = {"kubernetes.io/service-account.name": "a", "kubernetes.io/service-account.uid": account["metadata"]["uid"]}
    secret = {"metadata": {"name": "t", "namespace": "default", "annotations": annotations}, "type": "kubernetes.io/service-account-token"}
    await client.create(SECRETS, secret)
    tracking = {"metadata": {"name": "kube-apiserver-legacy-service-account-token-tracking", "namespace": "kube-system"}}
    await _ensure(client, CONFIG_MAPS, {**tracking, "data": {"since": clock.now_rfc3339()[:10]}})
    # Days may not be waited for; a period that ended yesterday is over.
    monkeypatch.setattr(legacytokencleaner, "_PERIOD_DAYS", period_days)
    async with controllers(apiserver, "legacy-serviceaccount-token-cleaner-controller"):

        async def is_marked() -> bool:
            labels = (await client.get(SECRETS, "t", "default"))["metadata"].get("labels") or {}
            return "kubernetes.io/legacy-token-invalid-since" in labels

        if period_days < 0:
            await until(is_marked)
        else:
            await asyncio.sleep(0.5)
            assert not await is_marked()
