"""What annotations ask of TLS: certificates of clients, and how the proxy speaks to backends. Pure.

Role: `model` asks once per Ingress; what comes out are actions for the script, and servers, authorities and checks of the routing table.
Invariants: who asks for certificates of clients and names no usable authority lets nobody in. A client's certificate counts only
on a connection that was opened for the same host name.
Source: behaviour and annotations of ingress-nginx (auth-tls, proxy-ssl).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable

from knarr.api.types import Object
from knarr.network.ingress.alternatives import Action
from knarr.network.ingress.certificates import authority_name, readable, secret_pem, server_action
from knarr.network.ingress.routes import Routes, Server

Ask = Callable[[str], str]
"""An annotation's text by its name; "" when absent."""
FindSecret = Callable[[str], Object | None]
_KEPT_OUT: Action = ("reply", "503")


def _authority(secret: Object | None) -> str:
    """The certificates under ca.crt; "" when there are none that can be read."""
    try:
        pem = base64.b64decode(((secret or {}).get("data") or {}).get("ca.crt") or "").decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return pem.strip() + "\n" if readable(pem) else ""


def _named(ask: Ask, name: str, namespace: str, problems: list[str]) -> str:
    """A Secret that an annotation names, as "namespace/name"; "" when it may not be used."""
    text = ask(name)
    key = text if "/" in text else f"{namespace}/{text}"
    if key.partition("/")[0] != namespace:
        problems.append(f"{name} {text} is in another namespace")
        return ""
    return key


def of_clients(ask: Ask, namespace: str, hosts: Iterable[str], secret: FindSecret, routes: Routes, problems: list[str]) -> list[Action]:
    """The check of clients' certificates; the authorities of the hosts are written to the table."""
    mode = ask("auth-tls-verify-client") or "on"
    if not ask("auth-tls-secret") or mode == "off":
        return []
    if mode not in ("on", "optional"):
        problems.append(f"auth-tls-verify-client {mode} is not supported; a certificate that is not valid is refused")
        mode = "optional"
    key = _named(ask, "auth-tls-secret", namespace, problems)
    pem = _authority(secret(key)) if key else ""
    if not pem:
        problems.append(f"secret {key} has no certificates under ca.crt; nobody is let in")
        return [_KEPT_OUT]
    if "*" in hosts:
        problems.append("auth-tls-secret needs rules with host names; nobody is let in")
        return [_KEPT_OUT]
    name = authority_name(pem)
    for host in hosts:
        if routes.checks.setdefault(host, name) != name:
            problems.append(f"auth-tls-secret: host {host} has another one; nobody is let in")
            return [_KEPT_OUT]
    routes.authorities[name] = pem
    passed = "1" if ask("auth-tls-pass-certificate-to-upstream") == "true" else ""
    return [("certified", mode, ask("auth-tls-error-page"), ask("auth-tls-match-cn"), passed)]


def of_backend(ask: Ask, namespace: str, secret: FindSecret, routes: Routes, problems: list[str]) -> list[Action]:
    """The server that speaks TLS as the annotations ask; none when nothing special is asked for."""
    wanted = [name for name in ("proxy-ssl-secret", "proxy-ssl-name", "proxy-ssl-verify") if ask(name)]
    if not wanted:
        return []
    name, authority, certificate = ask("proxy-ssl-name"), "", ""
    if ask("proxy-ssl-secret"):
        key = _named(ask, "proxy-ssl-secret", namespace, problems)
        found = secret(key) if key else None
        if found is None:
            problems.append(f"proxy-ssl-secret: secret {key} does not exist")
            return [_KEPT_OUT]
        if pem := secret_pem(found):
            certificate = authority_name(pem) + ".pem"
            routes.keys[certificate] = pem
        authority = _authority(found)
    if ask("proxy-ssl-verify") != "on":
        authority = ""
    elif not authority:
        problems.append("proxy-ssl-verify: the secret has no certificates under ca.crt; nothing is forwarded")
        return [_KEPT_OUT]
    server = Server(name, authority_name(authority) if authority else "", name, certificate)
    if authority:
        routes.authorities[server.authority] = authority
    return [server_action(routes, server)]
