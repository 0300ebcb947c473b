"""Cron lines and the times they name.

Five fields (minute, hour, day of month, month, day of week), names, ranges, steps, "?", the
descriptors "@daily" and so on, "@every 1h30m", and a leading "TZ=" or "CRON_TZ=". When both days
are restricted, either one suffices.
Source: github.com/robfig/cron v3 (ParseStandard, SpecSchedule.Next).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

_BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_MONTHS = {name: number for number, name in enumerate(("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1)}
_DAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}
_DESCRIPTORS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_YEARS = 5


class ScheduleError(ValueError):
    """The text is no schedule."""


def load_zone(name: str) -> tzinfo:
    """Give a time zone by name; "" and "UTC" are UTC, "Local" the machine's.

    Raises:
      ScheduleError: there is none of that name.
    """
    if name in ("", "UTC"):
        return UTC
    if name == "Local":
        return datetime.now().astimezone().tzinfo or UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ScheduleError(f"unknown time zone {name}") from error


@dataclass(frozen=True, slots=True)
class Schedule:
    """A parsed schedule."""

    fields: tuple[frozenset[int], ...]
    """Allowed minutes, hours, days, months, days of week; empty for a fixed delay."""
    any_day: bool
    any_weekday: bool
    zone: tzinfo
    every_seconds: float = 0.0

    def next(self, after: float) -> float | None:
        """Give the first time (epoch seconds) later than `after`; None if there is none within five years."""
        if self.every_seconds:
            return float(int(after) + self.every_seconds)
        local = datetime.fromtimestamp(int(after), UTC).astimezone(self.zone)
        # Field by field on the wall clock; each jump starts the smaller fields at zero.
        moment = local.replace(second=0, microsecond=0, tzinfo=None) + timedelta(minutes=1)
        limit = moment.year + _YEARS
        minutes, hours, _, months, _ = self.fields
        while moment.year <= limit:
            if moment.month not in months:
                moment = (moment.replace(day=1, hour=0, minute=0) + timedelta(days=32)).replace(day=1)
            elif not self._is_day(moment):
                moment = moment.replace(hour=0, minute=0) + timedelta(days=1)
            elif moment.hour not in hours:
                moment = moment.replace(minute=0) + timedelta(hours=1)
            elif moment.minute not in minutes:
                moment += timedelta(minutes=1)
            else:
                stamp = moment.replace(tzinfo=self.zone).timestamp()
                back = datetime.fromtimestamp(stamp, UTC).astimezone(self.zone).replace(tzinfo=None)
                # A time that the change to summer time skips does not come; one that comes twice counts once.
                if back == moment and stamp > after:
                    return stamp
                moment += timedelta(minutes=1)
        return None

    def _is_day(self, moment: datetime) -> bool:
        _, _, days, _, weekdays = self.fields
        day = moment.day in days
        weekday = (moment.weekday() + 1) % 7 in weekdays
        return day and weekday if self.any_day or self.any_weekday else day or weekday


def parse(text: str, zone: tzinfo = UTC) -> Schedule:
    """Read a cron line.

    Args:
      zone: used when the line does not name one itself.

    Raises:
      ScheduleError: it is not one.
    """
    text = text.strip()
    if not text:
        raise ScheduleError("empty spec string")
    if text.startswith(("TZ=", "CRON_TZ=")):
        prefix, _, text = text.partition(" ")
        zone = load_zone(prefix.partition("=")[2])
        text = text.strip()
    if text.startswith("@"):
        return _descriptor(text, zone)
    parts = text.split()
    if len(parts) != 5:
        raise ScheduleError(f"expected exactly 5 fields, found {len(parts)}: {parts}")
    names: tuple[dict[str, int], ...] = ({}, {}, {}, _MONTHS, _DAYS)
    fields = tuple(_field(part, bounds, known) for part, bounds, known in zip(parts, _BOUNDS, names, strict=True))
    return Schedule(fields, _is_star(parts[2]), _is_star(parts[4]), zone)


def _is_star(part: str) -> bool:
    return any(piece in ("*", "?", "*/1", "?/1") for piece in part.split(","))


def _descriptor(text: str, zone: tzinfo) -> Schedule:
    if text in _DESCRIPTORS:
        return parse(_DESCRIPTORS[text], zone)
    if text.startswith("@every "):
        seconds = _duration(text.removeprefix("@every ").strip())
        return Schedule((), True, True, zone, max(1.0, float(int(seconds))))
    raise ScheduleError(f"unrecognized descriptor: {text}")


def _duration(text: str) -> float:
    parts = re.findall(r"([0-9]*\.?[0-9]+)(ns|us|µs|ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ScheduleError(f"failed to parse duration {text}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _field(part: str, bounds: tuple[int, int], names: dict[str, int]) -> frozenset[int]:
    values: set[int] = set()
    for piece in part.split(","):
        values |= _range(piece, bounds, names)
    return frozenset(values)


def _range(piece: str, bounds: tuple[int, int], names: dict[str, int]) -> set[int]:
    span, slash, step_text = piece.partition("/")
    if "/" in step_text:
        raise ScheduleError(f"too many slashes: {piece}")
    low_text, dash, high_text = span.partition("-")
    if "-" in high_text:
        raise ScheduleError(f"too many hyphens: {piece}")
    if low_text in ("*", "?"):
        low, high = bounds
    else:
        low = _number(low_text, names)
        high = _number(high_text, names) if dash else low
        if slash and not dash:
            high = bounds[1]
    step = _number(step_text, {}) if slash else 1
    if low < bounds[0]:
        raise ScheduleError(f"beginning of range ({low}) below minimum ({bounds[0]}): {piece}")
    if high > bounds[1]:
        raise ScheduleError(f"end of range ({high}) above maximum ({bounds[1]}): {piece}")
    if low > high:
        raise ScheduleError(f"beginning of range ({low}) beyond end of range ({high}): {piece}")
    if step == 0:
        raise ScheduleError(f"step of range should be a positive number: {piece}")
    return set(range(low, high + 1, step))


def _number(text: str, names: dict[str, int]) -> int:
    if text.lower() in names:
        return names[text.lower()]
    if not text.isdigit():
        raise ScheduleError(f"failed to parse int from {text}")
    return int(text)
