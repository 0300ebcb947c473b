"""One question to a DNS server and the addresses of its answer, as a client asks it."""

from __future__ import annotations

import asyncio
import random

from knarr.network.dns.forward import Exchange
from knarr.network.dns.wire import AAAA, A, WireError, build_query, read_addresses

_ANSWER_SECONDS = 2.0


async def lookup(server: str, name: str, *, port: int = 53) -> list[str]:
    """Ask for IPv4 and IPv6 addresses of a full name.

    Returns:
      Addresses; none when the server says that there are none or the name does not exist.

    Raises:
      OSError: the server does not answer, or nonsense.
    """
    answers = await asyncio.gather(*(_ask(server, port, name, kind) for kind in (A, AAAA)))
    return [address for found in answers for address in found]


async def _ask(server: str, port: int, name: str, kind: int) -> list[str]:
    identity = random.getrandbits(16)
    message = build_query(identity, name, kind)
    result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Exchange(identity, message[12:].lower(), result), remote_addr=(server, port)
    )
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            transport.sendto(message)
            return read_addresses(await result)
    except WireError as error:
        raise OSError(f"{server} answered nonsense: {error}") from error
    except TimeoutError as error:
        raise OSError(f"{server} gave no answer in {_ANSWER_SECONDS:.0f} s") from error
    finally:
        transport.close()
