"""Which listener a request came to, when a Gateway has addresses of its own. Pure.

Role: `gateway` makes `Doors` of each such Gateway and asks for the site of each route. A door is an address and a port; a site is a
door's name with a host name or pattern, and stands in the proxy's maps where an Ingress has its host.
Invariants: a request belongs to the listener with the most special host name that fits, and to its routes only. A site has one
listener; where the host name of a route lies in that of a more special listener of the port, it can never be asked for.
Source: gateway-api Gateway (listener isolation), HTTPRouteSpec.hostnames.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from knarr.network.ingress.listeners import Listener
from knarr.network.ingress.routes import REFUSE, Routes


def covers(pattern: str, host: str) -> bool:
    """Whether a host name or pattern lies in another; "" is any."""
    return not pattern or pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:]))


class Doors:
    """The doors of one Gateway, written to a routing table.

    Args:
      key: The Gateway as "namespace/name".
      addresses: Where it is reached.
    """

    def __init__(self, routes: Routes, key: str, listeners: Sequence[Listener], addresses: Sequence[str]) -> None:
        self._routes = routes
        self._key = key
        self._listeners = [listener for listener in listeners if listener.works]
        for listener in self._listeners:
            for address in addresses:
                routes.doors[f"{address}:{listener.port}"] = self._name(listener)
            # A listener without routes keeps its names from wider ones.
            self._declare(listener, listener.hostname)

    def _name(self, listener: Listener) -> str:
        return f"g{hashlib.blake2b(self._key.encode(), digest_size=6).hexdigest()}:{listener.port}/"

    def _declare(self, listener: Listener, host: str) -> str:
        door = self._name(listener)
        site = f"{door}{host or '*'}"
        self._routes.owners[site] = listener.name
        if not host:
            return site
        if host.startswith("*."):
            self._routes.patterns[f"^{re.escape(door)}[^|]+{re.escape(host[1:])}$"] = site
        else:
            self._routes.hosts[site] = site
        return site

    def site(self, listener: Listener, host: str) -> str | None:
        """Where routes of a host name ("" for any) that fits a listener are found; None when a more special listener hides it."""
        for other in self._listeners:
            special = other is not listener and other.port == listener.port and len(other.hostname) > len(listener.hostname)
            if special and host and other.hostname and covers(other.hostname, host):
                return None
        return self._declare(listener, host)

    def close(self) -> None:
        """When all routes are written: TLS for names that no route takes is refused, unless there is somebody to decrypt it."""
        decrypting = {listener.port for listener in self._listeners if listener.protocol == "HTTPS"}
        for listener in self._listeners:
            if listener.protocol == "TLS":
                self._routes.streams.setdefault(f"{self._name(listener)}{listener.hostname or '*'}", REFUSE)
                if listener.port not in decrypting:
                    self._routes.streams.setdefault(f"{self._name(listener)}*", REFUSE)
