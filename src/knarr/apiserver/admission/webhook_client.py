"""Calls one webhook: finds its server, asks, and checks the form of the answer.

A service reference is resolved to a ready endpoint's address through the watch cache, so that it works before any proxy
does; the TLS name stays that of the service. Connections are kept.

Source: apiserver pkg/util/webhook, pkg/admission/plugin/webhook/request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ssl
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import orjson

from knarr.api.types import Object
from knarr.apiserver.attributes import Store
from knarr.apiserver.proxy.locations import endpoint_of
from knarr.apiserver.tracing import CURRENT
from knarr.http.client import HTTPClient, Response
from knarr.http.errors import ConnectFailed, ConnectionLost, HTTPError, TimeoutExpired

_MOST_CLIENTS = 200
_MOST_ANSWER_BYTES = 10 << 20


class CallFailed(Exception):
    """The webhook could not be asked, or its answer makes no sense; what happens then is the failure policy's business."""


class Answer(NamedTuple):
    """The checked response of an AdmissionReview."""

    allowed: bool
    result: Object | None
    patch: bytes
    warnings: list[str]
    audit_annotations: dict[str, str]


class Target(NamedTuple):
    """Where a webhook is: `shown` is the URL in messages."""

    shown: str
    base: str
    path: str
    server_name: str
    connect_to: tuple[str, int] | None


class WebhookClient:
    """Shared by all webhooks of an API server."""

    def __init__(self, services: Store, slices: Store) -> None:
        self._services = services
        self._slices = slices
        self._clients: dict[tuple[str, str, tuple[str, int] | None], HTTPClient] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}

    def _target(self, config: Object) -> Target:
        url = config.get("url")
        if url:
            parts = urlsplit(url)
            path = parts.path or "/"
            return Target(url, f"https://{parts.netloc}", f"{path}?{parts.query}" if parts.query else path, parts.hostname or "", None)
        reference = config.get("service") or {}
        name, namespace, port = reference.get("name") or "", reference.get("namespace") or "", reference.get("port") or 443
        path = reference.get("path") or "/"
        server_name = f"{name}.{namespace}.svc"
        base = f"https://{server_name}:{port}"
        return Target(base + path, base, path, server_name, self._dial(namespace, name, port))

    def _dial(self, namespace: str, name: str, port: int) -> tuple[str, int]:
        service = self._services.get_nowait(namespace, name)
        if service is None:
            raise CallFailed(f'service "{name}" not found')
        spec = service["spec"]
        if spec.get("type") == "ExternalName":
            return spec.get("externalName", ""), port
        found = [entry for entry in spec.get("ports") or () if entry.get("port") == port]
        if not found:
            raise CallFailed(f'no service port {port} found for service "{name}"')
        chosen = endpoint_of(self._slices, namespace, name, found[0].get("name") or "")
        if chosen is None:
            raise CallFailed(f'no endpoints available for service "{name}"')
        return chosen

    def _context(self, ca_bundle: str) -> ssl.SSLContext:
        key = hashlib.sha256(ca_bundle.encode()).hexdigest()
        context = self._contexts.get(key)
        if context is None:
            context = ssl.create_default_context()
            if ca_bundle:
                # Only the bundle counts; the machine's own trust store is for webhooks without one.
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                try:
                    context.load_verify_locations(cadata=base64.b64decode(ca_bundle).decode())
                except (ssl.SSLError, ValueError, binascii.Error) as error:
                    raise CallFailed(f"unable to load root certificates: {error}") from error
            if len(self._contexts) >= _MOST_CLIENTS:
                self._contexts.clear()
            self._contexts[key] = context
        return context

    def _client(self, target: Target, ca_bundle: str) -> HTTPClient:
        key = (target.base, ca_bundle, target.connect_to)
        client = self._clients.get(key)
        if client is None:
            if len(self._clients) >= _MOST_CLIENTS:
                self._clients.pop(next(iter(self._clients)))
            client = self._clients[key] = HTTPClient(
                target.base, self._context(ca_bundle), max_connections=64, server_hostname=target.server_name,
                connect_to=target.connect_to, timeout_seconds=None, connect_timeout_seconds=30, max_body_bytes=_MOST_ANSWER_BYTES,
            )  # fmt: skip
        return client

    async def post(self, config: Object, body: bytes, *, timeout_seconds: int) -> bytes:
        """Send a review and return the answer's body.

        Args:
          config: A WebhookClientConfig (url or service, caBundle).

        Raises:
          CallFailed: with upstream's words, the URL included.
        """
        target = self._target_or_words(config, timeout_seconds)
        shown = f"{target.shown}{'&' if '?' in target.shown else '?'}timeout={timeout_seconds}s"
        path = f"{target.path}{'&' if '?' in target.path else '?'}timeout={timeout_seconds}s"
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "kube-apiserver-admission"}
        span = CURRENT.get()
        if span is not None:
            headers["traceparent"] = span.traceparent
        try:
            response = await self._exchange(target, config.get("caBundle") or "", path, headers, body, timeout_seconds)
        except TimeoutExpired as error:
            raise CallFailed(f'Post "{shown}": context deadline exceeded') from error
        except ConnectFailed as error:
            raise CallFailed(f'Post "{shown}": {_dial_words(error)}') from error
        except HTTPError as error:
            raise CallFailed(f'Post "{shown}": {error}') from error
        if not 200 <= response.status < 300:
            text = response.body[:2000].decode("utf-8", "replace").strip()
            raise CallFailed(_status_words(response.status, text))
        return response.body

    def _target_or_words(self, config: Object, timeout_seconds: int) -> Target:
        try:
            return self._target(config)
        except CallFailed as error:
            reference = config.get("service") or {}
            base = f"https://{reference.get('name')}.{reference.get('namespace')}.svc:{reference.get('port') or 443}{reference.get('path') or '/'}"
            raise CallFailed(f'Post "{base}?timeout={timeout_seconds}s": {error}') from error

    async def _exchange(self, target: Target, ca: str, path: str, headers: dict[str, str], body: bytes, seconds: float) -> Response:
        client = self._client(target, ca)
        started = time.monotonic()
        try:
            return await client.request("POST", path, headers, body, timeout_seconds=seconds)
        except ConnectionLost:
            # A kept connection that the webhook's server had closed in the meantime: once more, on a new one, in the time left.
            left = seconds - (time.monotonic() - started)
            if left <= 0:
                raise TimeoutExpired("no time left") from None
            return await client.request("POST", path, headers, body, timeout_seconds=left)

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        self._clients.clear()


def _dial_words(error: Exception) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        if "Hostname mismatch" in text or "IP address mismatch" in text:
            return f"tls: failed to verify certificate: x509: {text}"
        return "tls: failed to verify certificate: x509: certificate signed by unknown authority"
    return text


def _status_words(status: int, text: str) -> str:
    words = {
        404: "the server could not find the requested resource", 401: "the server has asked for the client to provide credentials",
        403: text or "forbidden", 500: f"an error on the server ({text!r}) has prevented the request from succeeding",
        503: "the server is currently unable to handle the request",
    }  # fmt: skip
    return words.get(status) or f"the server responded with the status code {status} but did not return more information"


def review_answer(uid: str, version: str, body: bytes, *, mutating: bool) -> Answer:
    """Check the form of an AdmissionReview answer. Raises CallFailed."""
    try:
        review = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise CallFailed(f"failed to call webhook: {_json_words(body, error)}") from error
    invalid = "received invalid webhook response: "
    response = review.get("response") if isinstance(review, dict) else None
    if not isinstance(response, dict):
        raise CallFailed(f"{invalid}webhook response was absent")
    patch_text, patch_type = response.get("patch"), response.get("patchType")
    if version == "v1":
        if response.get("uid") != uid:
            raise CallFailed(f'{invalid}expected response.uid="{uid}", got "{response.get("uid") or ""}"')
        got = (review.get("apiVersion") or "", review.get("kind") or "")
        if got != ("admission.k8s.io/v1", "AdmissionReview"):
            raise CallFailed(f"{invalid}expected webhook response of admission.k8s.io/v1, Kind=AdmissionReview, got {got[0]}, Kind={got[1]}")
        if not mutating and patch_text:
            raise CallFailed(f"{invalid}validating webhook may not return response.patch")
        if not mutating and patch_type is not None:
            raise CallFailed(f"{invalid}validating webhook may not return response.patchType")
        if patch_text and patch_type is None:
            raise CallFailed(f"{invalid}webhook returned response.patch but not response.patchType")
        if patch_type is not None and not patch_text:
            raise CallFailed(f"{invalid}webhook returned response.patchType but not response.patch")
        if patch_text and patch_type != "JSONPatch":
            raise CallFailed(f'unsupported patch type "{patch_type}"')
    try:
        patch = base64.b64decode(patch_text, validate=True) if patch_text and mutating else b""
    except (binascii.Error, TypeError) as error:
        raise CallFailed(f"received undecodable patch in webhook response: {error}") from error
    result = response.get("status")
    return Answer(
        bool(response.get("allowed")), result if isinstance(result, dict) else None, patch,
        [str(text) for text in response.get("warnings") or ()],
        {str(key): str(value) for key, value in (response.get("auditAnnotations") or {}).items()},
    )  # fmt: skip


def _json_words(body: bytes, error: Exception) -> str:
    return "unexpected end of JSON input" if not body.strip() else str(error)
