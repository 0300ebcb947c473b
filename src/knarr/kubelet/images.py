"""Images for containers: presence, pull policy, credentials, back-off, and the events and reasons that users know.

Caller: pod_sync. Bound: `max_parallel_image_pulls` pulls at a time. Source: pkg/kubelet/images/image_manager.go,
pkg/credentialprovider.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.durations import go_duration
from knarr.kubelet.lifecycle import CrashBackOff
from knarr.runtime.cri import AuthConfig, Image, ImagePullError, ImageService, RuntimeFault

log = get_logger(__name__)

_SHOW_SECONDS = 1.0

Event = Callable[[str, str, str], None]
"""(type, reason, message) about one container."""

_DOMAIN = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*"
_REFERENCE = re.compile(
    rf"^(?:(?:{_DOMAIN}|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
    r"(?P<tag>:[\w][\w.-]{0,127})?(?P<digest>@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?$"
)


class ImageProblem(Exception):
    """An image cannot be had now. `reason` is the container's waiting reason, the text its message."""

    def __init__(self, reason: str, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_seconds = retry_seconds
        """When another try may succeed; None leaves it to the caller."""


def normalize(reference: str) -> str:
    """The full form of a reference: registry, repository, tag (or digest).

    Raises:
      ValueError: no image reference.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise ValueError(f'couldn\'t parse image name "{reference}": invalid reference format')
    if not match["tag"] and not match["digest"]:
        reference += ":latest"
    first, slash, _ = reference.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        reference = "docker.io/" + (reference if slash else "library/" + reference)
    return reference


def _size(image: Image | None) -> int:
    return image.size_bytes if image else 0


class ImageManager:
    """Makes images present for containers."""

    def __init__(
        self, service: ImageService, *, parallel: int, initial_seconds: float, maximum_seconds: float, credentials_file: str = ""
    ) -> None:
        self._service = service
        self._slots = asyncio.Semaphore(parallel)
        self._back_off = CrashBackOff(initial_seconds, maximum_seconds)
        self._failed_at: dict[str, float] = {}
        self._last_error: dict[str, str] = {}
        self._credentials_file = credentials_file
        self.used_at: dict[str, float] = {}
        """Image id to the last time a container was started from it; the image collector reads it."""

    async def ensure(self, pod: Object, image: str, policy: str, secrets: Sequence[Object], event: Event) -> Image:
        """Give the image, pulled if the policy says so.

        Raises:
          ImageProblem: with the reason and message for the container's state; events have been sent.
        """
        try:
            reference = normalize(image)
        except ValueError as e:
            message = f'Failed to apply default image tag "{image}": {e}'
            event("Warning", "InspectFailed", message)
            raise ImageProblem("InvalidImageName", message) from e
        policy = policy or ("Always" if reference.endswith(":latest") else "IfNotPresent")
        present: Image | None = None
        if policy != "Always":
            present = await self._inspect(reference, image, event)
        if present is not None:
            event("Normal", "Pulled", f'Container image "{image}" already present on machine and can be accessed by the pod')
            self.used_at[present.id] = clock.now()
            return present
        if policy == "Never":
            message = f'Container image "{image}" is not present with pull policy of Never'
            event("Warning", "ErrImageNeverPull", message)
            raise ImageProblem("ErrImageNeverPull", message)
        pulled = await self._pull(pod, reference, image, secrets, event)
        self.used_at[pulled.id] = clock.now()
        return pulled

    async def _inspect(self, reference: str, image: str, event: Event) -> Image | None:
        try:
            return await self._service.image_status(reference)
        except RuntimeFault as e:
            message = f'Failed to inspect image "{image}": {e}'
            event("Warning", "InspectFailed", message)
            raise ImageProblem("ImageInspectError", message, 10.0) from e

    async def _pull(self, pod: Object, reference: str, image: str, secrets: Sequence[Object], event: Event) -> Image:
        key = f"{podutil.uid(pod)}_{image}"
        now = clock.now()
        waiting = self._back_off.remaining(key, self._failed_at.get(key, 0.0), now) if key in self._failed_at else 0.0
        if waiting > 0:
            message = f'Back-off pulling image "{image}"'
            event("Normal", "BackOff", message)
            previous = self._last_error.get(key)
            raise ImageProblem("ImagePullBackOff", f"{message}: {previous}" if previous else message, waiting)
        self._last_error.pop(key, None)
        event("Normal", "Pulling", f'Pulling image "{image}"')
        started = clock.now()
        auth = self._credentials(reference, secrets)
        try:
            async with self._slots:
                pull_started = clock.now()
                image_id = await self._service.pull_image(reference, auth, pod["metadata"].get("namespace", ""))
            found = await self._service.image_status(image_id)
        except RuntimeFault as e:
            event("Warning", "Failed", f'Failed to pull image "{image}": {e}')
            failed = clock.now()
            self._back_off.next(key, self._failed_at.get(key, failed), failed)
            self._failed_at[key] = failed
            reason, message = _pull_fault(image, e)
            self._last_error[key] = f"{reason}: {message}"
            # The next look shows the back-off; the pull after that comes when it is over.
            raise ImageProblem(reason, message, _SHOW_SECONDS) from e
        now = clock.now()
        event(
            "Normal",
            "Pulled",
            f'Successfully pulled image "{image}" in {go_duration(now - pull_started)} ({go_duration(now - started)} including waiting). '
            f"Image size: {_size(found)} bytes.",
        )
        self._failed_at.pop(key, None)
        if found is None:
            raise ImageProblem("ErrImagePull", f'image "{image}" vanished after it was pulled', 1.0)
        return found

    def forget(self, pod_uid: str) -> None:
        """Drop back-off state of a pod that is gone."""
        for key in [k for k in self._failed_at if k.startswith(pod_uid)]:
            self._failed_at.pop(key, None)
            self._last_error.pop(key, None)

    def _credentials(self, reference: str, secrets: Sequence[Object]) -> list[AuthConfig]:
        configs = [c for c in map(_docker_config, secrets) if c]
        if self._credentials_file and os.path.exists(self._credentials_file):
            with open(self._credentials_file, "rb") as file:
                configs.append(orjson.loads(file.read()))
        found: list[tuple[int, AuthConfig]] = []
        for config in configs:
            for server, entry in (config.get("auths") or config).items():
                length = _matches(server, reference)
                if length and isinstance(entry, dict):
                    found.append((length, _auth(server, entry)))
        found.sort(key=lambda item: -item[0])
        return [auth for _, auth in found]


def _pull_fault(image: str, fault: RuntimeFault) -> tuple[str, str]:
    text = str(fault)
    reason = fault.reason if isinstance(fault, ImagePullError) else "ErrImagePull"
    for name, why in (("RegistryUnavailable", "the registry is unavailable"), ("SignatureValidationFailed", "the signature validation failed")):
        if reason == name:
            return reason, f"image pull failed for {image} because {why}" + text.removeprefix(name)
    return reason, text


def _docker_config(secret: Object) -> dict[str, Any] | None:
    data = secret.get("data") or {}
    raw = data.get(".dockerconfigjson") or data.get(".dockercfg")
    if not raw:
        return None
    try:
        parsed = orjson.loads(base64.b64decode(raw))
    except (ValueError, binascii.Error):
        log.warning("image pull secret is no docker configuration", secret=secret["metadata"]["name"])
        return None
    return parsed if isinstance(parsed, dict) else None


def _matches(server: str, reference: str) -> int:
    """How much of the reference the server's pattern covers; 0 for no match. Hosts may have * in each label."""
    server = re.sub(r"^https?://", "", server).rstrip("/")
    server = re.sub(r"/v[12]$", "", server)
    host, _, path = server.partition("/")
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = "docker.io"
    target_host, _, target_path = reference.partition("/")
    labels, target_labels = host.split("."), target_host.split(".")
    if len(labels) != len(target_labels):
        return 0
    for pattern, label in zip(labels, target_labels, strict=True):
        if not re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]*"), label):
            return 0
    if path and not target_path.startswith(path):
        return 0
    return len(server) or 1


def _auth(server: str, entry: dict[str, Any]) -> AuthConfig:
    username, password = entry.get("username", ""), entry.get("password", "")
    if entry.get("auth") and not username:
        decoded = base64.b64decode(entry["auth"]).decode(errors="replace")
        username, _, password = decoded.partition(":")
    return AuthConfig(
        username=username,
        password=password.rstrip("\x00"),
        server_address=server,
        identity_token=entry.get("identitytoken", ""),
        registry_token=entry.get("registrytoken", ""),
    )
