"""Authentication and authorization that ask others: OpenID Connect, token and access webhooks."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from knarr.api import jwt
from knarr.api import resources as R
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.options import OptionError, applied
from knarr.http.server import HTTPServer, Request
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from tests.apiserver.identities import as_user, refused, with_token


@contextlib.asynccontextmanager
async def _server(handler: Callable[[Request], Awaitable[None]]) -> AsyncIterator[str]:
    pairs = testing.test_pki()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(pairs.api_server.certificate), str(pairs.api_server.key))
    server = HTTPServer(handler, ssl_context=context)
    port = await server.listen("127.0.0.1", 0)
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        await server.close()


def _ca() -> Path:
    testing.test_pki()
    return Path(testing._folder().name) / "ca.crt"


def _kubeconfig(folder: Path, url: str) -> str:
    path = folder / "webhook.yaml"
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": url, "certificate-authority": str(_ca())}}], "users": [{"name": "u", "user": {}}],
    }))  # fmt: skip
    return str(path)


async def _whoami(server: RunningAPIServer, token: str) -> dict[str, object]:
    async with with_token(server, token) as client:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        answer = await client.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=body)
        info: dict[str, object] = json.loads(answer.body)["status"]["userInfo"]
        return info


async def test_an_id_token_of_the_provider_names_user_and_groups() -> None:
    signer = jwt.Signer(rsa.generate_private_key(65537, 2048))
    stranger = jwt.Signer(rsa.generate_private_key(65537, 2048))
    async def provider(request: Request) -> None:
        documents: dict[str, object] = {
            "/.well-known/openid-configuration": {"issuer": base, "jwks_uri": f"{base}/keys"}, "/keys": {"keys": [jwt.to_jwk(signer.public_key)]},
        }  # fmt: skip
        request.respond(200, [("Content-Type", "application/json")], json.dumps(documents[request.path]).encode())

    async with _server(provider) as base:
        options = {"issuer-url": base, "client-id": "knarr", "groups-claim": "groups", "groups-prefix": "oidc:", "username-prefix": "oidc:", "ca-file": str(_ca())}
        async with running_apiserver(oidc=options) as server:
            claims = {"iss": base, "aud": "knarr", "sub": "alice", "groups": ["devs"], "exp": int(time.time()) + 60}
            found = await _whoami(server, signer.sign(claims))
            assert (found["username"], found["groups"]) == ("oidc:alice", ["oidc:devs", "system:authenticated"])
            for bad in ({**claims, "aud": "other"}, {**claims, "exp": int(time.time()) - 60}):
                with refused(401):
                    await _whoami(server, signer.sign(bad))
            with refused(401):
                await _whoami(server, stranger.sign(claims))


async def test_a_token_webhook_is_asked_once_per_token_for_a_while(tmp_path: Path) -> None:
    asked: list[str] = []

    async def reviewer(request: Request) -> None:
        review = json.loads(await request.body())
        asked.append(review["spec"]["token"])
        good = review["spec"]["token"] == "good"
        review["status"] = {"authenticated": True, "user": {"username": "bob", "groups": ["ops"]}} if good else {"authenticated": False}
        request.respond(200, [("Content-Type", "application/json")], json.dumps(review).encode())

    async with _server(reviewer) as url:
        async with running_apiserver(authentication_webhook_config=_kubeconfig(tmp_path, f"{url}/authenticate")) as server:
            for _ in range(3):
                assert (await _whoami(server, "good"))["username"] == "bob"
            with refused(401):
                await _whoami(server, "bad")
    assert asked == ["good", "bad"]


async def test_an_access_webhook_decides_what_the_modes_before_it_leave_open(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    async def reviewer(request: Request) -> None:
        review = json.loads(await request.body())
        asked.append(review["spec"])
        review["status"] = {"allowed": review["spec"]["resourceAttributes"]["resource"] == "pods"}
        request.respond(200, [("Content-Type", "application/json")], json.dumps(review).encode())

    async with _server(reviewer) as url:
        settings = {"authorization_modes": ("RBAC", "Webhook"), "authorization_webhook_config": _kubeconfig(tmp_path, f"{url}/authorize")}
        async with running_apiserver(**settings) as server, as_user(server, "carol") as carol:
            for _ in range(3):
                assert (await carol.list(R.PODS, "default"))["items"] == []
            with refused(403, 'User "carol" cannot list resource "secrets"'):
                await carol.list(R.SECRETS, "default")
    assert [one["resourceAttributes"]["resource"] for one in asked] == ["pods", "secrets"]  # type: ignore[index]


def _structured(folder: Path, kind: str, **content: object) -> dict[str, object]:
    """Settings of a configuration file of apiserver.config.k8s.io."""
    option = {"AuthenticationConfiguration": "authentication-config", "AuthorizationConfiguration": "authorization-config"}[kind]
    path = folder / f"{option}.yaml"
    path.write_text(yaml.safe_dump({"apiVersion": "apiserver.config.k8s.io/v1", "kind": kind, **content}))
    config = applied(APIServerConfig(), [f"{option}={path}"])
    return {name: getattr(config, name) for name in ("jwt_issuers", "anonymous_paths", "authorizers", "authorization_modes")}


async def test_a_file_says_how_claims_become_users_and_where_nobody_may_ask(tmp_path: Path) -> None:
    signer = jwt.Signer(rsa.generate_private_key(65537, 2048))

    async def provider(request: Request) -> None:
        documents: dict[str, object] = {"/discovery": {"issuer": "https://issuer.example", "jwks_uri": f"{base}/keys"}, "/keys": {"keys": [jwt.to_jwk(signer.public_key)]}}
        request.respond(200, [("Content-Type", "application/json")], json.dumps(documents[request.path]).encode())

    async with _server(provider) as base:
        issuer = {
            "issuer": {
                "url": "https://issuer.example", "discoveryURL": f"{base}/discovery", "audiences": ["one", "two"],
                "audienceMatchPolicy": "MatchAny", "certificateAuthority": _ca().read_text(),
            },
            "claimValidationRules": [
                {"claim": "hd", "requiredValue": "example.com"}, {"expression": "claims.exp - claims.iat <= 3600", "message": "lives too long"},
            ],
            "claimMappings": {
                "username": {"expression": "claims.sub + ':' + claims.team"}, "groups": {"claim": "roles", "prefix": "jwt:"},
                "uid": {"claim": "sub"}, "extra": [{"key": "example.com/team", "valueExpression": "claims.team"}],
            },
            "userValidationRules": [{"expression": "!user.username.startsWith('system:')", "message": "not one of ours"}],
        }  # fmt: skip
        anonymous = {"enabled": True, "conditions": [{"path": "/livez"}]}
        settings = _structured(tmp_path, "AuthenticationConfiguration", jwt=[issuer], anonymous=anonymous)
        assert settings["anonymous_paths"] == ("/livez",)
        async with running_apiserver(**settings) as server:
            now = int(time.time())
            claims = {"iss": "https://issuer.example", "aud": ["two"], "sub": "alice", "team": "x", "roles": ["devs"], "hd": "example.com", "iat": now, "exp": now + 60}
            assert await _whoami(server, signer.sign(claims)) == {
                "username": "alice:x", "uid": "alice", "groups": ["jwt:devs", "system:authenticated"], "extra": {"example.com/team": ["x"]},
            }
            for wrong in ({"hd": "else.com"}, {"exp": now + 4000}, {"sub": "system"}, {"aud": "three"}, {"team": None}):
                with refused(401):
                    await _whoami(server, signer.sign({**claims, **wrong}))


async def test_a_file_says_who_authorizes_in_which_order_and_who_need_not_be_asked(tmp_path: Path) -> None:
    asked: list[str] = []

    async def reviewer(request: Request) -> None:
        review = json.loads(await request.body())
        asked.append(review["spec"]["resourceAttributes"]["resource"])
        review["status"] = {"allowed": True}
        request.respond(200, [("Content-Type", "application/json")], json.dumps(review).encode())

    def webhook(url: str, **more: object) -> dict[str, object]:
        (tmp_path / more.get("folder", "")).mkdir(exist_ok=True)  # type: ignore[operator]
        connection = {"type": "KubeConfigFile", "kubeConfigFile": _kubeconfig(tmp_path / str(more.pop("folder", "")), url)}
        return {"timeout": "3s", "subjectAccessReviewVersion": "v1", "failurePolicy": "Deny", "connectionInfo": connection, **more}

    async with _server(reviewer) as url:
        pods = [{"expression": "has(request.resourceAttributes) && request.resourceAttributes.resource == 'pods'"}]
        secrets = [{"expression": "has(request.resourceAttributes) && request.resourceAttributes.resource == 'secrets'"}]
        settings = _structured(tmp_path, "AuthorizationConfiguration", authorizers=[
            {"type": "Webhook", "name": "down", "webhook": webhook("https://127.0.0.1:9", folder="down", matchConditions=secrets)},
            {"type": "RBAC", "name": "rbac"}, {"type": "Webhook", "name": "pods", "webhook": webhook(f"{url}/a", matchConditions=pods)},
        ])  # fmt: skip
        async with running_apiserver(**settings) as server, as_user(server, "carol") as carol:
            assert (await carol.list(R.PODS, "default"))["items"] == []
            for resource in (R.SECRETS, R.CONFIG_MAPS):
                with refused(403, f'User "carol" cannot list resource "{resource.plural}"'):
                    await carol.list(resource, "default")
    assert asked == ["pods"]


def test_wrong_configuration_files_are_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = [
        ("AuthorizationConfiguration", {"authorizers": []}, "at least one authorization mode"),
        ("AuthorizationConfiguration", {"authorizers": [{"type": "RBAC", "name": "a"}, {"type": "RBAC", "name": "b"}]}, "Duplicate value"),
        ("AuthorizationConfiguration", {"authorizers": [{"type": "Else", "name": "a"}]}, "Unsupported value"),
        ("AuthenticationConfiguration", {"jwt": [{"issuer": {"url": "http://plain"}}]}, "URL scheme must be https"),
        ("AuthenticationConfiguration", {"jwt": [{"issuer": {"url": "https://i", "audiences": ["a"]}, "claimMappings": {"username": {"expression": "claims."}}}]},
         "compilation failed"),
        ("AuthenticationConfiguration", {"anonymous": {"enabled": False, "conditions": [{"path": "/livez"}]}}, "enabled should be set to true"),
    ]  # fmt: skip
    for kind, content, text in wrong:
        with pytest.raises(OptionError, match=text):
            _structured(tmp_path, kind, **content)  # type: ignore[arg-type]
