"""How fast an autoscaler may follow its metrics: stabilization windows, rates, bounds.

State is per autoscaler: recent recommendations and recent changes, as far back as a rule looks.
Source: pkg/controller/podautoscaler/horizontal.go (stabilize…, normalize…, convert…).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.api.types import Object

_UP_FACTOR = 2.0
_UP_MINIMUM = 4.0
_WITHIN = ("DesiredWithinRange", "the desired count is within the acceptable range")

Verdict = tuple[int, str, str]
"""(replicas, reason, message)."""


@dataclass(slots=True)
class History:
    """What one autoscaler recommended and did lately: (when, how many)."""

    recommendations: list[tuple[float, int]] = field(default_factory=list)
    ups: list[tuple[float, int]] = field(default_factory=list)
    downs: list[tuple[float, int]] = field(default_factory=list)

    def start(self, replicas: int) -> None:
        """The size found first counts as a recommendation."""
        if not self.recommendations:
            self.recommendations.append((clock.now(), replicas))

    def scaled(self, behavior: Object | None, before: int, after: int) -> None:
        """Remember a change, as long as a rule may ask for it."""
        if behavior is None:
            return
        now = clock.now()
        if after > before:
            self.ups = [*_recent(self.ups, now - _longest_period(behavior.get("scaleUp"))), (now, after - before)]
        else:
            self.downs = [*_recent(self.downs, now - _longest_period(behavior.get("scaleDown"))), (now, before - after)]


def _recent(entries: list[tuple[float, int]], since: float) -> list[tuple[float, int]]:
    return [entry for entry in entries if entry[0] >= since]


def _longest_period(rules: Object | None) -> float:
    return max((float(policy["periodSeconds"]) for policy in (rules or {}).get("policies") or ()), default=0.0)


def stabilize(history: History, desired: int, window_seconds: float) -> int:
    """The highest recommendation of the window, with no behavior given."""
    now = clock.now()
    recent = _recent(history.recommendations, now - window_seconds)
    history.recommendations = [*recent, (now, desired)]
    return max([desired, *(value for _, value in recent)])


def stabilize_with_behavior(history: History, current: int, desired: int, behavior: Object, window_seconds: float) -> Verdict:
    """Go up no further than the lowest recommendation of one window, down no further than the highest of the other."""
    now = clock.now()
    up_window = float((behavior.get("scaleUp") or {}).get("stabilizationWindowSeconds") or 0)
    down = (behavior.get("scaleDown") or {}).get("stabilizationWindowSeconds")
    down_window = window_seconds if down is None else float(down)
    up = min([desired, *(value for stamp, value in history.recommendations if stamp > now - up_window)])
    highest = max([desired, *(value for stamp, value in history.recommendations if stamp > now - down_window)])
    result = min(max(current, up), highest)
    history.recommendations = [*_recent(history.recommendations, now - max(up_window, down_window)), (now, desired)]
    if desired >= current:
        return result, "ScaleUpStabilized", "recent recommendations were lower than current one, applying the lowest recent recommendation"
    return result, "ScaleDownStabilized", "recent recommendations were higher than current one, applying the highest recent recommendation"


def limit(current: int, desired: int, least: int, most: int) -> Verdict:
    """Bounds and the default rate: at most doubling, or four."""
    fastest = int(max(_UP_FACTOR * current, _UP_MINIMUM))
    if most > fastest:
        allowed, reason, message = fastest, "ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate"
    else:
        allowed, reason, message = most, "TooManyReplicas", "the desired replica count is more than the maximum replica count"
    if desired < least:
        return least, "TooFewReplicas", "the desired replica count is less than the minimum replica count"
    if desired > allowed:
        return allowed, reason, message
    return desired, *_WITHIN


def limit_with_behavior(history: History, current: int, desired: int, least: int, most: int, behavior: Object) -> Verdict:
    """Bounds and the rates of the behavior."""
    if desired > current:
        rate = max(current, _rate(history, current, behavior.get("scaleUp") or {}, up=True))
        if most > rate:
            allowed, reason, message = rate, "ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate"
        else:
            allowed, reason, message = most, "TooManyReplicas", "the desired replica count is more than the maximum replica count"
        if desired > allowed:
            return allowed, reason, message
    elif desired < current:
        rate = min(current, _rate(history, current, behavior.get("scaleDown") or {}, up=False))
        if least < rate:
            allowed, reason, message = rate, "ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate"
        else:
            allowed, reason, message = least, "TooFewReplicas", "the desired replica count is less than the minimum replica count"
        if desired < allowed:
            return allowed, reason, message
    return desired, *_WITHIN


def _rate(history: History, current: int, rules: Object, *, up: bool) -> int:
    """The size that the policies allow now."""
    select = rules.get("selectPolicy") or "Max"
    policies = rules.get("policies") or ()
    if select == "Disabled" or not policies:
        return current
    now = clock.now()
    proposals: list[int] = []
    for policy in policies:
        since = now - float(policy["periodSeconds"])
        added = sum(change for stamp, change in history.ups if stamp > since)
        removed = sum(change for stamp, change in history.downs if stamp > since)
        start = current - added + removed
        value = policy["value"]
        if policy["type"] == "Pods":
            proposals.append(start + value if up else start - value)
        else:
            proposals.append(math.ceil(start * (1 + value / 100)) if up else int(start * (1 - value / 100)))
    # "Max" is the largest change: the highest number upwards, the lowest downwards.
    return max(proposals) if (select == "Min") != up else min(proposals)
