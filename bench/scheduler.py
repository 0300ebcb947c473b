"""`python -m bench.scheduler URL FOLDER`: our scheduler alone, against an API server of the benchmarks.

Prints a line when it is ready, then one per fiftieth of a second in which pods were seen bound: their number by namespace so far.
It counts from the scheduler's own informer, as upstream's benchmarks do, so that counting costs the API server nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from bench.servers import TOKEN
from knarr.aiokits import collector
from knarr.api.resources import PODS
from knarr.client.config import ClientConfig
from knarr.client.leanpods import lean_pod
from knarr.client.rest import Client
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.handlers import NOT_FINISHED
from knarr.scheduler.scheduler import Scheduler

_INTERVAL_SECONDS = 0.02


async def main(url: str, folder: Path) -> None:
    client = Client(ClientConfig(server=url, ca_data=(folder / "ca.crt").read_bytes(), token=TOKEN))
    scheduler = Scheduler(client, SchedulerConfig())
    bound: Counter[str] = Counter()

    def updated(old: dict[str, Any], new: dict[str, Any]) -> None:
        if new["spec"].get("nodeName") and not old["spec"].get("nodeName"):
            bound[new["metadata"]["namespace"]] += 1

    scheduler.informers.get(PODS, field_selector=NOT_FINISHED, transform=lean_pod).add_handler(None, updated)
    async with asyncio.TaskGroup() as group:
        group.create_task(scheduler.run())
        await scheduler.ready.wait()
        print("ready", flush=True)
        told = 0
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            if bound.total() != told:
                told = bound.total()
                print(json.dumps([time.monotonic(), bound]), flush=True)


if __name__ == "__main__":
    collector.relax()
    uvloop.run(main(sys.argv[1], Path(sys.argv[2])))
