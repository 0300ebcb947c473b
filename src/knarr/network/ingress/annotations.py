"""What an Ingress's annotations ask for, as flags, conditions and actions of its routes. Pure.

Role: `model` asks once per Ingress and path. Both prefixes, ours and ingress-nginx's, mean the same.
Invariants: an annotation that is known but cannot be done is named in `problems`; unknown ones are other programs' business.
Source: behaviour and annotations of ingress-nginx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from knarr.api.addresses import sloppy_network
from knarr.api.types import Object
from knarr.network.ingress import forwarding, limits
from knarr.network.ingress.alternatives import Action, Condition
from knarr.network.objects import object_key

ANNOTATION_PREFIXES = ("knarr.dev/", "nginx.ingress.kubernetes.io/")
HTTPS_BACKEND, HTTP2_BACKEND, AS_ASKED, TO_HTTPS, MOVED = "S", "G", "A", "R", "M"
"""Flags of a route: how its backend is spoken to (TLS, HTTP/2, TLS if the client does), and redirects."""
_PROTOCOL_FLAGS = {"": "", "HTTP": "", "HTTPS": HTTPS_BACKEND, "GRPC": HTTP2_BACKEND, "GRPCS": HTTPS_BACKEND, "AUTO_HTTP": AS_ASKED}
_CORS_METHODS = "GET, PUT, POST, DELETE, PATCH, OPTIONS"
_CORS_HEADERS = "DNT,Keep-Alive,User-Agent,X-Requested-With,If-Modified-Since,Cache-Control,Content-Type,Range,Authorization"


def annotation(obj: Object, name: str) -> str:
    """One of the known annotations, under any of its prefixes; "" when absent."""
    annotations = obj["metadata"].get("annotations") or {}
    return next((annotations[prefix + name] for prefix in ANNOTATION_PREFIXES if prefix + name in annotations), "")


def split_list(text: str) -> list[str]:
    """Items between commas, trimmed."""
    return [item.strip() for item in text.split(",") if item.strip()]


@dataclass(slots=True)
class Behaviour:
    """See the module.

    Attributes:
      regex: Paths are regular expressions.
      argument: A fixed path to ask the backend for, or where MOVED leads.
      rewrite: Replacement of the whole path with captures ("$1").
      conditions: A canary's: it takes only what meets them.
      before: Ways that come before the Ingress's own, each its conditions and what is done then.
      sticky: A client stays with an endpoint, so endpoints must be known.
      other_name: Redirect of a host's twin with or without "www."; its code.
      trusted: Who meets these conditions needs no password.
      passes_tls: TLS for the host goes to the backend as it is.
      stand_in: A Service that is asked when the wanted one has no endpoints.
      refused_others: Whom the conditions of an allow list keep out is answered 403.
    """

    flags: str = ""
    argument: str = ""
    regex: bool = False
    rewrite: str = ""
    app_root: str = ""
    aliases: list[str] = field(default_factory=list)
    conditions: list[tuple[Condition, ...]] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    before: list[tuple[tuple[Condition, ...], tuple[Action, ...]]] = field(default_factory=list)
    refused_others: bool = False
    sticky: bool = False
    other_name: str = ""
    stand_in: str = ""
    passes_tls: bool = False
    trusted: tuple[Condition, ...] = ()
    problems: list[str] = field(default_factory=list)


def read(ingress: Object, *, tls: bool) -> Behaviour:
    """All annotations of an Ingress for a host with or without TLS."""
    out = Behaviour()
    protocol = annotation(ingress, "backend-protocol").upper()
    if protocol in _PROTOCOL_FLAGS:
        out.flags += _PROTOCOL_FLAGS[protocol]
    else:
        out.problems.append(f"backend-protocol {protocol} is not supported")
    out.problems.extend(f"annotation {name} is not supported" for name in forwarding.NOT_DONE if annotation(ingress, name))
    redirect = annotation(ingress, "ssl-redirect") != "false" and tls
    if redirect or annotation(ingress, "force-ssl-redirect") == "true" or annotation(ingress, "ssl-passthrough") == "true":
        out.flags += TO_HTTPS
    out.app_root = annotation(ingress, "app-root")
    if annotation(ingress, "from-to-www-redirect") == "true":
        out.other_name = annotation(ingress, "from-to-www-redirect-code") or "308"
    out.aliases = [name.lower() for name in split_list(annotation(ingress, "server-alias"))]
    _paths(ingress, out)
    _headers(ingress, out)
    _sources(ingress, out)
    _canary(ingress, out)
    ask: Callable[[str], str] = lambda name: annotation(ingress, name)
    asked = limits.actions(ask, object_key(ingress), lambda name: _networks(ingress, name, out), out.problems)
    # Before the redirects, which are nobody's business who may not come.
    out.actions[:0] = asked
    out.actions.extend(forwarding.actions(ask, object_key(ingress), out.problems))
    out.passes_tls = ask("ssl-passthrough") == "true"
    out.stand_in = ask("default-backend")
    out.sticky = any(action[0] in ("sticky", "hash") for action in asked)
    return out


def secret_of(ingress: Object) -> tuple[str, str] | None:
    """The Secret with the users that may come, and its kind; None when everybody may."""
    return limits.secret_of(lambda name: annotation(ingress, name), object_key(ingress))


def _paths(ingress: Object, out: Behaviour) -> None:
    moved, soon = annotation(ingress, "permanent-redirect"), annotation(ingress, "temporal-redirect")
    code = annotation(ingress, "permanent-redirect-code") or "301"
    rewrite = annotation(ingress, "rewrite-target")
    if moved and code == "301":
        out.flags += MOVED
        out.argument = moved.replace("|", "%7C")
    elif moved or soon:
        soon_code = annotation(ingress, "temporal-redirect-code") or "302"
        out.actions.append(("redirect", code if moved else soon_code, "", "", "", "url", "", moved or soon))
    elif "$" in rewrite:
        out.regex, out.rewrite = True, rewrite
    elif rewrite:
        out.argument = rewrite.replace("|", "%7C")
    out.regex = out.regex or annotation(ingress, "use-regex") == "true"


def _headers(ingress: Object, out: Behaviour) -> None:
    if host := annotation(ingress, "upstream-vhost"):
        out.actions.append(("host", host))
    if prefix := annotation(ingress, "x-forwarded-prefix"):
        out.actions.append(("request-set", "X-Forwarded-Prefix", prefix))
    if annotation(ingress, "enable-cors") != "true":
        return
    origins = split_list(annotation(ingress, "cors-allow-origin")) or ["*"]
    fixed = len(origins) == 1 and "*" not in origins[0][1:]
    answers = [("Access-Control-Allow-Origin", origins[0])] if fixed else []
    if annotation(ingress, "cors-allow-credentials") != "false":
        answers.append(("Access-Control-Allow-Credentials", "true"))
    if shown := annotation(ingress, "cors-expose-headers"):
        answers.append(("Access-Control-Expose-Headers", shown))
    asked = [
        ("Access-Control-Allow-Methods", annotation(ingress, "cors-allow-methods") or _CORS_METHODS),
        ("Access-Control-Allow-Headers", annotation(ingress, "cors-allow-headers") or _CORS_HEADERS),
        ("Access-Control-Max-Age", annotation(ingress, "cors-max-age") or "1728000"),
    ]
    chosen: list[Action] = [] if fixed else [("origin", *origins)]
    preflight = ("reply", "204", *(part for pair in [*answers, *asked] for part in pair))
    out.before.append(((("m", "", "OPTIONS"),), (*chosen, preflight)))
    out.actions.extend(chosen)
    out.actions.extend(("answer-set", name, text) for name, text in answers)


def _networks(ingress: Object, name: str, out: Behaviour) -> str:
    found = []
    for text in split_list(annotation(ingress, name)):
        network = sloppy_network(text if "/" in text else f"{text}/{128 if ':' in text else 32}")
        if network is None:
            out.problems.append(f"{name}: {text!r} is not a network")
        else:
            found.append(str(network))
    return " ".join(found)


def _sources(ingress: Object, out: Behaviour) -> None:
    if denied := _networks(ingress, "denylist-source-range", out):
        out.before.append(((("i", "", denied),), (("reply", "403"),)))
    for name in ("allowlist-source-range", "whitelist-source-range"):
        if annotation(ingress, name):
            # A list without any good network lets nobody in.
            inside = (("i", "", _networks(ingress, name, out)),)
            if annotation(ingress, "satisfy") == "any" and (annotation(ingress, "auth-type") or annotation(ingress, "auth-url")):
                out.trusted = inside
            else:
                out.conditions.append(inside)
                out.refused_others = True
            return


def _canary(ingress: Object, out: Behaviour) -> None:
    if annotation(ingress, "canary") != "true":
        return
    header, weight, cookie = (annotation(ingress, f"canary-{name}") for name in ("by-header", "weight", "by-cookie"))
    never: tuple[Condition, ...] = ()
    if header:
        pattern, value = annotation(ingress, "canary-by-header-pattern"), annotation(ingress, "canary-by-header-value")
        out.conditions.append((("H", header, pattern) if pattern else ("h", header, value or "always"),))
        if not pattern and not value:
            never = (("!h", header, "never"),)
    if cookie:
        out.conditions.append((*never, ("c", cookie, "always")))
        never = (*never, ("!c", cookie, "never"))
    total = annotation(ingress, "canary-weight-total")
    if weight.isdigit() and int(weight):
        share = 100 * int(weight) / int(total) if total.isdigit() and int(total) else int(weight)
        out.conditions.append((*never, ("w", "", f"{min(share, 100):g}")))
    if not out.conditions:
        out.conditions.append((("w", "", "0"),))
