"""Passwords of Ingresses with basic authentication: what the proxy's script asks when it sees one for the first time.

Role: owned by `controller`, which gives it the users of each Secret. The script connects to a socket in the proxy's private
folder and sends "NAME\\nCREDENTIALS\\n" (the Secret and what the client sent, base64); the answer is one line, "1" or "0".
It remembers answers, so that a password costs its hash once.
Invariants: a Secret that is not known lets nobody in. Hashes are computed in a thread, four at a time.
Source: apache2 htpasswd (formats); behaviour of ingress-nginx's auth-type basic.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ctypes
import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from knarr.aiokits.log import get_logger
from knarr.api.types import Object

log = get_logger(__name__)

_LINE_BYTES = 8192
_AT_A_TIME = 4
_ANSWER_SECONDS = 10
_APR1 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def read_users(secret: Object, kind: str) -> dict[str, str]:
    """User names and hashes of a Secret: kind "auth-file" has an htpasswd file under "auth", "auth-map" a key for each user."""
    found: dict[str, str] = {}
    for name, encoded in (secret.get("data") or {}).items():
        try:
            text = base64.b64decode(encoded).decode()
        except (binascii.Error, UnicodeDecodeError):
            continue
        if kind == "auth-map":
            found[name] = text.strip()
        elif name == "auth":
            for line in text.splitlines():
                user, colon, stored = line.strip().partition(":")
                if colon and not user.startswith("#"):
                    found[user] = stored.partition(":")[0]
    return found


def matches(password: str, stored: str) -> bool:
    """Whether a password belongs to a stored hash of any of htpasswd's formats."""
    if stored.startswith("$apr1$"):
        computed = _apr1(password.encode(), stored.split("$")[2])
    elif stored.startswith("{SHA}"):
        computed = "{SHA}" + base64.b64encode(hashlib.sha1(password.encode()).digest()).decode()
    elif stored.startswith("{PLAIN}"):
        computed = "{PLAIN}" + password
    else:
        computed = _crypt(password, stored)
    return bool(computed) and hmac.compare_digest(computed.encode(), stored.encode())


def _apr1(password: bytes, salt_text: str) -> str:
    """Apache's variant of the MD5 crypt."""
    salt = salt_text.encode()[:8]
    inner = hashlib.md5(password + salt + password).digest()
    data = password + b"$apr1$" + salt + (inner * (len(password) // 16 + 1))[: len(password)]
    bits = len(password)
    while bits:
        data += b"\0" if bits & 1 else password[:1]
        bits >>= 1
    final = hashlib.md5(data).digest()
    for number in range(1000):
        mixed = password if number & 1 else final
        mixed += salt if number % 3 else b""
        mixed += password if number % 7 else b""
        final = hashlib.md5(mixed + (final if number & 1 else password)).digest()
    out = ""
    for a, b, c in ((0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5)):
        value = final[a] << 16 | final[b] << 8 | final[c]
        out += "".join(_APR1[value >> shift & 63] for shift in (0, 6, 12, 18))
    return f"$apr1${salt_text}${out}{_APR1[final[11] & 63]}{_APR1[final[11] >> 6]}"


class _CryptData(ctypes.Structure):
    """libxcrypt's working space; its size is the library's, its content nobody's business."""

    _fields_ = [("space", ctypes.c_char * 32768)]


def _crypt(password: str, stored: str) -> str:
    """The C library's hash (bcrypt, SHA-512, SHA-256, MD5, DES) with the stored one's salt; "" when it has none such."""
    try:
        library = ctypes.CDLL("libcrypt.so.1")
    except OSError:
        log.warning("passwords cannot be checked, the library is missing", library="libcrypt.so.1")
        return ""
    library.crypt_r.restype = ctypes.c_char_p
    answer = library.crypt_r(password.encode(), stored.encode(), ctypes.byref(_CryptData()))
    return "" if answer is None or answer.startswith(b"*") else answer.decode()


class Passwords:
    """See the module."""

    def __init__(self) -> None:
        self._users: Mapping[str, Mapping[str, str]] = {}
        self._server: asyncio.Server | None = None
        self._slots = asyncio.Semaphore(_AT_A_TIME)

    def replace(self, users: Mapping[str, Mapping[str, str]]) -> None:
        """The users of each Secret, by the name that the script sends."""
        self._users = users

    async def listen(self, path: Path) -> None:
        """Answer on a unix socket. Raises OSError."""
        if self._server is None:
            path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, str(path), limit=_LINE_BYTES)
            path.chmod(0o600)

    def close(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                name = (await reader.readline()).decode().strip()
                credentials = (await reader.readline()).decode().strip()
                good = await self.check(name, credentials)
                writer.write(b"1\n" if good else b"0\n")
                await writer.drain()
        except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            log.debug("a question about a password was not answered", error=str(error))
        finally:
            writer.close()

    async def check(self, name: str, credentials: str) -> bool:
        """Whether credentials ("user:password" in base64) are those of a user of a Secret."""
        try:
            user, colon, password = base64.b64decode(credentials, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        stored = self._users.get(name, {}).get(user)
        if not colon or stored is None or "\0" in password:
            return False
        async with self._slots:
            return await asyncio.to_thread(matches, password, stored)
