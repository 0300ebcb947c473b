"""Errors of the HTTP floor, told apart by what the caller should do.

    HTTPError
      BodyTooLarge        the peer sent more than allowed: answer 413
      BadRequest          the peer's bytes are not HTTP: answer 400
      ConnectFailed       no connection (refused, unreachable, TLS, name): try later or elsewhere
      ConnectionLost      the connection ended in the middle: the request may or may not have been carried out
      TimeoutExpired      nothing came within the time allowed
"""

from __future__ import annotations


class HTTPError(Exception):
    """Base of everything raised by knarr.http."""


class BodyTooLarge(HTTPError):
    """The body exceeds the server's bound."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"request body is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class BadRequest(HTTPError):
    """What came is not valid HTTP."""


class ConnectFailed(HTTPError):
    """The connection could not be made."""


class ConnectionLost(HTTPError):
    """The peer went away before the exchange was complete."""


class TimeoutExpired(HTTPError):
    """The peer did not answer in time."""
