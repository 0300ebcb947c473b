"""Shared words of the volume modules: a mounted volume, and why one could not be mounted."""

from __future__ import annotations

from dataclasses import dataclass


class VolumeError(Exception):
    """A volume cannot be set up now; the text is what the FailedMount event says after the volume's name.

    `retry` False means that only a change of the pod or of what it refers to helps.
    """

    def __init__(self, message: str, *, reason: str = "FailedMount") -> None:
        super().__init__(message)
        self.reason = reason


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
