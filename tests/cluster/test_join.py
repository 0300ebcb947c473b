"""Joining: what a machine believes before it knows anybody, and which names a node may have in its certificate."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from knarr.api.types import Object
from knarr.cluster import join, pki, tokens
from knarr.cluster.lifecycle import CommandError
from knarr.cluster.servingcerts import objection
from knarr.controllers.bootstrap import detached_signature
from knarr.kubelet.certificates import SERVING_SIGNER, Template, make_request

TOKEN = "abcdef.0123456789abcdef"


def test_a_description_signed_with_the_token_is_believed() -> None:
    join.verify("content", detached_signature("content", *TOKEN.split(".")), TOKEN)


@pytest.mark.parametrize(
    ("content", "signature", "words"),
    [
        ("other", detached_signature("content", *TOKEN.split(".")), "does not fit the token"),
        ("content", detached_signature("content", "abcdef", "f" * 16), "does not fit the token"),
        ("content", detached_signature("content", "fedcba", "0123456789abcdef"), "does not fit the token"),
        ("content", "", "unknown to the cluster"),
        ("content", "###.x.y", "signature"),
        ("content", base64.urlsafe_b64encode(b'{"alg":"none","kid":"abcdef"}').decode().rstrip("=") + "..", "does not fit the token"),
    ],
)
def test_a_description_that_is_not_signed_with_the_token_is_refused(content: str, signature: str, words: str) -> None:
    with pytest.raises(CommandError, match=words):
        join.verify(content, signature, TOKEN)


def test_the_hash_names_the_key_of_the_authority(tmp_path: Path) -> None:
    one = pki.Authority(tmp_path / "a", "ca", "kubernetes").pair.certificate_pem()
    other = pki.Authority(tmp_path / "b", "ca", "kubernetes").pair.certificate_pem()
    assert tokens.ca_hash(one).startswith("sha256:")
    assert len(tokens.ca_hash(one)) == 71
    assert tokens.ca_hash(one) != tokens.ca_hash(other)


@pytest.mark.parametrize(
    ("server", "token", "hashes", "words"),
    [
        ("192.0.2.1", TOKEN, ("sha256:" + "0" * 64,), "HOST:PORT"),
        ("192.0.2.1:6443", "abc", ("sha256:" + "0" * 64,), "not of the form abcdef"),
        ("192.0.2.1:6443", TOKEN, (), "discovery-token-ca-cert-hash"),
        ("192.0.2.1:6443", TOKEN, ("md5:0",), "sha256:HEX"),
    ],
)
def test_options_that_cannot_be_right_are_refused_before_anything_is_asked(server: str, token: str, hashes: tuple[str, ...], words: str) -> None:
    with pytest.raises(CommandError, match=words):
        join._check(join.JoinOptions(server=server, token=token, hashes=hashes))


NODE: Object = {"metadata": {"name": "n1"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}, {"type": "Hostname", "address": "n1"}]}}


def serving_request(template: Template, usages: tuple[str, ...] = ("digital signature", "server auth")) -> Object:
    return {"spec": {"request": base64.b64encode(make_request(template)[0]).decode(), "signerName": SERVING_SIGNER, "usages": list(usages)}}


def test_a_node_gets_its_own_names_and_addresses() -> None:
    assert objection(serving_request(Template("n1", dns=("n1",), ips=("192.0.2.7",))), NODE) is None


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (serving_request(Template("n2", dns=("n1",), ips=("192.0.2.7",))), "subject"),
        (serving_request(Template("n1", dns=("kubernetes",), ips=("192.0.2.7",))), "kubernetes is no name"),
        (serving_request(Template("n1", dns=("n1",), ips=("10.96.0.1",))), "10.96.0.1 is no name"),
        (serving_request(Template("n1")), "names nothing"),
        (serving_request(Template("n1", dns=("n1",)), ("digital signature", "client auth")), "not for a server"),
        ({"spec": {"request": "AAAA", "usages": []}}, "cannot be read"),
    ],
)
def test_a_node_gets_no_other_names(request_: Object, words: str) -> None:
    assert words in (objection(request_, NODE) or "")
