"""A small registry for tests: OCI distribution reads, tokens, basic auth, redirects, ranges, and faults on demand."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from dataclasses import dataclass, field

from knarr.http.server import HTTPServer, Request


@dataclass
class Registry:
    """Serves what was put in; `log` has (method, path, Range) of every request."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    credentials: tuple[str, str] | None = None
    scheme: str = "bearer"
    break_after: int = 0
    """Blobs are cut after that many bytes, once per blob."""
    redirect: bool = False
    ranges: bool = True
    log: list[tuple[str, str, str]] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._broken: set[str] = set()
        self.server = HTTPServer(self._handle)

    async def start(self) -> str:
        self.port = await self.server.listen("127.0.0.1", 0)
        return f"127.0.0.1:{self.port}"

    def blob(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def image(self, name: str, tag: str, config: bytes, layers: list[tuple[str, bytes]], *, index: bool = False) -> str:
        """Add an image; layers are (media type, data). Returns the digest of what the tag names."""
        entries = [{"mediaType": kind, "digest": self.blob(data), "size": len(data)} for kind, data in layers]
        config_entry = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": self.blob(config), "size": len(config)}
        kind = "application/vnd.oci.image.manifest.v1+json"
        manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config_entry, "layers": entries}).encode()
        digest = self._manifest(name, kind, manifest)
        if index:
            other = {"mediaType": kind, "digest": "sha256:" + "0" * 64, "size": 1, "platform": {"os": "linux", "architecture": "sparc"}}
            own = {"mediaType": kind, "digest": digest, "size": len(manifest), "platform": {"os": "linux", "architecture": "amd64"}}
            kind = "application/vnd.oci.image.index.v1+json"
            digest = self._manifest(name, kind, json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [other, own]}).encode())
        self.manifests[f"{name}:{tag}"] = self.manifests[f"{name}:{digest}"]
        return digest

    def _manifest(self, name: str, kind: str, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.manifests[f"{name}:{digest}"] = (kind, data)
        return digest

    def _allowed(self, request: Request) -> bool:
        if self.credentials is None:
            return True
        given = request.headers.get("authorization", "")
        if self.scheme == "basic":
            return given == "Basic " + base64.b64encode(":".join(self.credentials).encode()).decode()
        return given == "Bearer good-token"

    async def _handle(self, request: Request) -> None:
        self.log.append((request.method, request.path, request.headers.get("range", "")))
        if request.path == "/token":
            wanted = "Basic " + base64.b64encode(":".join(self.credentials or ("", "")).encode()).decode()
            good = request.headers.get("authorization") == wanted and request.query.get("scope", [""])[0].startswith("repository:")
            request.respond(200 if good else 401, [("Content-Type", "application/json")], b'{"token":"good-token"}' if good else b"{}")
            return
        if request.path.startswith("/store/"):
            assert "authorization" not in request.headers
            await self._blob(request, request.path.rpartition("/")[2])
            return
        if not self._allowed(request):
            realm = f'Bearer realm="http://127.0.0.1:{self.port}/token",service="test"' if self.scheme == "bearer" else 'Basic realm="test"'
            request.respond(401, [("WWW-Authenticate", realm)], b"{}")
            return
        name, _, rest = request.path.removeprefix("/v2/").rpartition("/manifests/")
        if name:
            found = self.manifests.get(f"{name}:{rest}")
            request.respond(200 if found else 404, [("Content-Type", found[0] if found else "text/plain")], found[1] if found else b"")
            return
        digest = request.path.rpartition("/")[2]
        if self.redirect:
            request.respond(307, [("Location", f"http://localhost:{self.port}/store/{digest}")], b"")
        else:
            await self._blob(request, digest)

    async def _blob(self, request: Request, digest: str) -> None:
        data = self.blobs.get(digest)
        if data is None:
            request.respond(404, [], b"")
            return
        start = 0
        if self.ranges and request.headers.get("range", "").startswith("bytes="):
            start = int(request.headers["range"][6:].rstrip("-"))
        headers = [("Content-Type", "application/octet-stream")]
        if self.break_after and digest not in self._broken and len(data) > self.break_after:
            self._broken.add(digest)
            stream = await request.start_stream(200, headers)
            stream.write(data[: self.break_after])
            await asyncio.sleep(0.2)
            stream.abort()
            return
        request.respond(206 if start else 200, headers, data[start:])
