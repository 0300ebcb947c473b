"""String formats and regular expressions of CRD schemas. Pure; used by checks.py and explain.py.

Source: kube-openapi validation/strfmt, apiextensions-apiserver validation/formats.go; Go's RE2 syntax.
"""

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable
from datetime import date
from functools import lru_cache

from knarr.api import times
from knarr.api.goregex import scoped_flags
from knarr.api.selectors import _SUBDOMAIN

_POSIX = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ", "cntrl": r"\x00-\x1f\x7f", "digit": "0-9",
    "graph": "!-~", "lower": "a-z", "print": " -~", "punct": r"!-/:-@\[-`{-~", "space": r"\t\n\v\f\r ", "upper": "A-Z",
    "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f",
}
_PROPERTIES = {"L": "^\\W\\d_", "Lu": "A-ZÀ-ÖØ-Þ", "Ll": "a-zß-öø-ÿ", "N": "\\d", "Nd": "\\d", "P": "!-/:-@\\[-`{-~", "S": "$+<=>^`|~", "Z": "\\s"}


class PatternError(ValueError):
    """The pattern is not a regular expression of Go's."""


@lru_cache(maxsize=2048)
def go_regex(pattern: str) -> re.Pattern[str]:
    """Compile a Go (RE2) pattern.

    Raises:
      PatternError: cannot be compiled.
    """
    if re.search(r"\(\?(=|!|<=|<!)|\\[1-9]", pattern):
        raise PatternError("error parsing regexp: invalid or unsupported Perl syntax")
    pattern = scoped_flags(pattern)
    out: list[str] = []
    index, in_class = 0, False
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            following = pattern[index + 1 : index + 2]
            if following == "z":
                out.append(r"\Z")
            elif following in "pP" and following:
                match = re.match(r"\\[pP](?:\{(\^?\w+)\}|(\w))", pattern[index:])
                name = (match[1] or match[2]) if match else ""
                ranges = _PROPERTIES.get(name, _PROPERTIES.get(name[:1], "\\w"))
                if in_class:
                    out.append(r"A-Za-zªµºÀ-ÖØ-öø-ˁͰ-￿" if ranges.startswith("^") else ranges)
                else:
                    out.append(f"[{ranges}]")
                index += len(match[0]) if match else 2
                continue
            elif following == "Q":
                end = pattern.find(r"\E", index)
                text = pattern[index + 2 : end if end >= 0 else len(pattern)]
                out.append(re.escape(text))
                index = (end + 2) if end >= 0 else len(pattern)
                continue
            else:
                out.append(pattern[index : index + 2])
            index += 2
            continue
        if in_class:
            match = re.match(r"\[:(\^?)(\w+):\]", pattern[index:])
            if match and match[2] in _POSIX:
                out.append(_POSIX[match[2]])
                index += len(match[0])
                continue
            if character == "]":
                in_class = False
            elif character == "[":
                character = "\\["
        elif character == "[":
            in_class = True
            out.append("[")
            index += 1
            if pattern[index : index + 1] == "^":
                out.append("^")
                index += 1
            if pattern[index : index + 1] == "]":
                out.append(r"\]")
                index += 1
            continue
        elif character == "$":
            character = r"\Z"
        out.append(character)
        index += 1
    try:
        return re.compile("".join(out), re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"error parsing regexp: {error}") from None


_UUID = r"[0-9a-f]{8}-?[0-9a-f]{4}-?%s[0-9a-f]{3}-?%s[0-9a-f]{3}-?[0-9a-f]{12}"
_UUIDS = {
    "uuid": re.compile(_UUID % ("[0-9a-f]", "[0-9a-f]"), re.I), "uuid3": re.compile(_UUID % ("3", "[0-9a-f]"), re.I),
    "uuid4": re.compile(_UUID % ("4", "[89ab]"), re.I), "uuid5": re.compile(_UUID % ("5", "[89ab]"), re.I),
}
_HOSTNAME = re.compile(
    r"([^\W_]((-?[^\W_]{0,62})?)|([^\W_](([^\W_]|-){0,61}[^\W_])?\.)+([^\W\d_]){2,63})",
)
_EMAIL = re.compile(r"(?:[^<>]*<)?[^\s@<>,;:()\"\[\]\\]+@[^\s@<>,;:()\"\[\]\\]+>?")
_CREDIT_CARD = re.compile(
    r"(?:4[0-9]{12}(?:[0-9]{3})?|5[1-5][0-9]{14}|6(?:011|5[0-9][0-9])[0-9]{12}|3[47][0-9]{13}|3(?:0[0-5]|[68][0-9])[0-9]{11}"
    r"|(?:2131|1800|35\d{3})\d{11})", re.ASCII,
)
_DATE_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)([tT ](\d\d):([0-5]\d):([0-5]\d|60)(\.\d+)?([zZ]|[+-]\d\d:?\d\d)?)?", re.ASCII,
)


def _isbn10(text: str) -> bool:
    digits = re.sub(r"[\s-]", "", text)
    if not re.fullmatch(r"[0-9]{9}[0-9X]", digits):
        return False
    return sum((10 if d == "X" else int(d)) * (i + 1) for i, d in enumerate(digits)) % 11 == 0


def _isbn13(text: str) -> bool:
    digits = re.sub(r"[\s-]", "", text)
    return bool(re.fullmatch(r"[0-9]{13}", digits)) and sum(int(d) * (1, 3)[i % 2] for i, d in enumerate(digits)) % 10 == 0


def _address(version: int) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        # An IPv4 address in IPv6 notation has dots and colons, and upstream goes by the characters.
        return ("." in text if version == 4 else ":" in text) and "%" not in str(address)

    return check


def _cidr(text: str) -> bool:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return False
    return "/" in text and text.rpartition("/")[2].isdigit()


def _base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _date(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII)) and date.fromisoformat(text) is not None
    except ValueError:
        return False


def _date_time(text: str) -> bool:
    match = _DATE_TIME.fullmatch(text)
    if match is None or match[4] is None or match[9] is None:
        return False
    try:
        date(int(match[1]) or 1, int(match[2]), int(match[3]))
    except ValueError:
        return False
    return int(match[5]) < 24


def _duration(text: str) -> bool:
    try:
        times.parse_duration(text)
    except ValueError:
        return bool(re.search(r"(\d+)\s*(ns|nano|nanos|us|µs|micro|micros|ms|milli|millis|s|sec|secs|second|seconds|m|min|mins|minute"
                              r"|minutes|h|hr|hour|hours|d|day|days|w|week|weeks)\b", text))
    return True


def _color(text: str) -> bool:
    match = re.fullmatch(r"rgb\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)", text, re.ASCII)
    return match is not None and all(int(part) < 256 for part in match.groups())


def _uri(text: str) -> bool:
    return bool(re.fullmatch(r"(?:[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x1f]*|/[^\s\x00-\x1f]*)", text))


def _fully(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


FORMATS: dict[str, Callable[[str], bool]] = {
    "bsonobjectid": _fully(re.compile(r"[0-9a-fA-F]{24}")),
    "uri": _uri,
    "email": _fully(_EMAIL),
    "hostname": lambda text: len(text) <= 255 and _HOSTNAME.fullmatch(text) is not None and all(len(p) <= 63 for p in text.split(".")),
    "ipv4": _address(4), "ipv6": _address(6), "cidr": _cidr,
    "mac": _fully(re.compile(r"([0-9a-fA-F]{2}([:-])([0-9a-fA-F]{2}\2){4}([0-9a-fA-F]{2}\2[0-9a-fA-F]{2}\2)?[0-9a-fA-F]{2})|"
                             r"([0-9a-fA-F]{4}\.){2,3}[0-9a-fA-F]{4}")),
    **{name: _fully(pattern) for name, pattern in _UUIDS.items()},
    "isbn": lambda text: _isbn10(text) or _isbn13(text), "isbn10": _isbn10, "isbn13": _isbn13,
    "creditcard": lambda text: _CREDIT_CARD.fullmatch(re.sub(r"[^0-9]+", "", text)) is not None,
    "ssn": _fully(re.compile(r"\d{3}[- ]?\d{2}[- ]?\d{4}", re.ASCII)),
    "hexcolor": _fully(re.compile(r"#?([0-9a-fA-F]{3}|[0-9a-fA-F]{6})")),
    "rgbcolor": _color, "byte": _base64, "password": lambda text: True, "date": _date, "duration": _duration, "datetime": _date_time,
    "k8sshortname": _fully(re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")),
    "k8slongname": lambda text: len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None,
}


def format_check(name: str) -> Callable[[str], bool] | None:
    """The check of a format, None for one that upstream ignores."""
    return FORMATS.get(name.replace("-", "")) if name else None
