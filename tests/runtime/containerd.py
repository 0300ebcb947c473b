"""A containerd of the tests' own: own folders, own socket, no network plugin (pods use the host's network)."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from tests.images import build

_CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10.1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
"""


@contextlib.asynccontextmanager
async def running_containerd() -> AsyncIterator[Path]:
    """Yield the folder; the socket in it is `sock`. Images busybox and pause are loaded."""
    folder = Path(tempfile.mkdtemp(prefix="runtime-containerd-", dir="/tmp"))
    (folder / "config.toml").write_text(_CONFIG.format(folder=folder))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["containerd", "-c", str(folder / "config.toml")], stdout=log, stderr=log)
    try:
        async with asyncio.timeout(20):
            while subprocess.run(["ctr", "-a", f"{folder}/sock", "version"], capture_output=True).returncode:
                await asyncio.sleep(0.05)
        for archive in (build.busybox(), build.pause()):
            subprocess.run(["ctr", "-a", f"{folder}/sock", "-n", "k8s.io", "images", "import", str(archive)], check=True, capture_output=True)
        yield folder
    finally:
        process.terminate()
        process.wait(10)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", line.split()[4]], check=False)
        shutil.rmtree(folder, ignore_errors=True)
