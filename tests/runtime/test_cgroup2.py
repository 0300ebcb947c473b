"""The runtime on a host with nothing but control groups version 2.

Where this host is a hybrid, its version 2 tree is put in the place of the others in a mount namespace of the test's own, which is
how runc decides; a pure version 2 host runs the same tests directly anyway.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_CHOSEN = "its_exit_code_and_log or stop_signal or does_not_exist or idempotent or shared_pid or user_namespace or found_again or host_namespaces"


@pytest.mark.skipif(not os.path.exists("/sys/fs/cgroup/unified/cgroup.procs"), reason="not a hybrid host")
def test_lifecycle_and_namespaces_on_version_2_alone() -> None:
    script = 'mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup && exec "$@"'
    files = [f"tests/runtime/test_{name}.py" for name in ("lifecycle", "security", "recovery")]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "60", "-k", _CHOSEN, *files]
    result = subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *tests], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
