"""Filters of HTTPRoutes as flags and actions of the proxy: redirects, rewrites, changes of headers, CORS. Pure.

Role: `gateway` reads the filters of each rule. What a filter asks for that cannot be done raises Unsupported.
Source: gateway-api HTTPRouteFilter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from knarr.network.ingress.alternatives import Action
from knarr.network.ingress.annotations import MOVED
from knarr.network.ingress.annotations import TO_HTTPS as TO_HTTPS_308
from knarr.network.ingress.routes import TO_HTTPS_301, TO_HTTPS_302

OF_RULES = ("RequestRedirect", "URLRewrite", "RequestMirror", "CORS")
"""Filters that a whole rule may have, a single backend not."""
_TO_HTTPS = {301: TO_HTTPS_301, 302: TO_HTTPS_302, 308: TO_HTTPS_308}


class Unsupported(Exception):
    """The text says what is not supported."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What filters come to: flags and argument of a plain map entry, and actions that need the script."""

    flags: str = ""
    argument: str = ""
    actions: tuple[Action, ...] = ()


def combine(effects: Iterable[Effect]) -> Effect:
    """Several filters of one rule."""
    found = list(effects)
    argument = next((effect.argument for effect in found if effect.argument), "")
    return Effect("".join(effect.flags for effect in found), argument, tuple(action for effect in found for action in effect.actions))


def read(item: Mapping[str, Any], prefix: str) -> Effect:
    """One filter; `prefix` is the path that its rule matches by. Raises Unsupported."""
    kind = item.get("type")
    if kind == "RequestRedirect":
        return _redirect(item.get("requestRedirect") or {}, prefix)
    if kind == "URLRewrite":
        return _rewrite(item.get("urlRewrite") or {}, prefix)
    if kind == "RequestHeaderModifier":
        return _headers("request", item.get("requestHeaderModifier") or {})
    if kind == "ResponseHeaderModifier":
        return _headers("answer", item.get("responseHeaderModifier") or {})
    if kind == "CORS":
        return _cors(item.get("cors") or {})
    raise Unsupported(f"filter {kind} is not supported")


def _replacement(path: Mapping[str, Any]) -> tuple[str, str]:
    """("full" or "prefix" or "", the new text). Raises Unsupported."""
    kind = path.get("type")
    if kind == "ReplaceFullPath":
        return "full", path.get("replaceFullPath") or "/"
    if kind == "ReplacePrefixMatch":
        return "prefix", path.get("replacePrefixMatch") or "/"
    if kind is None:
        return "", ""
    raise Unsupported(f"path replacement of type {kind} is not supported")


def _redirect(redirect: Mapping[str, Any], prefix: str) -> Effect:
    code = int(redirect.get("statusCode") or 302)
    kind, new = _replacement(redirect.get("path") or {})
    if set(redirect) <= {"scheme", "statusCode"} and redirect.get("scheme") == "https" and code in _TO_HTTPS:
        return Effect(_TO_HTTPS[code])
    if redirect.get("hostname") and redirect.get("scheme") and kind == "full" and code == 301 and not redirect.get("port"):
        return Effect(MOVED, f"{redirect['scheme']}://{redirect['hostname']}{new}".replace("|", "%7C"))
    port = str(redirect.get("port") or "")
    return Effect(actions=(("redirect", str(code), redirect.get("scheme") or "", redirect.get("hostname") or "", port, kind, prefix, new),))


def _rewrite(rewrite: Mapping[str, Any], prefix: str) -> Effect:
    kind, new = _replacement(rewrite.get("path") or {})
    actions: list[Action] = [("host", rewrite["hostname"])] if rewrite.get("hostname") else []
    if kind == "full":
        return Effect(argument=new.replace("|", "%7C"), actions=tuple(actions))
    if kind == "prefix":
        actions.append(("prefix", prefix, new))
    return Effect(actions=tuple(actions))


def _headers(side: str, change: Mapping[str, Any]) -> Effect:
    actions: list[Action] = []
    for verb in ("set", "add"):
        actions.extend((f"{side}-{verb}", item["name"], item["value"]) for item in change.get(verb) or ())
    actions.extend((f"{side}-remove", name) for name in change.get("remove") or ())
    return Effect(actions=tuple(actions))


def _cors(cors: Mapping[str, Any]) -> Effect:
    text = {name: ", ".join(cors.get(name) or ()) for name in ("allowMethods", "allowHeaders", "exposeHeaders")}
    credentials = "true" if cors.get("allowCredentials") else ""
    origins = cors.get("allowOrigins") or ()
    return Effect(actions=(("cors", credentials, *text.values(), str(cors.get("maxAge") or 5), *origins),))
