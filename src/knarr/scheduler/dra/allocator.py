"""The search for devices: which ones of those that a node reaches satisfy all claims of a pod at once.

Claim by claim, request by request, device by device; the first full solution is taken. What does not depend on earlier choices
(selectors) is asked before what does (constraints, counters). Pure: it changes nothing but its own notes. Caller: the
DynamicResources plugin, once per node and cycle.

Source: dynamic-resource-allocation structured allocator; KEP-4381, KEP-4816 (prioritized list), KEP-5018 (admin access),
KEP-5055 (taints), KEP-4815 (partitionable devices).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knarr.api.devices import tolerates
from knarr.scheduler.dra.devices import AllocationError, Counters, Device, DeviceID, Pool
from knarr.scheduler.objects import Object

MAXIMUM_RESULTS = 32
"""Devices that one claim can hold."""


@dataclass(frozen=True, slots=True)
class Features:
    """Gates of 1.35 with their defaults."""

    admin_access: bool = True
    prioritized_list: bool = True
    partitionable_devices: bool = False
    device_taints: bool = False


class Timeout(Exception):
    """The time for searching is up."""


class _TooMany(Exception):
    """More devices than a claim can hold: other devices for the same requests would not help."""


@dataclass(slots=True)
class _Want:
    """One request, or one of its alternatives."""

    claim: Object
    name: str
    parent: str
    """Name of the request that this is an alternative of, or ""."""
    spec: Object
    device_class: Object | None = None
    number: int = 0
    everything: list[Device] = field(default_factory=list)
    """For allocation mode All: the devices that are meant."""

    @property
    def takes_all(self) -> bool:
        return (self.spec.get("allocationMode") or "ExactCount") == "All"

    @property
    def admin(self) -> bool:
        return bool(self.spec.get("adminAccess")) and not self.parent

    @property
    def full_name(self) -> str:
        return f"{self.parent}/{self.name}" if self.parent else self.name

    @property
    def shown(self) -> str:
        metadata = self.claim["metadata"]
        return f"claim {metadata['namespace']}/{metadata['name']}, request {self.name}"


class _SameAttribute:
    """A constraint: all devices (of some requests) share the value of one attribute."""

    def __init__(self, attribute: str, requests: Sequence[str]) -> None:
        self._attribute = attribute
        self._requests = frozenset(requests)
        self._values: list[Mapping[str, Any]] = []

    def _concerns(self, want: _Want) -> bool:
        return not self._requests or want.full_name in self._requests or bool(want.parent and want.parent in self._requests)

    def add(self, want: _Want, device: Device) -> bool:
        if not self._concerns(want):
            return True
        value = device.attribute(self._attribute)
        if value is None or (self._values and value != self._values[0]):
            return False
        self._values.append(value)
        return True

    def remove(self, want: _Want) -> None:
        if self._concerns(want):
            self._values.pop()


def _tolerated(device: Device, want: _Want) -> bool:
    tolerations = want.spec.get("tolerations") or ()
    return all(any(tolerates(t, taint) for t in tolerations) for taint in device.spec.get("taints") or ())


class Search:
    """One attempt on one node.

    Args:
      pools: what the node reaches.
      classes: DeviceClass by name.
      allocated: devices that are taken.
      deadline: of time.monotonic(); later than that Timeout is raised.
    """

    def __init__(
        self, node: Object, claims: Sequence[Object], pools: Sequence[Pool], classes: Callable[[str], Object | None],
        allocated: Mapping[DeviceID, int], features: Features, deadline: float,
    ) -> None:  # fmt: skip
        self._node = node
        self._claims = claims
        self._pools = pools
        self._classes = classes
        self._allocated = allocated
        self._features = features
        self._deadline = deadline
        self._steps = 0
        self._wants: list[list[list[_Want]]] = []
        """Per claim, per request: its alternatives in order, or the request alone."""
        self._constraints: list[list[_SameAttribute]] = []
        self._taken: dict[DeviceID, set[int]] = {}
        self._results: list[list[tuple[_Want, Device]]] = [[] for _ in claims]
        self._chosen: dict[tuple[int, int], _Want] = {}
        self._left: dict[tuple[str, str], Counters] = {}

    def run(self) -> list[Object] | None:
        """Allocation results in the order of the claims; None when the node cannot satisfy all of them.

        Raises:
          AllocationError, Timeout.
        """
        for claim in self._claims:
            devices = claim["spec"].get("devices") or {}
            wants = [self._read(claim, request) for request in devices.get("requests") or ()]
            least = sum(min(want.number for want in choice) for choice in wants)
            if least > MAXIMUM_RESULTS:
                metadata = claim["metadata"]
                raise AllocationError(
                    f"claim {metadata['namespace']}/{metadata['name']}: number of requested devices {least} exceeds the claim limit of {MAXIMUM_RESULTS}"
                )
            self._wants.append(wants)
            self._constraints.append([_constraint(claim, number, c) for number, c in enumerate(devices.get("constraints") or ())])
        try:
            if not self._request(0, 0):
                return None
        except _TooMany:
            return None
        return [self._result(index, claim) for index, claim in enumerate(self._claims)]

    # Requests, read.

    def _read(self, claim: Object, request: Object) -> list[_Want]:
        if request.get("firstAvailable"):
            wants = [_Want(claim, sub["name"], request["name"], sub) for sub in request["firstAvailable"]]
            if not self._features.prioritized_list:
                raise AllocationError(f"{wants[0].shown}: has subrequests, but the DRAPrioritizedList feature is disabled")
        else:
            wants = [_Want(claim, request["name"], "", request.get("exactly") or {})]
        for want in wants:
            self._check(want)
        return wants

    def _check(self, want: _Want) -> None:
        spec = want.spec
        for number, selector in enumerate(spec.get("selectors") or ()):
            if not selector.get("cel"):
                raise AllocationError(f"{want.shown}, selector #{number}: CEL expression empty (unsupported selector type?)")
        if spec.get("adminAccess") is not None and not want.parent and not self._features.admin_access:
            raise AllocationError(f"{want.shown}: admin access is requested, but the feature is disabled")
        class_name = spec.get("deviceClassName")
        if not class_name:
            raise AllocationError(f"{want.shown}: missing device class name (unsupported request type?)")
        want.device_class = self._classes(class_name)
        if want.device_class is None:
            raise AllocationError(f'{want.shown}: could not retrieve device class {class_name}: deviceclass "{class_name}" not found')
        mode = spec.get("allocationMode") or "ExactCount"
        if mode == "ExactCount":
            want.number = int(spec.get("count") or 1)
        elif mode == "All":
            for pool in self._pools:
                if pool.incomplete or pool.invalid:
                    state = "being updated" if pool.incomplete else "invalid"
                    raise AllocationError(f"{want.shown}: asks for all devices, but resource pool {pool.id} is currently {state}")
                want.everything += [device for part in pool.slices for device in part.devices if self._selectable(want, device)]
            want.number = len(want.everything)
        else:
            raise AllocationError(f"{want.shown}: unsupported count mode {mode}")

    # Devices.

    def _selectable(self, want: _Want, device: Device) -> bool:
        """What of a device fits a request whatever else was chosen."""
        if device.spec.get("bindingConditions"):
            # Their gate is off: nobody would wait for the conditions.
            return False
        assert want.device_class is not None
        for owner, selectors in (
            (f"class {want.device_class['metadata']['name']}", want.device_class["spec"].get("selectors") or ()),
            (want.shown.partition(",")[0], want.spec.get("selectors") or ()),
        ):
            for number, selector in enumerate(selectors):
                try:
                    if not device.matches(selector["cel"]["expression"]):
                        return False
                except AllocationError as error:
                    raise AllocationError(f"{owner}: selector #{number}: {error}") from None
        return not device.slice.per_device or device.reaches(self._node)

    def _in_use(self, want: _Want, device: Device, claim: int) -> bool:
        if want.admin:
            # Looking at a device twice within a claim makes no sense; others may use it.
            return claim in self._taken.get(device.id, ())
        return device.id in self._allocated or bool(self._taken.get(device.id))

    def _take(self, want: _Want, device: Device, claim: int, pool: Pool) -> bool:
        """Take a selectable device, if nothing that was chosen before is against it."""
        if self._in_use(want, device, claim):
            return False
        if device.consumes and not (self._features.partitionable_devices and self._consume(device, pool)):
            return False
        if self._features.device_taints and not _tolerated(device, want):
            self._give_counters_back(device, pool)
            return False
        constraints = self._constraints[claim]
        for number, constraint in enumerate(constraints):
            if not constraint.add(want, device):
                for earlier in constraints[:number]:
                    earlier.remove(want)
                self._give_counters_back(device, pool)
                if want.takes_all:
                    name = "/".join(device.id)
                    raise AllocationError(f"{want.shown}: cannot add device {name} because a claim constraint would not be satisfied")
                return False
        self._taken.setdefault(device.id, set()).add(claim)
        self._results[claim].append((want, device))
        return True

    def _give_back(self, claim: int, pool: Pool) -> None:
        want, device = self._results[claim].pop()
        self._taken[device.id].discard(claim)
        for constraint in self._constraints[claim]:
            constraint.remove(want)
        self._give_counters_back(device, pool)

    def _counters(self, pool: Pool) -> Counters:
        """What the pool's devices that are in use leave of its shared counters."""
        key = (pool.driver, pool.name)
        left = self._left.get(key)
        if left is None:
            left = self._left[key] = {name: dict(counters) for name, counters in pool.counters().items()}
            for part in pool.slices:
                for device in part.devices:
                    if device.consumes and device.id in self._allocated:
                        _subtract(left, device.consumes, 1)
        return left

    def _consume(self, device: Device, pool: Pool) -> bool:
        left = self._counters(pool)
        _subtract(left, device.consumes, 1)
        for name, counters in device.consumes.items():
            if any(left.get(name, {}).get(counter, 0) < 0 for counter in counters):
                _subtract(left, device.consumes, -1)
                return False
        return True

    def _give_counters_back(self, device: Device, pool: Pool) -> None:
        if device.consumes and self._features.partitionable_devices:
            _subtract(self._counters(pool), device.consumes, -1)

    # The search.

    def _request(self, claim: int, request: int) -> bool:
        """Satisfy this request and all that follow."""
        if claim == len(self._claims):
            return True
        if request == len(self._wants[claim]):
            try:
                return self._request(claim + 1, 0)
            except _TooMany:
                # Another choice for an earlier claim may lead to an alternative that needs fewer devices.
                return False
        choices = self._wants[claim][request]
        exceeded = 0
        for want in choices:
            try:
                if self._device(claim, request, want, 0):
                    self._chosen[claim, request] = want
                    return True
            except _TooMany:
                exceeded += 1
        if exceeded == len(choices):
            raise _TooMany
        return False

    def _device(self, claim: int, request: int, want: _Want, index: int) -> bool:
        """Find this device of a request, those that it still lacks, and all that follows."""
        self._steps += 1
        if not self._steps & 255 and time.monotonic() > self._deadline:
            raise Timeout
        if want.takes_all and not want.everything:
            return False
        if index >= want.number:
            return self._request(claim, request + 1)
        if len(self._results[claim]) + want.number - index > MAXIMUM_RESULTS:
            raise _TooMany
        if want.takes_all:
            return self._with(claim, request, want, index, want.everything[index], self._pool_of(want.everything[index]))
        for pool in self._pools:
            if pool.invalid:
                raise AllocationError(f"pool {pool.name} is invalid: {pool.invalid}")
            for part in pool.slices:
                for device in part.devices:
                    if self._in_use(want, device, claim) or not self._selectable(want, device):
                        continue
                    if self._with(claim, request, want, index, device, pool):
                        return True
        return False

    def _pool_of(self, device: Device) -> Pool:
        return next(pool for pool in self._pools if (pool.driver, pool.name) == device.id[:2])

    def _with(self, claim: int, request: int, want: _Want, index: int, device: Device, pool: Pool) -> bool:
        if not self._take(want, device, claim, pool):
            return False
        done = False
        try:
            done = self._device(claim, request, want, index + 1)
        finally:
            if not done:
                self._give_back(claim, pool)
        return done

    # The result.

    def _result(self, index: int, claim: Object) -> Object:
        results = []
        for want, device in self._results[index]:
            driver, pool, name = device.id
            entry: Object = {"request": want.full_name, "driver": driver, "pool": pool, "device": name}
            if want.admin:
                entry["adminAccess"] = True
            if self._features.device_taints and want.spec.get("tolerations"):
                # What evicts from tainted devices reads the status alone.
                entry["tolerations"] = want.spec["tolerations"]
            results.append(entry)
        devices: Object = {"results": results}
        config = self._config(index, claim)
        if config:
            devices["config"] = config
        allocation: Object = {"devices": devices}
        selector = _node_selector([device for _, device in self._results[index]])
        if selector is not None:
            allocation["nodeSelector"] = selector
        return allocation

    def _config(self, index: int, claim: Object) -> list[Object]:
        found: list[Object] = []
        wants = [self._chosen[index, number] for number in range(len(self._wants[index]))]
        for want in wants:
            assert want.device_class is not None
            found += [{"source": "FromClass", **config} for config in want.device_class["spec"].get("config") or ()]
        names = {name for want in wants for name in (want.full_name, want.parent or want.name)}
        for config in (claim["spec"].get("devices") or {}).get("config") or ():
            requests = config.get("requests") or ()
            if not requests or names & set(requests):
                found.append({"source": "FromClaim", **config})
        return found


def _constraint(claim: Object, number: int, constraint: Object) -> _SameAttribute:
    if not constraint.get("matchAttribute"):
        metadata = claim["metadata"]
        whole = f"{metadata['namespace']}/{metadata['name']}"
        raise AllocationError(f"claim {whole}, constraint #{number}: empty constraint (unsupported constraint type?)")
    return _SameAttribute(constraint["matchAttribute"], constraint.get("requests") or ())


def _subtract(left: Counters, consumed: Counters, times: int) -> None:
    for name, counters in consumed.items():
        existing = left.get(name)
        if existing is not None:
            for counter, amount in counters.items():
                if counter in existing:
                    existing[counter] -= amount * times


def _node_selector(devices: Sequence[Device]) -> Object | None:
    """Where the devices can be used: on one node, on nodes that all of their slices select, or (None) everywhere."""
    fields: list[Object] = []
    expressions: list[Object] = []
    for device in devices:
        spec = device.spec if device.slice.per_device else device.slice.spec
        if spec.get("nodeName"):
            only = {"key": "metadata.name", "operator": "In", "values": [spec["nodeName"]]}
            return {"nodeSelectorTerms": [{"matchFields": [only]}]}
        terms = (spec.get("nodeSelector") or {}).get("nodeSelectorTerms") or ()
        if len(terms) > 1:
            raise AllocationError(f"unsupported ResourceSlice.NodeSelector with {len(terms)} terms")
        for term in terms:
            for wanted, collected in ((term.get("matchFields"), fields), (term.get("matchExpressions"), expressions)):
                collected += [r for r in wanted or () if not any(_same(r, other) for other in collected)]
    term = {key: value for key, value in (("matchExpressions", expressions), ("matchFields", fields)) if value}
    return {"nodeSelectorTerms": [term]} if term else None


def _same(one: Object, other: Object) -> bool:
    return (
        one["key"] == other["key"]
        and one["operator"] == other["operator"]
        and set(one.get("values") or ()) == set(other.get("values") or ())
    )
