"""HTTP extenders, asked over real connections by a scheduler of a real API server, answering as Go and as other languages do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from knarr.api.resources import NODES, PODS, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.http.server import HTTPServer, Request
from knarr.scheduler.config import SchedulerConfig, read_configuration
from knarr.scheduler.scheduler import Scheduler
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import running_apiserver

Answer = Callable[[Object], Any]
pytestmark = pytest.mark.timeout(60)
FOO = "example.com/foo"


class Extending:
    """A server whose verbs are functions; keeps what it was asked."""

    def __init__(self, answers: dict[str, Answer], context: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, Object]] = []
        self._answers = answers
        self.server = HTTPServer(self._handle, ssl_context=context)

    async def _handle(self, request: Request) -> None:
        verb, body = request.path.rsplit("/", 1)[1], json.loads(await request.body())
        self.asked.append((verb, body))
        answer = self._answers[verb](body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        request.respond(200, [("Content-Type", "application/json")], json.dumps(answer).encode())

    def bodies(self, verb: str) -> list[Object]:
        return [body for asked, body in self.asked if asked == verb]


@contextlib.asynccontextmanager
async def _extending(answers: dict[str, Answer], context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Extending, str]]:
    extending = Extending(answers, context)
    port = await extending.server.listen("127.0.0.1", 0)
    try:
        yield extending, f"http{'s' if context else ''}://127.0.0.1:{port}/extend"
    finally:
        await extending.server.close()


def _config(*extenders: Object) -> SchedulerConfig:
    kind = {"apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration"}
    return read_configuration({**kind, "extenders": list(extenders)})


@contextlib.asynccontextmanager
async def _cluster(config: SchedulerConfig, *nodes: str, **amounts: str) -> AsyncIterator[Client]:
    async with running_apiserver() as server:
        client, own = server.client, Client(server.client_config)
        await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": "default"}})
        for name in nodes:
            allocatable = {"cpu": "4", "memory": "8Gi", "pods": "10", **amounts}
            await client.create(NODES, {"metadata": {"name": name}, "status": {"allocatable": allocatable}})
            await client.patch(NODES, name, None, {"spec": {"taints": None}})
        task = asyncio.create_task(Scheduler(own, config).run())
        try:
            yield client
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await own.close()


def _pod(name: str, requests: dict[str, str] | None = None, **spec: Any) -> Object:
    wanted = requests or {"cpu": "100m"}
    limits = {resource: amount for resource, amount in wanted.items() if "/" in resource}
    container = {"name": "c", "image": "i", "env": [{"name": "A", "value": "b"}], "resources": {"requests": wanted, "limits": limits}}
    volumes = [{"name": "scratch", "emptyDir": {}}]
    metadata = {"name": name, "namespace": "default", "annotations": {"some": "note"}}
    return {"metadata": metadata, "spec": {"containers": [container], "volumes": volumes, **spec}}


async def _until(client: Client, name: str, holds: Callable[[Object], Any]) -> Any:
    async with asyncio.timeout(15):
        while not (found := holds(await client.get(PODS, name, "default"))):
            await asyncio.sleep(0.02)
    return found


def _node_of(pod: Object) -> str:
    return str(pod["spec"].get("nodeName") or "")


def _refusal(pod: Object) -> Object | None:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return next((dict(one) for one in conditions if one["type"] == "PodScheduled" and one["status"] == "False"), None)


def _assert_whole(pod: Object) -> None:
    assert pod["metadata"]["annotations"]["some"] == "note"
    assert pod["spec"]["containers"][0]["env"] == [{"name": "A", "value": "b"}]
    assert "scratch" in {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.parametrize("cached", [False, True], ids=["nodes", "names"])
async def test_filter_and_scores_decide_and_see_whole_pods(cached: bool) -> None:
    def left(body: Object) -> list[str]:
        names = body["NodeNames"] if cached else [node["metadata"]["name"] for node in body["Nodes"]["items"]]
        return [name for name in names if name != "a"]

    def as_go(body: Object) -> Object:
        nodes = None if cached else {"metadata": {}, "items": [{"metadata": {"name": name}} for name in left(body)]}
        return {"Nodes": nodes, "NodeNames": left(body) if cached else None, "FailedNodes": {"a": "a is bad"}, "Error": ""}

    def prefer_c(body: Object) -> list[Object]:
        return [{"host": name, "score": 10 if name == "c" else 0} for name in left(body)]

    async with _extending({"filter": as_go, "prioritize": prefer_c}) as (extending, url):
        settings = {"urlPrefix": url, "filterVerb": "filter", "prioritizeVerb": "prioritize", "weight": 100, "nodeCacheCapable": cached}
        async with _cluster(_config(settings), "a", "b", "c") as client:
            for number in range(3):
                await client.create(PODS, _pod(f"p{number}"))
                assert await _until(client, f"p{number}", _node_of) == "c"
            await client.create(PODS, _pod("picky", nodeSelector={"kubernetes.io/hostname": "x"}))
            await _until(client, "picky", _refusal)
        asked = extending.bodies("filter")[0]
        _assert_whole(asked["Pod"])
        assert set(asked) == {"Pod", "Nodes", "NodeNames"}
        assert (asked["NodeNames"] is None) != cached
        assert (asked["Nodes"] is None) == cached
        if not cached:
            assert asked["Nodes"]["items"][0]["status"]["allocatable"]["cpu"] == "4"


async def test_what_a_filter_says_of_nodes_is_told_of_the_pod() -> None:
    def nowhere(body: Object) -> Object:
        return {"nodeNames": [], "failedNodes": {"a": "too hot", "b": "too cold"}, "failedAndUnresolvableNodes": {"b": "frozen"}}

    async with _extending({"filter": nowhere}) as (_, url):
        settings = {"urlPrefix": url, "filterVerb": "filter", "nodeCacheCapable": True}
        async with _cluster(_config(settings), "a", "b") as client:
            await client.create(PODS, _pod("p"))
            words = "0/2 nodes are available: 1 frozen, 1 too hot."
            refusal = await _until(client, "p", lambda pod: (told := _refusal(pod)) and told["message"].startswith(words) and told)
            assert refusal["reason"] == "Unschedulable"


async def test_a_binder_binds_the_pods_of_its_resource_which_the_scheduler_does_not_count() -> None:
    clients: list[Client] = []

    async def bind(body: Object) -> Object:
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": body["PodName"], "uid": body["PodUID"]}}
        target = {"kind": "Node", "name": body["Node"]}
        path = f"/api/v1/namespaces/{body['PodNamespace']}/pods/{body['PodName']}/binding"
        await clients[0].request("POST", path, body={**binding, "target": target})
        return {"Error": ""}

    async with _extending({"bind": bind}) as (extending, url):
        managed = [{"name": FOO, "ignoredByScheduler": True}]
        async with _cluster(_config({"urlPrefix": url, "bindVerb": "bind", "managedResources": managed}), "a") as client:
            clients.append(client)
            await client.create(PODS, _pod("plain"))
            assert await _until(client, "plain", _node_of) == "a"
            assert not extending.asked
            await client.create(PODS, _pod("foo", {FOO: "3"}))
            assert await _until(client, "foo", _node_of) == "a"
        assert [body["PodName"] for body in extending.bodies("bind")] == ["foo"]


@pytest.mark.parametrize("answer", ["down", "error", "senseless"])
async def test_only_an_extender_that_may_be_ignored_can_fail(answer: str) -> None:
    def fails(body: Object) -> Any:
        return {"Error": "out of ideas"} if answer == "error" else ["what?"]

    async with _extending({"filter": fails}) as (extending, url):
        if answer == "down":
            await extending.server.close()
        needed = {"urlPrefix": url, "filterVerb": "filter", "managedResources": [{"name": FOO}]}
        other = {"urlPrefix": url, "filterVerb": "filter", "ignorable": True}
        async with _cluster(_config(other, needed), "a", **{FOO: "5"}) as client:
            await client.create(PODS, _pod("plain"))
            assert await _until(client, "plain", _node_of) == "a"
            await client.create(PODS, _pod("foo", {FOO: "1"}))
            refusal = await _until(client, "foo", _refusal)
            assert refusal["reason"] == "SchedulerError"
            if answer == "error":
                assert refusal["message"] == "out of ideas"


@pytest.mark.parametrize("cached", [False, True], ids=["pods", "uids"])
async def test_an_extender_chooses_among_the_victims_of_preemption(cached: bool) -> None:
    def keep_b(body: Object) -> Object:
        if cached:
            uids = [pod["UID"] for pod in body["NodeNameToMetaVictims"]["b"]["Pods"]]
        else:
            for pod in body["NodeNameToVictims"]["b"]["Pods"]:
                _assert_whole(pod)
            uids = [pod["metadata"]["uid"] for pod in body["NodeNameToVictims"]["b"]["Pods"]]
        return {"NodeNameToMetaVictims": {"b": {"Pods": [{"UID": uid} for uid in uids], "NumPDBViolations": 0}}}

    async with _extending({"preempt": keep_b}) as (extending, url):
        settings = {"urlPrefix": url, "preemptVerb": "preempt", "nodeCacheCapable": cached}
        async with _cluster(_config(settings), "a", "b", "c") as client:
            for name in ("x", "y", "z"):
                await client.create(PODS, _pod(name, {"cpu": "3"}, terminationGracePeriodSeconds=0))
            places = {await _until(client, name, _node_of): name for name in ("x", "y", "z")}
            await client.create(PODS, _pod("important", {"cpu": "3"}, priorityClassName="system-node-critical"))
            assert await _until(client, "important", _node_of) == "b"
            left = {pod["metadata"]["name"] for pod in (await client.list(PODS, "default"))["items"]}
            assert left == {"important", places["a"], places["c"]}
        assert extending.bodies("preempt")[0]["Pod"]["metadata"]["name"] == "important"


@pytest.mark.parametrize("tls", [{"caData": True}, {"insecure": True}, {}], ids=["trusted", "insecure", "enableHTTPS"])
async def test_an_extender_is_asked_over_tls_as_configured(tls: dict[str, Any], tmp_path: Path) -> None:
    authority = testing.test_pki().authority
    serving = authority.issue(tmp_path / "serving", "extender", hosts=["127.0.0.1"], server=True, client=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(serving.certificate), str(serving.key))
    if tls.get("caData"):
        tls = {"caData": base64.b64encode(Path(authority.pair.certificate).read_bytes()).decode()}

    async with _extending({"filter": lambda body: {"NodeNames": ["b"]}}, context) as (_, url):
        settings = {"urlPrefix": url, "filterVerb": "filter", "nodeCacheCapable": True, "enableHTTPS": "caData" in tls or not tls}
        async with _cluster(_config({**settings, "tlsConfig": tls}), "a", "b") as client:
            await client.create(PODS, _pod("p"))
            assert await _until(client, "p", _node_of) == "b"


@pytest.mark.parametrize(
    ("extenders", "words"),
    [
        ([{"urlPrefix": "http://a", "bindVerb": "b"}, {"urlPrefix": "http://b", "bindVerb": "b"}], "found 2 extenders implementing bind"),
        ([{"urlPrefix": "http://a", "prioritizeVerb": "p"}], "must have a positive weight"),
        ([{"urlPrefix": f"http://{name}", "managedResources": [{"name": FOO}]} for name in "ab"], "duplicate extender managed resource name"),
        ([{"urlPrefix": "https://a", "tlsConfig": {"caFile": "/nowhere/ca.crt"}}], r"https://a.*nowhere"),
    ],
)
def test_extenders_that_cannot_be_meant_are_refused(extenders: list[Object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _config(*extenders)
