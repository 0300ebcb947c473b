"""Rewrites what a proxied page says about its own place: Location headers and links in HTML.

Source: apimachinery pkg/util/proxy/transport.go.
"""

from __future__ import annotations

import posixpath
import re
from html import escape, unescape
from urllib.parse import urlsplit, urlunsplit

_URL_ATTRIBUTES: dict[str, frozenset[str]] = {
    "a": frozenset({"href"}), "applet": frozenset({"codebase"}), "area": frozenset({"href"}), "audio": frozenset({"src"}),
    "base": frozenset({"href"}), "blockquote": frozenset({"cite"}), "body": frozenset({"background"}),
    "button": frozenset({"formaction"}), "command": frozenset({"icon"}), "del": frozenset({"cite"}), "embed": frozenset({"src"}),
    "form": frozenset({"action"}), "frame": frozenset({"longdesc", "src"}), "head": frozenset({"profile"}),
    "html": frozenset({"manifest"}), "iframe": frozenset({"longdesc", "src"}), "img": frozenset({"longdesc", "src", "usemap"}),
    "input": frozenset({"src", "usemap", "formaction"}), "ins": frozenset({"cite"}), "link": frozenset({"href"}),
    "object": frozenset({"classid", "codebase", "data", "usemap"}), "q": frozenset({"cite"}), "script": frozenset({"src"}),
    "source": frozenset({"src"}), "video": frozenset({"poster", "src"}),
}  # fmt: skip
_TAG = re.compile(r"<([a-zA-Z][a-zA-Z0-9]*)(\s[^<>]*)?>")
_ATTRIBUTE = re.compile(r"""([a-zA-Z_:][-a-zA-Z0-9_:.]*)(\s*=\s*)("[^"]*"|'[^']*'|[^\s"'>]+)""")


def rewrite_url(url: str, *, prefix: str, backend: str, request_host: str) -> str:
    """Put the proxy's path in front of an absolute path on the same host; other URLs stay.

    Args:
      prefix: Path of the proxy, e.g. "/api/v1/namespaces/n/services/s/proxy".
      backend: host:port that was asked.
      request_host: Host header of the client's request.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    if parts.netloc not in ("", backend, request_host) or not parts.path.startswith("/"):
        return url
    path = parts.path
    if not path.startswith(prefix):
        path = posixpath.normpath(prefix + "/" + path).replace("//", "/")
        if parts.path.endswith("/") and not path.endswith("/"):
            path += "/"
    netloc = request_host if parts.netloc == request_host and request_host else ""
    scheme = parts.scheme if netloc else ""
    return urlunsplit((scheme, netloc, path, parts.query, parts.fragment))


def rewrite_html(page: str, *, prefix: str, backend: str, request_host: str) -> str:
    """Rewrite the URL-valued attributes of all tags."""

    def tag(match: re.Match[str]) -> str:
        wanted = _URL_ATTRIBUTES.get(match[1].lower())
        if wanted is None or not match[2]:
            return match[0]

        def attribute(found: re.Match[str]) -> str:
            if found[1].lower() not in wanted:
                return found[0]
            raw = found[3]
            value = unescape(raw[1:-1] if raw[0] in "\"'" else raw)
            changed = rewrite_url(value, prefix=prefix, backend=backend, request_host=request_host)
            return found[0] if changed == value else f'{found[1]}{found[2]}"{escape(changed)}"'

        return f"<{match[1]}{_ATTRIBUTE.sub(attribute, match[2])}>"

    return _TAG.sub(tag, page)
