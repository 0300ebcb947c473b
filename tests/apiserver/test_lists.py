"""Lists: pages at one revision, tokens that outlive compaction, consistent reads."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from knarr.api import errors
from knarr.api.resources import CONFIG_MAPS
from knarr.testing.apiserver import RunningAPIServer, running_apiserver

PATH = "/api/v1/namespaces/default/configmaps"


async def fill(server: RunningAPIServer, count: int) -> None:
    bodies = [{"metadata": {"name": f"c{i:03d}", "labels": {"odd": str(i % 2)}}} for i in range(count)]
    await asyncio.gather(*[server.client.create(CONFIG_MAPS, body, "default") for body in bodies])


async def page(server: RunningAPIServer, query: str) -> dict:  # type: ignore[type-arg]
    return orjson.loads((await server.client.request("GET", f"{PATH}?{query}")).body)


async def test_pages_show_one_revision_though_objects_change_meanwhile(apiserver: RunningAPIServer) -> None:
    await fill(apiserver, 40)
    first = await page(apiserver, "limit=17")
    assert first["metadata"]["remainingItemCount"] == 23
    await apiserver.client.delete(CONFIG_MAPS, "c030", "default")
    await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": "c020a"}}, "default")
    second = await page(apiserver, f"limit=17&continue={first['metadata']['continue']}")
    third = await page(apiserver, f"limit=17&continue={second['metadata']['continue']}")
    pages = [first, second, third]
    names = [item["metadata"]["name"] for one in pages for item in one["items"]]
    assert names == [f"c{i:03d}" for i in range(40)]
    assert len({one["metadata"]["resourceVersion"] for one in pages}) == 1
    assert "continue" not in third["metadata"]
    assert "remainingItemCount" not in third["metadata"]


async def test_pages_with_selectors_do_not_say_how_many_remain(apiserver: RunningAPIServer) -> None:
    await fill(apiserver, 20)
    first = await page(apiserver, "limit=4&labelSelector=odd%3D1")
    assert "remainingItemCount" not in first["metadata"]
    rest = await page(apiserver, f"limit=100&labelSelector=odd%3D1&continue={first['metadata']['continue']}")
    assert len(first["items"]) + len(rest["items"]) == 10


async def test_compacted_token_is_expired_and_carries_one_that_goes_on(apiserver: RunningAPIServer) -> None:
    await fill(apiserver, 20)
    first = await page(apiserver, "limit=8")
    await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": "later"}}, "default")
    await apiserver.server.storage.store.compact(apiserver.server.storage.revision)
    with pytest.raises(errors.StatusError) as raised:
        await page(apiserver, f"limit=8&continue={first['metadata']['continue']}")
    assert (raised.value.code, raised.value.reason) == (410, "Expired")
    token = raised.value.extra_metadata["continue"]
    second = await page(apiserver, f"limit=8&continue={token}")
    assert [item["metadata"]["name"] for item in second["items"]] == [f"c{i:03d}" for i in range(8, 16)]
    assert second["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]


async def test_exact_version_shows_the_past(apiserver: RunningAPIServer) -> None:
    await fill(apiserver, 2)
    then = (await page(apiserver, ""))["metadata"]["resourceVersion"]
    await apiserver.client.delete(CONFIG_MAPS, "c000", "default")
    past = await page(apiserver, f"resourceVersion={then}&resourceVersionMatch=Exact")
    assert [item["metadata"]["name"] for item in past["items"]] == ["c000", "c001"]
    with pytest.raises(errors.StatusError) as raised:
        await page(apiserver, "resourceVersion=99999999")
    assert raised.value.code == 504


async def test_restart_shows_the_same_world(tmp_path: object) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    async with running_apiserver(store=url) as server:
        await fill(server, 5)
        before = await page(server, "")
    async with running_apiserver(store=url) as server:
        after = await page(server, "")
        assert after["items"] == before["items"]
        watched = server.client.watch(CONFIG_MAPS, "default", resource_version=before["metadata"]["resourceVersion"])
        await server.client.delete(CONFIG_MAPS, "c000", "default")
        async with asyncio.timeout(5):
            kind, obj = await anext(aiter(watched))
        assert (kind, obj["metadata"]["name"]) == ("DELETED", "c000")


async def test_a_large_object_that_was_written_is_answered_packed(apiserver: RunningAPIServer) -> None:
    body = {"metadata": {"name": "large", "namespace": "default"}, "data": {"text": "x" * 700_000}}
    headers = [*await apiserver.client.headers(content_type="application/json"), ("Accept-Encoding", "gzip")]
    answer = await apiserver.client.http.request("POST", "/api/v1/namespaces/default/configmaps", headers, orjson.dumps(body))
    assert answer.status == 201
    assert len(orjson.loads(answer.body)["data"]["text"]) == 700_000


async def test_wrong_parameters_are_told_in_upstreams_turn_and_words(apiserver: RunningAPIServer) -> None:
    """Numbers first, then selectors, then the token; what nobody could read comes before all of them."""
    http, headers = apiserver.client.http, [pair for pair in await apiserver.client.headers() if pair[0].lower() != "accept"]
    path = "/api/v1/namespaces/default/configmaps"
    for query, accept, status, words in (
        ("limit=x&fieldSelector=foo%3Dbar", "application/json", 400, 'strconv.ParseInt: parsing "x": invalid syntax'),
        ("limit=", "application/json", 400, 'strconv.ParseInt: parsing "": invalid syntax'),
        ("limit=9223372036854775808", "application/json", 400, "value out of range"),
        ("continue=x&resourceVersion=x", "application/json", 400, "continue key is not valid: illegal base64 data at input byte 0"),
        ("resourceVersion=18446744073709551616", "application/json", 400, "value out of range"),
        ("fieldSelector=metadata.name%3D%5C", "application/json", 400, "invalid field selector: invalid escape sequence: \\"),
        ("fieldSelector=%3D", "application/json", 200, "ConfigMapList"),
        ("resourceVersion=x", "application/json;as=Foo;v=v1;g=meta.k8s.io", 406, "only the following media types are accepted"),
    ):
        answer = await http.request("GET", f"{path}?{query}", [*headers, ("Accept", accept)])
        told = orjson.loads(answer.body)
        assert (answer.status, words in (told.get("message") or told["kind"])) == (status, True), (query, answer.body)


async def test_yaml_is_written_as_gos(apiserver: RunningAPIServer) -> None:
    http, headers = apiserver.client.http, [pair for pair in await apiserver.client.headers() if pair[0].lower() != "accept"]
    data = {"a": "1", "b": "yes", "c": "one\ntwo\n", "d": "x: y", "e": "y", "f": "1e3", "g": "plain"}
    await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": "n"}, "data": data}, "default")
    answer = await http.request("GET", "/api/v1/namespaces/default/configmaps/n", [*headers, ("Accept", "application/yaml")])
    text = answer.body.decode()
    lines = ['  a: "1"\n', '  b: "yes"\n', "  c: |\n    one\n    two\n", "  d: 'x: y'\n", '  e: "y"\n', '  f: "1e3"\n', "  g: plain\n", '  name: "n"\n']
    assert [line for line in lines if line not in text] == []


async def test_an_empty_table_of_a_kind_without_columns_of_its_own_has_no_rows_at_all(apiserver: RunningAPIServer) -> None:
    as_table = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}

    async def rows(resource: str) -> object:
        path = f"/api/v1/namespaces/default/{resource}?labelSelector=none"
        return orjson.loads((await apiserver.client.request("GET", path, headers=as_table)).body)["rows"]

    assert await rows("limitranges") is None
    assert await rows("configmaps") == []
