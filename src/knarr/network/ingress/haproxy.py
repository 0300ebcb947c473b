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
import hashlib
import resource
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.network.ingress.alternatives import LISTED, ONLY_PLAIN, ONLY_TLS
from knarr.network.ingress.annotations import HTTP2_BACKEND, HTTPS_BACKEND, MOVED, TO_HTTPS
from knarr.network.ingress.model import TO_HTTPS_301, TO_HTTPS_302, Routes
from knarr.network.ingress.script import SCRIPT

log = get_logger(__name__)

PASSWORD_SOCKET = "passwords.sock"
LIMITS = {"rps": ("(5s)", "http_req_rate"), "rpm": ("(60s)", "http_req_rate"), "connections": ("", "conn_cur")}
"""Kinds of limits: the table's window and what it counts."""
MAPS = ("targets", "rules", "exact", "prefix", "regex", "hosts")
_REFERRED = ("targets", "rules")
"""Maps that the others refer to: what is new comes before them, what is gone leaves after them."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class HAProxyError(Exception):
    """HAProxy refused its configuration or a command; the text is its own."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the proxy listens."""

    addresses: tuple[str, ...] = ("*",)
    http_port: int = 80
    https_port: int = 443
    threads: int = 2


@dataclass(slots=True)
class Certificates:
    """Certificate chains with keys, as PEM, by file name; and the host names of each."""

    pems: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, list[str]] = field(default_factory=dict)


def program() -> str | None:
    """Path of HAProxy, or None when it is not installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/sbin:/usr/local/sbin")


def _route(folder: Path) -> str:
    """Find the rule of a request: host first, then path."""
    return f"""  http-request set-var(txn.host) req.hdr(host),field(1,:),lower
  http-request set-var(txn.wild) var(txn.host),regsub(^[^.]*,*)
  http-request set-var(txn.site) var(txn.host),map_str({folder}/hosts.map)
  http-request set-var(txn.site) var(txn.wild),map_str({folder}/hosts.map) unless {{ var(txn.site) -m found }}
  http-request set-var(txn.site) str(*) unless {{ var(txn.site) -m found }}
  http-request set-var(txn.path) path
  http-request set-var(txn.exact) var(txn.site),concat(|,txn.path)
  http-request set-var(txn.prefix) var(txn.exact),concat(/)
  http-request set-var(txn.rule) var(txn.exact),map_str({folder}/exact.map)
  http-request set-var(txn.rule) var(txn.exact),map_reg({folder}/regex.map) unless {{ var(txn.rule) -m found }}
  http-request set-var(txn.rule) var(txn.prefix),map_beg({folder}/prefix.map) unless {{ var(txn.rule) -m found }}
  http-request set-var(txn.spare) str(*),concat(|,txn.path),concat(/)
  http-request set-var(txn.rule) var(txn.spare),map_beg({folder}/prefix.map) unless {{ var(txn.rule) -m found }}
  http-request return status 404 content-type text/plain string "default backend - 404" unless {{ var(txn.rule) -m found }}
  http-request set-var(txn.target) var(txn.rule),field(1,|)
  http-request set-var(txn.flags) var(txn.rule),field(2,|)
  http-request set-var(txn.argument) var(txn.rule),field(3,|)
  http-request set-header X-Forwarded-Host %[req.hdr(host)]
  http-request lua.choose if {{ var(txn.flags) -m sub {LISTED} }}
{_limits()}
  http-request wait-for-body time 2s if {{ var(txn.mirror) -m found }}
  http-request lua.mirror if {{ var(txn.mirror) -m found }}
  http-response lua.answered if {{ var(txn.after) -m found }}"""


def _limits() -> str:
    """Refuse who comes too often; the script has set what is counted and how much is allowed."""
    lines = []
    for counter, (kind, (_window, measure)) in enumerate(LIMITS.items()):
        found = f"{{ var(txn.{kind}_key) -m found }}"
        lines += [
            f"  http-request track-sc{counter} var(txn.{kind}_key) table {kind} if {found}",
            f"  http-request deny deny_status 503 if {found} {{ sc_{measure}({counter}),sub(txn.{kind}_limit) gt 0 }}",
        ]
    return "\n".join(lines)


def _tables() -> str:
    return "\n".join(
        f"backend {kind}\n  stick-table type string len 64 size 100k expire {10 if window.endswith('s)') else 70}s store {measure}{window}"
        for kind, (window, measure) in LIMITS.items()
    )


def _forward(folder: Path) -> str:
    """Send a request to where its rule says."""
    return f"""  http-request redirect location %[var(txn.argument)] code 301 if {{ var(txn.flags) -m sub {MOVED} }}
  http-request set-var(txn.count) var(txn.target),map_str({folder}/targets.map,0),add(0)
  http-request return status 503 content-type text/plain string "no endpoints" if {{ var(txn.count) -m int 0 }}
  http-request set-var(txn.index) rand,mod(txn.count) unless {{ var(txn.place) -m found }}
  http-request set-var(txn.place) var(txn.target),concat(\\#,txn.index),map_str({folder}/targets.map) unless {{ var(txn.place) -m found }}
  http-request set-var(txn.address) var(txn.place),field(1,|)
  http-request set-var(txn.port) var(txn.place),field(2,|)
  http-request set-path %[var(txn.argument)] if {{ var(txn.argument) -m len gt 0 }}
  http-request set-header X-Real-IP %[src]
  http-request set-header X-Forwarded-Port %[dst_port]
  use_backend secure if {{ var(txn.flags) -m sub {HTTPS_BACKEND} }}
  use_backend http2 if {{ var(txn.flags) -m sub {HTTP2_BACKEND} }}
  default_backend plain"""


def render(folder: Path, listen: Listen) -> str:
    """The configuration; it never changes while the listening places stay."""
    binds = "\n".join(f"  bind {address}:{listen.http_port}" for address in listen.addresses)
    secure = "\n".join(
        f"  bind {address}:{listen.https_port} ssl crt-list {folder}/certs.list alpn h2,http/1.1" for address in listen.addresses
    )
    route, forward = _route(folder), _forward(folder)
    backend = """  option forwardfor
  http-request set-dst var(txn.address)
  http-request set-dst-port var(txn.port)
  http-request set-timeout server var(txn.timeout) if { var(txn.timeout) -m found }
  http-request disable-l7-retry if { var(txn.timeout) -m found }
  retry-on conn-failure empty-response response-timeout 0rtt-rejected
  http-reuse safe"""
    # Each connection needs two descriptors, and HAProxy refuses to start with fewer than it was promised.
    connections = max(100, min(20_000, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2 - 100))
    return f"""global
  stats socket {folder}/admin.sock mode 600 level admin
  maxconn {connections}
  nbthread {listen.threads}
  tune.ssl.default-dh-param 2048
  ssl-default-bind-options ssl-min-ver TLSv1.2
  hard-stop-after 60s
  lua-load-per-thread {folder}/script.lua
defaults
  mode http
  timeout connect 3s
  timeout client 65s
  timeout server 65s
  timeout http-request 15s
  timeout http-keep-alive 65s
  timeout tunnel 1h
  retries 3
  option redispatch
frontend http
{binds}
{route}
  http-request return status 404 content-type text/plain string "default backend - 404" if {{ var(txn.flags) -m sub {ONLY_TLS} }}
  http-request redirect scheme https code 308 if {{ var(txn.flags) -m sub {TO_HTTPS} }}
  http-request redirect scheme https code 301 if {{ var(txn.flags) -m sub {TO_HTTPS_301} }}
  http-request redirect scheme https code 302 if {{ var(txn.flags) -m sub {TO_HTTPS_302} }}
  http-request set-header X-Forwarded-Proto http
{forward}
frontend https
{secure}
{route}
  http-request return status 404 content-type text/plain string "default backend - 404" if {{ var(txn.flags) -m sub {ONLY_PLAIN} }}
  http-request set-header X-Forwarded-Proto https
{forward}
backend plain
{backend}
  server any 0.0.0.0:0
backend secure
{backend}
  server any 0.0.0.0:0 ssl verify none sni req.hdr(host),field(1,:) alpn h2,http/1.1
backend http2
{backend}
  server any 0.0.0.0:0 proto h2
{_tables()}
"""


class HAProxy:
    """The child process and what it holds.

    Args:
      folder: Private folder for configuration, maps, certificates and the socket.
    """

    def __init__(self, folder: Path, listen: Listen, default_pem: str) -> None:
        self._folder = folder
        self._listen = listen
        self._default_pem = default_pem
        self._maps: dict[str, dict[str, str]] = {name: {} for name in MAPS}
        self._certificates = Certificates()
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tasks = Tasks()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

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
            await self._stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _run_once(self) -> None:
        binary = program()
        if binary is None:
            raise HAProxyError("haproxy is not installed (apt-get install haproxy)")
        self._write_files()
        begun_with = self._maps, self._certificates
        config = self._folder / "haproxy.cfg"
        config.write_text(render(self._folder, self._listen))
        self._process = process = await asyncio.create_subprocess_exec(
            binary, "-db", "-f", str(config), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, preexec_fn=_die_with_parent
        )
        noise = bytearray()
        if process.stderr is not None:
            self._tasks.spawn(_keep_tail(process.stderr, noise), "ingress proxy: messages")
        try:
            if await self._wait_socket(process):
                async with self._changing:
                    # What came while it started may be in the files only.
                    await self._apply_running(*begun_with, self._certificates)
                    self._ready.set()
                log.info("ingress proxy runs", pid=process.pid, http_port=self._listen.http_port)
            await process.wait()
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

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def wait_ready(self) -> None:
        """Wait until the child answers."""
        await self._ready.wait()

    async def apply(self, routes: Routes, certificates: Certificates) -> None:
        """Bring maps and certificates to a new state; connections are not disturbed.

        Raises:
          HAProxyError: the running child refused something; files are right, so a restart would be, too.
        """
        async with self._changing:
            before, self._maps = self._maps, {name: dict(getattr(routes, name)) for name in MAPS}
            old, self._certificates = self._certificates, certificates
            if not self._folder.exists():
                return
            self._write_files()
            if self._ready.is_set():
                await self._change(before, old, certificates)

    async def _change(self, before: Mapping[str, dict[str, str]], old: Certificates, certificates: Certificates) -> None:
        try:
            await self._apply_running(before, old, certificates)
        except (HAProxyError, OSError, TimeoutError):
            # What it holds now is unknown; the files are right, so a fresh child is, too.
            if self.pid is not None and self._process is not None:
                self._process.terminate()
            raise

    async def _apply_running(self, before: Mapping[str, dict[str, str]], old: Certificates, certificates: Certificates) -> None:
        await self._apply_certificates(old, certificates)
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

    def _write_files(self) -> None:
        _write(self._folder / "script.lua", SCRIPT.replace("FOLDER", str(self._folder)).replace("HTTPS_PORT", str(self._listen.https_port)))
        for name in MAPS:
            _write(self._folder / f"{name}.map", "".join(f"{key} {text}\n" for key, text in _ordered(name, self._maps[name])))
        lines = [f"{self._folder}/default.pem"]
        _write(self._folder / "default.pem", self._default_pem)
        for name, pem in self._certificates.pems.items():
            _write(self._folder / name, pem)
            lines.append(f"{self._folder}/{name} {' '.join(self._certificates.hosts[name])}")
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
            await self._command(f"set ssl cert {path} <<\n{_no_blank_lines(new.pems[name])}")
            answer = await self._command(f"commit ssl cert {path}")
            if "Success" not in answer:
                raise HAProxyError(f"certificate {name}: {answer.strip()}")
            if name not in old.pems or new.hosts[name] != old.hosts[name]:
                await self._command(f"add ssl crt-list {self._folder}/certs.list <<\n{path} {' '.join(new.hosts[name])}\n")
        for name in old.pems:
            if name not in new.pems:
                await self._command(f"del ssl cert {self._folder}/{name}")
                (self._folder / name).unlink(missing_ok=True)

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


async def _keep_tail(stream: asyncio.StreamReader, tail: bytearray) -> None:
    while data := await stream.read(4096):
        tail += data
        del tail[:-1500]


def _ordered(name: str, content: Mapping[str, str]) -> list[tuple[str, str]]:
    """A map's entries; of several expressions that match a path the first counts, so the long ones come first."""
    return sorted(content.items(), key=lambda item: (-len(item[0]) if name == "regex" else 0, item))


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


def certificate_name(secret: str) -> str:
    """File name for a Secret's certificate."""
    return hashlib.blake2b(secret.encode(), digest_size=10).hexdigest() + ".pem"


def usable(pem_parts: Sequence[str]) -> str:
    """Certificate chain and key in one text."""
    return "\n".join(part.strip() for part in pem_parts) + "\n"
