"""Pull images from registries that speak the OCI distribution protocol.

Role: behind pull_image and `knarr image pull`. Mirrors are tried in order before the registry itself, each set of credentials
in order and then none. Layers come in parallel, each resumable: a broken download goes on where it ended (Range), also after a
restart of this process, because the partial file keeps its name. Every byte is verified by digest before it counts.
Source: OCI distribution-spec; docker registry v2 manifests; containerd core/remotes/docker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.http.client import HTTPClient, Response, StreamResponse
from knarr.http.errors import ConnectFailed, ConnectionLost, HTTPError
from knarr.runtime.cri import AuthConfig, ImagePullError, RuntimeFault
from knarr.runtime.images.auth import Authorizer
from knarr.runtime.images.layers import LayerBlob
from knarr.runtime.images.platform import ARCHITECTURE, choose
from knarr.runtime.images.reference import Reference, parse_reference
from knarr.runtime.images.store import ImageStore, LayerSource, StoredImage
from knarr.runtime.workers import Workers

log = get_logger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with (layer digest, bytes so far, bytes in all)."""

_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_ACCEPT = ", ".join((*_MANIFESTS, *_INDEXES, "*/*"))
_MAX_MANIFEST = 8 << 20
_PARALLEL_LAYERS = 3
_TRIES = 5
_WRITE_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Where registries really are."""

    mirrors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Registry host to base URLs tried first, e.g. {"docker.io": ["https://mirror.local"]}; "*" is for every registry."""
    insecure: frozenset[str] = frozenset()
    """Hosts (host or host:port) whose certificate is not verified, or that speak plain HTTP."""
    ca_files: Mapping[str, str] = field(default_factory=dict)
    """Host to a PEM file of authorities."""


class _Unauthorized(Exception):
    """These credentials do not do."""


class _Endpoint:
    """One base URL, with one set of credentials, for one repository."""

    def __init__(self, base: str, repository: str, auth: AuthConfig | None, mirrors: Mirrors) -> None:
        self.base = base.rstrip("/")
        self._path = f"/v2/{repository}"
        self._mirrors = mirrors
        self._clients: dict[str, HTTPClient] = {}
        self._authorizer = Authorizer(self._token_request, repository, auth)

    def _client(self, url: str) -> tuple[HTTPClient, str]:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        client = self._clients.get(origin)
        if client is None:
            client = HTTPClient(origin, self._tls(parts.netloc) if parts.scheme == "https" else None, {"User-Agent": "knarr"}, 8)
            self._clients[origin] = client
        return client, parts.path + (f"?{parts.query}" if parts.query else "")

    def _tls(self, host: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._mirrors.ca_files.get(host))
        if host in self._mirrors.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    async def _token_request(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> Response:
        client, path = self._client(url)
        return await client.request(method, path, headers, body)

    @contextlib.asynccontextmanager
    async def get(self, path: str, headers: Mapping[str, str]) -> Any:
        """GET below the repository, following redirects and answering one challenge; yields the StreamResponse."""
        url, challenged = self.base + self._path + path, False
        own = urlsplit(url).netloc
        for _ in range(10):
            client, target = self._client(url)
            sent = dict(headers)
            # Credentials are for the registry, not for the store that it redirects to.
            if self._authorizer.header and urlsplit(url).netloc == own:
                sent["Authorization"] = self._authorizer.header
            again = False
            async with client.stream("GET", target, sent, timeout_seconds=60) as response:
                if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                    url, again = urljoin(url, response.headers["location"]), True
                elif response.status == 401 and not challenged:
                    challenge = response.headers.get("www-authenticate", "")
                    challenged = again = True
                else:
                    yield response
                    return
            if challenged and again and urlsplit(url).netloc == own and response.status == 401 and not await self._authorizer.answer(challenge):
                raise _Unauthorized
        raise ImagePullError(f"too many redirects from {self.base}")

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


class Puller:
    """Pulls into a store; concurrent pulls of one reference share the work."""

    def __init__(self, store: ImageStore, workers: Workers, tasks: Tasks, mirrors: Mirrors) -> None:
        self._store, self._workers, self._tasks, self._mirrors = store, workers, tasks, mirrors
        self._blobs: dict[str, asyncio.Task[LayerBlob]] = {}
        self._uses: Counter[str] = Counter()

    async def pull(self, text: str, auth: Sequence[AuthConfig] = (), progress: Progress | None = None) -> StoredImage:
        """Bring an image here.

        An image that was loaded by hand serves as it is while no registry can be reached: on a laptop without a network
        `imagePullPolicy: Always` (which every :latest has) would otherwise make loading pointless.

        Raises ImagePullError.
        """
        reference = parse_reference(text)
        errors: list[str] = []
        reached = False
        for base in self._bases(reference):
            for credentials in auth or (None,):
                endpoint = _Endpoint(base, reference.path, credentials, self._mirrors)
                try:
                    return await self._pull_from(endpoint, reference, progress)
                except _Unauthorized:
                    reached = True
                    errors.append(
                        "pull access denied, repository does not exist or may require authorization: "
                        "server message: insufficient_scope: authorization failed"
                    )
                except HTTPError as error:
                    errors.append(f'failed to do request: Head "{base}/v2/{reference.path}/manifests/{_wanted(reference)}": {error}')
                    break
                except ImagePullError as error:
                    reached = True
                    errors.append(str(error))
                    break
                except (RuntimeFault, OSError) as error:
                    errors.append(str(error))
                    break
                finally:
                    await endpoint.close()
        present = self._store.find(text)
        if present is not None and present.loaded and not reached:
            log.info("no registry can be reached, using the image that was loaded", image=str(reference), error=errors[-1])
            return present
        raise ImagePullError(f'failed to pull and unpack image "{reference}": failed to resolve reference "{reference}": {errors[-1]}')

    def _bases(self, reference: Reference) -> list[str]:
        domain = reference.domain
        own = "registry-1.docker.io" if domain == "docker.io" else domain
        host = own.partition(":")[0]
        plain = own in self._mirrors.insecure or host in ("localhost", "127.0.0.1", "[") or host.startswith("127.")
        bases = [*self._mirrors.mirrors.get(domain, ()), *self._mirrors.mirrors.get("*", ())]
        bases.append(f"https://{own}")
        if plain:
            bases.append(f"http://{own}")
        return bases

    async def _pull_from(self, endpoint: _Endpoint, reference: Reference, progress: Progress | None) -> StoredImage:
        raw, kind, top = await self._manifest(endpoint, reference, _wanted(reference))
        manifest = _document(raw)
        digest, depth = top, 0
        while kind in _INDEXES or "manifests" in manifest:
            chosen = choose(manifest.get("manifests") or [])
            if chosen is None or depth > 3:
                raise ImagePullError(f"no match for platform in manifest: linux/{ARCHITECTURE}")
            raw, kind, digest = await self._manifest(endpoint, reference, str(chosen["digest"]))
            manifest, depth = _document(raw), depth + 1
        try:
            config_digest, layers = str(manifest["config"]["digest"]), list(manifest["layers"])
            sizes = [int(layer["size"]) for layer in layers]
            digests = [str(layer["digest"]) for layer in layers]
        except (KeyError, TypeError, ValueError) as error:
            raise ImagePullError(f"unsupported manifest media type {kind!r}") from error
        existing = self._store.find(config_digest)
        config = await self._small_blob(endpoint, config_digest)
        slots = asyncio.Semaphore(_PARALLEL_LAYERS)
        sources = [LayerSource(item, self._fetcher(endpoint, item, size, slots, progress)) for item, size in zip(digests, sizes, strict=True)]
        names = [f"{reference.repository}@{item}" for item in dict.fromkeys([top, digest])]
        size = existing.size_bytes if existing is not None else len(raw) + len(config) + sum(sizes)
        self._uses.update(digests)
        try:
            return await self._store.add(config, sources, names=[reference] if reference.tag else [], digests=names, size_bytes=size)
        finally:
            self._uses.subtract(digests)
            for item in digests:
                # Another pull may still be unpacking the same blob.
                if self._uses[item] <= 0:
                    del self._uses[item]
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._ingest_path(item, done=True))

    async def _manifest(self, endpoint: _Endpoint, reference: Reference, wanted: str) -> tuple[bytes, str, str]:
        """(bytes, media type, digest) of a manifest or index."""
        async with endpoint.get(f"/manifests/{wanted}", {"Accept": _ACCEPT}) as response:
            if response.status == 404:
                raise ImagePullError(f"{reference}: not found")
            if response.status in (401, 403):
                raise _Unauthorized
            if response.status != 200:
                raise ImagePullError(f"unexpected status from GET request to {endpoint.base}/v2/{reference.path}/manifests/{wanted}: {response.status}")
            raw = await _bounded(response, _MAX_MANIFEST)
            kind = response.headers.get("content-type", "").partition(";")[0].strip()
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        if wanted.startswith("sha256:") and digest != wanted:
            raise ImagePullError(f"manifest has digest {digest}, expected {wanted}")
        return raw, kind or str(_document(raw).get("mediaType", "")), digest

    async def _small_blob(self, endpoint: _Endpoint, digest: str) -> bytes:
        _check_digest(digest)
        async with endpoint.get(f"/blobs/{digest}", {}) as response:
            if response.status != 200:
                raise ImagePullError(f"blob {digest}: unexpected status {response.status}")
            raw = await _bounded(response, _MAX_MANIFEST)
        if "sha256:" + hashlib.sha256(raw).hexdigest() != digest:
            raise ImagePullError(f"blob {digest} has other content than its digest says")
        return raw

    def _fetcher(
        self, endpoint: _Endpoint, digest: str, size: int, slots: asyncio.Semaphore, progress: Progress | None
    ) -> Callable[[], Awaitable[LayerBlob]]:
        _check_digest(digest)

        async def fetch() -> LayerBlob:
            task = self._blobs.get(digest)
            if task is None:
                task = self._tasks.spawn(self._download(endpoint, digest, size, slots, progress), f"pull {digest[7:19]}")
                self._blobs[digest] = task
                task.add_done_callback(lambda _: self._blobs.pop(digest, None))
            return await asyncio.shield(task)

        return fetch

    def _ingest_path(self, digest: str, *, done: bool) -> str:
        return os.path.join(self._store.ingest, digest.removeprefix("sha256:") + ("" if done else ".partial"))

    async def _download(
        self, endpoint: _Endpoint, digest: str, size: int, slots: asyncio.Semaphore, progress: Progress | None
    ) -> LayerBlob:
        path, final = self._ingest_path(digest, done=False), self._ingest_path(digest, done=True)
        last: Exception | None = None
        async with slots:
            for attempt in range(_TRIES):
                if attempt:
                    await asyncio.sleep(min(0.2 * 2**attempt, 5.0))
                try:
                    await self._download_part(endpoint, digest, size, path, progress)
                except (ConnectionLost, ConnectFailed, TimeoutError) as error:
                    last = error
                    continue
                if await self._workers.run(lambda: _file_digest(path)) == digest:
                    os.replace(path, final)
                    return LayerBlob(final, 0, os.path.getsize(final))
                os.unlink(path)
                if isinstance(last, ImagePullError):
                    break  # wrong twice: what the registry has is wrong
                last = ImagePullError(f"blob {digest} has other content than its digest says")
        raise ImagePullError(f"failed to copy: {last}")

    async def _download_part(self, endpoint: _Endpoint, digest: str, size: int, path: str, progress: Progress | None) -> None:
        offset = os.path.getsize(path) if os.path.exists(path) else 0
        if offset > size:
            os.unlink(path)
            offset = 0
        if offset == size and size:
            return
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with endpoint.get(f"/blobs/{digest}", headers) as response:
            if response.status not in (200, 206):
                raise ImagePullError(f"blob {digest}: unexpected status {response.status}")
            if response.status == 200:
                offset = 0  # this server does not resume
            with open(path, "r+b" if offset else "wb") as file:
                file.seek(offset)
                pending: list[bytes] = []
                waiting = 0
                try:
                    async for chunk in response.iter_chunks():
                        pending.append(chunk)
                        waiting += len(chunk)
                        offset += len(chunk)
                        if offset > size:
                            raise ImagePullError(f"blob {digest} is longer than the manifest says")
                        if waiting >= _WRITE_CHUNK:
                            data, pending, waiting = b"".join(pending), [], 0
                            await self._workers.run(lambda data=data: file.write(data))  # type: ignore[misc]
                            if progress is not None:
                                progress(digest, offset, size)
                finally:
                    # What came before the connection broke is kept: the next try asks only for the rest.
                    file.write(b"".join(pending))
        if offset < size:
            raise ConnectionLost(f"{offset} of {size} bytes came")
        if progress is not None:
            progress(digest, offset, size)


def _wanted(reference: Reference) -> str:
    return reference.digest or reference.tag


def _check_digest(digest: str) -> None:
    if len(digest) != 71 or not digest.startswith("sha256:") or any(letter not in "0123456789abcdef" for letter in digest[7:]):
        raise ImagePullError(f"unsupported digest {digest!r}")


def _document(raw: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ImagePullError(f"malformed manifest: {error}") from error
    if not isinstance(document, dict):
        raise ImagePullError("malformed manifest")
    return document


async def _bounded(response: StreamResponse, limit: int) -> bytes:
    data = b""
    async for chunk in response.iter_chunks():
        data += chunk
        if len(data) > limit:
            raise ImagePullError("the registry's answer is too large")
    return data


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
