"""Image references as docker and Kubernetes read them: redis -> docker.io/library/redis:latest.

Role: pure parsing, used by store, registry client and command line. Source: distribution/reference grammar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from knarr.runtime.cri import ImagePullError

_DOMAIN = re.compile(r"(?:localhost|[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?\Z")
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_DIGEST = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")
IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised reference. With a digest the tag, if any, is only decoration."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str:
        """repository:tag, or "" without a tag."""
        return f"{self.repository}:{self.tag}" if self.tag else ""

    def __str__(self) -> str:
        return self.repository + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def _invalid(text: str, why: str) -> ImagePullError:
    return ImagePullError(f'failed to parse reference "{text}": {why}', "InvalidImageName")


def parse_reference(text: str) -> Reference:
    """Parse and normalise; raises ImagePullError with reason InvalidImageName."""
    rest, _, digest = text.partition("@")
    if "@" in text and not _DIGEST.match(digest):
        raise _invalid(text, "invalid digest" if digest else "invalid reference format")
    first, slash, remainder = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        domain = first
    else:
        domain, remainder = "docker.io", rest
    path, colon, tag = remainder.partition(":")
    if colon and not _TAG.match(tag):
        raise _invalid(text, "invalid reference format")
    if not _DOMAIN.match(domain) or not _PATH.match(path):
        upper = path.lower() != path and _PATH.match(path.lower())
        raise _invalid(text, "invalid reference format" + (": repository name must be lowercase" if upper else ""))
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in path:
        path = f"library/{path}"
    if len(path) > 255:
        raise _invalid(text, "repository name must not be more than 255 characters")
    return Reference(domain, path, tag or ("" if digest else "latest"), digest)
