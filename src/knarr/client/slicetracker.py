"""ResourceSlices with the taints that DeviceTaintRules put on their devices: what scheduler and eviction look at.

A slice is shown as it is, unless a rule concerns it; then a copy with the rule's taints added is shown. Handlers are told when a
slice changes, or when what the rules make of it does.
Source: dynamic-resource-allocation resourceslice/tracker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from knarr.api import devices
from knarr.api.meta import deep_copy
from knarr.api.types import Object
from knarr.client.informer import Informer

Changed = Callable[[Object | None, Object | None], None]
"""(slice as shown before or None, slice as shown now or None)."""
Report = Callable[[Object, str], None]
"""(rule, what its expression failed with)."""


class SliceTracker:
    """Joins three informers.

    Args:
      slices, rules, classes: informers of ResourceSlices, DeviceTaintRules and DeviceClasses, started by the caller; rules may
        come late, or never, where they are not served.
      changed: called for every change, in the informers' handlers.
    """

    def __init__(self, slices: Informer, rules: Informer, classes: Informer, changed: Changed, report: Report | None = None) -> None:
        self._slices = slices
        self._rules = rules
        self._classes = classes
        self._changed = changed
        self._report = report
        self._shown: dict[str, Object] = {}
        slices.add_handler(self._slice_set, lambda _, new: self._slice_set(new), self._slice_gone)
        rules.add_handler(self._rule_changed, self._rule_updated, self._rule_changed)
        classes.add_handler(self._class_changed, lambda _, new: self._class_changed(new), self._class_changed)

    def _slice_set(self, obj: Object) -> None:
        self._show(obj, always=True)

    def _slice_gone(self, obj: Object) -> None:
        old = self._shown.pop(obj["metadata"]["name"], None)
        if old is not None:
            self._changed(old, None)

    def _rule_changed(self, rule: Object) -> None:
        self._show_all(lambda spec: _concerns(rule, spec))

    def _rule_updated(self, old: Object, new: Object) -> None:
        self._show_all(lambda spec: _concerns(old, spec) or _concerns(new, spec))

    def _class_changed(self, changed: Object) -> None:
        name = changed["metadata"]["name"]
        if any(_selector(rule).get("deviceClassName") == name for rule in self._rules):
            self._show_all(lambda _: True)

    def _show_all(self, concerned: Callable[[Object], bool]) -> None:
        for obj in self._slices.list():
            if concerned(obj["spec"]):
                self._show(obj, always=False)

    def _show(self, obj: Object, *, always: bool) -> None:
        name = obj["metadata"]["name"]
        old, new = self._shown.get(name), self._tainted(obj)
        if not always and old is not None and _taints(old) == _taints(new):
            return
        self._shown[name] = new
        self._changed(old, new)

    def _tainted(self, obj: Object) -> Object:
        shown = obj
        for rule in sorted(self._rules, key=lambda rule: str(rule["metadata"]["name"])):
            if not _concerns(rule, obj["spec"]):
                continue
            expressions = self._expressions(rule)
            if expressions is None:
                continue
            for index, device in enumerate(obj["spec"].get("devices") or ()):
                if self._picks(rule, expressions, obj["spec"].get("driver") or "", device):
                    if shown is obj:
                        shown = deep_copy(obj)
                    shown["spec"]["devices"][index].setdefault("taints", []).append(rule["spec"]["taint"])
        return shown

    def _expressions(self, rule: Object) -> list[str] | None:
        """What has to hold for a device; None when the class that the rule names does not exist."""
        selector = _selector(rule)
        selectors = list(selector.get("selectors") or ())
        name = selector.get("deviceClassName")
        if name is not None:
            named = self._classes.get(None, name)
            if named is None:
                return None
            selectors = [*(named["spec"].get("selectors") or ()), *selectors]
        return [one["cel"]["expression"] for one in selectors if one.get("cel")]

    def _picks(self, rule: Object, expressions: list[str], driver: str, device: Object) -> bool:
        wanted = _selector(rule).get("device")
        if wanted is not None and wanted != device["name"]:
            return False
        if not expressions:
            return True
        try:
            variables = devices.as_seen(driver, device)
            return all(devices.matches(expression, variables) for expression in expressions)
        except devices.DeviceError as error:
            if self._report is not None:
                self._report(rule, str(error))
            return False


def _selector(rule: Object) -> Object:
    found: Object = rule["spec"].get("deviceSelector") or {}
    return found


def _concerns(rule: Object, spec: Object) -> bool:
    """Whether a rule may concern devices of a slice, by driver and pool."""
    selector = _selector(rule)
    driver, pool = selector.get("driver"), selector.get("pool")
    return (driver is None or driver == spec.get("driver")) and (pool is None or pool == (spec.get("pool") or {}).get("name"))


def _taints(obj: Object) -> list[Any]:
    return [device.get("taints") for device in obj["spec"].get("devices") or ()]
