"""Drives a whole cluster through its command line, as a user would, and speaks to it with the real kubectl."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tools


class Cluster:
    """One cluster of this machine under test.

    Args:
      name: given to --name; the folder holds its kubeconfig.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    def knarr(self, *arguments: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run one knarr command on this cluster."""
        verb, *rest = arguments
        command = [sys.executable, "-m", "knarr", verb, *([rest.pop(0)] if verb in ("image", "node", "token") else []), "--name", self.name, *rest]
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=timeout)
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}\n{self.logs()}")
        return result

    def up(self, *arguments: str) -> str:
        return self.knarr("up", *arguments).stderr

    def down(self) -> None:
        self.knarr("down")

    def delete(self) -> None:
        self.knarr("delete")

    def logs(self) -> str:
        """The ends of all component logs, for a failed test's message."""
        parts = []
        for path in sorted(Path(f"/var/lib/knarr/{self.name}/logs").glob("*.log")):
            with contextlib.suppress(OSError):
                parts.append(f"--- {path.name}\n" + path.read_text(errors="replace")[-2000:])
        return "\n".join(parts)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 120) -> str:
        """Run the real kubectl; returns its output, raises with all it said when it fails."""
        result = subprocess.run([tools.kubectl(), *arguments], input=stdin, capture_output=True, text=True, env=self.environment, timeout=timeout)
        if check and result.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: exit {result.returncode}\n{result.stdout}{result.stderr}\n{self.logs()}")
        return result.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def component_pid(self, component: str) -> int:
        status = json.loads(self.knarr("status", "-o", "json", check=False).stdout)
        return next(int(part["pid"]) for part in status["supervisor"]["components"] if part["name"] == component)


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The condition's first true value; fails with what was waited for. For the outside of a cluster, which sends no events."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = condition()
        except (AssertionError, OSError) as error:
            value, last = None, error
        else:
            last = value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what} (last: {last})")
        time.sleep(0.1)
