"""Where a proxied request goes: pure look-ups in the watch cache.

Source: kubernetes pkg/registry/core/{pod,node,service}, pkg/kubelet/client.
"""

from __future__ import annotations

import ipaddress
import random
from typing import NamedTuple

from knarr.api import errors
from knarr.api.errors import go_quote
from knarr.api.types import Object
from knarr.apiserver.attributes import Store
from knarr.apiserver.auth.podrefs import containers

KUBELET_PORT = 10250
# Addresses that surely lead there come first: names of nodes need not resolve.
_ADDRESS_TYPES = ("InternalIP", "ExternalIP", "Hostname", "InternalDNS", "ExternalDNS")
_SERVICE_LABEL = "kubernetes.io/service-name"


class Location(NamedTuple):
    """One server to talk to; `kubelet` says that our client certificate belongs to the connection."""

    scheme: str
    host: str
    port: int
    kubelet: bool = False

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def split_scheme_name_port(text: str) -> tuple[str, str, str] | None:
    """Split "name", "name:port", "scheme:name:port" (also with an empty scheme or port); None when malformed."""
    parts = text.split(":")
    if len(parts) == 1:
        scheme, name, port = "", parts[0], ""
    elif len(parts) == 2:
        scheme, name, port = "", parts[0], parts[1]
    elif len(parts) == 3:
        scheme, name, port = parts[0], parts[1], parts[2]
        if scheme not in ("http", "https", ""):
            return None
    else:
        return None
    if not name:
        return None
    return scheme, name, port


def container_of(pod: Object, asked: str) -> str:
    """Return the container to use: the one asked for, or the only one. Raises 400."""
    name = pod["metadata"]["name"]
    spec = pod["spec"]
    if asked:
        if not any(container["name"] == asked for _, _, container in containers(spec)):
            raise errors.bad_request(f"container {asked} is not valid for pod {name}")
        return asked
    names = [container["name"] for container in spec.get("containers") or ()]
    if len(names) == 1:
        return str(names[0])
    if not names:
        raise errors.bad_request(f"a container name must be specified for pod {name}")
    text = f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]"
    for field, word in (("initContainers", "init"), ("ephemeralContainers", "ephemeral")):
        others = [container["name"] for container in spec.get(field) or ()]
        if others:
            text += f" or one of the {word} containers: [{' '.join(others)}]"
    raise errors.bad_request(text)


def kubelet_of(nodes: Store, node_name: str) -> Location:
    """Return where a node's kubelet listens. Raises 404, or 400 for a node without address."""
    node = nodes.get_nowait("", node_name)
    if node is None:
        raise errors.not_found("nodes", node_name)
    status = node.get("status") or {}
    addresses: dict[str, str] = {}
    for entry in status.get("addresses") or ():
        addresses.setdefault(entry.get("type", ""), entry.get("address", ""))
    port = ((status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get("Port") or KUBELET_PORT
    for kind in _ADDRESS_TYPES:
        if addresses.get(kind):
            return Location("https", addresses[kind], int(port), kubelet=True)
    raise errors.StatusError(500, "", f"no preferred addresses found; known addresses: {list(addresses.values())}")


def _proxyable(host: str) -> bool:
    """Refuse addresses by which the server could be made to talk to itself or its link."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


def node_location(nodes: Store, text: str) -> Location:
    """Resolve the NAME of nodes/NAME/proxy."""
    parts = split_scheme_name_port(text)
    if parts is None:
        raise errors.bad_request(f"invalid node request {go_quote(text)}")
    scheme, name, port = parts
    kubelet = kubelet_of(nodes, name)
    if not _proxyable(kubelet.host):
        raise errors.bad_request("address not allowed")
    if not port or port == str(kubelet.port):
        return kubelet
    return Location(scheme or "http", kubelet.host, _port(port, text))


def _port(text: str, request: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise errors.bad_request(f"invalid port in request {go_quote(request)}")
    return int(text)


def pod_location(pods: Store, namespace: str, text: str) -> Location:
    """Resolve the NAME of pods/NAME/proxy; without a port the first one that the pod declares."""
    parts = split_scheme_name_port(text)
    if parts is None:
        raise errors.bad_request(f"invalid pod request {go_quote(text)}")
    scheme, name, port = parts
    pod = pods.get_nowait(namespace, name)
    if pod is None:
        raise errors.not_found("pods", name)
    if not port:
        declared = [entry["containerPort"] for one in pod["spec"].get("containers") or () for entry in one.get("ports") or ()]
        port = str(declared[0]) if declared else "443" if scheme == "https" else "80"
    addresses = (pod.get("status") or {}).get("podIPs") or []
    host = addresses[0].get("ip", "") if addresses else ""
    if not host or not _proxyable(host):
        raise errors.bad_request("address not allowed")
    return Location(scheme or "http", host, _port(port, text))


def service_location(services: Store, slices: Store, namespace: str, text: str) -> Location:
    """Resolve the NAME of services/NAME/proxy to one ready endpoint."""
    parts = split_scheme_name_port(text)
    if parts is None:
        raise errors.bad_request(f"invalid service request {go_quote(text)}")
    scheme, name, port = parts
    service = services.get_nowait(namespace, name)
    if service is None:
        raise errors.not_found("services", name)
    if port.isdigit():
        found = [entry for entry in service["spec"].get("ports") or () if entry.get("port") == int(port)]
        if not found:
            raise errors.service_unavailable(f"no service port {port} found for service {go_quote(name)}")
        port = found[0].get("name") or ""
    chosen = endpoint_of(slices, namespace, name, port)
    if chosen is None:
        raise errors.service_unavailable(f"no endpoints available for service {go_quote(text)}")
    return Location(scheme or "http", chosen[0], chosen[1])


def endpoint_of(slices: Store, namespace: str, service: str, port_name: str) -> tuple[str, int] | None:
    """Choose a ready endpoint of a service's named port: (address, port)."""
    found: list[tuple[str, int]] = []
    for one in slices.list_nowait(namespace):
        if (one["metadata"].get("labels") or {}).get(_SERVICE_LABEL) != service or one.get("addressType") == "FQDN":
            continue
        ports = [entry.get("port") for entry in one.get("ports") or () if (entry.get("name") or "") == port_name]
        if not ports or not ports[0]:
            continue
        for endpoint in one.get("endpoints") or ():
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                found += [(address, ports[0]) for address in endpoint.get("addresses") or ()]
    return random.choice(found) if found else None
