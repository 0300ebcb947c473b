"""API servers to measure: ours in a process of its own on SQLite, and optionally another one with its etcd."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from knarr.cluster import pki

TOKEN = "bench-token"


@dataclass
class Target:
    """A running API server: base URL, the CA file, and the credentials of a cluster administrator."""

    name: str
    url: str
    folder: Path
    pid: int

    @property
    def header(self) -> str:
        return f"Authorization: Bearer {TOKEN}"

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.crt"))

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, context=self.context(), timeout=60) as answer:
            return bytes(answer.read())

    @contextlib.contextmanager
    def connection(self) -> Iterator[Callable[..., int]]:
        """Give ask(method, path, body, wanted status) -> status over one connection that is kept."""
        host, port = self.url.removeprefix("https://").split(":")
        connection = http.client.HTTPSConnection(host, int(port), context=self.context(), timeout=60)

        def ask(method: str, path: str, body: bytes | None = None, wanted: int = 0) -> int:
            connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if wanted and answer.status != wanted:
                raise RuntimeError(text.decode())
            return answer.status

        try:
            yield ask
        finally:
            connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def beside(options: argparse.Namespace) -> list[contextlib.AbstractContextManager[Target]]:
    """The servers that a row measures in turn: ours, and the reference if one was named."""
    found = [ours()]
    if options.reference_apiserver:
        found.append(reference(options.reference_apiserver, options.reference_etcd))
    return found


@contextlib.contextmanager
def ours() -> Iterator[Target]:
    """Our API server with its embedded store on disk."""
    with tempfile.TemporaryDirectory(prefix="knarr-bench-") as name:
        folder = Path(name)
        _credentials(folder)
        with _ours_in(folder) as target:
            yield target


@contextlib.contextmanager
def restarted(target: Target, between: Callable[[], None]) -> Iterator[float]:
    """Give the seconds that our server needs to be ready in a new process, after `between` has changed its stopped store."""
    os.kill(target.pid, signal.SIGTERM)
    while not _ended(target.pid):
        time.sleep(0.01)
    between()
    begin = time.monotonic()
    with _ours_in(target.folder):
        yield time.monotonic() - begin


def _ended(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def _ours_in(folder: Path) -> Iterator[Target]:
    port = free_port()
    with _process([sys.executable, "-m", "bench.apiserver", str(folder), str(port)], folder / "server.log") as pid:
        target = Target("knarr", f"https://127.0.0.1:{port}", folder, pid)
        _wait(target)
        yield target


@contextlib.contextmanager
def reference(apiserver: str, etcd: str) -> Iterator[Target]:
    """Another API server and etcd, with the same certificates and token."""
    with tempfile.TemporaryDirectory(prefix="knarr-bench-ref-") as name:
        folder = Path(name)
        port, client, peer = free_port(), free_port(), free_port()
        _credentials(folder)
        store = [
            etcd,
            "--data-dir",
            str(folder / "etcd"),
            "--listen-client-urls",
            f"http://127.0.0.1:{client}",
            "--advertise-client-urls",
            f"http://127.0.0.1:{client}",
        ]
        store += [
            "--listen-peer-urls",
            f"http://127.0.0.1:{peer}",
            "--initial-cluster",
            f"default=http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls",
            f"http://127.0.0.1:{peer}",
        ]
        server = [
            apiserver,
            f"--etcd-servers=http://127.0.0.1:{client}",
            f"--secure-port={port}",
            "--bind-address=127.0.0.1",
            f"--tls-cert-file={folder}/apiserver.crt",
        ]
        server += [
            f"--tls-private-key-file={folder}/apiserver.key",
            f"--client-ca-file={folder}/ca.crt",
            f"--token-auth-file={folder}/tokens.csv",
            "--authorization-mode=RBAC",
        ]
        server += [
            f"--service-account-key-file={folder}/sa.pub",
            f"--service-account-signing-key-file={folder}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc",
        ]
        server += ["--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount"]
        with _process(store, folder / "etcd.log"), _process(server, folder / "server.log") as pid:
            target = Target("reference", f"https://127.0.0.1:{port}", folder, pid)
            _wait(target)
            yield target


def _credentials(folder: Path) -> None:
    pki.ensure(folder, ["localhost", "127.0.0.1", "10.96.0.1", "kubernetes.default.svc"])
    (folder / "tokens.csv").write_text(f'{TOKEN},bench,1,"system:masters"\n')


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[int]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.join(os.getcwd(), "src")])})
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(target: Target) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            target.request("GET", "/api/v1/namespaces/default")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{target.name} did not start: {error}\n" + (target.folder / "server.log").read_text()[-2000:]
                ) from error
            time.sleep(0.05)
