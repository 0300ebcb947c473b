"""Ingress annotations that look at who comes, how often and how long: passwords, limits, cookies, origins, through a real HAProxy."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
from collections import Counter
from typing import Any

import pytest

from knarr.api.resources import ENDPOINT_SLICES, SECRETS, SERVICES
from knarr.network.ingress import limits
from knarr.network.ingress.passwords import matches, read_users

from .test_ingress import Running, Web, headless, ingress, own_address, rule, running  # noqa: F401
from .world import endpoint_slice, service

pytestmark = pytest.mark.timeout(60)
PREFIX = "nginx.ingress.kubernetes.io/"
BCRYPT = "$2y$05$iy2LRNFLJiVg/l4gtQwW5.bG21tgo5ToC7fXZl4UoC.v6PaXcm5Aa"
SHA512 = "$6$saltsalt$YTeBOLnmm3CoeJTzBuijUEtOEWCqrw/nQ8/AeMmON4LGp3k0ZiMjC1OdqzWFUAfDQBvYkOch9BWtQTBcZ1E/p0"


async def put(running: Running, name: str, target: str = "a", path: str = "/", **annotations: str) -> None:  # noqa: F811
    wanted = {PREFIX + key.replace("_", "-"): value for key, value in annotations.items()}
    await running.put(ingress(name, [rule(f"{name}.test", (path, "Prefix", target))], wanted))


def basic(user: str, password: str) -> str:
    return f"Authorization: Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}\r\n"


def users(text: str) -> dict[str, Any]:
    data = {"auth": base64.b64encode(text.encode()).decode()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "users", "namespace": "default"}, "data": data}


async def test_only_users_of_the_secret_come_in_and_a_changed_password_counts_at_once(running: Running) -> None:  # noqa: F811
    await running.expose("a")
    await put(running, "auth", auth_type="basic", auth_secret="users", auth_realm='Who "are" you')
    assert (await running.get("auth.test", headers=basic("ann", "secret")))[0] == 401
    await running.client.create(SECRETS, users("ann:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=\n# a comment\nbob:$apr1$F7rrfvxk$xVLQ8HJbQiBtEfyAyB3cr.\n"), "default")

    async def status(headers: str = "") -> int:
        return (await running.get("auth.test", headers=headers))[0]

    async with asyncio.timeout(10):
        while await status(basic("ann", "secret")) != 200:
            await asyncio.sleep(0.02)
    answer = await running.get("auth.test")
    assert answer[0] == 401
    assert 'www-authenticate: Basic realm="Who are you"' in answer[2]
    for headers in (basic("ann", "wrong"), basic("eve", "secret"), "Authorization: Basic %%%\r\n", "Authorization: Bearer x\r\n"):
        assert await status(headers) == 401
    assert [await status(basic("ann", "secret")) for _ in range(3)] == [200] * 3
    await running.client.update(SECRETS, users("ann:{PLAIN}other\n"))
    async with asyncio.timeout(10):
        while await status(basic("ann", "other")) != 200:
            await asyncio.sleep(0.02)
    assert await status(basic("ann", "secret")) == 401


async def test_a_client_with_a_cookie_stays_with_its_endpoint_as_long_as_that_lives(running: Running) -> None:  # noqa: F811
    webs = [await Web(f"w{number}").start() for number in range(3)]
    svc = service("a", "10.96.200.1", [("http", "TCP", 80)])
    svc.pop("status")
    svc["metadata"].pop("uid")  # type: ignore[attr-defined]
    svc["spec"] = {"ports": [{"name": "http", "port": 80}]}
    await running.client.create(SERVICES, svc, "default")

    def part(number: int) -> dict[str, Any]:
        made = endpoint_slice("a", [("http", "TCP", webs[number].port)], [{"addresses": [own_address()], "conditions": {"ready": True}}])
        made["metadata"]["name"] = f"a-{number}"  # type: ignore[index]
        return made

    for number in range(3):
        await running.client.create(ENDPOINT_SLICES, part(number), "default")
    await put(running, "stay", affinity="cookie", session_cookie_name="where", session_cookie_max_age="60", session_cookie_samesite="Lax")
    seen: dict[str, str] = {}
    async with asyncio.timeout(10):
        while len(seen) < 3:
            _status, body, head = await running.get("stay.test")
            found = re.search(r"set-cookie: where=(\w+); Path=/; Max-Age=60; SameSite=Lax; HttpOnly", head)
            if found:
                seen[body[:2]] = found[1]
    for name, mark in seen.items():
        answers = [await running.get("stay.test", headers=f"Cookie: x=1; where={mark}\r\n") for _ in range(5)]
        assert {body[:2] for _status, body, _head in answers} == {name}
        assert not any("set-cookie" in head for _status, _body, head in answers)
    await running.client.delete(ENDPOINT_SLICES, "a-1", "default")
    async with asyncio.timeout(10):
        while "set-cookie" not in (answer := await running.get("stay.test", headers=f"Cookie: where={seen['w1']}\r\n"))[2]:
            await asyncio.sleep(0.02)
    assert answer[1][:2] in ("w0", "w2")


async def test_who_comes_too_often_is_refused_and_others_are_not(running: Running) -> None:  # noqa: F811
    await running.expose("a")
    await put(running, "often", limit_rps="2")
    await put(running, "exempt", limit_rps="2", limit_whitelist="127.0.0.0/8")
    await put(running, "minute", limit_rpm="3")
    counted = {host: Counter([(await running.get(f"{host}.test"))[0] for _ in range(40)]) for host in ("often", "exempt", "minute")}
    assert counted["exempt"] == {200: 40}
    assert counted["minute"] == {200: 3, 503: 37}
    # Ten at once, and two more for each second that the others take.
    assert counted["often"][200] >= 10
    assert counted["often"][503] > 0


async def test_only_so_many_requests_at_a_time(running: Running) -> None:  # noqa: F811
    gate = asyncio.Event()
    started = asyncio.Semaphore(0)

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        started.release()
        await gate.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    web = Web("a")
    web.server = await asyncio.start_server(slow, own_address(), 0)
    web.port = web.server.sockets[0].getsockname()[1]
    svc, part = headless("a", web)
    await running.client.create(SERVICES, svc, "default")
    await running.client.create(ENDPOINT_SLICES, part, "default")
    await put(running, "few", limit_connections="2")
    await put(running, "patient", proxy_read_timeout="1")
    waiting = [asyncio.create_task(running.get("few.test")) for _ in range(2)]
    for _ in waiting:
        await started.acquire()
    assert (await running.get("few.test"))[0] == 503
    assert (await running.get("patient.test"))[0] == 504
    gate.set()
    assert [status for status, _body, _head in await asyncio.gather(*waiting)] == [200, 200]
    assert (await running.get("few.test"))[0] == 200


async def test_another_server_judges_each_request(running: Running) -> None:  # noqa: F811
    await running.expose("a")
    heads: list[str] = []

    async def decide(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(head)
        status, more = "401 Unauthorized", "WWW-Authenticate: Bearer\r\n"
        if "x-key: good" in head.lower():
            status, more = "204 No Content", "X-Test: ann\r\n"
        elif "x-key: bad" in head.lower():
            status, more = "403 Forbidden", ""
        elif "x-key: odd" in head.lower():
            status, more = "302 Found", ""
        writer.write(f"HTTP/1.1 {status}\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    judge = Web("judge")
    judge.server = await asyncio.start_server(decide, own_address(), 0)
    judge.port = judge.server.sockets[0].getsockname()[1]
    svc, part = headless("judge", judge)
    await running.client.create(SERVICES, svc, "default")
    await running.client.create(ENDPOINT_SLICES, part, "default")
    url = "http://judge.default.svc.cluster.local:80/verify?x=1"
    await put(running, "asked", auth_url=url, auth_response_headers="X-Test, X-Other")
    await put(running, "sign", auth_url=url, auth_signin="https://login.test/start?h=$host")
    await put(running, "direct", auth_url=f"http://{own_address()}:{judge.port}/verify")
    await put(running, "gone", auth_url="http://nobody.default.svc/verify")
    got = {key: await running.get("asked.test", "/p?q=1", headers=f"X-Key: {key}\r\nX-Other: forged\r\n") for key in ("good", "bad", "odd", "none")}
    assert {key: answer[0] for key, answer in got.items()} == {"good": 200, "bad": 403, "odd": 500, "none": 401}
    assert "saw-x-test: ann" in got["good"][2]
    assert "www-authenticate: Bearer" in got["none"][2]
    assert heads[0].startswith("GET /verify?x=1 ")
    for line in ("x-original-url: http://asked.test/p?q=1", "x-original-method: GET", "host: judge.default.svc.cluster.local:80"):
        assert line in heads[0]
    status, _body, head = await running.get("sign.test", "/p?q=1")
    assert (status, "location: https://login.test/start?h=sign.test&rd=http%3A%2F%2Fsign.test%2Fp%3Fq%3D1" in head) == (302, True)
    assert (await running.get("direct.test", headers="X-Key: good\r\n"))[0] == 200
    assert (await running.get("gone.test", headers="X-Key: good\r\n"))[0] == 503


async def test_the_endpoint_follows_from_what_is_hashed(running: Running) -> None:  # noqa: F811
    webs = [await Web(f"w{number}").start() for number in range(3)]
    svc, _part = headless("a", webs[0])
    await running.client.create(SERVICES, svc, "default")
    for number, web in enumerate(webs):
        part = headless("a", web)[1]
        part["metadata"]["name"] = f"a-{number}"
        await running.client.create(ENDPOINT_SLICES, part, "default")
    await put(running, "hashed", upstream_hash_by="$request_uri$http_x_user")
    first = {path: (await running.get("hashed.test", path))[1][:2] for path in (f"/{number}" for number in range(30))}
    assert set(first.values()) == {"w0", "w1", "w2"}
    assert {path: (await running.get("hashed.test", path))[1][:2] for path in first} == first
    users_of = {(await running.get("hashed.test", "/1", headers=f"X-User: {number}\r\n"))[1][:2] for number in range(20)}
    assert len(users_of) > 1
    await running.client.delete(ENDPOINT_SLICES, "a-1", "default")
    moved = next(path for path, name in first.items() if name == "w1")
    async with asyncio.timeout(10):
        while (await running.get("hashed.test", moved))[1][:2] == "w1":
            await asyncio.sleep(0.02)
    after = {path: (await running.get("hashed.test", path))[1][:2] for path in first}
    assert all(after[path] == name for path, name in first.items() if name != "w1")


async def test_bodies_origins_twins_and_canaries_by_cookie(running: Running) -> None:  # noqa: F811
    for name in ("a", "b"):
        await running.expose(name)
    await put(running, "small", proxy_body_size="1k")
    assert (await running.get("small.test", headers="Content-Length: 2000\r\n", method="POST"))[0] == 413
    assert (await running.get("small.test"))[0] == 200
    await put(running, "cors", enable_cors="true", cors_allow_origin="https://one.test, https://*.two.test")
    for origin, allowed in (("https://one.test", True), ("https://x.two.test", True), ("https://two.test", False), ("https://one.test.evil", False)):
        for method in ("GET", "OPTIONS"):
            head = (await running.get("cors.test", headers=f"Origin: {origin}\r\n", method=method))[2].lower()
            assert (f"access-control-allow-origin: {origin}\r" in head + "\r") is allowed, (origin, method, head)
    await put(running, "twin", from_to_www_redirect="true")
    status, _body, head = await running.get("www.twin.test", "/deep?x=1")
    assert (status, "location: http://twin.test/deep?x=1" in head) == (308, True)
    await put(running, "main")
    annotations = {PREFIX + "canary": "true", PREFIX + "canary-by-cookie": "beta", PREFIX + "canary-weight": "100"}
    await running.put(ingress("canary", [rule("main.test", ("/", "Prefix", "b"))], annotations))
    assert (await running.get("main.test", headers="Cookie: beta=never\r\n"))[1].startswith("a ")
    assert (await running.get("main.test", headers="Cookie: beta=always\r\n"))[1].startswith("b ")
    assert (await running.get("main.test"))[1].startswith("b ")


async def test_a_body_of_unknown_length_is_cut_off_when_it_grows_too_long(running: Running) -> None:  # noqa: F811
    whole: list[int] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            length = 0
            while size := int((await reader.readline()).strip() or b"", 16):
                length += len(await reader.readexactly(size + 2)) - 2
            whole.append(length)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            await writer.drain()
        except (ValueError, asyncio.IncompleteReadError, ConnectionError):
            whole.append(-1)
        writer.close()

    web = Web("a")
    web.server = await asyncio.start_server(collect, own_address(), 0)
    web.port = web.server.sockets[0].getsockname()[1]
    svc, part = headless("a", web)
    await running.client.create(SERVICES, svc, "default")
    await running.client.create(ENDPOINT_SLICES, part, "default")
    await put(running, "grows", proxy_body_size="100k")

    async def sent(pieces: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.listen.http_port)
        try:
            writer.write(b"POST / HTTP/1.1\r\nHost: grows.test\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(pieces):
                writer.write(b"2710\r\n" + b"x" * 10000 + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            return (await asyncio.wait_for(reader.read(4096), 10)).split(b"\r\n")[0]
        except ConnectionError:
            return b""
        finally:
            writer.close()

    assert b"200" in await sent(9)
    assert b"200" not in await sent(300)
    async with asyncio.timeout(10):
        while len(whole) < 2:
            await asyncio.sleep(0.02)
    assert whole == [90000, -1]


@pytest.mark.parametrize(
    ("password", "stored"),
    [("hello", BCRYPT), ("hello", SHA512), ("secret", "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ="), ("pw", "{PLAIN}pw")],
)
def test_hashes_of_htpasswd(password: str, stored: str) -> None:
    assert matches(password, stored)
    assert not matches(password + "x", stored)


def test_apaches_own_hash_is_what_openssl_computes() -> None:
    for password in ("a", "secret", "a much longer pass phrase, longer than sixteen"):
        made = subprocess.run(["openssl", "passwd", "-apr1", "-salt", "r31.....", password], capture_output=True, text=True, check=True).stdout.strip()
        assert matches(password, made)
        assert not matches(password + "x", made)


def test_what_cannot_be_understood_keeps_out_or_is_told() -> None:
    problems: list[str] = []

    def read(**annotations: str) -> list[tuple[str, ...]]:
        wanted = {name.replace("_", "-"): text for name, text in annotations.items()}
        return limits.actions(lambda name: wanted.get(name, ""), "ns/web", lambda _name: "", problems)

    assert read(auth_type="digest") == [("reply", "503")]
    assert read(auth_type="basic", auth_secret="other/users") == [("reply", "503")]
    assert read(limit_rps="many", proxy_body_size="big", proxy_read_timeout="long", affinity="ip", session_cookie_name="x") == []
    assert len(problems) == 6
    assert read(auth_url="ftp://x/") == read(auth_url="http://$host/") == read(auth_url="http://[::1/") == [("reply", "503")]
    assert read(upstream_hash_by="$nothing") == []
    assert len(problems) == 10
    assert read(proxy_body_size="0") == []
    assert read_users(users("a:b:c\nno colon\n"), "auth-file") == {"a": "b"}
    assert read_users({"data": {"ann": base64.b64encode(b"{PLAIN}x").decode()}}, "auth-map") == {"ann": "{PLAIN}x"}
