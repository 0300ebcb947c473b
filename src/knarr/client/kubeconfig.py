"""Kubeconfig files: load and merge several, change one entry, write back safely.

Callers: ClientConfig (reads), the cluster's lifecycle (adds and removes its own context) and
kubectl. Files are plain dicts in wire form. Invariant: entries this module is not asked to
change stay as they are, including fields unknown to us; a write is atomic and keeps mode 0600.
Source: client-go tools/clientcmd (loader.go, config.go).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]

_LISTS = ("clusters", "users", "contexts")
_FILE_FIELDS = {
    "clusters": ("cluster", ("certificate-authority",)),
    "users": ("user", ("client-certificate", "client-key", "tokenFile")),
}


class KubeconfigError(Exception):
    """The file cannot be used: not readable, no mapping, or a name that is not there."""


def default_paths() -> list[Path]:
    """Give the files of $KUBECONFIG, or ~/.kube/config."""
    value = os.environ.get("KUBECONFIG", "")
    paths = list(dict.fromkeys(Path(part) for part in value.split(os.pathsep) if part))
    return paths or [Path.home() / ".kube" / "config"]


def empty() -> Config:
    return {"apiVersion": "v1", "kind": "Config", "clusters": [], "users": [], "contexts": [], "current-context": "", "preferences": {}}


def load_file(path: str | os.PathLike[str]) -> Config:
    """Read one file; relative file names in it become absolute.

    Raises:
      KubeconfigError: unreadable, invalid YAML, or no mapping.
      FileNotFoundError: there is no such file.
    """
    path = Path(path)
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(path.read_bytes(), Loader=loader)
    except FileNotFoundError:
        raise
    except (OSError, yaml.YAMLError) as error:
        raise KubeconfigError(f"{path}: {error}") from error
    if content is None:
        return empty()
    if not isinstance(content, dict):
        raise KubeconfigError(f"{path}: not a kubeconfig mapping")
    for listname, (inner, fields) in _FILE_FIELDS.items():
        for entry in content.get(listname) or []:
            body = entry.get(inner) or {}
            for field in fields:
                if body.get(field) and not os.path.isabs(body[field]):
                    body[field] = str(path.parent.absolute() / body[field])
    return content


def merge(configs: list[Config]) -> Config:
    """Merge files as clientcmd does: the first to name an entry or a current context wins."""
    result = empty()
    for config in configs:
        for listname in _LISTS:
            known = {entry["name"] for entry in result[listname]}
            result[listname] += [entry for entry in config.get(listname) or [] if entry.get("name") not in known]
        if not result["current-context"]:
            result["current-context"] = config.get("current-context") or ""
    return result


def load(path: str | os.PathLike[str] | None = None) -> Config:
    """Read one explicit file, or merge the default ones (missing default files count as empty)."""
    if path is not None:
        return load_file(path)
    configs = []
    for candidate in default_paths():
        with contextlib.suppress(FileNotFoundError):
            configs.append(load_file(candidate))
    return merge(configs)


def entry(config: Config, listname: str, name: str) -> dict[str, Any]:
    """Give the body of a named cluster, user or context.

    Args:
      listname: "clusters", "users" or "contexts".

    Raises:
      KubeconfigError: there is none of that name.
    """
    for item in config.get(listname) or []:
        if item.get("name") == name:
            body = item.get(listname[:-1])
            return body if isinstance(body, dict) else {}
    raise KubeconfigError(f"{listname[:-1]} {name!r} does not exist")


def put_entry(config: Config, listname: str, name: str, body: dict[str, Any]) -> None:
    """Add or replace a named cluster, user or context, in place."""
    items = config.get(listname)
    if not isinstance(items, list):
        items = config[listname] = []
    for item in items:
        if item.get("name") == name:
            item[listname[:-1]] = body
            return
    items.append({"name": name, listname[:-1]: body})


def remove_entry(config: Config, listname: str, name: str) -> bool:
    """Remove a named entry, in place; says whether it was there."""
    items = config.get(listname) or []
    kept = [item for item in items if item.get("name") != name]
    config[listname] = kept
    return len(kept) != len(items)


def write_file(path: str | os.PathLike[str], config: Config) -> None:
    """Write one file atomically with mode 0600, creating its folder.

    A symbolic link stays a link: its target is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".kubeconfig-")
    try:
        with os.fdopen(handle, "w") as file:
            yaml.safe_dump(config, file, sort_keys=False, default_flow_style=False)
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            os.chown(temporary, state.st_uid, state.st_gid)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _raw(path: Path) -> Config:
    # Unlike load_file this keeps relative paths, because the file is written back.
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(path.read_bytes(), Loader=loader)
    except FileNotFoundError:
        return empty()
    except yaml.YAMLError as error:
        raise KubeconfigError(f"{path}: {error}") from error
    if content is None:
        return empty()
    if not isinstance(content, dict):
        raise KubeconfigError(f"{path}: not a kubeconfig mapping")
    return content


def file_of(listname: str, name: str) -> Path:
    """Give the default file that holds an entry; without one, the file new entries go to (the last that exists, else the first)."""
    paths = default_paths()
    for path in paths:
        if any(item.get("name") == name for item in _raw(path).get(listname) or []):
            return path
    existing = [path for path in paths if path.exists()]
    return existing[-1] if existing else paths[0]


def merge_context(
    name: str,
    cluster: dict[str, Any],
    user: dict[str, Any],
    *,
    namespace: str = "",
    path: str | os.PathLike[str] | None = None,
    set_current: bool = True,
) -> Path:
    """Add or replace the cluster, user and context of one name; everything else stays.

    Args:
      cluster: body, e.g. {"server": …, "certificate-authority-data": …}.
      user: body, e.g. {"client-certificate-data": …, "client-key-data": …}.
      path: the file; None takes the one of the default files that has the context already.
      set_current: make it the current context.

    Returns:
      The file written.
    """
    target = Path(path) if path is not None else file_of("contexts", name)
    config = _raw(target)
    config.setdefault("apiVersion", "v1")
    config.setdefault("kind", "Config")
    put_entry(config, "clusters", name, cluster)
    put_entry(config, "users", name, user)
    context: dict[str, Any] = {"cluster": name, "user": name}
    if namespace:
        context["namespace"] = namespace
    else:
        with contextlib.suppress(KubeconfigError):
            # The user's own choice of a namespace survives a second `up`.
            kept = entry(config, "contexts", name).get("namespace")
            if kept:
                context["namespace"] = kept
    put_entry(config, "contexts", name, context)
    if set_current or not config.get("current-context"):
        config["current-context"] = name
    write_file(target, config)
    return target


def remove_context(name: str, *, path: str | os.PathLike[str] | None = None) -> list[Path]:
    """Remove the cluster, user and context of one name from the given or all default files.

    Returns:
      The files that changed.
    """
    changed = []
    for target in [Path(path)] if path is not None else default_paths():
        if not target.exists():
            continue
        config = _raw(target)
        removed = [remove_entry(config, listname, name) for listname in _LISTS]
        if config.get("current-context") == name:
            config["current-context"] = ""
            removed.append(True)
        if any(removed):
            write_file(target, config)
            changed.append(target)
    return changed
