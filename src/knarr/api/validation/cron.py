"""Is a text a cron schedule: five fields, or a descriptor such as "@daily" or "@every 1h30m".

Only checks; the CronJob controller computes times. Source: robfig/cron v3 ParseStandard.
"""

from __future__ import annotations

import re

_MONTHS = {name: i + 1 for i, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())}
_DAYS = {name: i for i, name in enumerate("sun mon tue wed thu fri sat".split())}
_FIELDS: tuple[tuple[int, int, dict[str, int]], ...] = ((0, 59, {}), (0, 23, {}), (1, 31, {}), (1, 12, _MONTHS), (0, 6, _DAYS))
_DESCRIPTORS = frozenset({"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"})
_DURATION = re.compile(r"[+-]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+")


class CronError(ValueError):
    """The text is no schedule; the message says why."""


def _number(text: str, names: dict[str, int]) -> int:
    if text.lower() in names:
        return names[text.lower()]
    if not text.isdigit():
        raise CronError(f'failed to parse int from {text}: strconv.Atoi: parsing "{text}": invalid syntax')
    return int(text)


def _range(text: str, low: int, high: int, names: dict[str, int]) -> None:
    parts = text.split("/")
    limits = parts[0].split("-")
    if limits[0] in ("*", "?"):
        start, end = low, high
        if len(limits) > 1:
            raise CronError(f"too many hyphens: {text}")
    else:
        start = _number(limits[0], names)
        if len(limits) > 2:
            raise CronError(f"too many hyphens: {text}")
        end = _number(limits[1], names) if len(limits) == 2 else start
    if len(parts) > 2:
        raise CronError(f"too many slashes: {text}")
    step = 1
    if len(parts) == 2:
        step = _number(parts[1], {})
        if len(limits) == 1:
            end = high
    if start < low:
        raise CronError(f"beginning of range ({start}) below minimum ({low}): {text}")
    if end > high:
        raise CronError(f"end of range ({end}) above maximum ({high}): {text}")
    if start > end:
        raise CronError(f"beginning of range ({start}) beyond end of range ({end}): {text}")
    if step == 0:
        raise CronError(f"step of range should be a positive number: {text}")


def parse_schedule(text: str) -> None:
    """Check a schedule.

    Raises:
      CronError: it is none.
    """
    rest = text
    if rest.startswith(("TZ=", "CRON_TZ=")):
        zone, _, rest = rest.partition(" ")
        if not rest:
            raise CronError(f"provided bad location {zone.partition('=')[2]}")
        rest = rest.strip()
    if rest.startswith("@"):
        if rest in _DESCRIPTORS:
            return
        if rest.startswith("@every ") and _DURATION.fullmatch(rest[len("@every ") :]):
            return
        raise CronError(f"unrecognized descriptor: {rest}")
    fields = rest.split()
    if len(fields) != 5:
        raise CronError(f"expected exactly 5 fields, found {len(fields)}: [{' '.join(fields)}]")
    for field, (low, high, names) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            if part:
                _range(part, low, high, names)
