"""What expressions say about devices, and which taints of devices are tolerated: shared by scheduler and controllers. Pure.

Source: dynamic-resource-allocation cel, resourceclaim/devicetoleration.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from knarr.api import cel, quantity
from knarr.api.cel.extensions import Quantity, semver


class DeviceError(Exception):
    """A device is not as it must be, or an expression about it is wrong."""


class Attributes(dict[str, Any]):
    """Attributes or capacity by domain; domains that a device knows nothing about are empty, not missing."""

    def __contains__(self, key: object) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if super().__contains__(key) else {}

    def __missing__(self, key: str) -> dict[str, Any]:
        return {}


@lru_cache(maxsize=512)
def _program(expression: str) -> cel.Program | str:
    try:
        return cel.base().compile(expression, {"device": cel.DYN}, result=cel.BOOL)
    except cel.CELError as error:
        return f"CEL compile error: {error}"


def _value(name: str, attribute: Mapping[str, Any]) -> Any:
    for kind in ("int", "bool", "string"):
        if attribute.get(kind) is not None:
            return attribute[kind]
    if attribute.get("version") is not None:
        return semver(attribute["version"])
    raise DeviceError(f"CEL runtime error: attribute {name}: unsupported attribute value")


def as_seen(driver: str, device: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of an expression about an entry of a slice's devices. Raises DeviceError."""

    def split(name: str) -> tuple[str, str]:
        domain, slash, key = name.partition("/")
        return (domain, key) if slash else (driver, name)

    attributes, capacity = Attributes(), Attributes()
    for name, attribute in (device.get("attributes") or {}).items():
        domain, key = split(name)
        attributes.setdefault(domain, {})[key] = _value(name, attribute)
    for name, amount in (device.get("capacity") or {}).items():
        domain, key = split(name)
        capacity.setdefault(domain, {})[key] = Quantity(quantity.parse(amount["value"]))
    return {"device": {"driver": driver, "attributes": attributes, "capacity": capacity}}


def matches(expression: str, variables: Mapping[str, Any]) -> bool:
    """Evaluate a selector about what `as_seen` gave. Raises DeviceError."""
    program = _program(expression)
    if isinstance(program, str):
        raise DeviceError(program)
    try:
        result = program.evaluate(variables)
    except cel.CELError as error:
        raise DeviceError(f"CEL runtime error: {error}") from error
    if not isinstance(result, bool):
        raise DeviceError("CEL runtime error: CEL result could not be converted to bool")
    return result


def tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """Whether a device toleration covers a device taint; its seconds are not looked at."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("key") and toleration["key"] != taint.get("key"):
        return False
    if (toleration.get("operator") or "Equal") == "Equal":
        return (toleration.get("value") or "") == (taint.get("value") or "")
    return bool(toleration["operator"] == "Exists")
