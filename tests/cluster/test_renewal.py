"""Certificates are made anew while everything runs, and used at once."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest

from knarr.api.errors import StatusError
from knarr.cluster import pki, renewal
from tests.kubelet.conftest import Bench, bench
from tests.kubelet.test_server import PORT, client_of

__all__ = ["bench"]


async def test_a_pair_that_ends_soon_is_made_anew_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = pki.Authority(tmp_path, "ca", "kubernetes")

    def issue() -> list[pki.KeyPair]:
        return [authority.issue(tmp_path / name, name) for name in ("a", "b")]

    first = issue()
    monkeypatch.setattr(pki, "LEAF_DAYS", pki.RENEW_DAYS - 1)
    (tmp_path / "b.crt").unlink()
    pairs = issue()
    before = pairs[1].certificate_pem()
    monkeypatch.setattr(pki, "LEAF_DAYS", 365)
    told: list[list[pki.KeyPair]] = []
    task = asyncio.ensure_future(renewal.follow(first, told.append, issue=issue, seconds=0.01))
    try:
        await asyncio.sleep(0.3)
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert told == [[pairs[1]]]
    assert pairs[1].certificate_pem() != before


async def test_a_pair_that_is_half_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    pair = pki.Authority(tmp_path, "ca", "kubernetes").issue(tmp_path / "a", "a")
    told: list[bytes] = []

    def renewed(pairs: list[pki.KeyPair]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pairs[0].certificate, pairs[0].key)
        told.append(pairs[0].certificate_pem())

    other = pki.Authority(tmp_path, "ca", "kubernetes").issue(tmp_path / "new", "a")
    task = asyncio.ensure_future(renewal.follow([pair], renewed, seconds=0.01))
    try:
        await asyncio.sleep(0)
        pair.key.write_bytes(other.key_pem())
        await asyncio.sleep(0.1)
        assert told == []
        pair.certificate.write_bytes(other.certificate_pem())
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert told == [other.certificate_pem()]


async def test_a_kubelet_shows_and_uses_its_new_certificates_without_a_restart(bench: Bench) -> None:
    from tests.kubelet.test_server import serve

    await serve(bench)
    assert bench.kubelet is not None
    before = ssl.get_server_certificate
    shown = await asyncio.to_thread(before, ("127.0.0.1", PORT))
    config = bench.kubelet.config
    client = client_of(certificate=True)
    try:
        assert (await client.request("GET", "/healthz")).status == 200
        authority = pki.Authority(Path(config.client_ca).parent, "ca", "kubernetes")
        fresh = authority.issue(bench.folder / "fresh", "system:node:" + bench.node_name, groups=["system:nodes"], hosts=["127.0.0.1"], server=True)
        Path(config.serving_key).write_bytes(fresh.key_pem())
        Path(config.serving_cert).write_bytes(fresh.certificate_pem())
        bench.kubelet.serving_renewed()
        again = await asyncio.to_thread(before, ("127.0.0.1", PORT))
        assert again != shown
        assert again.strip() == fresh.certificate_pem().decode().strip()
        # The connection of before goes on, and to the API server this is now another client.
        assert (await client.request("GET", "/healthz")).status == 200
        bench.kubelet.client_renewed(fresh.certificate_pem(), fresh.key_pem())
        with pytest.raises(StatusError, match=f'node "{bench.node_name}" can only create mirror pods'):
            await bench.run("p", "true")
    finally:
        await client.close()
