"""Certificates that are made anew while the cluster runs, long before they end: nobody has to restart anything for a year's end.

Role: each process looks at its own pairs every few hours; a node's process and the API server's also make them anew when less than
pki.RENEW_DAYS are left. A node then goes on with the new pair on new connections. The API server and the controllers are started
again by the supervisor instead, which costs their clients a moment in the backlog of a socket that stays open.
Invariant: a pair that is only half there is left for the next look.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence

from knarr.aiokits.log import get_logger
from knarr.cluster.pki import KeyPair

log = get_logger(__name__)

LOOK_SECONDS = 6 * 3600.0


async def follow(
    pairs: Sequence[KeyPair], renewed: Callable[[list[KeyPair]], None], *, issue: Callable[[], object] = lambda: None, seconds: float = LOOK_SECONDS
) -> None:
    """Call `renewed` with those of the pairs that have become others. Eternal.

    Args:
      issue: makes pairs anew where that is due; without it another process does.
      seconds: between two looks.
    """
    known = {pair: (pair.certificate_pem(), pair.key_pem()) for pair in pairs}
    while True:
        await asyncio.sleep(seconds)
        try:
            issue()
            seen = {pair: (pair.certificate_pem(), pair.key_pem()) for pair in pairs}
            changed = [pair for pair, content in seen.items() if known.get(pair) != content]
            if changed:
                renewed(changed)
                log.info("certificates renewed", files=",".join(pair.certificate.name for pair in changed))
        except (OSError, ValueError) as error:
            log.warning("certificates not renewed", error=str(error))
            continue
        known = seen


def start_again(_changed: list[KeyPair]) -> None:
    """End this process in order; the supervisor starts it again at once."""
    os.kill(os.getpid(), signal.SIGTERM)
