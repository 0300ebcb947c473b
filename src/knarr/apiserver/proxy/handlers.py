"""The connect subresources: pods/log, exec, attach, portforward, and proxy of pods, services and nodes.

Each resolves its target in the watch cache, asks admission (CONNECT; log is a plain read), and hands over to the relay.
"""

from __future__ import annotations

from urllib.parse import quote

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.apiserver.attributes import AdmissionRequest, ConnectRequest, Services
from knarr.apiserver.proxy import options
from knarr.apiserver.proxy.clients import Clients
from knarr.apiserver.proxy.locations import Location, container_of, kubelet_of, node_location, pod_location, service_location
from knarr.apiserver.proxy.relay import relay_http, relay_upgrade, stream_body
from knarr.http import websocket
from knarr.http.errors import HTTPError
from knarr.http.server import Request

_MOST_ERROR_BYTES = 50_000
_PROXY_KINDS = {"pods": "PodProxyOptions", "services": "ServiceProxyOptions", "nodes": "NodeProxyOptions"}


def is_upgrade(request: Request) -> bool:
    return any(token.strip().lower() == "upgrade" for token in request.headers.get("connection", "").split(","))


class ConnectHandlers:
    """All handlers; one object per API server."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._pods = services.store("", "pods")
        self._nodes = services.store("", "nodes")
        self._service_store = services.store("", "services")
        self._slices = services.store("discovery.k8s.io", "endpointslices")
        self.clients = Clients(services.config)

    # -- common --------------------------------------------------------------------------------------------------------
    def _pod(self, connect: ConnectRequest) -> Object:
        attributes = connect.attributes
        pod = self._pods.get_nowait(attributes.namespace, attributes.name)
        if pod is None:
            raise errors.not_found("pods", attributes.name)
        return pod

    async def _admit(self, connect: ConnectRequest, object_: Object) -> None:
        chain = self._services.admission
        attributes = connect.attributes
        if chain is None or not chain.concerns("CONNECT", connect.resource, attributes.subresource):
            return
        request = AdmissionRequest(
            operation="CONNECT", resource=connect.resource, subresource=attributes.subresource, kind=("", "v1", object_["kind"]),
            namespace=attributes.namespace, name=attributes.name, object=object_, old_object=None, user=attributes.user,
        )  # fmt: skip
        await chain.run(request)

    async def _stream(self, connect: ConnectRequest, verb: str, object_: Object, query: str, *, container: str = "") -> None:
        await self._admit(connect, object_)
        pod = self._pod(connect)
        if container or verb != "portForward":
            container = container_of(pod, container)
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName")
        if not node:
            raise errors.bad_request(f"pod {name} does not have a host assigned")
        if not is_upgrade(connect.request):
            raise errors.bad_request("Upgrade request required")
        kubelet = kubelet_of(self._nodes, node)
        path = f"/{verb}/{pod['metadata']['namespace']}/{name}"
        if container:
            path += f"/{quote(container)}"
        await relay_upgrade(connect.request, self.clients.to(kubelet), f"{path}?{query}" if query else path)

    # -- pods ----------------------------------------------------------------------------------------------------------
    async def exec(self, connect: ConnectRequest) -> None:
        chosen = options.stream_options("PodExecOptions", connect.request.query)
        await self._stream(connect, "exec", chosen, options.stream_query(chosen), container=chosen.get("container", ""))

    async def attach(self, connect: ConnectRequest) -> None:
        chosen = options.stream_options("PodAttachOptions", connect.request.query)
        await self._stream(connect, "attach", chosen, options.stream_query(chosen), container=chosen.get("container", ""))

    async def port_forward(self, connect: ConnectRequest) -> None:
        chosen = options.port_forward_options(connect.request.query)
        await self._stream(connect, "portForward", chosen, options.port_forward_query(chosen))

    async def log(self, connect: ConnectRequest) -> None:
        request = connect.request
        if request.method not in ("GET", "HEAD"):
            raise errors.method_not_allowed()
        pod_name = connect.attributes.name
        asked, query, _ = options.log_query(pod_name, request.query)
        pod = self._pod(connect)
        container = container_of(pod, asked)
        node = pod["spec"].get("nodeName")
        if not node:
            # Not started anywhere: there is no log.
            request.respond(204, [], b"")
            return
        kubelet = kubelet_of(self._nodes, node)
        path = f"/containerLogs/{pod['metadata']['namespace']}/{pod_name}/{quote(container)}?{query}"
        await self._send_log(request, kubelet, path, pod_name)

    async def _send_log(self, request: Request, kubelet: Location, path: str, pod_name: str) -> None:
        try:
            async with self.clients.to(kubelet).stream("GET", path) as response:
                if not 200 <= response.status <= 206:
                    raise _log_error(response.status, (await response.read())[:_MOST_ERROR_BYTES].decode("utf-8", "replace"), pod_name)
                if websocket.is_upgrade(request):
                    try:
                        await websocket.serve_reader(request, response.iter_chunks())
                    finally:
                        response.abort()
                    return
                await stream_body(request, response, [("Content-Type", "text/plain")])
        except HTTPError as error:
            if not request.done:
                raise StatusError(500, "", f'Get "https://{kubelet.authority}{path}": {error}') from error

    # -- proxies -------------------------------------------------------------------------------------------------------
    async def proxy_pod(self, connect: ConnectRequest) -> None:
        await self._proxy(connect, lambda: pod_location(self._pods, connect.attributes.namespace, connect.attributes.name))

    async def proxy_service(self, connect: ConnectRequest) -> None:
        namespace, name = connect.attributes.namespace, connect.attributes.name
        await self._proxy(connect, lambda: service_location(self._service_store, self._slices, namespace, name))

    async def proxy_node(self, connect: ConnectRequest) -> None:
        await self._proxy(connect, lambda: node_location(self._nodes, connect.attributes.name))

    async def _proxy(self, connect: ConnectRequest, locate: object) -> None:
        assert callable(locate)
        request, path = connect.request, connect.path
        object_: Object = {"kind": _PROXY_KINDS[connect.resource.plural], "apiVersion": "v1"}
        if path:
            object_["path"] = path
        await self._admit(connect, object_)
        location: Location = locate()
        client = self.clients.to(location)
        query = f"?{request.query_string}" if request.query_string else ""
        if is_upgrade(request):
            await relay_upgrade(request, client, (path or "/") + query)
            return
        if not path and request.method in ("GET", "HEAD"):
            # Relative links on the page only work below a directory.
            request.respond(301, [("Location", f"{request.raw_path}/{query}")], b"")
            return
        raw = request.raw_path
        prefix = raw[: len(raw) - len(path)] if path and raw.endswith(path) else raw
        await relay_http(request, client, location, (path or "/") + query, prefix.rstrip("/"))


def _log_error(status: int, text: str, pod_name: str) -> StatusError:
    if status == 500:
        return errors.internal(text)
    if status == 400:
        return errors.bad_request(text)
    reason = {404: "NotFound", 403: "Forbidden", 401: "Unauthorized", 503: "ServiceUnavailable", 405: "MethodNotAllowed"}.get(status, "")
    message = f"the server could not find the requested resource ( pods/log {pod_name})" if status == 404 else text
    cause = {"reason": "UnexpectedServerResponse", "message": text}
    return StatusError(status, reason, message, {"name": pod_name, "kind": "pods/log", "causes": [cause]})
