"""Times and durations as Go reads and writes them on the wire. Pure.

Source: apimachinery meta/v1 time.go, micro_time.go, duration.go; Go's time package for texts.
"""

import re
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache

_RFC3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:[.,](\d+))?(?:(Z)|([+-])(\d\d):(\d\d))", re.ASCII)
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNIT_NANOS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def parse(text: str) -> tuple[datetime, int]:
    """(UTC time in whole seconds, nanoseconds) of an RFC 3339 text.

    Raises:
      ValueError: not such a text.
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    year, month, day, hour, minute, second, fraction, _zulu, sign, offset_hours, offset_minutes = match.groups()
    zone = UTC
    if sign:
        if int(offset_hours) > 24 or int(offset_minutes) > 60:
            raise ValueError(text)
        offset = timedelta(hours=int(offset_hours), minutes=int(offset_minutes))
        zone = timezone(offset if sign == "+" else -offset)
    moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=zone)
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(text) from None
    return moment, int(((fraction or "") + "000000000")[:9])


def _seconds_text(moment: datetime) -> str:
    return f"{moment.year:04d}-{moment.month:02d}-{moment.day:02d}T{moment.hour:02d}:{moment.minute:02d}:{moment.second:02d}"


@lru_cache(maxsize=4096)
def canonical_seconds(text: str) -> str | None:
    """RFC 3339 in UTC and whole seconds, as meta/v1 Time is written; None for Go's zero time, which is written as null.

    Raises:
      ValueError: not a time.
    """
    moment, nanos = parse(text)
    if moment.year == 1 and nanos == 0 and moment.timetuple()[:6] == (1, 1, 1, 0, 0, 0):
        return None
    return _seconds_text(moment) + "Z"


@lru_cache(maxsize=4096)
def canonical_micros(text: str) -> str | None:
    """RFC 3339 in UTC with six decimals, as meta/v1 MicroTime is written; None for the zero time.

    Raises:
      ValueError: not a time, or not with exactly six decimals, which is all that upstream reads here.
    """
    match = _RFC3339.fullmatch(text)
    if match is None or len(match[7] or "") != 6:
        raise ValueError(text)
    moment, nanos = parse(text)
    if moment.timetuple()[:6] == (1, 1, 1, 0, 0, 0) and nanos == 0:
        return None
    return f"{_seconds_text(moment)}.{nanos // 1000:06d}Z"


def from_epoch(seconds: int, nanos: int = 0, *, micros: bool = False) -> str | None:
    """Wire text of a protobuf time; None for Go's zero time.

    Raises:
      ValueError: outside of the years 1 to 9999.
    """
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError(seconds) from None
    if moment.timetuple()[:6] == (1, 1, 1, 0, 0, 0) and nanos == 0:
        return None
    return f"{_seconds_text(moment)}.{nanos // 1000:06d}Z" if micros else _seconds_text(moment) + "Z"


@lru_cache(maxsize=4096)
def to_epoch(text: str) -> tuple[int, int]:
    """(seconds since 1970, nanoseconds) of a wire text.

    Raises:
      ValueError: not a time.
    """
    moment, nanos = parse(text)
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return delta.days * 86400 + delta.seconds, nanos


def parse_duration(text: str) -> int:
    """Nanoseconds of a Go duration such as "1h0m0.5s".

    Raises:
      ValueError: not a duration.
    """
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text[1:] if text.startswith("+") else text)
    if rest == "0":
        return 0
    total, position = 0, 0
    while position < len(rest):
        match = _DURATION.match(rest, position)
        if match is None:
            raise ValueError(text)
        whole, _, part = match[1].partition(".")
        unit = _UNIT_NANOS[match[2]]
        total += int(whole or "0") * unit + (int(part) * unit // 10 ** len(part) if part else 0)
        position = match.end()
    if not rest or total >= 2**63:
        raise ValueError(text)
    return sign * total


def format_duration(nanos: int) -> str:
    """Go's text of a duration: "1h0m0s", "1.5s", "10ms", "0s"."""
    if nanos == 0:
        return "0s"
    sign, rest = ("-", -nanos) if nanos < 0 else ("", nanos)
    if rest < 10**9:
        for unit, size in (("ns", 1), ("µs", 10**3), ("ms", 10**6)):
            if rest < size * 1000:
                return f"{sign}{_decimal(rest, size)}{unit}"
    hours, rest = divmod(rest, 3600 * 10**9)
    minutes, rest = divmod(rest, 60 * 10**9)
    text = f"{_decimal(rest, 10**9)}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{text}"
    return f"{sign}{minutes}m{text}" if minutes else sign + text


def _decimal(value: int, size: int) -> str:
    whole, part = divmod(value, size)
    if not part:
        return str(whole)
    digits = len(str(size)) - 1
    return f"{whole}.{part:0{digits}d}".rstrip("0")


def canonical_duration(text: str) -> str:
    """The text Go writes after reading this duration.

    Raises:
      ValueError: not a duration.
    """
    return format_duration(parse_duration(text))
