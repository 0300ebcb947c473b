"""The real kubectl against exec, attach, cp and port-forward, over WebSocket and over SPDY."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import pty
import signal
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from knarr.runtime.cri import RuntimeFault
from tests import tools
from tests.http.streams.api import StreamServer
from tests.runtime.conftest import Bench


class Kubectl:
    def __init__(self, server: StreamServer, config: Path) -> None:
        self.server, self.config = server, config

    def argv(self, *args: str) -> list[str]:
        return [tools.kubectl(), "--kubeconfig", str(self.config), "--cache-dir", str(self.config.parent / "cache"), *args]

    def env(self) -> dict[str, str]:
        websockets = "true" if self.server.websockets else "false"
        return {**os.environ, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websockets, "KUBECTL_PORT_FORWARD_WEBSOCKETS": websockets}

    async def run(self, *args: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        process = await asyncio.create_subprocess_exec(
            *self.argv(*args), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env()
        )
        async with asyncio.timeout(30):
            out, err = await process.communicate(stdin)
        assert process.returncode is not None
        return process.returncode, out, err


@pytest.fixture(params=["websocket", "spdy"])
async def kubectl(request: pytest.FixtureRequest, bench: Bench, tmp_path: Path) -> AsyncIterator[Kubectl]:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    container_id = await bench.run("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done", sandbox_id=sandbox_id)
    server = StreamServer(bench.runtime, sandbox_id, container_id)
    server.websockets = request.param == "websocket"
    yield Kubectl(server, await server.start(tmp_path))
    await server.server.close()


async def test_output_error_and_exit_code_of_an_exec(kubectl: Kubectl) -> None:
    code, out, err = await kubectl.run("exec", "p", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (code, out) == (7, b"out\n")
    assert err.startswith(b"err\n")
    assert b"command terminated with exit code 7" in err


async def test_stdin_is_carried_and_its_end_is_seen(kubectl: Kubectl) -> None:
    payload = os.urandom(1 << 20)
    code, out, err = await kubectl.run("exec", "-i", "p", "--", "cat", stdin=payload)
    assert (code, err) == (0, b"")
    assert out == payload


async def test_many_lines_arrive_without_loss(kubectl: Kubectl) -> None:
    code, out, _ = await kubectl.run("exec", "p", "--", "seq", "1", "200000")
    assert code == 0
    assert out == b"".join(b"%d\n" % number for number in range(1, 200001))


async def test_a_missing_command_is_told_in_the_runtimes_words(kubectl: Kubectl) -> None:
    code, _, err = await kubectl.run("exec", "p", "--", "no-such-thing")
    assert code == 1
    assert b'exec: "no-such-thing": executable file not found in $PATH' in err
    assert b"Internal error occurred: error executing command in container" in err


async def test_a_terminal_has_the_clients_size(kubectl: Kubectl) -> None:
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    command = "i=0; while [ \"$(stty size)\" != '33 101' ] && [ $i -lt 50 ]; do sleep 0.05; i=$((i+1)); done; stty size; tty; exit 5"
    process = subprocess.Popen(
        kubectl.argv("exec", "-it", "p", "--", "sh", "-c", command), stdin=slave, stdout=slave, stderr=slave, env=kubectl.env(), start_new_session=True
    )
    os.close(slave)
    output = b""
    while True:
        try:
            data = await asyncio.to_thread(os.read, master, 4096)
        except OSError:
            break
        output += data
    assert await asyncio.to_thread(process.wait, 10) == 5
    os.close(master)
    assert b"33 101\r\n" in output
    assert b"/dev/pts/" in output


async def test_files_are_copied_both_ways(kubectl: Kubectl, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / "a").write_bytes(os.urandom(300_000))
    (source / "b").write_text("text")
    code, _, err = await kubectl.run("cp", str(source), "p:/tmp/tree")
    assert code == 0, err
    code, _, err = await kubectl.run("cp", "p:/tmp/tree", str(tmp_path / "back"))
    assert code == 0, err
    assert (tmp_path / "back/a").read_bytes() == (source / "a").read_bytes()
    assert (tmp_path / "back/b").read_text() == "text"


async def test_a_large_file_survives_the_way_in_and_out(kubectl: Kubectl, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(1 << 20) * 24)
    code, _, err = await kubectl.run("cp", str(source), "p:/tmp/large")
    assert code == 0, err
    code, out, err = await kubectl.run("exec", "p", "--", "sha256sum", "/tmp/large")
    assert (code, out.decode().partition(" ")[0]) == (0, hashlib.sha256(source.read_bytes()).hexdigest()), err
    code, _, err = await kubectl.run("cp", "p:/tmp/large", str(tmp_path / "back"))
    assert code == 0, err
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


async def test_an_archive_from_a_pod_cannot_leave_the_target_folder(kubectl: Kubectl, bench: Bench, tmp_path: Path) -> None:
    """The pod's own tar lies: names with dots, absolute names, and a link followed by a file behind it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in ("../escaped", "tree/../../escaped", "/tmp/escaped-by-root", "tree/link/escaped"):
            if "link" in name:
                link = tarfile.TarInfo("tree/link")
                link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
                archive.addfile(link)
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
    code, _, err = await kubectl.run("exec", "-i", "p", "--", "sh", "-c", "cat > /evil.tar", stdin=made.getvalue())
    assert code == 0, err
    liar = "rm /bin/tar; printf '#!/bin/sh\\ncat /evil.tar\\n' > /bin/tar; chmod 755 /bin/tar"
    code, _, err = await kubectl.run("exec", "p", "--", "sh", "-c", liar)
    assert code == 0, err
    target = tmp_path / "outer" / "target"
    target.mkdir(parents=True)
    await kubectl.run("cp", "p:/tree", str(target))
    outside = [path for path in tmp_path.rglob("*") if path.name.startswith("escaped") and target not in path.parents]
    assert outside == []
    assert not Path("/tmp/escaped-by-root").exists()


async def test_thousands_of_lines_arrive_complete_and_in_order(kubectl: Kubectl) -> None:
    code, out, err = await kubectl.run("exec", "p", "--", "sh", "-c", "seq 1 60000; echo last >&2")
    assert (code, err) == (0, b"last\n")
    assert out == b"".join(b"%d\n" % number for number in range(1, 60001))


async def test_the_end_of_input_closes_only_that_direction(kubectl: Kubectl) -> None:
    """The program reads to the end, and only then answers: more than any buffer on the way holds."""
    given = os.urandom(3 << 20)
    code, out, err = await kubectl.run("exec", "-i", "p", "--", "sh", "-c", "cat > /tmp/in; sleep 0.2; cat /tmp/in", stdin=given)
    assert (code, err) == (0, b"")
    assert out == given


async def test_attach_sees_output_from_then_on(kubectl: Kubectl, bench: Bench) -> None:
    kubectl.server.container_id = await bench.run(
        "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.02; done; echo hello; exit 3", sandbox_id=kubectl.server.sandbox_id, name="d"
    )
    running = asyncio.ensure_future(kubectl.run("attach", "p", "-c", "c"))
    await asyncio.sleep(0.7)
    await bench.runtime.exec_sync(kubectl.server.container_id, ["touch", "/tmp/go"])
    code, out, _ = await running
    assert code == 0
    assert b"hello\n" in out


async def test_attach_carries_stdin_once(kubectl: Kubectl, bench: Bench) -> None:
    kubectl.server.container_id = await bench.run(
        "sh", "-c", "cat; echo end", sandbox_id=kubectl.server.sandbox_id, name="d", stdin=True, stdin_once=True
    )
    kubectl.server.stdin = True
    code, out, _ = await kubectl.run("attach", "-i", "p", "-c", "c", stdin=b"some input\n")
    assert code == 0
    assert b"some input\nend\n" in out


@contextlib.asynccontextmanager
async def _forwarding(kubectl: Kubectl, port: int) -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(
        *kubectl.argv("port-forward", "p", f":{port}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=kubectl.env()
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(10):
            line = (await process.stdout.readline()).decode()
        yield int(line.split(":")[1].split()[0])
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()


async def _listening(bench: Bench, sandbox_id: str, port: int) -> None:
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(RuntimeFault):
                await (await bench.runtime.port_forward(sandbox_id, port)).close()
                return
            await asyncio.sleep(0.02)


async def test_forwarded_connections_carry_bytes_both_ways(kubectl: Kubectl, bench: Bench) -> None:
    await bench.run("nc", "-ll", "-p", "8080", "-e", "cat", sandbox_id=kubectl.server.sandbox_id, name="srv")
    await _listening(bench, kubectl.server.sandbox_id, 8080)
    async with _forwarding(kubectl, 8080) as port:
        payload = os.urandom(1 << 20)

        async def one() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(payload)
            writer.write_eof()
            data = await reader.read()
            writer.close()
            return data

        async with asyncio.timeout(20):
            for data in await asyncio.gather(one(), one(), one()):
                assert data == payload


async def test_a_refused_port_does_not_end_the_forwarding(kubectl: Kubectl, bench: Bench) -> None:
    async with _forwarding(kubectl, 8081) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
