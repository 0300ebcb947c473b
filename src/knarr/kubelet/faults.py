"""What may go wrong on the way to the API server without an answer from it: try again later.

Used in `except` clauses all over the package; answers of the server are `knarr.api.errors.StatusError`.
"""

from __future__ import annotations

from knarr.http.errors import HTTPError

UNREACHABLE = (OSError, TimeoutError, EOFError, HTTPError)
"""Connection refused, reset or cut, TLS refused, timed out, half an answer."""
