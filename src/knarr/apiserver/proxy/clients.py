"""HTTP clients towards kubelets and backends, kept per server so that TLS handshakes are not repeated."""

from __future__ import annotations

import ssl
from functools import cached_property

from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.proxy.locations import Location
from knarr.http.client import HTTPClient

_MOST_CLIENTS = 500


class Clients:
    """Makes clients on demand and keeps them."""

    def __init__(self, config: APIServerConfig) -> None:
        self._config = config
        self._clients: dict[Location, HTTPClient] = {}

    @cached_property
    def _kubelet_tls(self) -> ssl.SSLContext:
        """With our client certificate; the kubelet's own is checked when a CA is configured."""
        config = self._config
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if config.kubelet_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.check_hostname = True
            context.load_verify_locations(config.kubelet_ca)
        if config.kubelet_client_cert:
            context.load_cert_chain(config.kubelet_client_cert, config.kubelet_client_key)
        return context

    @cached_property
    def _backend_tls(self) -> ssl.SSLContext:
        """Pods have no certificates that we could check; upstream does not check them either."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def to(self, location: Location) -> HTTPClient:
        client = self._clients.get(location)
        if client is None:
            if len(self._clients) >= _MOST_CLIENTS:
                # A client with requests under way stays usable by them; it is only not found again.
                self._clients.pop(next(iter(self._clients)))
            context = None
            if location.scheme == "https":
                context = self._kubelet_tls if location.kubelet else self._backend_tls
            client = self._clients[location] = HTTPClient(
                f"{location.scheme}://{location.authority}", context, max_connections=64, timeout_seconds=None, connect_timeout_seconds=10
            )
        return client

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
