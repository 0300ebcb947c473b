"""Topology hints by annotation: which zone each endpoint of a Service is meant for.

Role: endpointslice calls it for Services with `service.kubernetes.io/topology-mode: Auto`. Every zone is given a share of the
endpoints that fits its share of the nodes' CPU; where the zones' own endpoints do not come out at that, some are lent to others.
Invariants: hints are given to all ready endpoints of a Service and address family or to none, and no endpoint is
expected to carry more than 20 % above its share. Slices from the cache are copied before they change.
Source: endpointslice/topologycache/{topologycache,sliceinfo,utils,event}.go, endpointslice/utils.go (hintsEnabled).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from knarr.api import meta, quantity
from knarr.api.types import Object
from knarr.controllers.podutil import is_ready

ZONE = "topology.kubernetes.io/zone"
MODE = "service.kubernetes.io/topology-mode"
DEPRECATED_MODE = "service.kubernetes.io/topology-aware-hints"
_EXCLUDED = ("node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master")
_UNLOADED = 1 / (1 + 0.2)
"""Part of its fair share of endpoints that a zone needs at least, so that none of them is overloaded by more than 20 %."""

_NO_NODE_INFO = "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes"
_TOO_FEW = "Insufficient number of endpoints"
_OVERLOAD = "Unable to allocate minimum required endpoints to each zone without exceeding overload threshold"
_NO_ZONE = "One or more endpoints do not have a zone specified"
_NO_HINTS = "No hints allocated for zones"


def wants_hints(service: Object) -> bool:
    """Whether a Service asks for hints by annotation; the deprecated one counts first where both are set."""
    annotations = meta.annotations(service)
    return annotations.get(DEPRECATED_MODE, annotations.get(MODE)) in ("Auto", "auto")


class Telling(NamedTuple):
    """An event about the Service."""

    type: str
    reason: str
    message: str


class NodeShare(NamedTuple):
    """What of a node counts for the shares of the zones."""

    zone: str
    cpu: int
    """Allocatable, in thousandths."""


class Share(NamedTuple):
    """Number of endpoints that a zone should have."""

    least: int
    most: int
    desired: float


@dataclass(slots=True)
class Slices:
    """The slices of one Service and address family: those about to be created or updated (ours to change), and the others."""

    create: list[Object] = field(default_factory=list)
    update: list[Object] = field(default_factory=list)
    unchanged: list[Object] = field(default_factory=list)

    def all(self) -> list[Object]:
        return self.create + self.update + self.unchanged

    def remove_hints(self) -> None:
        """Take the hints from all slices; unchanged ones that have some become updates."""
        kept = []
        for obj in self.unchanged:
            if any(endpoint.get("hints") for endpoint in obj.get("endpoints") or ()):
                self.update.append(_own(obj))
            else:
                kept.append(obj)
        self.unchanged = kept
        for obj in self.create + self.update:
            for endpoint in obj["endpoints"]:
                endpoint.pop("hints", None)


class ZoneHints:
    """What is known of the zones, and how the Services with hints are spread over them."""

    def __init__(self) -> None:
        self.ratios: dict[str, float] = {}
        """Part of the cluster's CPU by zone; empty if the nodes do not tell enough, or all are in one zone."""
        self._spread: dict[str, dict[str, dict[str, int]]] = {}
        self._hinted: set[str] = set()
        self._uninformed: set[str] = set()

    def set_nodes(self, nodes: Iterable[Object]) -> list[str]:
        """Take the present nodes.

        Returns: keys of the Services whose hints should be made anew: those of which a zone has too few endpoints now, and
        those that had none because the nodes did not tell enough. (Upstream leaves the latter to their next change.)
        """
        self.ratios = zone_ratios(nodes)
        keys = [key for key, families in self._spread.items() if any(is_overloaded(zones, self.ratios) for zones in families.values())]
        if self.ratios:
            keys += sorted(self._uninformed)
            self._uninformed.clear()
        return keys

    def forget(self, key: str, family: str = "") -> bool:
        """Drop what is known of a Service, or of one of its families.

        Returns: whether it had hints.
        """
        hinted = key in self._hinted
        self._hinted.discard(key)
        families = self._spread.get(key)
        if families is not None:
            families.pop(family, None)
            if not families or not family:
                del self._spread[key]
        if not family:
            self._uninformed.discard(key)
        return hinted

    def disable(self, key: str, family: str) -> list[Telling]:
        """Take note that a Service does not want hints (any more)."""
        self._uninformed.discard(key)
        return [_disabled("Topology Aware Hints has been disabled", family)] if self.forget(key, family) else []

    def add(self, key: str, family: str, slices: Slices) -> list[Telling]:
        """Give every ready endpoint a hint, or take all of them away if the zones' shares cannot be met.

        Args:
          slices: changed in place; an unchanged one whose hints do not fit any more becomes an update.
        """
        self._uninformed.discard(key)
        refusal, spread = self._assign(slices)
        if refusal:
            self.forget(key, family)
            if refusal == _NO_NODE_INFO:
                self._uninformed.add(key)
            slices.remove_hints()
            return [_disabled(refusal, family)]
        self._spread.setdefault(key, {})[family] = spread
        if key in self._hinted:
            return []
        self._hinted.add(key)
        return [Telling("Normal", "TopologyAwareHintsEnabled", f"Topology Aware Hints has been enabled, addressType: {family}")]

    def _assign(self, slices: Slices) -> tuple[str, dict[str, int]]:
        """(why there can be no hints, endpoints by zone they are meant for)."""
        count = sum(_is_ready(endpoint) for obj in slices.all() for endpoint in obj.get("endpoints") or ())
        shares, refusal = shares_of(self.ratios, count)
        if refusal:
            return refusal, {}
        spread = _keep_fitting(slices, shares)
        changing = slices.create + slices.update
        for obj in changing:
            for endpoint in obj["endpoints"]:
                if not _is_ready(endpoint):
                    endpoint.pop("hints", None)
                    continue
                zone = endpoint.get("zone")
                if not zone:
                    return _NO_ZONE, {}
                spread[zone] = spread.get(zone, 0) + 1
                endpoint["hints"] = _hint(zone)
        giving, receiving = surplus(shares, spread)
        for zone, difference in redistribute(changing, giving, receiving).items():
            spread[zone] = spread.get(zone, 0) + difference
        return ("", spread) if spread else (_NO_HINTS, {})


def _disabled(message: str, family: str) -> Telling:
    return Telling("Warning", "TopologyAwareHintsDisabled", f"{message}, addressType: {family}")


def _hint(zone: str) -> Object:
    return {"forZones": [{"name": zone}]}


def _is_ready(endpoint: Object) -> bool:
    return bool((endpoint.get("conditions") or {}).get("ready"))


def _own(obj: Object) -> Object:
    """Copy of a slice as far as hints are changed in it."""
    return {**obj, "endpoints": [dict(endpoint) for endpoint in obj.get("endpoints") or ()]}


def node_share(node: Object) -> NodeShare | None:
    """What a node counts for; None if it does not count: it is not ready, or carries the control plane."""
    labels = meta.labels(node)
    if any(label in labels for label in _EXCLUDED) or not is_ready(node):
        return None
    cpu = ((node.get("status") or {}).get("allocatable") or {}).get("cpu", 0)
    return NodeShare(labels.get(ZONE, ""), quantity.cpu_millicores(cpu))


def zone_ratios(nodes: Iterable[Object]) -> dict[str, float]:
    """Part of the CPU by zone; empty if one node that counts lacks zone or CPU, or there are not at least two zones."""
    by_zone: dict[str, int] = {}
    for node in nodes:
        share = node_share(node)
        if share is None:
            continue
        if not share.zone or not share.cpu:
            return {}
        by_zone[share.zone] = by_zone.get(share.zone, 0) + share.cpu
    total = sum(by_zone.values())
    return {zone: by_zone[zone] / total for zone in sorted(by_zone)} if len(by_zone) > 1 else {}


def shares_of(ratios: Mapping[str, float], endpoints: int) -> tuple[dict[str, Share], str]:
    """(number of endpoints that each zone should have, "" or why they cannot be shared out)."""
    if not ratios:
        return {}, _NO_NODE_INFO
    counted = f"({endpoints} endpoints, {len(ratios)} zones)"
    if len(ratios) > endpoints:
        return {}, f"{_TOO_FEW} {counted}"
    least = {zone: math.ceil(ratio * endpoints * _UNLOADED) for zone, ratio in ratios.items()}
    spare = endpoints - sum(least.values())
    if spare < 0:
        return {}, f"{_OVERLOAD} {counted}"
    return {zone: Share(least[zone], least[zone] + spare, max(ratio * endpoints, float(least[zone]))) for zone, ratio in ratios.items()}, ""


def is_overloaded(spread: Mapping[str, int], ratios: Mapping[str, float]) -> bool:
    """Whether a Service has too few endpoints for some zone."""
    if not spread:
        return False
    total = sum(spread.values())
    return not ratios or any(zone not in spread or spread[zone] < math.ceil(total * ratio * _UNLOADED) for zone, ratio in ratios.items())


def hints_of(obj: Object, spread: Mapping[str, int], shares: Mapping[str, Share]) -> dict[str, int] | None:
    """Count the hints of a slice by zone.

    Args:
      spread: hints of the slices before it.

    Returns: None if the slice has to change: a ready endpoint has no hint, or one for a zone that needs
    none, or the hints are so many for a zone that others could not get their least.
    """
    counted: dict[str, int] = {}
    for endpoint in obj.get("endpoints") or ():
        if not _is_ready(endpoint):
            continue
        zones = (endpoint.get("hints") or {}).get("forZones")
        if not zones:
            return None
        for zone in zones:
            name = zone["name"]
            counted[name] = counted.get(name, 0) + 1
            if name not in shares or counted[name] + spread.get(name, 0) > shares[name].most:
                return None
    return counted


def _keep_fitting(slices: Slices, shares: Mapping[str, Share]) -> dict[str, int]:
    """Leave unchanged slices as they are where their hints still fit, and give these hints by zone."""
    spread: dict[str, int] = {}
    kept = []
    for obj in slices.unchanged:
        counted = hints_of(obj, spread, shares)
        if counted is None:
            slices.update.append(_own(obj))
            continue
        kept.append(obj)
        for zone, count in counted.items():
            spread[zone] = spread.get(zone, 0) + count
    slices.unchanged = kept
    return spread


def _greatest(zones: Mapping[str, float]) -> str:
    return max(sorted(zones), key=zones.__getitem__)


def surplus(shares: Mapping[str, Share], spread: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """(endpoints that zones give away, endpoints that zones receive); an endpoint moves only if that helps enough."""
    more: dict[str, float] = {}
    less: dict[str, float] = {}
    for zone, share in shares.items():
        difference = spread.get(zone, 0) - share.desired
        if difference > 0:
            more[zone] = difference
        elif difference < 0:
            less[zone] = -difference
    giving: dict[str, int] = {}
    receiving: dict[str, int] = {}
    while more and less:
        giver, receiver = _greatest(more), _greatest(less)
        give, receive = more[giver], less[receiver]
        # Half an endpoint on one side must be a whole one on the other: else its own zone is the better place.
        if min(give, receive) < 0.5 or max(give, receive) < 1.0:
            break
        giving[giver] = giving.get(giver, 0) + 1
        receiving[receiver] = receiving.get(receiver, 0) + 1
        more[giver] -= 1
        less[receiver] -= 1
    return giving, receiving


def redistribute(changing: Iterable[Object], giving: dict[str, int], receiving: dict[str, int]) -> dict[str, int]:
    """Lend endpoints of zones that give to zones that receive; both are used up.

    Returns: by how many the hints of a zone became more or less.
    """
    differences: dict[str, int] = {}
    for obj in changing:
        for endpoint in obj["endpoints"]:
            if not giving or not receiving:
                return differences
            giver = endpoint.get("zone")
            if not giver or giver not in giving or not _is_ready(endpoint):
                continue
            # Upstream takes any; the neediest first keeps it fair where there are too few to lend.
            receiver = max(receiving, key=receiving.__getitem__)
            endpoint["hints"] = _hint(receiver)
            for left, zone, step in ((giving, giver, -1), (receiving, receiver, 1)):
                differences[zone] = differences.get(zone, 0) + step
                left[zone] -= 1
                if not left[zone]:
                    del left[zone]
    return differences
