"""The routing table: what the proxy looks up, and what it holds beside that. Plain data.

Role: `model` and `gateway` fill one, `alternatives.settle` finishes it, `controller` hands it to `haproxy`. The same input gives the
same table, so that the difference to what the proxy holds is the whole change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.network.ingress.alternatives import Alternative, Place

ANY_NAME = "*:"
"""In front of a Secret, among host names with certificates: it serves all names that no other serves."""
TO_HTTPS_301, TO_HTTPS_302 = "1", "2"
NOWHERE = ("nowhere", 0)
"""The place of a backend that does not exist: the proxy answers 500 for it."""
PASS, TERMINATE, REFUSE = "P", "T", "R"
"""What is done with the TLS of a stream."""


@dataclass(frozen=True, slots=True)
class Server:
    """How the proxy speaks TLS to backends.

    Attributes:
      sni: The name asked for; "" is the request's host.
      authority: File name of the authorities that must have signed the backend's certificate; "" takes any certificate, "@system-ca"
        the machine's own authorities.
      name: The name that the certificate must have.
      certificate: File name of our own certificate.
    """

    sni: str = ""
    authority: str = ""
    name: str = ""
    certificate: str = ""


@dataclass(slots=True)
class Routes:
    """The routing table.

    Attributes:
      hosts: Host name or "*.domain" (lower case) that has rules; itself as value. Behind a door (`doors`) the door's name is in front.
      doors: "address:port" of a Gateway to its name, which ends in "/".
      patterns: Regular expression of a door with a host name to what stands in place of the host name in the maps below.
      owners: What stands in place of a host name, behind a door, to the listener whose it is.
      streams: As hosts, to "PASS|target" or "TERMINATE|target", or REFUSE, of what goes on as a stream of bytes.
      exact, prefix: "host|path" to "target|flags|argument"; prefixes end in "/".
      regex: Regular expression of "host|path" to the same.
      rules: Lists of alternatives by name, for the proxy's script.
      alternatives, lists: What `alternatives.settle` makes regex, rules and some of exact and prefix from.
      servers: Ways to speak TLS to backends, by name.
      authorities: Certificates of authorities (PEM), by the file name that servers and certificates refer to.
      keys: Our own certificates with keys (PEM) for backends, by file name.
      checks: Host name to the file name of the authorities of which its clients are asked for certificates.
      targets: Target to its number of addresses, and "target#index" to "address|port".
      certificates: Host name to the Secret ("namespace/name") whose certificate serves it; "" holds none.
      problems: (Ingress key, text) of what cannot be served.
    """

    hosts: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    prefix: dict[str, str] = field(default_factory=dict)
    regex: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    doors: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)
    authorities: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    alternatives: dict[Place, list[Alternative]] = field(default_factory=dict)
    lists: dict[Place, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    certificates: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


Addresses = Callable[[str, str, Mapping[str, Any]], list[tuple[str, int]] | str]
"""(namespace, Service, backend port) to the addresses to send to, or why there are none."""
FIRST = "first"
"""In a backend port: the Service's first port is wanted."""
ENDPOINTS = "endpoints"
"""In a backend port: the addresses of the endpoints are wanted, not the Service's own."""
