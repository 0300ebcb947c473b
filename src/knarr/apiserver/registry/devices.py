"""ResourceSlices, ResourceClaims and their templates: who may ask for admin access, and fields whose gates are off.

A field behind a gate that is off is dropped, silently, unless the stored object has it already.
Source: pkg/registry/resource.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from knarr.api import errors
from knarr.api.errors import FieldError
from knarr.api.types import Object
from knarr.apiserver.call import Call
from knarr.apiserver.registry.simple import KeepsMostOnStatus, Plain, ReturnsDeleted

ADMIN_LABEL = "resource.kubernetes.io/admin-access"

_SLICE_GATES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("DRADeviceTaints", (), ("taints",)),
    ("DRAPartitionableDevices", ("sharedCounters", "perDeviceNodeSelection"), ("consumesCounters", "nodeName", "nodeSelector", "allNodes")),
    ("DRADeviceBindingConditions", (), ("bindingConditions", "bindingFailureConditions", "bindsToNode")),
    ("DRAConsumableCapacity", (), ("allowMultipleAllocations",)),
)
"""Per gate: fields of the slice's spec, of its devices."""
_REQUEST_FIELD = "capacity"
_RESULT_FIELDS = ("bindingConditions", "bindingFailureConditions", "shareID", "consumedCapacity")
"""Of claims. Tolerations stay, though the gate of taints is off: without taints they mean nothing."""


def _has(spec: Object, own: tuple[str, ...], of_devices: tuple[str, ...]) -> bool:
    return any(name in spec for name in own) or any(name in device for device in spec.get("devices") or () for name in of_devices)


def drop_from_slice(spec: Object, old: Object, gates: Mapping[str, bool]) -> None:
    """Drop what is behind gates from a ResourceSlice's spec; `old` is the stored one, empty on create."""
    for gate, own, of_devices in _SLICE_GATES:
        if gates.get(gate) or _has(old, own, of_devices):
            continue
        for name in own:
            spec.pop(name, None)
        for device in spec.get("devices") or ():
            for name in of_devices:
                device.pop(name, None)
    if not any("requestPolicy" in amount for amount in _capacities(old)):
        for amount in _capacities(spec):
            amount.pop("requestPolicy", None)


def _capacities(spec: Object) -> Iterator[Object]:
    for device in spec.get("devices") or ():
        yield from (device.get("capacity") or {}).values()


def _requests(spec: Mapping[str, Any]) -> Iterator[Object]:
    for request in (spec.get("devices") or {}).get("requests") or ():
        yield from ([request["exactly"]] if request.get("exactly") else request.get("firstAvailable") or ())


def drop_from_claim(spec: Object, old: Object) -> None:
    """The same for a claim's spec."""
    if not any(_REQUEST_FIELD in request for request in _requests(old)):
        for request in _requests(spec):
            request.pop(_REQUEST_FIELD, None)
    constraints = (old.get("devices") or {}).get("constraints") or ()
    if not any("distinctAttribute" in constraint for constraint in constraints):
        for constraint in (spec.get("devices") or {}).get("constraints") or ():
            constraint.pop("distinctAttribute", None)


def _device(result: Object) -> tuple[Any, ...]:
    return result.get("driver"), result.get("pool"), result.get("device")


def _results(obj: Object) -> list[Object]:
    allocation = (obj.get("status") or {}).get("allocation") or {}
    return list((allocation.get("devices") or {}).get("results") or ())


def drop_from_claim_status(obj: Object, old: Object) -> None:
    """Drop what is behind gates, and what drivers said of devices that the claim gives back."""
    status = obj.get("status") or {}
    before = _results(old)
    if not any(name in result for result in before for name in _RESULT_FIELDS):
        for result in _results(obj):
            for name in _RESULT_FIELDS:
                result.pop(name, None)
        if status.get("allocation") and "allocationTimestamp" not in ((old.get("status") or {}).get("allocation") or {}):
            status["allocation"].pop("allocationTimestamp", None)
    given_back = {_device(result) for result in before} - {_device(result) for result in _results(obj)}
    if given_back and status.get("devices"):
        status["devices"] = [device for device in status["devices"] if _device(device) not in given_back]
        if not status["devices"]:
            del status["devices"]


class _AdminAccess:
    """Devices that others use may be looked at only from namespaces that an administrator has marked."""

    def _refusal(self, call: Call, path: str) -> list[FieldError]:
        namespace = call.server.registry.stores["", "namespaces"].get_nowait("", call.namespace) or {}
        if ((namespace.get("metadata") or {}).get("labels") or {}).get(ADMIN_LABEL) == "true":
            return []
        return [errors.field_forbidden(path, f"admin access to devices requires the `{ADMIN_LABEL}: true` label on the containing namespace")]

    def _check_requests(self, call: Call, spec: Object) -> list[FieldError]:
        for index, request in enumerate((spec.get("devices") or {}).get("requests") or ()):
            if (request.get("exactly") or {}).get("adminAccess"):
                return self._refusal(call, f"spec.devices.requests[{index}].adminAccess")
        return []


class ResourceClaim(_AdminAccess, KeepsMostOnStatus):
    returns_deleted = True
    has_generation = False

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        drop_from_claim(obj.get("spec") or {}, {})

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        drop_from_claim(obj.get("spec") or {}, old.get("spec") or {})

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        drop_from_claim_status(obj, old)

    def validate_create(self, call: Call, obj: Object) -> list[FieldError]:
        return self._check_requests(call, obj.get("spec") or {})

    def validate_status(self, call: Call, obj: Object, old: Object) -> list[FieldError]:
        if any(result.get("adminAccess") for result in _results(old)):
            return []
        for index, result in enumerate(_results(obj)):
            if result.get("adminAccess"):
                return self._refusal(call, f"status.allocation.devices.results[{index}].adminAccess")
        return []


class ResourceClaimTemplate(_AdminAccess, ReturnsDeleted):
    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        drop_from_claim((obj.get("spec") or {}).get("spec") or {}, {})

    def validate_create(self, call: Call, obj: Object) -> list[FieldError]:
        return self._check_requests(call, (obj.get("spec") or {}).get("spec") or {})


class ResourceSlice(Plain):
    returns_deleted = True
    has_generation = True
    field_names = ("spec.nodeName", "spec.driver")

    def fields(self, obj: Object) -> tuple[str, ...]:
        spec = obj.get("spec") or {}
        return (spec.get("nodeName") or "", spec.get("driver") or "")

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        drop_from_slice(obj.get("spec") or {}, {}, call.server.config.feature_gates)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        drop_from_slice(obj.get("spec") or {}, old.get("spec") or {}, call.server.config.feature_gates)
        super().prepare_update(call, obj, old)


class DeviceTaintRule(Plain):
    returns_deleted = True
    has_generation = True
