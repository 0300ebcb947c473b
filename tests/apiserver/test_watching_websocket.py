"""Watches over WebSocket: one message for each event, text or protobuf."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import orjson
import pytest

from knarr.api.resources import CONFIG_MAPS
from knarr.http import websocket
from knarr.http.client import HTTPClient
from knarr.testing.apiserver import RunningAPIServer

PATH = "/api/v1/namespaces/default/configmaps"
ORIGIN = {"Origin": "https://console.example"}


@contextlib.asynccontextmanager
async def watching(server: RunningAPIServer, path: str, headers: dict[str, str]) -> AsyncIterator[tuple[int, websocket.WebSocket | None]]:
    """Yield the handshake's status and the socket, None when it was refused."""
    client = HTTPClient(server.url, ssl_context=server.client_config.ssl_context())
    head = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": websocket.client_key()}
    try:
        response, connection = await client.upgrade("GET", path, head | headers)
        try:
            yield response.status, None if connection is None else websocket.WebSocket(connection, client=True)
        finally:
            if connection is not None:
                connection.close()
    finally:
        await client.close()


async def receive(socket: websocket.WebSocket | None) -> tuple[int, bytes] | None:
    assert socket is not None
    async with asyncio.timeout(5):
        return await socket.receive()


async def test_a_watch_over_websocket_sends_every_event_as_a_text_message_and_says_good_bye(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    first = await client.create(CONFIG_MAPS, {"metadata": {"name": "a"}}, "default")
    async with watching(apiserver, f"{PATH}?watch=true&timeoutSeconds=1", ORIGIN) as (status, socket):
        assert status == 101
        await client.update(CONFIG_MAPS, {**first, "data": {"k": "two\nlines"}})
        await client.delete(CONFIG_MAPS, "a", "default")
        messages = [await receive(socket) for _ in range(3)]
        assert await receive(socket) is None
    events = [orjson.loads(message[1]) for message in messages if message is not None and message[0] == websocket.TEXT]
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert events[1]["object"]["data"] == {"k": "two\nlines"}


async def test_protobuf_events_are_binary_messages_without_the_length_before_them(apiserver: RunningAPIServer) -> None:
    await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": "a"}}, "default")
    async with watching(apiserver, f"{PATH}?watch=true", ORIGIN | {"Accept": "application/vnd.kubernetes.protobuf"}) as (_, socket):
        await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": "b"}}, "default")
        messages = [await receive(socket) for _ in range(2)]
    for message, name in zip(messages, (b"\x01a", b"\x01b"), strict=True):
        assert message is not None
        assert message[0] == websocket.BINARY
        assert message[1].startswith(b"\n\x05ADDED\x12")
        assert b"k8s\x00" in message[1]
        assert name in message[1]


async def test_a_client_that_closes_ends_its_watch(apiserver: RunningAPIServer) -> None:
    async with watching(apiserver, f"{PATH}?watch=true", ORIGIN | {"Sec-WebSocket-Protocol": "x"}) as (status, socket):
        assert status == 101
        assert socket is not None
        socket.close()
    await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": "after"}}, "default")


@pytest.mark.parametrize(("headers", "status"), [({}, 403), ({"Origin": "null"}, 403), (ORIGIN | {"Sec-WebSocket-Protocol": "a, b"}, 400)])
async def test_handshakes_without_an_origin_or_with_several_protocols_are_refused(
    apiserver: RunningAPIServer, headers: dict[str, str], status: int
) -> None:
    async with watching(apiserver, f"{PATH}?watch=true", headers) as (answered, socket):
        assert (answered, socket) == (status, None)


async def test_what_is_wrong_with_the_request_is_answered_before_the_handshake(apiserver: RunningAPIServer) -> None:
    async with watching(apiserver, f"{PATH}?watch=true&labelSelector=a%20b%20c", ORIGIN) as (status, _):
        assert status == 400
