"""The README's tour, command by command, as a reader would type it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import tools
from tests.host_state import HostState

ROOT = Path(__file__).parents[2]
NAME = "tour"

pytestmark = pytest.mark.root


def tour() -> list[str]:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"```console tour\n(.*?)```", text, re.DOTALL)
    assert found is not None, "the README has no tour"
    return found[1].strip().splitlines()


def test_every_command_of_the_tour_succeeds_and_leaves_the_host_clean(tmp_path: Path) -> None:
    before = HostState.take()
    environment = {**os.environ, "KNARR_NAME": NAME, "KUBECONFIG": str(tmp_path / "kubeconfig"), "PATH": f"{Path(tools.kubectl()).parent}:{os.environ['PATH']}"}
    try:
        for command in tour():
            result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
            assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        assert HostState.take().difference(before) == {}
    finally:
        subprocess.run(["./run", "delete"], cwd=ROOT, env=environment, capture_output=True, timeout=120)
