"""Closing transports alike on every Python: role shared by server, client and raw connections."""

from __future__ import annotations

import asyncio


def close_once(transport: asyncio.WriteTransport) -> None:
    """Close after what was written has been sent; a second call does nothing.

    asyncio's TLS transport of early 3.11 loses its connection on the second close, and can then not be aborted either.
    """
    if not transport.is_closing():
        transport.close()
