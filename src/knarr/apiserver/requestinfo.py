"""From method and path to what is asked for. Used once per request, before anything else.

Source: apiserver endpoints/request/requestinfo.go.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
NAMESPACE_SUBRESOURCES = frozenset({"status", "finalize"})


class RequestInfo(NamedTuple):
    """is_resource False: only verb (lower-case method) and path are meaningful."""

    is_resource: bool
    verb: str
    path: str
    group: str = ""
    version: str = ""
    namespace: str = ""
    resource: str = ""
    subresource: str = ""
    name: str = ""
    rest: str = ""
    """What follows the subresource, with a leading slash; "" when nothing does (not even a slash)."""
    legacy_watch: bool = False


def parse(method: str, path: str, raw_path: str, query_string: str) -> RequestInfo:
    """Return the RequestInfo of a request.

    Args:
      path: Decoded path.
      raw_path: The path as received; cut into segments before decoding, since names may hold an encoded slash.
      query_string: Looked at for watch= and fieldSelector= only when the path names a collection.
    """
    parts = raw_path.split("/")
    root = parts[1] if len(parts) > 1 else ""
    count = len(parts)
    if root == "api":
        start = 3
        if count < 4:
            return RequestInfo(False, method.lower(), path)
        group, version = "", parts[2]
    elif root == "apis":
        start = 4
        if count < 5:
            return RequestInfo(False, method.lower(), path)
        group, version = parts[2], parts[3]
    else:
        return RequestInfo(False, method.lower(), path)
    rest = ""
    if raw_path[-1] == "/":
        # Trailing slashes do not count, except for proxied paths, which are rebuilt from raw_path below.
        while count > start and not parts[count - 1]:
            count -= 1
        parts = parts[:count]
        if count <= start:
            return RequestInfo(False, method.lower(), path)
    if "%" in raw_path:
        parts = [unquote(part, errors="surrogateescape") for part in parts]
    verb = VERBS.get(method, method.lower())
    legacy = parts[start] == "watch"
    if legacy:
        verb = "watch"
        start += 1
        if count <= start:
            return RequestInfo(False, method.lower(), path)
    namespace = ""
    if parts[start] == "namespaces":
        if count > start + 1:
            namespace = parts[start + 1]
            if count > start + 2 and parts[start + 2] not in NAMESPACE_SUBRESOURCES:
                start += 2
    resource = parts[start]
    name = parts[start + 1] if count > start + 1 else ""
    subresource = parts[start + 2] if count > start + 2 else ""
    if subresource:
        # Everything after the subresource exactly as it came, for proxies.
        pieces = raw_path.split("/", start + 3)
        if len(pieces) > start + 3:
            rest = "/" + pieces[start + 3]
    if not name and not legacy:
        if verb == "get":
            verb = "list"
            if "watch=" in query_string and _is_watch(query_string):
                verb = "watch"
        elif verb == "delete":
            verb = "deletecollection"
    return RequestInfo(True, verb, path, group, version, namespace, resource, subresource, name, rest, legacy)


def _is_watch(query_string: str) -> bool:
    for pair in query_string.split("&"):
        key, _, value = pair.partition("=")
        if key == "watch":
            return value.lower() not in ("false", "0", "f")
    return "watch" in query_string.split("&")
