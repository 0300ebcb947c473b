"""`python -m bench.apiserver FOLDER PORT`: our API server alone, as the benchmarks load it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from knarr.aiokits import collector
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.server import APIServer


async def serve(folder: Path, port: int) -> None:
    server = APIServer(
        APIServerConfig(
            bind_address="127.0.0.1", port=port, store=f"sqlite://{folder}/store.db", data_dir=str(folder), serving_cert=str(folder / "apiserver.crt"), serving_key=str(folder / "apiserver.key"),
            client_ca=str(folder / "ca.crt"), service_account_key=str(folder / "sa.key"), token_file=str(folder / "tokens.csv"), admission_plugins_off=("ServiceAccount",),
        )
    )  # fmt: skip
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop()


if __name__ == "__main__":
    collector.relax()
    uvloop.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
