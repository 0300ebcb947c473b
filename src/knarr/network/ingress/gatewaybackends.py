"""Where the routes of the Gateway API lead: Services with weights, and who permits references across namespaces. Pure.

Role: `gateway` asks for the target of each rule. Source: gateway-api BackendRef, HTTPBackendRef, ReferenceGrant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from math import gcd
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress.model import Addresses, Routes

GROUP = "gateway.networking.k8s.io"
_MAXIMUM_WEIGHTS = 100

Problem = tuple[str, str]
"""Reason and message of a condition."""


class Grants:
    """What ReferenceGrants permit."""

    def __init__(self, objects: Iterable[Object] = ()) -> None:
        self._objects = list(objects)

    def permit(self, from_kind: str, from_namespace: str, kind: str, namespace: str, name: str) -> bool:
        """Whether objects of our API group may refer to a core object; those of one namespace always may."""
        return from_namespace == namespace or any(
            grant["metadata"]["namespace"] == namespace
            and _lists(grant, "from", {"group": GROUP, "kind": from_kind, "namespace": from_namespace})
            and (_lists(grant, "to", {"group": "", "kind": kind, "name": name}) or _lists(grant, "to", {"group": "", "kind": kind, "name": None}))
            for grant in self._objects
        )


def _lists(grant: Object, side: str, wanted: Mapping[str, Any]) -> bool:
    return any(all((item.get(name) or None) == (value or None) for name, value in wanted.items()) for item in (grant.get("spec") or {}).get(side) or ())


def find_target(
    routes: Routes, kind: str, route: Object, refs: Sequence[Mapping[str, Any]], addresses: Addresses, grants: Grants
) -> tuple[str, Problem | None]:
    """A target for weighted backends of a route of some kind, and what is wrong with the references."""
    own = route["metadata"]["namespace"]
    problem: Problem | None = None
    weighted: list[tuple[int, list[tuple[str, int]]]] = []
    for ref in refs:
        namespace = ref.get("namespace") or own
        if ref.get("group", "") != "" or ref.get("kind", "Service") != "Service":
            problem = ("InvalidKind", f"backend of kind {ref.get('kind')} is not supported")
        elif not grants.permit(kind, own, "Service", namespace, ref["name"]):
            problem = ("RefNotPermitted", f"no ReferenceGrant in namespace {namespace} permits to use service {ref['name']}")
        else:
            found = addresses(namespace, ref["name"], {"number": ref.get("port")})
            if isinstance(found, str):
                problem = ("BackendNotFound", found)
            elif ref.get("weight", 1) > 0 and found:
                weighted.append((ref.get("weight", 1), found))
    name = "gw/" + hashlib.blake2b(json.dumps([kind, own, list(refs)], sort_keys=True).encode(), digest_size=9).hexdigest()
    if name not in routes.targets:
        places = _spread(weighted)
        routes.targets[name] = str(len(places))
        routes.targets.update({f"{name}#{index}": f"{address}|{port}" for index, (address, port) in enumerate(places)})
    return name, problem


def _spread(weighted: Sequence[tuple[int, list[tuple[str, int]]]]) -> list[tuple[str, int]]:
    """A list in which each backend appears as often as its weight asks, so that drawing evenly keeps the proportions."""
    if not weighted:
        return []
    divisor = reduce(gcd, (weight for weight, _places in weighted))
    total = sum(weight // divisor for weight, _places in weighted)
    scale = min(1.0, _MAXIMUM_WEIGHTS / total)
    out: list[tuple[str, int]] = []
    for weight, places in weighted:
        count = max(1, round(weight // divisor * scale))
        out.extend(places[index % len(places)] for index in range(max(count, 1)))
    return out
