"""`python -m tests.faults.component controllers|scheduler URL FOLDER`: one component in a process that a test may kill.

It prints a line when it is ready.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvloop
from bench.servers import TOKEN

from knarr.aiokits.tasks import Tasks
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.scheduler import Scheduler


async def main(name: str, url: str, folder: Path) -> None:
    client = Client(ClientConfig(server=url, ca_data=(folder / "ca.crt").read_bytes(), token=TOKEN))
    scheduler, controllers = Scheduler(client, SchedulerConfig()), ControllerManager(client, ControllersConfig())

    async def tell() -> None:
        await (scheduler.ready.wait() if name == "scheduler" else controllers.wait_ready())
        print("ready", flush=True)

    async with Tasks() as tasks:
        tasks.spawn(tell(), "tell")
        await (scheduler if name == "scheduler" else controllers).run()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
