"""Users named by a front proxy in X-Remote-* headers; trusted only with the proxy's client certificate.

Source: apiserver pkg/authentication/request/headerrequest.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from urllib.parse import unquote

from cryptography import x509

from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.auth.chains import CABundle
from knarr.apiserver.auth.x509 import common_name
from knarr.http.server import Request

USERNAME_HEADER = "X-Remote-User"
UID_HEADER = "X-Remote-Uid"
GROUP_HEADER = "X-Remote-Group"
EXTRA_PREFIX = "X-Remote-Extra-"


class RequestHeader:
    """Reads the headers of requests whose certificate comes from the proxy CA."""

    def __init__(self, bundle: CABundle, allowed_names: tuple[str, ...]) -> None:
        self._bundle = bundle
        self._allowed_names = allowed_names

    def trusted_until(self, leaf: x509.Certificate, others: Sequence[x509.Certificate]) -> datetime | None:
        """Return until when a certificate is a front proxy's; None when it is none."""
        if self._allowed_names and common_name(leaf) not in self._allowed_names:
            return None
        return self._bundle.trusted_until(leaf, others)

    @staticmethod
    def user(request: Request) -> UserInfo | None:
        name = request.headers.get(USERNAME_HEADER.lower(), "")
        if not name:
            return None
        groups = tuple(value for value in request.header_values(GROUP_HEADER.lower()) if value)
        extra: dict[str, tuple[str, ...]] = {}
        prefix = EXTRA_PREFIX.lower()
        for header, value in request.header_list:
            if header.startswith(prefix):
                key = unquote(header[len(prefix) :])
                extra[key] = (*extra.get(key, ()), value)
        return UserInfo(name, request.headers.get(UID_HEADER.lower(), ""), groups, extra)
