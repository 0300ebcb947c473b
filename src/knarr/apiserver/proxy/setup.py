"""Builds the handlers of all connect subresources."""

from __future__ import annotations

from knarr.apiserver.attributes import ConnectHandler, ResourceKey, Services
from knarr.apiserver.proxy.handlers import ConnectHandlers


def build_connect(services: Services) -> dict[ResourceKey, ConnectHandler]:
    """Return the handler of each connect subresource."""
    handlers = ConnectHandlers(services)
    return {
        ResourceKey("", "pods", "exec"): handlers.exec,
        ResourceKey("", "pods", "attach"): handlers.attach,
        ResourceKey("", "pods", "portforward"): handlers.port_forward,
        ResourceKey("", "pods", "log"): handlers.log,
        ResourceKey("", "pods", "proxy"): handlers.proxy_pod,
        ResourceKey("", "services", "proxy"): handlers.proxy_service,
        ResourceKey("", "nodes", "proxy"): handlers.proxy_node,
    }
