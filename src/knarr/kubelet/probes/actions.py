"""The probes themselves: one try of exec, HTTP or TCP, and what it says. gRPC is in grpc.py. Also used by lifecycle hooks.

Every action ends within its timeout. A probe that could not be carried out (`errored`) counts as a failure but is tried again
at once by the caller. Source: pkg/probe.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from knarr.api.types import Object
from knarr.runtime.cri import DeadlineExceeded, NotFound, RuntimeFault, RuntimeService

USER_AGENT = "kube-probe/1.35"
_BODY_BYTES = 10 * 1024
_REDIRECTS = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one try found; `warning` keeps a success but makes an event."""

    success: bool
    output: str = ""
    errored: bool = False
    warning: bool = False


class UnknownPort(Exception):
    """The probe names a port that the container does not declare."""


def resolve_port(container: Object, port: int | str) -> int:
    """A port number, looked up among the container's port names. Raises UnknownPort."""
    if isinstance(port, int):
        number = port
    elif port.isdigit():
        number = int(port)
    else:
        number = next((p["containerPort"] for p in container.get("ports") or [] if p.get("name") == port), 0)
        if not number:
            raise UnknownPort(f"couldn't find port: {port}")
    if not 0 < number < 65536:
        raise UnknownPort(f"invalid port number: {number}")
    return number


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect_error(e: BaseException, host: str, port: int) -> str:
    """As Go words a failed dial."""
    if isinstance(e, TimeoutError):
        return f"dial tcp {_address(host, port)}: i/o timeout"
    code = getattr(e, "errno", None)
    if code == errno.ECONNREFUSED:
        why = "connect: connection refused"
    elif code:
        why = f"connect: {os.strerror(code).lower()}"
    else:
        why = str(e)
    return f"dial tcp {_address(host, port)}: {why}"


async def tcp(host: str, port: int, timeout_seconds: float) -> Outcome:
    """Succeed if a connection can be made."""
    try:
        async with asyncio.timeout(timeout_seconds):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as e:
        return Outcome(False, connect_error(e, host, port))
    writer.transport.abort()
    return Outcome(True)


async def run_exec(runtime: RuntimeService, container_id: str, command: Sequence[str], timeout_seconds: float) -> Outcome:
    """Run a command in the container; its exit code decides."""
    try:
        result = await runtime.exec_sync(container_id, command, timeout_seconds)
    except DeadlineExceeded:
        return Outcome(False, f'command timed out: "{" ".join(command)}" timed out after {timeout_seconds:g}s')
    except NotFound as e:
        return Outcome(False, str(e))
    except RuntimeFault as e:
        return Outcome(False, str(e), errored=True)
    output = (result.stdout + result.stderr)[:_BODY_BYTES].decode(errors="replace")
    return Outcome(result.exit_code == 0, output)


def http_headers(source: Object) -> dict[str, str]:
    """Headers of an httpGet as sent; an empty Accept or User-Agent of the user's removes ours."""
    out: dict[str, str] = {}
    for header in source.get("httpHeaders") or []:
        name = "-".join(part.capitalize() for part in header["name"].split("-"))
        out[name] = f"{out[name]}, {header['value']}" if name in out and name != "Host" else header.get("value", "")
    out.setdefault("User-Agent", USER_AGENT)
    out.setdefault("Accept", "*/*")
    return {k: v for k, v in out.items() if v or k not in ("User-Agent", "Accept")}


PLAIN_ANSWER = "http: server gave HTTP response to HTTPS client"
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")
"""OpenSSL's words, by version, for an answer that is no TLS."""


async def http_get(
    scheme: str, host: str, port: int, path: str, headers: Mapping[str, str], timeout_seconds: float, *, follow: bool = True
) -> Outcome:
    """GET a path; 200 to 399 is success. Redirects to the same host are followed.

    `path` is sent as it is, query included.
    """
    if not path.startswith("/"):
        path = "/" + path
    url = f"{scheme}://{_address(host, port)}{path}"
    try:
        async with asyncio.timeout(timeout_seconds):
            for _ in range(_REDIRECTS + 1):
                status, location, body = await _fetch(scheme, host, port, path, headers)
                if not follow or not location or status not in (301, 302, 303, 307, 308):
                    break
                target = urlsplit(urljoin(f"{scheme}://{_address(host, port)}{path}", location))
                if target.hostname != host:
                    return Outcome(True, f"Probe terminated redirects, Response body: {body}", warning=True)
                scheme, port = target.scheme, target.port or (443 if target.scheme == "https" else 80)
                path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            else:
                return Outcome(False, f'Get "{url}": stopped after 10 redirects')
    except TimeoutError:
        return Outcome(False, f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)')
    except ssl.SSLError as e:
        return Outcome(False, f'Get "{url}": {PLAIN_ANSWER if e.reason in _NO_TLS else f"tls: {e.reason or e}"}')
    except OSError as e:
        return Outcome(False, f'Get "{url}": {connect_error(e, host, port)}')
    except (ValueError, EOFError) as e:
        return Outcome(False, f'Get "{url}": {e or "EOF"}')
    if 200 <= status < 400:
        return Outcome(True, body)
    return Outcome(False, f"HTTP probe failed with statuscode: {status}")


async def _fetch(scheme: str, host: str, port: int, path: str, headers: Mapping[str, str]) -> tuple[int, str, str]:
    """(status code, Location header, start of the body)."""
    context = None
    if scheme.lower() == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=64 * 1024)
    try:
        sent = {"Host": _address(host, port), **headers, "Connection": "close"}
        lines = "".join(f"{k}: {v}\r\n" for k, v in sent.items())
        target = path.replace(" ", "%20").replace("\r", "").replace("\n", "")
        writer.write(f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", errors="replace"))
        first = await reader.readline()
        parts = first.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
            if not first:
                raise EOFError("EOF")
            raise ValueError(f'net/http: HTTP/1.x transport connection broken: malformed HTTP response "{first[:80].decode(errors="replace").strip()}"')
        location = ""
        while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"location":
                location = value.strip().decode("latin-1")
        body = await reader.read(_BODY_BYTES)
        return int(parts[1]), location, body.decode(errors="replace")
    finally:
        writer.transport.abort()
