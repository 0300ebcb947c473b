"""Configuration files of authentication and authorization that change while the server runs; and a judge of images."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from knarr.api import jwt
from knarr.api import resources as R
from knarr.api.errors import StatusError
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.options import applied
from knarr.http.server import Request
from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from tests.apiserver.auth.test_outside import _ca, _kubeconfig, _server, _whoami
from tests.apiserver.identities import as_user, make_namespace, pod, refused

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.apiserver.auth.reload.RELOAD_SECONDS", 0.02)


def _write(path: Path, kind: str, **content: Any) -> None:
    """Replace the file in one step, as whoever mounts a ConfigMap does."""
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump({"apiVersion": "apiserver.config.k8s.io/v1", "kind": kind, **content}))
    fresh.rename(path)


def _settings(option: str, path: Path) -> dict[str, Any]:
    before, after = APIServerConfig(), applied(APIServerConfig(), [f"{option}={path}"])
    names = [name for name in APIServerConfig.__slots__ if getattr(before, name) != getattr(after, name)]
    return {name: getattr(after, name) for name in names}


async def _reloaded(server: RunningAPIServer, kind: str, status: str, times: int) -> None:
    """Wait until the metric tells of so many readings."""
    wanted = f'status="{status}"}} {times}'
    async with asyncio.timeout(20):
        while True:
            text = (await server.client.request("GET", "/metrics")).body.decode()
            if any(f"apiserver_{kind}_config_controller_automatic_reloads_total" in line and line.endswith(wanted) for line in text.splitlines()):
                return
            await asyncio.sleep(0.02)


async def test_an_issuer_that_is_added_counts_and_one_that_is_taken_out_counts_no_more(tmp_path: Path) -> None:
    signer = jwt.Signer(rsa.generate_private_key(65537, 2048))

    async def provider(request: Request) -> None:
        documents: dict[str, object] = {
            "/.well-known/openid-configuration": {"issuer": base, "jwks_uri": f"{base}/keys"}, "/keys": {"keys": [jwt.to_jwk(signer.public_key)]},
        }  # fmt: skip
        request.respond(200, [("Content-Type", "application/json")], json.dumps(documents[request.path]).encode())

    path = tmp_path / "authentication.yaml"
    async with _server(provider) as base:
        issuer = {"url": base, "audiences": ["knarr"], "certificateAuthority": _ca().read_text()}
        entry = {"issuer": issuer, "claimMappings": {"username": {"claim": "sub", "prefix": "oidc:"}}}
        token = signer.sign({"iss": base, "aud": "knarr", "sub": "alice", "exp": int(time.time()) + 600})
        _write(path, "AuthenticationConfiguration", jwt=[])
        async with running_apiserver(**_settings("authentication-config", path)) as server:
            with refused(401):
                await _whoami(server, token)
            _write(path, "AuthenticationConfiguration", jwt=[entry])
            await _reloaded(server, "authentication", "success", 1)
            assert (await _whoami(server, token))["username"] == "oidc:alice"
            # What cannot be read changes nothing.
            _write(path, "AuthenticationConfiguration", jwt=[{"issuer": {"url": "http://plain"}}])
            await _reloaded(server, "authentication", "failure", 1)
            assert (await _whoami(server, token))["username"] == "oidc:alice"
            _write(path, "AuthenticationConfiguration", jwt=[])
            await _reloaded(server, "authentication", "success", 2)
            with refused(401):
                await _whoami(server, token)


async def test_webhooks_for_access_come_and_go_but_nothing_else_does(tmp_path: Path) -> None:
    async def allows(request: Request) -> None:
        review = json.loads(await request.body())
        request.respond(200, [("Content-Type", "application/json")], json.dumps({**review, "status": {"allowed": True}}).encode())

    path = tmp_path / "authorization.yaml"
    async with _server(allows) as url:
        connection = {"type": "KubeConfigFile", "kubeConfigFile": _kubeconfig(tmp_path, f"{url}/a")}
        webhook = {"timeout": "3s", "subjectAccessReviewVersion": "v1", "failurePolicy": "Deny", "connectionInfo": connection}
        rbac = {"type": "RBAC", "name": "rbac"}
        _write(path, "AuthorizationConfiguration", authorizers=[rbac])
        async with running_apiserver(**_settings("authorization-config", path)) as server, as_user(server, "carol") as carol:
            with refused(403):
                await carol.list(R.PODS, "default")
            _write(path, "AuthorizationConfiguration", authorizers=[rbac, {"type": "Webhook", "name": "all", "webhook": webhook}])
            await _reloaded(server, "authorization", "success", 1)
            assert (await carol.list(R.PODS, "default"))["items"] == []
            _write(path, "AuthorizationConfiguration", authorizers=[{"type": "AlwaysAllow", "name": "all"}])
            await _reloaded(server, "authorization", "failure", 1)
            assert (await carol.list(R.PODS, "default"))["items"] == []
            _write(path, "AuthorizationConfiguration", authorizers=[rbac])
            await _reloaded(server, "authorization", "success", 2)
            with refused(403):
                await carol.list(R.CONFIG_MAPS, "default")


async def test_a_webhook_judges_the_images_of_pods(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    async def judge(request: Request) -> None:
        review = json.loads(await request.body())
        asked.append(review["spec"])
        bad = [one["image"] for one in review["spec"]["containers"] if "bad" in one["image"]]
        status = {"allowed": not bad, **({"reason": f"{bad[0]} is not trusted"} if bad else {})}
        request.respond(200, [("Content-Type", "application/json")], json.dumps({**review, "status": status}).encode())

    async with _server(judge) as url:
        policy = {"imagePolicy": {"kubeConfigFile": _kubeconfig(tmp_path, f"{url}/judge"), "retryBackoff": 1}}
        settings: dict[str, Any] = {"admission_plugins_on": ("ImagePolicyWebhook",), "admission_config": {"ImagePolicyWebhook": policy}}
        async with running_apiserver(**settings) as server:
            await make_namespace(server.client, "t")
            for name in ("p", "q"):
                made = pod(name, "t", containers=[{"name": "c", "image": "good:1"}])
                made["metadata"]["annotations"] = {"my.image-policy.k8s.io/ticket": "1", "other": "2"}
                await server.client.create(R.PODS, made, "t")
            # The same question is asked once.
            assert asked == [{"containers": [{"image": "good:1"}], "annotations": {"my.image-policy.k8s.io/ticket": "1"}, "namespace": "t"}]
            with refused(403, "image policy webhook backend denied one or more images: bad:1 is not trusted"):
                await server.client.create(R.PODS, pod("r", "t", containers=[{"name": "c", "image": "bad:1"}]), "t")
    for allows in (True, False):
        policy["imagePolicy"]["defaultAllow"] = allows
        async with running_apiserver(**settings) as server:
            await make_namespace(server.client, "t")
            if allows:
                made = await server.client.create(R.PODS, pod("p", "t", containers=[{"name": "c", "image": "x"}]), "t")
                assert made["metadata"]["annotations"]["alpha.image-policy.k8s.io/failed-open"] == "true"
            else:
                with pytest.raises(StatusError) as raised:
                    await server.client.create(R.PODS, pod("p", "t", containers=[{"name": "c", "image": "x"}]), "t")
                assert raised.value.code == 403
