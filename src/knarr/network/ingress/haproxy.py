"""The real proxy under the Ingress controller: HAProxy, run as a child and changed through its runtime socket.

Why HAProxy: routes are look-ups in maps and a target's address is set per request, so every change of an Ingress,
Service or certificate is a change of map entries or of a certificate in the running process. Nothing is ever reloaded,
so no connection is ever lost to a change; nginx has to reload for each.
Role: used by `controller`. `apply` brings maps and certificates to a wanted state; each map is replaced atomically,
targets before the routes that name them and removed after.
Invariants: files in the folder are what a restarted child begins with, written before the running one is changed. The
child is restarted with back-off when it dies, and dies with us.
"""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.network.ingress.certificates import Certificates
from knarr.network.ingress.haproxyconfig import KINDS, VERIFIED, Listen, render, server_line
from knarr.network.ingress.routes import Routes, Server
from knarr.network.ingress.script import SCRIPT

__all__ = ["HAProxy", "HAProxyError", "Listen", "program"]
log = get_logger(__name__)

PASSWORD_SOCKET = "passwords.sock"
MAPS = ("targets", "rules", "exact", "prefix", "regex", "streams", "owners", "patterns", "hosts", "doors")
_REGULAR = ("regex", "patterns")
"""Maps of regular expressions."""
_REFERRED = ("targets", "rules")
"""Maps that the others refer to: what is new comes before them, what is gone leaves after them."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class HAProxyError(Exception):
    """HAProxy refused its configuration or a command; the text is its own."""


def program() -> str | None:
    """Path of HAProxy, or None when it is not installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/sbin:/usr/local/sbin")


@dataclass(slots=True)
class Tls:
    """How the proxy speaks TLS: servers by name, and authorities' certificates by file name."""

    servers: dict[str, Server] = field(default_factory=dict)
    authorities: dict[str, str] = field(default_factory=dict)


class HAProxy:
    """The child process and what it holds.

    Args:
      folder: Private folder for configuration, maps, certificates and the socket.
    """

    def __init__(self, folder: Path, listen: Listen, default_pem: str) -> None:
        self._folder = folder
        self._listen = listen
        self.default_pem = default_pem
        self._maps: dict[str, dict[str, str]] = {name: {} for name in MAPS}
        self._certificates = Certificates()
        self._tls = Tls()
        self._sockets: dict[str, list[socket.socket]] = {}
        self._passing = False
        self._leaving: list[asyncio.subprocess.Process] = []
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tasks = Tasks()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def stream_port(self) -> int:
        """The port for TLS of Gateways that may go on undecrypted. It stays the same while we live, across deaths of the child."""
        return int(self._listening("streams")[0].getsockname()[1])

    def _listening(self, kind: str) -> list[socket.socket]:
        """The sockets of a kind. They are ours, so that whoever connects while there is no child waits for the next. Raises OSError."""
        if kind not in self._sockets:
            listen, port = self._listen, {"http": self._listen.http_port, "https": self._listen.https_port}.get(kind, 0)
            places = listen.addresses if port else listen.addresses[:1]
            made: list[socket.socket] = []
            try:
                for place in places:
                    family = socket.AF_INET6 if ":" in place else socket.AF_INET
                    made.append(socket.create_server(("" if place == "*" else place, port), family=family, backlog=4096))
                    made[-1].setblocking(False)
            except OSError:
                for one in made:
                    one.close()
                raise
            self._sockets[kind] = made
        return self._sockets[kind]

    async def run(self) -> None:
        """Keep the child running until cancelled; it is gone on return."""
        backoff = Backoff(0.2, 30.0)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            while True:
                try:
                    await self._run_once()
                except (HAProxyError, OSError) as error:
                    log.warning("ingress proxy cannot run", error=str(error))
                    self._ready.clear()
                    await backoff.sleep()
        finally:
            for process in (*self._leaving, self._process):
                await _stop(process)
            for one in (one for kind in self._sockets.values() for one in kind):
                one.close()
            self._sockets = {}
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _run_once(self) -> None:
        """Run a child until it makes room for another. Raises HAProxyError when it ends otherwise, OSError."""
        binary = program()
        if binary is None:
            raise HAProxyError("haproxy is not installed (apt-get install haproxy)")
        self._write_files()
        begun_with, passing = (self._maps, self._certificates, self._tls), self._passing
        config, sockets = self._folder / "haproxy.cfg", {kind: [one.fileno() for one in self._listening(kind)] for kind in KINDS}
        config.write_text(render(self._folder, self._listen, sockets, self._tls.servers, passing=passing))
        # A child that leaves may still answer there.
        (self._folder / "admin.sock").unlink(missing_ok=True)
        self._process = process = await asyncio.create_subprocess_exec(
            binary, "-db", "-f", str(config),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, preexec_fn=_die_with_parent, pass_fds=[number for numbers in sockets.values() for number in numbers],
        )  # fmt: skip
        noise = bytearray()
        if process.stderr is not None:
            self._tasks.spawn(_keep_tail(process.stderr, noise), "ingress proxy: messages")
        try:
            if await self._wait_socket(process):
                async with self._changing:
                    # What came while it started may be in the files only.
                    await self._apply_running(*begun_with)
                    if passing == self._passing:
                        self._leave.clear()
                        self._ready.set()
                    else:
                        self._leave.set()
                log.info("ingress proxy runs", pid=process.pid, http_port=self._listen.http_port)
            await self._ended(process)
            if process in self._leaving:
                return
            await self._tasks.wait_idle()
        finally:
            await self._tasks.close()
            self._tasks = Tasks()
        raise HAProxyError(noise.decode(errors="replace").strip() or f"ended with {process.returncode}")

    async def _wait_socket(self, process: asyncio.subprocess.Process) -> bool:
        """Whether the child answers; False when it ended instead."""
        for _ in range(200):
            if process.returncode is not None:
                return False
            try:
                await self._command("show info")
                return True
            except OSError:
                # The socket appears within milliseconds of the start; there is nothing else to wait on.
                await asyncio.sleep(0.01)
        raise HAProxyError("haproxy does not answer on its socket")

    async def _ended(self, process: asyncio.subprocess.Process) -> None:
        """Wait until a child has ended, or has been told to leave when it has answered what it was asked."""
        ended, told = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._leave.wait())
        try:
            await asyncio.wait([ended, told], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            told.cancel()
        if self._leave.is_set():
            self._leave.clear()
            self._leaving = [item for item in self._leaving if item.returncode is None]
            if process.returncode is None:
                process.send_signal(signal.SIGUSR1)
                self._leaving.append(process)

    async def wait_ready(self) -> None:
        """Wait until the child answers."""
        await self._ready.wait()

    async def apply(self, routes: Routes, certificates: Certificates) -> None:
        """Bring maps and certificates to a new state; connections are not disturbed.

        Raises:
          HAProxyError: the running child refused something; files are right, so a restart would be, too.
        """
        async with self._changing:
            before, self._maps = (self._maps, self._certificates, self._tls), {name: dict(getattr(routes, name)) for name in MAPS}
            self._certificates, self._tls = certificates, Tls(dict(routes.servers), dict(routes.authorities))
            if not self._folder.exists():
                return
            self._write_files()
            passing = any("/" not in name for name in routes.streams)
            if passing != self._passing:
                # The only change that needs another child: TLS is looked at before it is decrypted, which costs all of it.
                self._passing = passing
                if self._ready.is_set():
                    self._ready.clear()
                    self._leave.set()
            elif self._ready.is_set():
                await self._change(*before)

    async def _change(self, before: Mapping[str, dict[str, str]], old: Certificates, tls: Tls) -> None:
        try:
            await self._apply_running(before, old, tls)
        except (HAProxyError, OSError, TimeoutError):
            # What it holds now is unknown; the files are right, so a fresh child is, too.
            if self.pid is not None and self._process is not None:
                self._process.terminate()
            raise

    async def _apply_running(self, before: Mapping[str, dict[str, str]], old: Certificates, tls: Tls) -> None:
        await self._add_authorities(tls.authorities)
        await self._apply_certificates(old, self._certificates)
        await self._apply_keys(old, self._certificates)
        await self._add_servers(tls.servers)
        merged = {name: {**before[name], **self._maps[name]} for name in _REFERRED}
        for name in _REFERRED:
            if merged[name] != before[name]:
                await self._replace(name, merged[name])
        for name in MAPS:
            if name not in _REFERRED and before[name] != self._maps[name]:
                await self._replace(name, self._maps[name])
        for name in reversed(_REFERRED):
            if merged[name] != self._maps[name]:
                await self._replace(name, self._maps[name])
        await self._forget(tls, old)

    async def _add_authorities(self, old: Mapping[str, str]) -> None:
        for name, pem in self._tls.authorities.items():
            if name in old:
                continue
            path = self._folder / name
            await self._command(f"new ssl ca-file {path}")
            await self._command(f"set ssl ca-file {path} <<\n{_no_blank_lines(pem)}")
            answer = await self._command(f"commit ssl ca-file {path}")
            if "Success" not in answer:
                raise HAProxyError(f"authorities {name}: {answer.strip()}")

    async def _add_servers(self, old: Mapping[str, Server]) -> None:
        for name, server in self._tls.servers.items():
            if name not in old:
                answer = await self._command(f"add server {VERIFIED}/{name} {server_line(self._folder, server)}")
                if "registered" not in answer:
                    raise HAProxyError(f"server {name}: {answer.strip()}")
                await self._command(f"enable server {VERIFIED}/{name}")

    async def _forget(self, old: Tls, before: Certificates) -> None:
        """What nothing refers to any more. What is still in use by a request stays; a fresh child is without it."""
        for name in old.servers:
            if name not in self._tls.servers:
                await self._command(f"set server {VERIFIED}/{name} state maint")
                answer = await self._command(f"del server {VERIFIED}/{name}")
                if "deleted" not in answer:
                    # It would be in the way when it is wanted again.
                    self._tls.servers[name] = old.servers[name]
        for name in old.authorities:
            if name not in self._tls.authorities:
                if "deleted" in await self._command(f"del ssl ca-file {self._folder}/{name}"):
                    (self._folder / name).unlink(missing_ok=True)
                else:
                    self._tls.authorities[name] = old.authorities[name]
        for name in before.keys:
            if name not in self._certificates.keys:
                if "deleted" in await self._command(f"del ssl cert {self._folder}/{name}"):
                    (self._folder / name).unlink(missing_ok=True)
                else:
                    self._certificates.keys[name] = before.keys[name]

    def _write_files(self) -> None:
        _write(self._folder / "script.lua", SCRIPT.replace("FOLDER", str(self._folder)))
        for name in MAPS:
            _write(self._folder / f"{name}.map", "".join(f"{key} {text}\n" for key, text in _ordered(name, self._maps[name])))
        lines = [f"{self._folder}/default.pem"]
        _write(self._folder / "default.pem", self._certificates.fallback or self.default_pem)
        for name, pem in self._tls.authorities.items():
            _write(self._folder / name, pem)
        for name, pem in self._certificates.pems.items():
            _write(self._folder / name, pem)
            lines.append(self._line(self._certificates, name))
        for name, pem in self._certificates.keys.items():
            _write(self._folder / name, pem)
        _write(self._folder / "certs.list", "\n".join(lines) + "\n")

    async def _replace(self, name: str, content: Mapping[str, str]) -> None:
        path = self._folder / f"{name}.map"
        answer = await self._command(f"prepare map {path}")
        version = answer.rpartition(":")[2].strip()
        if not version.isdigit():
            raise HAProxyError(f"prepare map: {answer}")
        items = _ordered(name, content)
        # The payload of one command must fit into HAProxy's buffer.
        for start in range(0, len(items), 40):
            lines = "".join(f"{key} {text}\n" for key, text in items[start : start + 40])
            await self._expect_silence(f"add map @{version} {path} <<\n{lines}")
        await self._expect_silence(f"commit map @{version} {path}")

    async def _apply_certificates(self, old: Certificates, new: Certificates) -> None:
        changed = [name for name in new.pems if new.pems[name] != old.pems.get(name) or new.hosts[name] != old.hosts.get(name)]
        for name in [
            *(name for name in old.pems if name not in new.pems),
            *(name for name in changed if name in old.pems and new.hosts[name] != old.hosts[name]),
        ]:
            await self._command(f"del ssl crt-list {self._folder}/certs.list {self._folder}/{name}")
        for name in changed:
            path = self._folder / name
            if name not in old.pems:
                await self._command(f"new ssl cert {path}")
            await self._show(path, new.pems[name])
            if name not in old.pems or new.hosts[name] != old.hosts[name]:
                answer = await self._command(f"add ssl crt-list {self._folder}/certs.list <<\n{self._line(new, name)}\n")
                if "Success" not in answer:
                    raise HAProxyError(f"certificate {name}: {answer.strip()}")
        if old.fallback != new.fallback:
            await self._show(self._folder / "default.pem", new.fallback or self.default_pem)
        for name in old.pems:
            if name not in new.pems:
                await self._command(f"del ssl cert {self._folder}/{name}")
                (self._folder / name).unlink(missing_ok=True)

    def _line(self, certificates: Certificates, name: str) -> str:
        """What the list of certificates says of one. Clients without a certificate are refused by the script, which can say why."""
        check = certificates.checks.get(name)
        asked = f"[verify optional ca-file {self._folder}/{check}] " if check else ""
        return f"{self._folder}/{name} {asked}{' '.join(certificates.hosts[name])}"

    async def _apply_keys(self, old: Certificates, new: Certificates) -> None:
        for name, pem in new.keys.items():
            if name not in old.keys:
                await self._command(f"new ssl cert {self._folder}/{name}")
                await self._show(self._folder / name, pem)

    async def _show(self, path: Path, pem: str) -> None:
        await self._command(f"set ssl cert {path} <<\n{_no_blank_lines(pem)}")
        answer = await self._command(f"commit ssl cert {path}")
        if "Success" not in answer:
            raise HAProxyError(f"certificate {path.name}: {answer.strip()}")

    async def _expect_silence(self, command: str) -> None:
        answer = (await self._command(command)).strip()
        if answer:
            raise HAProxyError(f"{command.splitlines()[0]}: {answer}")

    async def _command(self, command: str) -> str:
        # A payload ends with an empty line, which the newline behind the command makes.
        reader, writer = await asyncio.open_unix_connection(str(self._folder / "admin.sock"))
        try:
            writer.write(command.encode() + b"\n")
            await writer.drain()
            async with asyncio.timeout(10):
                return (await reader.read()).decode(errors="replace")
        finally:
            writer.close()


async def _stop(process: asyncio.subprocess.Process | None) -> None:
    if process is None or process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(5):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _keep_tail(stream: asyncio.StreamReader, tail: bytearray) -> None:
    while data := await stream.read(4096):
        tail += data
        del tail[:-1500]


def _ordered(name: str, content: Mapping[str, str]) -> list[tuple[str, str]]:
    """A map's entries; of several expressions that match a path the first counts, so the long ones come first."""
    return sorted(content.items(), key=lambda item: (-len(item[0]) if name in _REGULAR else 0, item))


def _no_blank_lines(pem: str) -> str:
    # An empty line ends a payload.
    return "\n".join(line for line in pem.splitlines() if line.strip()) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
