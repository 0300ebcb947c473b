"""Tokens of Secrets: accepted while the Secret has them, their use noted once a day."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import UTC, datetime
from pathlib import Path

from knarr.aiokits import clock
from knarr.api import resources as R
from knarr.api.types import Object
from knarr.apiserver.auth.legacytokens import LAST_USED, TRACKING
from knarr.client.rest import Client
from knarr.controllers.serviceaccounttoken import legacy_token
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import make_namespace, refused, with_token


async def legacy(server: RunningAPIServer) -> str:
    """A Secret t/s with a token of the account t/default."""
    account = await server.client.get(R.SERVICE_ACCOUNTS, "default", "t")
    annotations = {"kubernetes.io/service-account.name": "default", "kubernetes.io/service-account.uid": account["metadata"]["uid"]}
    secret: Object = {"metadata": {"name": "s", "namespace": "t", "annotations": annotations}, "type": "kubernetes.io/service-account-token"}
    token = legacy_token(Path(server.server.config.service_account_key).read_bytes(), account, secret)
    await server.client.create(R.SECRETS, {**secret, "data": {"token": base64.b64encode(token.encode()).decode()}}, "t")
    return token


async def whoami(client: Client) -> str:
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    answer = await client.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=body)
    name: str = json.loads(answer.body)["status"]["userInfo"]["username"]
    return name


async def test_the_day_of_the_last_use_is_noted_once(apiserver: RunningAPIServer) -> None:
    today = datetime.fromtimestamp(clock.now(), UTC).strftime("%Y-%m-%d")
    tracking = await apiserver.client.get(R.CONFIG_MAPS, TRACKING, "kube-system")
    assert tracking["data"]["since"] == today
    await make_namespace(apiserver.client, "t")
    token = await legacy(apiserver)
    async with with_token(apiserver, token) as client:
        assert await whoami(client) == "system:serviceaccount:t:default"
        async with asyncio.timeout(5):
            while LAST_USED not in (secret := await apiserver.client.get(R.SECRETS, "s", "t"))["metadata"].get("labels", {}):
                await asyncio.sleep(0.01)
        assert secret["metadata"]["labels"][LAST_USED] == today
        assert await whoami(client) == "system:serviceaccount:t:default"
        assert (await apiserver.client.get(R.SECRETS, "s", "t"))["metadata"]["resourceVersion"] == secret["metadata"]["resourceVersion"]


async def test_a_token_that_was_marked_or_whose_secret_is_gone_is_refused(apiserver: RunningAPIServer) -> None:
    await make_namespace(apiserver.client, "t")
    token = await legacy(apiserver)
    async with with_token(apiserver, token) as client:
        await apiserver.client.patch(R.SECRETS, "s", "t", {"metadata": {"labels": {"kubernetes.io/legacy-token-invalid-since": "2020-01-01"}}})
        with refused(401, "Unauthorized"):
            await whoami(client)
        await apiserver.client.delete(R.SECRETS, "s", "t")
        with refused(401, "Unauthorized"):
            await whoami(client)
