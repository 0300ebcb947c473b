"""Service account tokens end to end: issued, used, reviewed, and dying with what they are bound to."""

import base64
import json

from knarr.api import resources as R
from knarr.client.rest import Client
from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from tests.apiserver.identities import make_namespace, pod, refused, with_token


async def _token(client: Client, namespace: str, **spec: object) -> str:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    answer = await client.create(R.SERVICE_ACCOUNTS, request, namespace, subresource="token", name="default")
    return str(answer["status"]["token"])


async def _review(client: Client, token: str, *audiences: str) -> dict[str, object]:
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": list(audiences)}}
    answer = await client.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body)
    status: dict[str, object] = json.loads(answer.body)["status"]
    return status


async def test_a_requested_token_authenticates_and_says_who_it_is(apiserver: RunningAPIServer) -> None:
    await make_namespace(apiserver.client, "t")
    token = await _token(apiserver.client, "t")
    status = await _review(apiserver.client, token)
    assert status["authenticated"] is True
    user = status["user"]
    assert isinstance(user, dict)
    assert user["username"] == "system:serviceaccount:t:default"
    assert user["groups"] == ["system:serviceaccounts", "system:serviceaccounts:t", "system:authenticated"]
    assert user["extra"]["authentication.kubernetes.io/credential-id"][0].startswith("JTI=")
    async with with_token(apiserver, token) as client:
        with refused(403, 'User "system:serviceaccount:t:default" cannot list resource "pods" in API group "" in the namespace "t"'):
            await client.list(R.PODS, "t")


async def test_a_pod_bound_token_names_pod_and_node_and_dies_with_the_pod(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    node = await client.create(R.NODES, {"metadata": {"name": "n1"}})
    made = await client.create(R.PODS, pod("p", "t", nodeName="n1"), "t")
    token = await _token(client, "t", boundObjectRef={"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": made["metadata"]["uid"]})
    extra = (await _review(client, token))["user"]["extra"]  # type: ignore[index]
    assert extra["authentication.kubernetes.io/pod-name"] == ["p"]
    assert extra["authentication.kubernetes.io/pod-uid"] == [made["metadata"]["uid"]]
    assert extra["authentication.kubernetes.io/node-name"] == ["n1"]
    assert extra["authentication.kubernetes.io/node-uid"] == [node["metadata"]["uid"]]
    await client.delete(R.PODS, "p", "t", grace_period_seconds=0)
    status = await _review(client, token)
    assert not status.get("authenticated")
    assert "service account token has been invalidated" in str(status["error"])


async def test_audiences_are_kept_apart(apiserver: RunningAPIServer) -> None:
    await make_namespace(apiserver.client, "t")
    token = await _token(apiserver.client, "t", audiences=["other"])
    assert not (await _review(apiserver.client, token)).get("authenticated")
    status = await _review(apiserver.client, token, "other", "third")
    assert (status["authenticated"], status["audiences"]) == (True, ["other"])
    async with with_token(apiserver, token) as client:
        with refused(401):
            await client.list(R.PODS, "t")


async def test_a_tampered_token_is_refused(apiserver: RunningAPIServer) -> None:
    await make_namespace(apiserver.client, "t")
    head, claims, signature = (await _token(apiserver.client, "t")).split(".")
    changed = json.loads(base64.urlsafe_b64decode(claims + "==="))
    changed["sub"] = "system:serviceaccount:kube-system:admin"
    forged = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()
    assert not (await _review(apiserver.client, f"{head}.{forged}.{signature}")).get("authenticated")


async def test_a_token_cannot_be_bound_to_another_accounts_pod(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    await client.create(R.SERVICE_ACCOUNTS, {"metadata": {"name": "other", "namespace": "t"}}, "t")
    await client.create(R.PODS, pod("p", "t", serviceAccountName="other"), "t")
    with refused(400, 'cannot bind token for serviceaccount "default" to pod running with different serviceaccount name'):
        await _token(client, "t", boundObjectRef={"apiVersion": "v1", "kind": "Pod", "name": "p"})
    with refused(422, "may not specify a duration less than 10 minutes"):
        await _token(client, "t", expirationSeconds=10)


async def test_the_issuer_publishes_keys_that_check_its_tokens(apiserver: RunningAPIServer) -> None:
    from knarr.api import jwt

    await make_namespace(apiserver.client, "t")
    token = await _token(apiserver.client, "t")
    document = json.loads((await apiserver.client.request("GET", "/.well-known/openid-configuration")).body)
    keys = json.loads((await apiserver.client.request("GET", "/openid/v1/jwks")).body)["keys"]
    claims = jwt.verify(token, [jwt.from_jwk(key) for key in keys])
    assert claims["iss"] == document["issuer"]


async def test_a_bootstrap_token_logs_in_as_its_group(apiserver: RunningAPIServer) -> None:
    data = {
        "token-id": "abcdef", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true",
        "auth-extra-groups": "system:bootstrappers:workers",
    }  # fmt: skip
    secret = {"metadata": {"name": "bootstrap-token-abcdef", "namespace": "kube-system"}, "type": "bootstrap.kubernetes.io/token", "stringData": data}
    await apiserver.client.create(R.SECRETS, secret, "kube-system")
    status = await _review(apiserver.client, "abcdef.0123456789abcdef")
    assert status["user"]["username"] == "system:bootstrap:abcdef"  # type: ignore[index]
    assert status["user"]["groups"] == ["system:bootstrappers", "system:bootstrappers:workers", "system:authenticated"]  # type: ignore[index]
    assert not (await _review(apiserver.client, "abcdef.ffffffffffffffff")).get("authenticated")


async def test_static_tokens_come_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "tokens.csv"
    file.write_text('secret-token,alice,7,"devs,ops"\n')
    async with running_apiserver(token_file=str(file)) as server, with_token(server, "secret-token") as client:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        answer = json.loads((await client.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=body)).body)
        assert answer["status"]["userInfo"] == {"username": "alice", "uid": "7", "groups": ["devs", "ops", "system:authenticated"]}


async def test_without_credentials_only_health_answers(apiserver: RunningAPIServer) -> None:
    import ssl

    from knarr.http.client import HTTPClient

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = HTTPClient(apiserver.url, context)
    try:
        assert (await client.request("GET", "/livez")).status == 200
        assert (await client.request("GET", "/api/v1/pods")).status == 401
        assert (await client.request("GET", "/livez", {"Authorization": "Bearer nonsense"})).status == 401
    finally:
        await client.close()
