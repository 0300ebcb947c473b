"""Shared words of the volume modules: a mounted volume, and why one could not be mounted."""

from __future__ import annotations

from dataclasses import dataclass


class VolumeError(Exception):
    """A volume cannot be set up now; the text is what the FailedMount event says after the volume's name.

    `step` is the part of the work that failed, in upstream's words.
    """

    def __init__(self, message: str, *, reason: str = "FailedMount", step: str = "MountVolume.SetUp") -> None:
        super().__init__(message)
        self.reason = reason
        self.step = step


@dataclass(slots=True)
class MountedVolume:
    """One volume of a pod, ready for its containers."""

    name: str
    path: str = ""
    """Absolute path on the host."""
    read_only: bool = False
    block: bool = False
    image: str = ""
    """Image id when the volume is an image."""
    again_at: float | None = None
    """When a volume that is in use wants to be set up again, as CSI drivers may ask."""
