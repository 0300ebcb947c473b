"""Container Device Interface: device names such as vendor.com/gpu=0 become edits of the OCI specification.

Role: reads the specifications that device vendors put into the standard folders and applies what a container asks for, either
in its cdi_devices or in annotations "cdi.k8s.io/…". Callers: container.py. A later folder wins over an earlier one.
Source: CNCF container-device-interface SPEC.md; containerd pkg/cdi.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import yaml

from knarr.runtime.cri import Device, RuntimeFault
from knarr.runtime.spec import device_entries

FOLDERS = ("/etc/cdi", "/var/run/cdi")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*/[A-Za-z0-9_.-]+=[A-Za-z0-9][A-Za-z0-9_.:-]*\Z")
_HOOKS = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}


def wanted(devices: Iterable[str], annotations: Mapping[str, str]) -> list[str]:
    """Names that a container asks for, each once, in order. Raises RuntimeFault for a malformed one."""
    names = list(devices)
    for key, value in sorted(annotations.items()):
        if key.startswith("cdi.k8s.io/"):
            names += [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if not _NAME.match(name):
            raise RuntimeFault(f'invalid CDI device name "{name}"')
    return list(dict.fromkeys(names))


def apply(document: dict[str, Any], names: list[str], folders: Iterable[str] = FOLDERS) -> None:
    """Edit an OCI specification in place. Blocks. Raises RuntimeFault for devices that no folder knows."""
    if not names:
        return
    specs = _load(folders)
    missing = [name for name in names if name not in specs]
    if missing:
        raise RuntimeFault(f"CDI device injection failed: unresolvable CDI devices {', '.join(missing)}")
    common_done: set[int] = set()
    for name in names:
        common, own = specs[name]
        if id(common) not in common_done:
            common_done.add(id(common))
            _edit(document, common)
        _edit(document, own)
    # The home folder that nobody asked for comes last, behind what devices bring, as when the OCI runtime adds it.
    environment = document["process"]["env"]
    environment.sort(key=lambda item: item.startswith("HOME="))


def _load(folders: Iterable[str]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Device name to (edits of its whole specification, its own edits); unreadable files are skipped."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
                with open(path, "rb") as file:
                    text = file.read(4 << 20)
                if name.endswith(".json"):
                    spec = orjson.loads(text)
                elif name.endswith((".yaml", ".yml")):
                    spec = yaml.safe_load(text)
                else:
                    continue
                common = spec.get("containerEdits") or {}
                for device in spec["devices"]:
                    found[f"{spec['kind']}={device['name']}"] = (common, device.get("containerEdits") or {})
    return found


def _edit(document: dict[str, Any], edits: Mapping[str, Any]) -> None:
    try:
        _edit_process(document["process"], edits)
        for node in edits.get("deviceNodes") or []:
            device = Device(node["path"], node.get("hostPath") or node["path"], node.get("permissions") or "rwm")
            entries, rules = device_entries(device)
            for entry in entries:
                entry.update({key: node[key] for key in ("fileMode", "uid", "gid") if node.get(key) is not None})
            paths = {entry["path"] for entry in entries}
            linux = document["linux"]
            linux["devices"] = [item for item in linux["devices"] if item["path"] not in paths] + entries
            linux["resources"]["devices"] += rules
        for mount in edits.get("mounts") or []:
            options = list(mount.get("options") or []) or ["rbind", "ro"]
            document["mounts"].append(
                {"destination": mount["containerPath"], "source": mount["hostPath"], "type": mount.get("type") or "bind", "options": options}
            )
        for hook in edits.get("hooks") or []:
            if hook["hookName"] not in _HOOKS:
                raise RuntimeFault(f"CDI device injection failed: unknown hook {hook['hookName']!r}")
            entry = {key: hook[key] for key in ("path", "args", "env", "timeout") if key in hook}
            document.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise RuntimeFault(f"CDI device injection failed: malformed specification: {error!r}") from error


def _edit_process(process: dict[str, Any], edits: Mapping[str, Any]) -> None:
    for item in edits.get("env") or []:
        name = item.partition("=")[0]
        process["env"] = [other for other in process["env"] if other.partition("=")[0] != name] + [item]
    groups = process["user"]["additionalGids"]
    groups += [gid for gid in edits.get("additionalGids") or [] if gid and gid not in groups]
