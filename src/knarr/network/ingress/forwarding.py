"""What annotations ask of forwarding: how long a connection may take, how often it is tried, copies, and what stands in for errors. Pure.

Role: `annotations` asks once per Ingress; the actions are the proxy script's (`script`).
Invariants: as there. Annotations that only tune what the proxy does by itself are taken without a word (`HARMLESS`).
Source: behaviour and annotations of ingress-nginx.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from knarr.network.ingress.alternatives import Action

Ask = Callable[[str], str]
"""An annotation's text by its name; "" when absent."""
CONNECT_SECONDS = (1, 5, 15, 60)
"""Times to connect that there are; another is rounded up."""
NOT_DONE = (
    "auth-snippet", "configuration-snippet", "server-snippet", "stream-snippet", "modsecurity-snippet", "enable-modsecurity", "custom-headers",
    "limit-rate", "limit-rate-after", "auth-cache-key", "auth-proxy-set-headers", "proxy-cookie-domain", "proxy-cookie-path", "proxy-redirect-from",
    "ssl-ciphers", "denylist-snippet",
)  # fmt: skip


def actions(ask: Ask, key: str, problems: list[str]) -> list[Action]:
    """What the proxy does when it forwards a request.

    Args:
      key: The Ingress as "namespace/name".
      problems: Gets the text of what cannot be done.
    """
    return [*_connecting(ask, problems), *_tries(ask, problems), *_copies(ask, problems), *_errors(ask, key, problems)]


def _connecting(ask: Ask, problems: list[str]) -> list[Action]:
    text = ask("proxy-connect-timeout").strip().removesuffix("s")
    if not text:
        return []
    if not text.isdigit() or not int(text):
        problems.append(f"proxy-connect-timeout: {text!r} is not a number of seconds")
        return []
    return [("connect", str(next((limit for limit in CONNECT_SECONDS if limit >= int(text)), CONNECT_SECONDS[-1])))]


def _tries(ask: Ask, problems: list[str]) -> list[Action]:
    tries = ask("proxy-next-upstream-tries")
    if tries and not tries.isdigit():
        problems.append(f"proxy-next-upstream-tries: {tries!r} is not a number")
    return [("once",)] if tries == "1" or ask("proxy-next-upstream").strip() == "off" else []


def _copies(ask: Ask, problems: list[str]) -> list[Action]:
    url = ask("mirror-target")
    if not url:
        return []
    try:
        parts = urlsplit(url.replace("$request_uri", "").replace("$host", "x"))
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"([^$\s|]|\$request_uri|\$host)+", url):
        problems.append(f"mirror-target: {url!r} cannot be asked")
        return []
    return [("mirror-url", url, ask("mirror-host") or parts.netloc, "" if ask("mirror-request-body") == "off" else "1")]


def _errors(ask: Ask, key: str, problems: list[str]) -> list[Action]:
    codes = [code.strip() for code in ask("custom-http-errors").split(",") if code.strip()]
    if not codes:
        return []
    if not all(re.fullmatch(r"[345]\d\d", code) for code in codes):
        problems.append(f"custom-http-errors: {ask('custom-http-errors')!r} is not a list of statuses")
        return []
    if not ask("default-backend"):
        problems.append("custom-http-errors needs the annotation default-backend")
        return []
    return [("errors", " ".join(codes), "", *key.split("/", 1))]
