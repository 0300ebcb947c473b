"""A server with just enough of the API for kubectl exec, attach, cp and port-forward, over a real embedded runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knarr.http import remotecommand
from knarr.http.server import HTTPServer, Request
from knarr.runtime.embedded import EmbeddedRuntime

_RESOURCES = [
    {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": ["get", "list"], "shortNames": ["po"]},
    {"name": "pods/exec", "singularName": "", "namespaced": True, "kind": "PodExecOptions", "verbs": ["create", "get"]},
]


class StreamServer:
    """Serves one pod `p` with one container `c`."""

    def __init__(self, runtime: EmbeddedRuntime, sandbox_id: str, container_id: str, *, tty: bool = False, stdin: bool = False) -> None:
        self.runtime, self.sandbox_id, self.container_id = runtime, sandbox_id, container_id
        self.tty, self.stdin = tty, stdin
        self.websockets = True
        self.server = HTTPServer(self.handle)
        self.port = 0

    async def start(self, folder: Path) -> Path:
        self.port = await self.server.listen("127.0.0.1", 0)
        path = folder / "kubeconfig"
        cluster = {"name": "k", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "k", "context": {"cluster": "k", "user": "k"}}
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "current-context": "k", "users": [{"name": "k", "user": {}}]}))
        return path

    def pod(self) -> dict[str, Any]:
        container = {"name": "c", "image": "busybox", "tty": self.tty, "stdin": self.stdin}
        return {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default", "uid": "u"},
            "spec": {"containers": [container], "nodeName": "n"}, "status": {"phase": "Running", "containerStatuses": [{"name": "c", "ready": True, "state": {"running": {}}}]},
        }  # fmt: skip

    async def handle(self, request: Request) -> None:
        path = request.path
        if path == "/api":
            self._json(request, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            self._json(request, {"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
        elif path == "/api/v1":
            self._json(request, {"kind": "APIResourceList", "groupVersion": "v1", "resources": _RESOURCES})
        elif path == "/api/v1/namespaces/default/pods/p":
            self._json(request, self.pod())
        elif path.endswith(("/exec", "/attach", "/portforward")):
            if not self.websockets and request.headers.get("upgrade", "").lower() == "websocket":
                request.respond(403, [("Content-Type", "text/plain")], b"no websockets here\n")
            else:
                await self._stream(request, path.rpartition("/")[2])
        else:
            self._json(request, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound"}, 404)

    async def _stream(self, request: Request, verb: str) -> None:
        runtime = self.runtime
        if verb == "portforward":
            await remotecommand.serve_port_forward(request, lambda port: runtime.port_forward(self.sandbox_id, port), pod="default_p", uid="u")
            return
        options = remotecommand.parse_options(request.query)
        command = request.query.get("command", [])
        if verb == "exec":
            await remotecommand.serve_exec(
                request, lambda: runtime.exec(self.container_id, command, tty=options.tty, stdin=options.stdin), options, command=command
            )
        else:
            await remotecommand.serve_exec(
                request, lambda: runtime.attach(self.container_id, tty=options.tty, stdin=options.stdin), options, attach=True
            )

    def _json(self, request: Request, document: dict[str, Any], status: int = 200) -> None:
        request.respond(status, [("Content-Type", "application/json")], json.dumps(document).encode())
