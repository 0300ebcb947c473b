"""A machine that gets another address while its cluster runs, as a laptop that moves to another network.

Role: each process to which the machine's address matters runs `follow` with what it has to do then; nothing is restarted.
Invariants: a machine that has no address for a while keeps the last one. What fails is tried again until it succeeds or the
address changes once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.cluster import addresses
from knarr.network.hostwatch import HostWatch

log = get_logger(__name__)


async def follow(address: str, moved: Callable[[str, str], Awaitable[None]]) -> None:
    """Call `moved(old, new)` whenever the machine's primary address is another one. Eternal.

    Args:
      address: The one known now.
    """
    wake = asyncio.Event()
    watch = HostWatch(wake.set)
    backoff = Backoff(0.5, 30.0)
    watch.start()
    try:
        while True:
            found = addresses.primary_address()
            if found and found != address:
                try:
                    await moved(address, found)
                except Exception as error:  # whatever it was: the cluster has to follow sooner or later
                    delay = backoff.next_seconds()
                    log.warning("the machine has another address, following it failed", address=found, delay_seconds=delay, error=repr(error))
                    await asyncio.sleep(delay)
                    continue
                log.info("the machine has another address", address=found, before=address)
                address = found
                backoff.reset()
            await wake.wait()
            wake.clear()
    finally:
        watch.close()
