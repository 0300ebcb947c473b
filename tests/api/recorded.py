"""Recorded answers of a real 1.35 API server, as test data, and the few things its readers share."""

import json
import pathlib
import re
from typing import Any

from knarr.api.scheme import SCHEME, Resource

DATA = pathlib.Path(__file__).parent / "data"


def load(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def body_bytes(body: Any) -> bytes:
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def resource_of(path: str) -> tuple[Resource | None, str]:
    """(resource, subresource) of a request path."""
    match = re.match(r"/(?:api/(v1)|apis/([^/]+)/([^/]+))/(?:namespaces/[^/]+/)?([^/]+)(?:/([^/]+))?(?:/([^/]+))?$", path.split("?")[0])
    assert match is not None, path
    group, version = ("", match[1]) if match[1] else (match[2], match[3])
    return SCHEME.resource(group, version, match[4]), match[6] or ""


def query(path: str, name: str, default: str) -> str:
    match = re.search(rf"[?&]{name}=([^&]*)", path)
    return match[1] if match else default


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Paths that differ, each with what: "-" only theirs, "+" only ours, "~" other value; "*" stands for any."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: list[str] = []
        for key in sorted(set(ours) | set(theirs)):
            if key not in ours:
                found.append(f"-{path}.{key}={theirs[key]!r}")
            elif key not in theirs:
                found.append(f"+{path}.{key}={ours[key]!r}")
            else:
                found += differences(ours[key], theirs[key], f"{path}.{key}")
        return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if ours == theirs or theirs == "*" else [f"~{path}: {ours!r} != {theirs!r}"]
