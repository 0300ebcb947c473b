"""Whether an OCI runtime can make a container on this machine at all: one is tried, and goes again at once.

Caller: the cluster's preflight, for runtimes other than runc: releases of crun differ in the cgroup layouts that they take, and
otherwise every pod would fail with the reason in its events alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

_SECONDS = 20.0


def probe(binary: str, cgroups: str = "/sys/fs/cgroup") -> str:
    """What the runtime says against making a container; "" when it makes one.

    Args:
      binary: name or path of the runtime.
      cgroups: where a group that a failed try left is looked for.
    """
    name = f"knarr-probe-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="knarr-probe-") as folder:
        bundle = Path(folder, "bundle")
        (bundle / "rootfs" / "proc").mkdir(parents=True)
        # The program need not exist: that is found out after everything that depends on the machine.
        document = {
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/none"], "env": [], "cwd": "/"},
            "root": {"path": "rootfs", "readonly": True},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"cgroupsPath": f"/{name}", "namespaces": [{"type": "mount"}, {"type": "pid"}], "resources": {}},
        }
        (bundle / "config.json").write_text(json.dumps(document))
        command = [binary, "--root", str(Path(folder, "state"))]
        try:
            done = subprocess.run(
                [*command, "create", "--bundle", str(bundle), name], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_SECONDS
            )
            subprocess.run([*command, "delete", "--force", name], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        finally:
            _remove_groups(cgroups, name)
    text = done.stderr.decode(errors="replace").strip()
    if done.returncode == 0 or "/none" in text or "No such file" in text:
        return ""
    return text.splitlines()[-1] if text else f"exit code {done.returncode}"


def _remove_groups(cgroups: str, name: str) -> None:
    for path in (Path(cgroups, name), *(Path(entry, name) for entry in Path(cgroups).glob("*") if entry.is_dir())):
        try:
            path.rmdir()
        except OSError:
            continue
