"""Credentials for images: plugins, pull secrets, and who may use an image that another pod has brought to the node."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knarr.api.resources import PODS, SECRETS, SERVICE_ACCOUNTS
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.configfile import ConfigFileError
from knarr.kubelet.configfile import load as load_kubelet
from knarr.kubelet.credentials import keyring, providerconfig, records
from knarr.kubelet.credentials.keyring import Credential, Owner
from knarr.kubelet.images import repository
from knarr.runtime.cri import AuthConfig, Image
from tests.images import build
from tests.kubelet.conftest import Bench, container_state

PASSWORD = "secret"
HTPASSWD = "user:$2b$04$4FRvrmAOr7X64MWyP.k7u.Dml2k7azZ4nIsaOiD0wr/fAEwJHMJQW\n"
ALLOWED = base64.b64encode(f"user:{PASSWORD}".encode()).decode()


@pytest.mark.parametrize(
    ("pattern", "image", "expected"),
    [
        ("registry.io", "registry.io/a", True),
        ("registry.io/a", "registry.io/a/b", True),
        ("registry.io/b", "registry.io/a/b", False),
        ("*.registry.io", "x.registry.io/a", True),
        ("*.registry.io", "x.y.registry.io/a", False),
        ("*.*.registry.io", "x.y.registry.io/a", True),
        ("x*.registry.i?", "xyz.registry.io/a", True),
        ("registry.io", "registry.io:5000/a", False),
        ("registry.io:5000", "registry.io:5000/a", True),
        ("*.io:5000", "registry.io:5000/a", True),
    ],
)
def test_credentials_are_for_images_that_their_pattern_matches(pattern: str, image: str, expected: bool) -> None:
    assert keyring.matches(pattern, image) is expected


def test_more_specific_keys_come_first_and_docker_hub_has_many_names() -> None:
    entries = keyring.of_config({"https://index.docker.io/v1/": {"username": "a"}, "docker.io/team": {"username": "b"}, "other.io": {"username": "c"}})
    assert [c.auth.username for c in keyring.choose(entries, "docker.io/team/app")] == ["b", "a"]
    assert [c.auth.username for c in keyring.choose(entries, "docker.io/library/app")] == ["a"]


@pytest.mark.parametrize(("reference", "expected"), [("a.io:5000/b/c:1", "a.io:5000/b/c"), ("a.io/c@sha256:" + "0" * 64, "a.io/c"), ("a.io:1/c", "a.io:1/c")])
def test_an_image_has_a_repository(reference: str, expected: str) -> None:
    assert repository(reference) == expected


def _provider(**fields: Any) -> dict[str, Any]:
    return {"name": "plugin", "matchImages": ["*.io"], "defaultCacheDuration": "1m", "apiVersion": providerconfig.V1, **fields}


def _configured(folder: Path, *providers: dict[str, Any]) -> list[providerconfig.ProviderConfig]:
    document = {"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": providers}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "plugin").write_text("")
    (folder / "plugin").chmod(0o755)
    return providerconfig.load(str(folder / "config.json"), str(folder))


_TOKEN = {"serviceAccountTokenAudience": "a", "cacheType": "Token", "requireServiceAccount": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "providers.name"),
        ({"matchImages": []}, "matchImages"),
        ({"defaultCacheDuration": None}, "defaultCacheDuration"),
        ({"apiVersion": "v1"}, "providers.apiVersion"),
        ({"surprise": 1}, 'unknown field "providers.surprise"'),
        ({"name": "missing"}, "did not exist"),
        ({"tokenAttributes": {**_TOKEN, "cacheType": "No"}}, "cacheType"),
        ({"tokenAttributes": _TOKEN, "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1"}, "only supported for"),
        ({"tokenAttributes": {**_TOKEN, "requireServiceAccount": False, "requiredServiceAccountAnnotationKeys": ["a"]}}, "cannot be false"),
        ({"tokenAttributes": {**_TOKEN, "requiredServiceAccountAnnotationKeys": ["a"], "optionalServiceAccountAnnotationKeys": ["a"]}}, "twice"),
    ],
)
def test_a_configuration_of_plugins_that_is_not_right_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(providerconfig.ProviderConfigError, match=message.replace("/", "\\/")):
        _configured(tmp_path, _provider(**fields))


def test_configurations_of_a_folder_are_joined(tmp_path: Path) -> None:
    assert [p.cache_seconds for p in _configured(tmp_path, _provider(tokenAttributes=_TOKEN))] == [60.0]
    with pytest.raises(providerconfig.ProviderConfigError, match="duplicate provider name"):
        shutil.copy(tmp_path / "config.json", tmp_path / "other.yaml")
        providerconfig.load(str(tmp_path), str(tmp_path))


def _secret(name: str, password: str = "p") -> Credential:
    return Credential(AuthConfig("u", password), secret=Owner("ns", name, name))


def test_who_pulled_an_image_is_remembered_over_restarts(tmp_path: Path) -> None:
    def fresh(policy: str = records.PRELOADED, allowed: tuple[str, ...] = ()) -> records.PullRecords:
        return records.PullRecords(str(tmp_path), records.policy(policy, allowed))

    pulls = fresh()
    assert pulls.open("r/a:1", "r/a", "id") is True, "put there by the node's owner"
    pulls.intend("r/a:1")
    assert pulls.open("r/a:1", "r/a", "id") is False, "being pulled by somebody"
    pulls.pulled("r/a:1", "r/a", "id", _secret("one"))
    pulls = fresh()
    assert pulls.open("r/a:1", "r/a", "id") is None
    assert not pulls.allows("r/a", "id", [_secret("two", "other")])
    assert pulls.allows("r/a", "id", [_secret("one", "rotated")]), "the same object"
    assert pulls.allows("r/a", "id", [_secret("three", "rotated")]), "the same content"
    assert pulls.open("r/b:1", "r/b", "id") is False, "another name is another right"
    pulls.intend("r/a:1")
    pulls.pulled("r/a:1", "r/a", "id", None)
    assert fresh().open("r/a:1", "r/a", "id") is True, "nobody needs credentials"
    assert fresh(records.ALWAYS).open("x:1", "x", "preloaded") is False
    assert fresh(records.NEVER).open("r/b:1", "r/b", "id") is True
    assert fresh(records.ALLOWLISTED, ("r/*", "y")).open("r/b:1", "r/b", "id") is True
    assert fresh(records.ALLOWLISTED, ("r/*", "y")).open("yy:1", "yy", "id") is False
    pulls.prune({"other"}, time.time() + 10)
    assert fresh().open("r/a:1", "r/a", "id") is True
    assert os.listdir(tmp_path / "pulled") == os.listdir(tmp_path / "pulling") == []


def test_a_pull_that_the_kubelet_did_not_survive_makes_no_image_of_the_nodes_owner(tmp_path: Path) -> None:
    records.PullRecords(str(tmp_path), records.policy(records.PRELOADED)).intend("r/a:1")
    pulls = records.PullRecords(str(tmp_path), records.policy(records.PRELOADED))
    assert pulls.unsettled == {"r/a:1"}
    pulls.settle([Image("id", repo_tags=["r/a:1"], repo_digests=[], size_bytes=1)])
    assert pulls.unsettled == set()
    assert pulls.open("r/a:1", "r/a", "id") is False
    assert os.listdir(tmp_path / "pulling") == []


@pytest.mark.parametrize("pattern", ["", "/*", "a*", "a/*/*", " a", "a:1", "a@sha256:0"])
def test_patterns_of_allowed_images_name_repositories(pattern: str) -> None:
    text = json.dumps({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "imagePullCredentialsVerificationPolicy": "NeverVerifyAllowlistedImages", "preloadedImagesVerificationAllowlist": [pattern],
    })  # fmt: skip
    with pytest.raises(ConfigFileError, match="preloadedImagesVerificationAllowlist"):
        load_kubelet(text, KubeletConfig(node_name="n"))


class Registry:
    """Debian's docker-registry with basic authentication."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{port}"

    def push(self, name: str) -> None:
        """The busybox image."""
        with tarfile.open(build.busybox()) as archive:
            index = json.loads(archive.extractfile("index.json").read())  # type: ignore[union-attr]
            blobs = {m.name.rpartition("/")[2]: archive.extractfile(m).read() for m in archive if m.name.startswith("blobs/sha256/")}  # type: ignore[union-attr]
        descriptor = index["manifests"][0]
        manifest = blobs[descriptor["digest"].partition(":")[2]]
        for part in (json.loads(manifest)["config"], *json.loads(manifest)["layers"]):
            location = self._send("POST", f"/v2/{name}/blobs/uploads/", b"").headers["Location"]
            path = location.partition(self.address)[2] or location
            self._send("PUT", f"{path}{'&' if '?' in path else '?'}digest={part['digest']}", blobs[part["digest"].partition(":")[2]], "application/octet-stream")
        self._send("PUT", f"/v2/{name}/manifests/1", manifest, descriptor["mediaType"])

    def _send(self, method: str, path: str, body: bytes, kind: str = "") -> Any:
        headers = {"Authorization": f"Basic {ALLOWED}", **({"Content-Type": kind} if kind else {})}
        return urllib.request.urlopen(urllib.request.Request(f"http://{self.address}{path}", body, headers, method=method), timeout=10)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    document = {
        "version": 0.1, "log": {"level": "error", "accesslog": {"disabled": True}}, "http": {"addr": f"127.0.0.1:{port}"},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "store")}},
        "auth": {"htpasswd": {"realm": "test", "path": str(tmp_path / "htpasswd")}},
    }  # fmt: skip
    (tmp_path / "registry.yml").write_text(json.dumps(document))
    program = shutil.which("docker-registry")
    assert program is not None, "docker-registry is among the Debian packages that the tests install"
    process = subprocess.Popen([program, "serve", str(tmp_path / "registry.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        made = Registry(tmp_path, port)
        for _ in range(500):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                made._send("GET", "/v2/", b"").close()
                break
            time.sleep(0.02)
        yield made
    finally:
        process.terminate()
        process.wait(10)


def plugin(registry: Registry) -> dict[str, str]:
    """Settings of a kubelet with a plugin that notes its requests in a file and knows the password."""
    folder = registry.folder / "plugins"
    folder.mkdir()
    answer = {
        "kind": "CredentialProviderResponse", "apiVersion": providerconfig.V1, "cacheKeyType": "Registry", "cacheDuration": "1h",
        "auth": {registry.address: {"username": "user", "password": PASSWORD}},
    }  # fmt: skip
    (folder / "give").write_text(f"#!/bin/sh\ncat >> {folder}/requests\necho >> {folder}/requests\n[ \"$1 $MODE\" = 'now go' ] || exit 3\necho '{json.dumps(answer)}'\n")
    (folder / "give").chmod(0o755)
    tokens = {
        "serviceAccountTokenAudience": "registry", "cacheType": "ServiceAccount", "requireServiceAccount": True,
        "requiredServiceAccountAnnotationKeys": ["test/role"], "optionalServiceAccountAnnotationKeys": ["test/more"],
    }  # fmt: skip
    provider = {
        "name": "give", "matchImages": [registry.address], "defaultCacheDuration": "0s", "apiVersion": providerconfig.V1, "args": ["now"],
        "env": [{"name": "MODE", "value": "go"}], "tokenAttributes": tokens,
    }  # fmt: skip
    document = {"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [provider]}
    (registry.folder / "providers.yaml").write_text(json.dumps(document))
    return {"credential_provider_config": str(registry.folder / "providers.yaml"), "credential_provider_bin_dir": str(folder)}


async def _waits(bench: Bench, name: str, *reasons: str) -> str:
    """The message with which a pod's container waits for one of these reasons; the pod is deleted."""

    def message(pod: Any) -> str | None:
        waiting = container_state(pod).get("waiting") or {} if pod and pod["status"].get("containerStatuses") else {}
        return f"{waiting.get('message')}" if waiting.get("reason") in reasons else None

    found: str = await bench.until(name, message)
    await bench.client.delete(PODS, name, bench.namespace)
    await bench.until_gone(name)
    return found


async def test_a_private_image_is_for_pods_whose_own_credentials_could_have_pulled_it(bench: Bench, registry: Registry) -> None:
    registry.push("team/app")
    bench.options = plugin(registry)
    await bench.restart()
    image = f"{registry.address}/team/app:1"
    fields = {"imagePullPolicy": "IfNotPresent", "image": image}

    await bench.run("stranger", "true", container=fields)
    assert "authorization failed" in await _waits(bench, "stranger", "ErrImagePull", "ImagePullBackOff")
    assert not (registry.folder / "plugins" / "requests").exists(), "an account without the annotation does not take part"

    for name in ("taking-part", "other"):
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": bench.namespace, "annotations": {"test/role": name}}}
        await bench.client.create(SERVICE_ACCOUNTS, account, bench.namespace)
    for name in ("first", "second"):
        await bench.run(name, "echo here", container=fields, serviceAccountName="taking-part")
        await bench.until_phase(name, "Succeeded")
    (request,) = [json.loads(line) for line in (registry.folder / "plugins" / "requests").read_text().splitlines()]
    claims = json.loads(base64.urlsafe_b64decode(request.pop("serviceAccountToken").split(".")[1] + "=="))
    assert (claims["aud"], claims["kubernetes.io"]["serviceaccount"]["name"], claims["kubernetes.io"]["pod"]["name"]) == (["registry"], "taking-part", "first")
    assert request == {
        "kind": "CredentialProviderRequest", "apiVersion": providerconfig.V1, "image": f"{registry.address}/team/app",
        "serviceAccountAnnotations": {"test/role": "taking-part"},
    }  # fmt: skip

    await bench.restart()  # what is known of the image outlives the kubelet
    await bench.run("stranger", "true", container=fields)
    assert "authorization failed" in await _waits(bench, "stranger", "ErrImagePull", "ImagePullBackOff")
    await bench.run("never", "true", container={**fields, "imagePullPolicy": "Never"})
    assert "is not present with pull policy of Never" in await _waits(bench, "never", "ErrImageNeverPull")

    for name, server in (("one", registry.address), ("two", registry.address)):
        content = json.dumps({"auths": {server: {"auth": ALLOWED}}}).encode()
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": bench.namespace}, "type": "kubernetes.io/dockerconfigjson"}
        await bench.client.create(SECRETS, {**secret, "data": {".dockerconfigjson": base64.b64encode(content).decode()}}, bench.namespace)
    await bench.run("with-secret", "true", container=fields, imagePullSecrets=[{"name": "one"}])
    await bench.until_phase("with-secret", "Succeeded")
    await bench.run("same-content", "true", container={**fields, "imagePullPolicy": "Never"}, imagePullSecrets=[{"name": "two"}])
    await bench.until_phase("same-content", "Succeeded")
