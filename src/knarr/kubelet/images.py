"""Images for containers: presence, pull policy, credentials, back-off, and the events and reasons that users know.

Caller: pod_sync. Bound: `max_parallel_image_pulls` pulls at a time. An image that is here is given to a pod only when it may have it
(credentials.records). Source: pkg/kubelet/images/image_manager.go, pkg/kubelet/kuberuntime/kuberuntime_image.go.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Sequence

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.credentials import keyring
from knarr.kubelet.credentials.keyring import Credential
from knarr.kubelet.credentials.provider import Providers
from knarr.kubelet.credentials.records import PullRecords
from knarr.kubelet.durations import go_duration
from knarr.kubelet.lifecycle import CrashBackOff
from knarr.runtime.cri import Image, ImagePullError, ImageService, RuntimeFault

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


def repository(reference: str) -> str:
    """A normalized reference without tag and digest."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(":")[0]


def _size(image: Image | None) -> int:
    return image.size_bytes if image else 0


class ImageManager:
    """Makes images present for containers."""

    def __init__(
        self,
        service: ImageService,
        records: PullRecords,
        *,
        parallel: int,
        initial_seconds: float,
        maximum_seconds: float,
        credentials_file: str = "",
        providers: Providers | None = None,
    ) -> None:
        self._service = service
        self.records = records
        self._providers = providers
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
        present = await self._inspect(reference, image, event) if policy != "Always" else None
        credentials: list[Credential] | None = None
        if present is not None:
            name, accessible = repository(reference), self.records.open(reference, repository(reference), present.id)
            if accessible is None:
                credentials = await self._credentials(pod, name, secrets)
                accessible = self.records.allows(name, present.id, credentials)
            if accessible:
                event("Normal", "Pulled", f'Container image "{image}" already present on machine and can be accessed by the pod')
                self.used_at[present.id] = clock.now()
                return present
        if policy == "Never":
            # Also of an image that is here but not for this pod: whether it is here is nothing that the pod is to learn.
            message = f'Container image "{image}" is not present with pull policy of Never'
            event("Warning", "ErrImageNeverPull", message)
            raise ImageProblem("ErrImageNeverPull", message)
        pulled = await self._pull(pod, reference, image, secrets, event, credentials)
        self.used_at[pulled.id] = clock.now()
        return pulled

    async def _inspect(self, reference: str, image: str, event: Event) -> Image | None:
        try:
            return await self._service.image_status(reference)
        except RuntimeFault as e:
            message = f'Failed to inspect image "{image}": {e}'
            event("Warning", "InspectFailed", message)
            raise ImageProblem("ImageInspectError", message, 10.0) from e

    async def _pull(
        self, pod: Object, reference: str, image: str, secrets: Sequence[Object], event: Event, credentials: list[Credential] | None
    ) -> Image:
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
        try:
            if credentials is None:
                credentials = await self._credentials(pod, repository(reference), secrets)
            async with self._slots:
                pull_started = clock.now()
                image_id = await self._recorded_pull(pod, reference, credentials)
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

    async def _recorded_pull(self, pod: Object, reference: str, credentials: Sequence[Credential]) -> str:
        """The image's id. Raises RuntimeFault."""
        records, image_id = self.records, ""
        try:
            records.intend(reference)
        except OSError as e:
            raise RuntimeFault(f"failed to record image pull intent: {e}") from e
        try:
            image_id, used = await self._pull_with(pod, reference, credentials)
            records.pulled(reference, repository(reference), image_id, used)
        finally:
            if not image_id:
                records.failed(reference)
        return image_id

    async def _pull_with(self, pod: Object, reference: str, credentials: Sequence[Credential]) -> tuple[str, Credential | None]:
        """(image id, credential that was good). Each is tried in order; none at all only where there are none. Raises RuntimeFault."""
        namespace, faults = pod["metadata"].get("namespace", ""), list[RuntimeFault]()
        for credential in credentials or (None,):
            try:
                return await self._service.pull_image(reference, [credential.auth] if credential else [], namespace), credential
            except RuntimeFault as e:
                faults.append(e)
        if len({str(e) for e in faults}) > 1:
            faults[-1].args = (f"[{', '.join(dict.fromkeys(str(e) for e in faults))}]",)
        raise faults[-1]

    async def _credentials(self, pod: Object, name: str, secrets: Sequence[Object]) -> list[Credential]:
        """For an image (registry and repository): the pod's secrets', then the node's, then what plugins give."""
        found = keyring.choose(keyring.of_secrets(secrets), name)
        if self._credentials_file and os.path.exists(self._credentials_file):
            with open(self._credentials_file, "rb") as file:
                document = orjson.loads(file.read())
            found += keyring.choose(keyring.of_config(document.get("auths") or document), name)
        if self._providers is not None:
            found += await self._providers.credentials(pod, name)
        return found


def _pull_fault(image: str, fault: RuntimeFault) -> tuple[str, str]:
    text = str(fault)
    reason = fault.reason if isinstance(fault, ImagePullError) else "ErrImagePull"
    for name, why in (("RegistryUnavailable", "the registry is unavailable"), ("SignatureValidationFailed", "the signature validation failed")):
        if reason == name:
            return reason, f"image pull failed for {image} because {why}" + text.removeprefix(name)
    return reason, text
