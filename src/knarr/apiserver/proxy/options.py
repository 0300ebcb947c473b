"""Query parameters of the connect subresources as the objects that admission sees, and as the kubelet wants them.

Source: k8s.io/api core/v1 PodExecOptions, PodAttachOptions, PodPortForwardOptions, PodLogOptions; pkg/registry/core/pod/strategy.go.
"""

from __future__ import annotations

from urllib.parse import urlencode

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.errors import FieldError, field_forbidden, invalid_value
from knarr.api.types import Object

Query = dict[str, list[str]]
_STREAMS = ("stdin", "stdout", "stderr", "tty")
_KUBELET_NAMES = {"stdin": "input", "stdout": "output", "stderr": "error", "tty": "tty"}


def _flag(query: Query, name: str) -> bool:
    """Read a boolean as Go's conversion does: everything but false and 0 is true."""
    values = query.get(name) or ["false"]
    return values[0].lower() not in ("false", "0")


def stream_options(kind: str, query: Query) -> Object:
    """PodExecOptions or PodAttachOptions."""
    options: Object = {"kind": kind, "apiVersion": "v1"}
    for name in _STREAMS:
        if _flag(query, name):
            options[name] = True
    if query.get("container", [""])[0]:
        options["container"] = query["container"][0]
    if kind == "PodExecOptions":
        options["command"] = list(query.get("command") or []) or None
    return options


def stream_query(options: Object) -> str:
    """The kubelet's query for exec and attach."""
    pairs = [(_KUBELET_NAMES[name], "1") for name in _STREAMS if options.get(name)]
    pairs += [("command", word) for word in options.get("command") or ()]
    return urlencode(sorted(pairs, key=lambda pair: pair[0]))


def port_forward_options(query: Query) -> Object:
    """PodPortForwardOptions. Raises 400 for ports that are no numbers."""
    options: Object = {"kind": "PodPortForwardOptions", "apiVersion": "v1"}
    ports = [port for value in query.get("ports") or () for port in value.split(",") if port]
    if ports:
        if not all(port.isdigit() for port in ports):
            raise errors.bad_request(f"unable to parse ports {ports}")
        options["ports"] = [int(port) for port in ports]
    return options


def port_forward_query(options: Object) -> str:
    ports = options.get("ports")
    return urlencode({"port": ",".join(str(port) for port in ports)}) if ports else ""


def _integer(query: Query, name: str) -> int | None:
    values = query.get(name)
    if not values or not values[0]:
        return None
    try:
        return int(values[0])
    except ValueError as error:
        raise errors.bad_request(f'strconv.ParseInt: parsing "{values[0]}": invalid syntax') from error


def log_query(pod_name: str, query: Query) -> tuple[str, str, bool]:
    """Check PodLogOptions; return (container asked for, the kubelet's query, whether its certificate may go unchecked).

    Raises:
      StatusError: 400 or 422.
    """
    tail, limit, since = _integer(query, "tailLines"), _integer(query, "limitBytes"), _integer(query, "sinceSeconds")
    since_time = (query.get("sinceTime") or [""])[0]
    if since_time:
        try:
            since_time = clock.rfc3339(clock.parse_rfc3339(since_time))
        except ValueError as error:
            raise errors.bad_request(f'parsing time "{since_time}": {error}') from error
    found: list[FieldError] = []
    if tail is not None and tail < 0:
        found.append(invalid_value("tailLines", tail, "must be greater than or equal to 0"))
    if limit is not None and limit < 1:
        found.append(invalid_value("limitBytes", limit, "must be greater than 0"))
    if since is not None and since_time:
        # Upstream's path has one element without a name, which prints so.
        found.append(field_forbidden("[]", "at most one of `sinceTime` or `sinceSeconds` may be specified"))
    elif since is not None and since < 1:
        found.append(invalid_value("sinceSeconds", since, "must be greater than 0"))
    if "stream" in query:
        found.append(field_forbidden("stream", "may not be specified"))
    if found:
        raise errors.invalid("PodLogOptions", pod_name, found)
    pairs: list[tuple[str, str]] = [(name, "true") for name in ("follow", "previous", "timestamps") if _flag(query, name)]
    pairs += [(name, str(value)) for name, value in (("sinceSeconds", since), ("tailLines", tail), ("limitBytes", limit)) if value is not None]
    if since_time:
        pairs.append(("sinceTime", since_time))
    container = (query.get("container") or [""])[0]
    return container, urlencode(sorted(pairs)), _flag(query, "insecureSkipTLSVerifyBackend")
