"""Plugins that give credentials for images: a program that reads a request on its standard input and writes an answer.

Caller: images, before a pull. Each answer says for which images it is good (Image, Registry, Global) and how long; requests for the same
at the same time share one run. A plugin that wants it is told a token of the pod's service account, and its credentials are then that
account's alone. A plugin that fails gives nothing: the pull goes on without it. Bound: one run of at most RUN_SECONDS per plugin and image.
Source: pkg/credentialprovider/plugin/plugin.go, staging kubelet/pkg/apis/credentialprovider, KEP-2133, KEP-4412.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterable
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors, times
from knarr.api.resources import SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import podutil
from knarr.kubelet.credentials import keyring
from knarr.kubelet.credentials.keyring import Credential, Owner
from knarr.kubelet.credentials.providerconfig import ProviderConfig
from knarr.kubelet.faults import UNREACHABLE
from knarr.kubelet.tokens import Tokens
from knarr.runtime.cri import AuthConfig

log = get_logger(__name__)

RUN_SECONDS = 60.0
_TOKEN_SECONDS = 3600
_PURGE_SECONDS = 900.0

_Answer = dict[str, AuthConfig]
"""Pattern of images to credentials."""
_Key = tuple[str, ...]


class ProviderError(Exception):
    """A plugin gave nothing usable. Never tells what it answered: that may be a secret."""


class Providers:
    """All plugins of a node."""

    def __init__(self, configs: Iterable[ProviderConfig], folder: str, client: Client, tokens: Tokens) -> None:
        """`folder` holds the plugins' programs."""
        self._tasks = Tasks()
        self._plugins = [_Plugin(config, folder, client, tokens, self._tasks) for config in configs]

    async def close(self) -> None:
        """End what runs."""
        await self._tasks.close()

    async def credentials(self, pod: Object, image: str) -> list[Credential]:
        """What all plugins give for an image (registry and repository, no tag)."""
        found: list[Credential] = []
        for plugin in self._plugins:
            try:
                found += await plugin.credentials(pod, image)
            except (ProviderError, errors.StatusError, *UNREACHABLE) as error:
                log.error("credentials for an image not provided", provider=plugin.name, image=image, pod=podutil.key(pod), error=str(error))
        return found


class _Plugin:
    def __init__(self, config: ProviderConfig, folder: str, client: Client, tokens: Tokens, tasks: Tasks) -> None:
        self.name = config.name
        self._tasks = tasks
        self._config = config
        self._program = os.path.join(folder, config.name)
        self._client = client
        self._tokens = tokens
        self._cache: dict[_Key, tuple[float, _Answer]] = {}
        self._purged_at = clock.now()
        self._running: dict[_Key, asyncio.Task[_Answer | ProviderError]] = {}

    async def credentials(self, pod: Object, image: str) -> list[Credential]:
        config, wants = self._config, self._config.token
        if not any(keyring.matches(pattern, image) for pattern in config.match_images):
            return []
        name = pod["spec"].get("serviceAccountName") or ""
        token, owner = "", None
        annotations: dict[str, str] = {}
        account: _Key = ()
        if wants is not None and not name and wants.required:
            return []
        if wants is not None and name:
            namespace = pod["metadata"].get("namespace", "")
            found = await self._client.get(SERVICE_ACCOUNTS, name, namespace)
            held = found["metadata"].get("annotations") or {}
            if any(key not in held for key in wants.required_annotations):
                # How a service account says that it does not take part.
                log.debug("required annotation not found", provider=self.name, account=f"{namespace}/{name}")
                return []
            annotations = {key: held[key] for key in (*wants.required_annotations, *wants.optional_annotations) if key in held}
            token, _ = await self._tokens.get(pod, wants.audience, _TOKEN_SECONDS)
            owner = Owner(namespace, name, found["metadata"]["uid"])
            digest = hashlib.sha256(token.encode()).hexdigest() if wants.per_token else ""
            account = (namespace, name, owner.uid, digest, *(part for key in sorted(annotations) for part in (key, annotations[key])))
        answer = self._cached(image, account)
        if answer is None:
            answer = await self._shared(image, token, annotations, account)
        entries = [(pattern, Credential(auth, account=owner)) for pattern, auth in answer.items()]
        return keyring.choose(entries, image)

    def _cached(self, image: str, account: _Key) -> _Answer | None:
        now = clock.now()
        if now - self._purged_at > _PURGE_SECONDS:
            self._cache = {key: entry for key, entry in self._cache.items() if entry[0] > now}
            self._purged_at = now
        for base in (("Image", image), ("Registry", image.partition("/")[0]), ("Global",)):
            entry = self._cache.get((*base, "", *account))
            if entry is not None and entry[0] > now:
                return entry[1]
        return None

    async def _shared(self, image: str, token: str, annotations: dict[str, str], account: _Key) -> _Answer:
        key = (image, token, *account)
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = self._tasks.spawn(self._try(image, token, annotations, account), f"credentials-{self.name}")
            task.add_done_callback(lambda _: self._running.pop(key, None))
        # Whoever stops waiting must not end the run for the others.
        result = await asyncio.shield(task)
        if isinstance(result, ProviderError):
            raise ProviderError(str(result)) from result
        return result

    async def _try(self, image: str, token: str, annotations: dict[str, str], account: _Key) -> _Answer | ProviderError:
        try:
            return await self._ask(image, token, annotations, account)
        except ProviderError as error:
            return error

    async def _ask(self, image: str, token: str, annotations: dict[str, str], account: _Key) -> _Answer:
        config = self._config
        request: dict[str, Any] = {"kind": "CredentialProviderRequest", "apiVersion": config.api_version, "image": image}
        if token:
            request["serviceAccountToken"] = token
        if annotations:
            request["serviceAccountAnnotations"] = annotations
        output = await self._run(orjson.dumps(request), image)
        try:
            return self._take(orjson.loads(output), image, token, account)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ProviderError("error decoding credential provider plugin response from stdout") from error

    def _take(self, response: Any, image: str, token: str, account: _Key) -> _Answer:
        config = self._config
        if response.get("apiVersion") != config.api_version or response.get("kind") != "CredentialProviderResponse":
            raise ProviderError(f"apiVersion or kind from credential plugin response did not match: expected {config.api_version} CredentialProviderResponse")
        answer = {
            str(pattern): AuthConfig(username=str(entry.get("username") or ""), password=str(entry.get("password") or ""), server_address=str(pattern))
            for pattern, entry in (response.get("auth") or {}).items()
        }
        if token and config.token is not None and not config.token.per_token and any(auth.password == token for auth in answer.values()):
            raise ProviderError("credential provider plugin returned the service account token as the password, which is only allowed with the cache type Token")
        kind = response.get("cacheKeyType")
        bases: dict[Any, _Key] = {"Image": ("Image", image), "Registry": ("Registry", image.partition("/")[0]), "Global": ("Global",)}
        if kind not in bases:
            raise ProviderError(f"credential provider plugin did not return a valid cacheKeyType: {kind}")
        duration = response.get("cacheDuration")
        seconds = config.cache_seconds if duration is None else times.parse_duration(duration) / 1e9
        if seconds > 0:
            self._cache[(*bases[kind], "", *account)] = (clock.now() + seconds, answer)
        return answer

    async def _run(self, request: bytes, image: str) -> bytes:
        config = self._config
        try:
            process = await asyncio.create_subprocess_exec(
                self._program, *config.args, env={**os.environ, **config.env}, start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise ProviderError(f"error execing credential provider plugin {self.name} for image {image}: {error.strerror}") from error
        try:
            async with asyncio.timeout(RUN_SECONDS):
                output, complaint = await process.communicate(request)
        except TimeoutError as error:
            raise ProviderError(f"error execing credential provider plugin {self.name} for image {image}: context deadline exceeded") from error
        finally:
            if process.returncode is None:
                # With what it started: a script's child would hold the pipes.
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode != 0:
            text = complaint.decode(errors="replace").strip()
            raise ProviderError(f"error execing credential provider plugin {self.name} for image {image}: exit status {process.returncode}: {text}")
        return output
