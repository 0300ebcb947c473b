"""Ingress annotations about TLS and errors: certificates of clients, backends that are checked, stand-ins, through a real HAProxy."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from knarr.api.resources import ENDPOINT_SLICES, SECRETS, SERVICES

from .test_ingress import Running, Web, headless, ingress, rule, running  # noqa: F401

pytestmark = pytest.mark.timeout(60)
PREFIX = "nginx.ingress.kubernetes.io/"


class Authority:
    """Signs certificates, for servers and clients."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.pem = self._sign(self.name, self.key, authority=True)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool = False) -> str:
        present = datetime.datetime.now(datetime.UTC)
        name = subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(present - datetime.timedelta(days=1))
            .not_valid_after(present + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(str(name))]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def pair(self, name: str) -> tuple[str, str]:
        """Certificate and key, as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
        return self._sign(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key), private


def secret(name: str, **parts: str) -> dict[str, Any]:
    data = {key.replace("_", "."): base64.b64encode(text.encode()).decode() for key, text in parts.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"}, "data": data}


def annotated(name: str, tls: str = "", target: str = "a", **annotations: str) -> dict[str, Any]:
    wanted = {PREFIX + key.replace("_", "-"): text for key, text in annotations.items()}
    spec = {"tls": [{"hosts": [f"{name}.test"], "secretName": tls}]} if tls else {}
    return ingress(name, [rule(f"{name}.test", ("/", "Prefix", target))], wanted, **spec)


async def get(running: Running, host: str, pair: Path | None = None, *, sni: str = "", headers: str = "") -> tuple[int, str]:  # noqa: F811
    """Status and whole answer of a request over TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if pair is not None:
        context.load_cert_chain(pair)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.listen.https_port, ssl=context, server_hostname=sni or host)
    writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n".encode())
    try:
        async with asyncio.timeout(5):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = await reader.readexactly(int(head.lower().split("content-length: ")[1].split("\r\n")[0]))
    finally:
        writer.close()
    return int(head.split(" ")[1]), head + body.decode()


async def test_only_clients_with_a_certificate_of_the_authority_come_in(running: Running, tmp_path: Path) -> None:  # noqa: F811
    await running.expose("a")
    ours, others = Authority("ours"), Authority("others")
    for name, pair in (("good", ours.pair("ann")), ("other", others.pair("ann")), ("eve", ours.pair("eve"))):
        (tmp_path / name).write_text("".join(pair))
    certificate, key = ours.pair("safe.test")
    await running.client.create(SECRETS, secret("cert", tls_crt=certificate, tls_key=key), "default")
    await running.client.create(SECRETS, secret("authority", ca_crt=ours.pem), "default")
    await running.put(annotated("safe", "cert", auth_tls_secret="default/authority", auth_tls_match_cn="CN=an+$"))
    await running.put(annotated("free", "cert"))
    await running.put(annotated("asked", "cert", auth_tls_secret="authority", auth_tls_verify_client="optional"))
    await running.put(annotated("shut", "cert", auth_tls_secret="missing"))
    assert (await get(running, "safe.test"))[0] == 400
    assert (await get(running, "safe.test", tmp_path / "good", headers="ssl-client-subject-dn: CN=root\r\n"))[0] == 200
    assert (await get(running, "safe.test", tmp_path / "eve"))[0] == 403
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await get(running, "safe.test", tmp_path / "other")
    # A connection that was opened for a name without the check does not help.
    assert (await get(running, "safe.test", tmp_path / "good", sni="free.test"))[0] == 421
    assert (await get(running, "free.test"))[0] == 200
    assert (await get(running, "asked.test"))[0] == 200
    assert (await get(running, "shut.test", tmp_path / "good"))[0] == 503
    assert (await running.get("safe.test"))[0] == 308
    await running.put(annotated("safe", "cert"))
    assert (await get(running, "safe.test"))[0] == 200


async def secure_web(running: Running, name: str, pair: tuple[str, str], folder: Path, client_authority: str = "") -> None:  # noqa: F811
    """Expose a server that speaks TLS, and wants certificates of an authority."""
    file = folder / f"{name}.pem"
    file.write_text("".join(pair))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=client_authority or None)
    context.load_cert_chain(file)
    if client_authority:
        context.verify_mode = ssl.CERT_REQUIRED
    web = await Web(name).start(ssl=context)
    svc, part = headless(name, web)
    await running.client.create(SERVICES, svc, "default")
    await running.client.create(ENDPOINT_SLICES, part, "default")


async def test_backends_are_checked_and_see_our_certificate(running: Running, tmp_path: Path) -> None:  # noqa: F811
    ours, others = Authority("ours"), Authority("others")
    await secure_web(running, "a", ours.pair("inner.test"), tmp_path, ours.pem)
    certificate, key = ours.pair("proxy")
    await running.client.create(SECRETS, secret("both", tls_crt=certificate, tls_key=key, ca_crt=ours.pem), "default")
    await running.client.create(SECRETS, secret("wrong", tls_crt=certificate, tls_key=key, ca_crt=others.pem), "default")
    common = {"backend_protocol": "HTTPS", "proxy_ssl_verify": "on"}
    await running.put(annotated("good", **common, proxy_ssl_secret="default/both", proxy_ssl_name="inner.test"))
    await running.put(annotated("name", **common, proxy_ssl_secret="both", proxy_ssl_name="outer.test"))
    await running.put(annotated("wrong", **common, proxy_ssl_secret="wrong", proxy_ssl_name="inner.test"))
    await running.put(annotated("none", backend_protocol="HTTPS"))
    pid = running.controller.proxy.pid
    assert (await running.get("good.test"))[:2] == (200, "a / http 127.0.0.1")
    for host in ("name.test", "wrong.test", "none.test"):
        assert (await running.get(host))[0] in (502, 503), host
    await running.put(annotated("wrong", **common, proxy_ssl_secret="both", proxy_ssl_name="inner.test"))
    assert (await running.get("wrong.test"))[0] == 200
    assert running.controller.proxy.pid == pid


class Moody(Web):
    """Answers with the status that the path asks for."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads = [*getattr(self, "heads", []), head]
        status = head.split(" ")[1].strip("/").partition("?")[0][:3] or "200"
        body = f"{self.name} {status}".encode()
        writer.write(b"HTTP/1.1 %s X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status.encode(), len(body), body))
        await writer.drain()
        writer.close()


async def expose(running: Running, web: Web) -> None:  # noqa: F811
    svc, part = headless(web.name, await web.start())
    await running.client.create(SERVICES, svc, "default")
    await running.client.create(ENDPOINT_SLICES, part, "default")


async def test_another_server_stands_in_for_errors_and_for_missing_endpoints(running: Running) -> None:  # noqa: F811
    app, page = Moody("a"), Moody("page")
    await expose(running, app)
    await expose(running, page)
    await running.put(annotated("moody", custom_http_errors="404,503", default_backend="page"))
    await running.put(annotated("gone", target="nothing", default_backend="page"))
    assert (await running.get("moody.test", "/200"))[:2] == (200, "a 200")
    assert (await running.get("moody.test", "/500"))[:2] == (500, "a 500")
    assert (await running.get("moody.test", "/404", headers="Accept: text/x\r\n"))[:2] == (200, "page 200")
    seen = page.heads[-1].lower()  # type: ignore[attr-defined]
    for line in ("x-code: 404", "x-format: text/x", "x-original-uri: /404", "x-namespace: default", "x-ingress-name: moody", "x-service-name: a"):
        assert line in seen
    assert (await running.get("gone.test", "/"))[:2] == (200, "page 200")


async def test_copies_go_to_urls_and_slow_connections_have_their_own_time(running: Running) -> None:  # noqa: F811
    app, copies = Moody("a"), Moody("copies")
    await expose(running, app)
    await expose(running, copies)
    url = f"http://{copies.server.sockets[0].getsockname()[0]}:{copies.port}/201$request_uri"
    await running.put(annotated("both", mirror_target=url, mirror_host="copy.test", proxy_connect_timeout="4", proxy_next_upstream="off"))
    assert (await running.get("both.test", "/200?x=1"))[:2] == (200, "a 200")
    async with asyncio.timeout(5):
        while not getattr(copies, "heads", None):
            await asyncio.sleep(0.02)
    assert copies.heads[0].startswith("GET /201/200?x=1 ")  # type: ignore[attr-defined]
    assert "host: copy.test" in copies.heads[0].lower()  # type: ignore[attr-defined]


async def test_who_comes_from_a_known_network_needs_no_password_if_any_is_enough(running: Running) -> None:  # noqa: F811
    await running.expose("a")
    await running.client.create(SECRETS, secret("users", auth="ann:{PLAIN}secret\n"), "default")
    common = {"auth_type": "basic", "auth_secret": "users", "satisfy": "any"}
    await running.put(annotated("near", **common, allowlist_source_range="127.0.0.0/8"))
    await running.put(annotated("far", **common, allowlist_source_range="10.0.0.0/8"))
    assert (await running.get("near.test"))[0] == 200
    assert (await running.get("far.test"))[0] == 401


async def test_tls_that_passes_through_shows_the_backends_certificate_and_disturbs_nobody(running: Running, tmp_path: Path) -> None:  # noqa: F811
    ours = Authority("ours")
    await secure_web(running, "inner", ours.pair("through.test"), tmp_path)
    await running.expose("a")
    certificate, key = ours.pair("other.test")
    await running.client.create(SECRETS, secret("cert", tls_crt=certificate, tls_key=key), "default")
    await running.put(annotated("other", "cert"))
    pid = running.controller.proxy.pid
    # One connection is open all the while, and is served on.
    reader, writer = await asyncio.open_connection("127.0.0.1", running.listen.http_port)
    await running.put(annotated("through", target="inner", ssl_passthrough="true"))

    async def names(host: str) -> str:
        context = ssl.create_default_context(cadata=ours.pem)
        _reader, connection = await asyncio.open_connection("127.0.0.1", running.listen.https_port, ssl=context, server_hostname=host)
        found = connection.get_extra_info("peercert")["subject"][0][0][1]
        connection.close()
        return str(found)

    assert running.controller.proxy.pid != pid
    assert (await get(running, "through.test"))[1].endswith("inner / None None")
    assert [await names(host) for host in ("through.test", "other.test")] == ["through.test", "other.test"]
    assert (await get(running, "other.test"))[0] == 200
    assert (await running.get("through.test"))[0] == 308
    writer.write(b"GET / HTTP/1.1\r\nHost: other.test\r\nConnection: close\r\n\r\n")
    assert b" 308 " in (await asyncio.wait_for(reader.read(), 5))
    writer.close()
    await running.put(annotated("through", target="inner", backend_protocol="HTTPS"))
    assert (await get(running, "through.test"))[1].endswith("inner / https 127.0.0.1")
