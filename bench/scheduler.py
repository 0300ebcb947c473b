"""`python -m bench.scheduler URL FOLDER`: our scheduler alone, against an API server of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import uvloop

from bench.servers import TOKEN
from knarr.aiokits import collector
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.scheduler import Scheduler


async def main(url: str, folder: Path) -> None:
    client = Client(ClientConfig(server=url, ca_data=(folder / "ca.crt").read_bytes(), token=TOKEN))
    print("started", flush=True)
    await Scheduler(client, SchedulerConfig()).run()


if __name__ == "__main__":
    collector.relax()
    uvloop.run(main(sys.argv[1], Path(sys.argv[2])))
