"""What annotations ask for beyond routing: who may come, how often, how long and how much, and where he came before. Pure.

Role: `annotations` asks once per Ingress; the actions are the proxy script's (`script`).
Invariants: as there. A user list or limit that cannot be understood keeps everybody out rather than nobody.
Source: behaviour and annotations of ingress-nginx.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from knarr.network.ingress.alternatives import Action

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_BURST = "5"
"""The only multiplier there is: limits count over five seconds."""
DEFAULT_COOKIE = "INGRESSCOOKIE"

Ask = Callable[[str], str]
"""An annotation's text by its name; "" when absent."""


def actions(ask: Ask, key: str, networks: Callable[[str], str], problems: list[str]) -> list[Action]:
    """What the proxy does before it forwards a request.

    Args:
      key: The Ingress as "namespace/name".
      networks: Reads an annotation as a list of networks, separated by blanks.
      problems: Gets the text of what cannot be done.
    """
    # Those that come too often must not cost the hash of a password.
    return [*_rates(ask, key, networks, problems), *_password(ask, key, problems), *_judge(ask, problems), *_size(ask, problems), *_times(ask, problems), *_affinity(ask, problems)]


def secret_of(ask: Ask, key: str) -> tuple[str, str] | None:
    """The Secret with the users ("namespace/name") and its kind; None without basic authentication."""
    if ask("auth-type") != "basic":
        return None
    namespace, name = key.partition("/")[0], ask("auth-secret")
    return (name if "/" in name else f"{namespace}/{name}"), ask("auth-secret-type") or "auth-file"


def _password(ask: Ask, key: str, problems: list[str]) -> list[Action]:
    kind = ask("auth-type")
    if not kind:
        return []
    found = secret_of(ask, key)
    if found is None:
        problems.append(f"auth-type {kind} is not supported")
        return [("reply", "503")]
    secret, form = found
    if secret.partition("/")[0] != key.partition("/")[0]:
        problems.append(f"auth-secret {secret} is in another namespace")
        return [("reply", "503")]
    return [("password", ask("auth-realm") or "Authentication Required", f"{secret}|{form}")]


def _judge(ask: Ask, problems: list[str]) -> list[Action]:
    """Another server that is asked about each request."""
    url = ask("auth-url")
    if not url:
        return []
    parts = urlsplit("")
    host, port = None, None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if parts.scheme not in ("http", "https") or not host or "$" in url or "[" in parts.netloc:
        problems.append(f"auth-url: {url!r} cannot be asked")
        return [("reply", "503")]
    if ask("auth-method") not in ("", "GET"):
        problems.append("auth-method: only GET is supported")
    place = f"{parts.scheme}://{host}:{port or (443 if parts.scheme == 'https' else 80)}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return [("judge", place, path, parts.netloc, ask("auth-signin"), ask("auth-response-headers").replace(" ", ""))]


def _rates(ask: Ask, key: str, networks: Callable[[str], str], problems: list[str]) -> list[Action]:
    identity = hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
    found: list[Action] = []
    exempt = networks("limit-whitelist") if ask("limit-whitelist") else ""
    for name, kind, window in (("limit-rps", "rps", 5), ("limit-rpm", "rpm", 1), ("limit-connections", "connections", 1)):
        text = ask(name)
        if not text or text == "0":
            continue
        if not text.isdigit():
            problems.append(f"{name}: {text!r} is not a number")
            continue
        found.append(("limit", kind, identity, str(int(text) * window), exempt))
    if found and ask("limit-burst-multiplier") not in ("", _BURST):
        problems.append(f"limit-burst-multiplier: only {_BURST} is supported")
    return found


def _size(ask: Ask, problems: list[str]) -> list[Action]:
    text = ask("proxy-body-size").strip().lower()
    if not text:
        return []
    parts = re.fullmatch(r"(\d+)([kmg]?)", text)
    if parts is None:
        problems.append(f"proxy-body-size: {text!r} is not a size such as 8m")
        return []
    limit = int(parts[1]) * _UNITS[parts[2]]
    return [("size", str(limit))] if limit else []


def _times(ask: Ask, problems: list[str]) -> list[Action]:
    found = []
    for name in ("proxy-read-timeout", "proxy-send-timeout"):
        text = ask(name).strip().removesuffix("s")
        if text and text.isdigit() and int(text):
            found.append(int(text))
        elif text:
            problems.append(f"{name}: {text!r} is not a number of seconds")
    return [("timeout", str(1000 * max(found)))] if found else []


def _affinity(ask: Ask, problems: list[str]) -> list[Action]:
    kind = ask("affinity")
    if not kind:
        return _hashed(ask, problems)
    if kind != "cookie":
        problems.append(f"affinity {kind} is not supported")
        return []
    name = ask("session-cookie-name") or DEFAULT_COOKIE
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        problems.append(f"session-cookie-name: {name!r} cannot be a cookie's name")
        return []
    attributes = [f"Path={ask('session-cookie-path') or '/'}"]
    if domain := ask("session-cookie-domain"):
        attributes.append(f"Domain={domain}")
    if (age := ask("session-cookie-max-age") or ask("session-cookie-expires")).isdigit():
        attributes.append(f"Max-Age={age}")
    if same := ask("session-cookie-samesite"):
        attributes.append(f"SameSite={same}")
    if ask("session-cookie-secure") == "true":
        attributes.append("Secure")
    return [("sticky", name, "; ".join([*attributes, "HttpOnly"]))]


def _hashed(ask: Ask, problems: list[str]) -> list[Action]:
    text = ask("upstream-hash-by")
    if not text:
        return []
    if not re.fullmatch(r"(\$(request_uri|uri|remote_addr|host|(http|arg|cookie)_\w+)|[^$])+", text):
        problems.append(f"upstream-hash-by: {text!r} has a variable that is not supported")
        return []
    return [("hash", text)]
