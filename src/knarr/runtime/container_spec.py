"""Writes a container's bundle: the OCI specification, and in place what a change of limits before the start needs.

Caller: container.py, in a worker thread. What goes into the specification is spec.py's; here its inputs are gathered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import orjson

from knarr.runtime import cdi, users
from knarr.runtime.container_model import Container
from knarr.runtime.roots import Prepared
from knarr.runtime.sandbox import Sandbox
from knarr.runtime.spec import SpecInput, build


def write_spec(
    container: Container,
    sandbox: Sandbox,
    image_config: dict[str, Any],
    prepared: Prepared,
    *,
    bundle: str,
    namespace_paths: Mapping[str, str],
    shm_path: str,
    sandbox_dir: str,
    cgroup_version: int,
    oom_score_floor: int,
) -> None:
    """Resolve the user, write config.json, and note in the container what exec and stop need later. Raises RuntimeFault, OSError."""
    config = container.config
    rootfs = os.path.join(bundle, "rootfs")
    container.user = users.resolve(rootfs, str(image_config.get("User") or ""), config.security)
    container.stop_signal = config.stop_signal or str(image_config.get("StopSignal") or "")
    document = build(
        SpecInput(
            id=container.id,
            config=config,
            image=image_config,
            rootfs=rootfs,
            user=container.user,
            hostname=sandbox.config.hostname or os.uname().nodename,
            namespace_paths=dict(namespace_paths),
            shm_path=shm_path,
            resolv_conf=os.path.join(sandbox_dir, "resolv.conf"),
            hostname_file=os.path.join(sandbox_dir, "hostname"),
            cgroups_path=container.cgroup,
            cgroup_version=cgroup_version,
            user_mappings=sandbox.config.namespaces.user_mappings,
            image_mounts=prepared.image_mounts,
            mapped_mounts=prepared.mapped_mounts,
            volume_dirs=prepared.volume_dirs,
            oom_score_floor=oom_score_floor,
        )
    )
    cdi.apply(document, cdi.wanted(config.cdi_devices, config.annotations))
    container.spec_process = document["process"]
    container.hooks = "hooks" in document
    with open(os.path.join(bundle, "config.json"), "wb") as file:
        file.write(orjson.dumps(document))


def change_resources(path: str, wanted: dict[str, Any]) -> None:
    """Change limits in a specification whose container has not been made yet."""
    with open(path, "rb") as file:
        document = orjson.loads(file.read())
    for key, value in wanted.items():
        if isinstance(value, dict):
            document["linux"]["resources"].setdefault(key, {}).update(value)
        else:
            document["linux"]["resources"][key] = value
    with open(f"{path}.new", "wb") as out:
        out.write(orjson.dumps(document))
    os.replace(f"{path}.new", path)
