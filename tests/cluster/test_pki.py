from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509

from knarr.cluster import pki

HOSTS = ["kubernetes", "localhost", "127.0.0.1", "10.96.0.1"]


def test_a_second_call_keeps_every_certificate(tmp_path: Path) -> None:
    pki.ensure(tmp_path, HOSTS)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pki.ensure(tmp_path, HOSTS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_new_address_renews_the_api_servers_certificate_alone(tmp_path: Path) -> None:
    first = pki.ensure(tmp_path, HOSTS)
    before = first.api_server.certificate_pem(), first.admin.certificate_pem()
    second = pki.ensure(tmp_path, [*HOSTS, "192.0.2.7"])
    assert second.api_server.certificate_pem() != before[0]
    assert second.admin.certificate_pem() == before[1]


def test_certificates_chain_to_the_authority_and_name_the_bootstrap_users(tmp_path: Path) -> None:
    made = pki.ensure(tmp_path, HOSTS)
    authority = x509.load_pem_x509_certificate(made.authority.pair.certificate_pem())
    for pair, name in ((made.admin, "kubernetes-admin"), (made.scheduler, "system:kube-scheduler"), (made.node_client(tmp_path, "n1"), "system:node:n1")):
        certificate = x509.load_pem_x509_certificate(pair.certificate_pem())
        certificate.verify_directly_issued_by(authority)
        assert certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value == name


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    pki.ensure(tmp_path, HOSTS)
    assert {os.stat(path).st_mode & 0o777 for path in tmp_path.glob("*.key")} == {0o600}
