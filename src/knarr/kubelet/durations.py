"""Durations as Go prints them (time.Duration.String), because messages and events show them so. Pure."""

from __future__ import annotations


def go_duration(seconds: float) -> str:
    """Format whole milliseconds as Go does: 0s, 850ms, 1.5s, 2m40s, 1h0m0s."""
    millis = round(seconds * 1000)
    if millis == 0:
        return "0s"
    if millis < 1000:
        return f"{millis}ms"
    whole, rest = divmod(millis, 1000)
    hours, remainder = divmod(whole, 3600)
    minutes, secs = divmod(remainder, 60)
    fraction = f".{rest:03d}".rstrip("0") if rest else ""
    text = f"{secs}{fraction}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
