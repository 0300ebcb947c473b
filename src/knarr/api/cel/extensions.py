"""Kubernetes' and cel-go's extension functions: strings, lists, regular expressions, sets, quantities, URLs, addresses, formats, versions.

Long because it is a table: one small function per entry of upstream's libraries, with its signature, and nothing else.

Source: apiserver pkg/cel/library/*.go, cel-go ext/strings.go.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from knarr.api import quantity as quantities
from knarr.api.cel.errors import EvalError
from knarr.api.cel.stdlib import compiled, double_text, to_string
from knarr.api.cel.values import Duration, Opaque, Optional, compare, equals, no_overload, type_name

Function = Callable[..., Any]

DECLARATIONS = """
string.charAt(int) string
string.indexOf(string) int
string.indexOf(string,int) int
string.lastIndexOf(string) int
string.lastIndexOf(string,int) int
string.lowerAscii() string
string.upperAscii() string
string.replace(string,string) string
string.replace(string,string,int) string
string.split(string) list(string)
string.split(string,int) list(string)
string.substring(int) string
string.substring(int,int) string
string.trim() string
string.reverse() string
string.format(list(dyn)) string
strings.quote(string) string
list(string).join() string
list(string).join(string) string
list(A).isSorted() bool
list(A).sum() A
list(A).min() A
list(A).max() A
list(A).indexOf(A) int
list(A).lastIndexOf(A) int
list(A).slice(int,int) list(A)
list(A).flatten() list(dyn)
list(A).distinct() list(A)
list(A).sort() list(A)
list(A).reverse() list(A)
lists.range(int) list(int)
string.find(string) string
string.findAll(string) list(string)
string.findAll(string,int) list(string)
sets.contains(list(A),list(A)) bool
sets.equivalent(list(A),list(A)) bool
sets.intersects(list(A),list(A)) bool
quantity(string) quantity
isQuantity(string) bool
quantity.sign() int
quantity.isInteger() bool
quantity.asInteger() int
quantity.asApproximateFloat() double
quantity.isGreaterThan(quantity) bool
quantity.isLessThan(quantity) bool
quantity.compareTo(quantity) int
quantity.add(quantity) quantity
quantity.add(int) quantity
quantity.sub(quantity) quantity
quantity.sub(int) quantity
url(string) url
isURL(string) bool
url.getScheme() string
url.getHost() string
url.getHostname() string
url.getPort() string
url.getEscapedPath() string
url.getQuery() map(string,list(string))
ip(string) ip
isIP(string) bool
ip.isCanonical(string) bool
ip.family() int
ip.isUnspecified() bool
ip.isLoopback() bool
ip.isLinkLocalMulticast() bool
ip.isLinkLocalUnicast() bool
ip.isGlobalUnicast() bool
string(ip) string
cidr(string) cidr
isCIDR(string) bool
cidr.containsIP(ip) bool
cidr.containsIP(string) bool
cidr.containsCIDR(cidr) bool
cidr.containsCIDR(string) bool
cidr.ip() ip
cidr.masked() cidr
cidr.prefixLength() int
string(cidr) string
format.named(string) optional(format)
format.dns1123Label() format
format.dns1123Subdomain() format
format.dns1035Label() format
format.dns1123LabelPrefix() format
format.dns1123SubdomainPrefix() format
format.dns1035LabelPrefix() format
format.qualifiedName() format
format.labelValue() format
format.uri() format
format.uuid() format
format.byte() format
format.date() format
format.datetime() format
format.validate(string) optional(list(string))
semver(string) semver
semver(string,bool) semver
isSemver(string) bool
isSemver(string,bool) bool
semver.major() int
semver.minor() int
semver.patch() int
semver.isGreaterThan(semver) bool
semver.isLessThan(semver) bool
semver.compareTo(semver) int
jsonpatch.escapeKey(string) string
"""
NAMESPACES = frozenset({"strings", "lists", "sets", "jsonpatch"})
_FORMAT_NAMES = (
    "dns1123Label", "dns1123Subdomain", "dns1035Label", "dns1123LabelPrefix", "dns1123SubdomainPrefix", "dns1035LabelPrefix", "qualifiedName",
    "labelValue", "uri", "uuid", "byte", "date", "datetime",
)  # fmt: skip


# -- strings ---------------------------------------------------------------------------------------------------------------
def _text(function: str, *values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise no_overload(function, *values)


def char_at(text: Any, position: Any) -> str:
    _text("charAt", text)
    if not 0 <= position <= len(text):
        raise EvalError(f"index out of range: {position}")
    return str(text[position : position + 1])


def index_of(holder: Any, part: Any, start: int = 0) -> int:
    if isinstance(holder, list | tuple):
        return next((index for index, item in enumerate(holder) if equals(item, part)), -1)
    _text("indexOf", holder, part)
    if start < 0 or (start > len(holder)):
        raise EvalError(f"index out of range: {start}")
    return int(holder.find(part, start))


def last_index_of(holder: Any, part: Any, start: int | None = None) -> int:
    if isinstance(holder, list | tuple):
        return next((index for index in range(len(holder) - 1, -1, -1) if equals(holder[index], part)), -1)
    _text("lastIndexOf", holder, part)
    if start is None:
        return int(holder.rfind(part))
    if not 0 <= start <= len(holder):
        raise EvalError(f"index out of range: {start}")
    return int(holder.rfind(part, 0, start + len(part)))


_LOWER = {code: code + 32 for code in range(65, 91)}
_UPPER = {code: code - 32 for code in range(97, 123)}


def replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    _text("replace", text, old, new)
    return str(text.replace(old, new, count))


def split(text: Any, separator: Any, count: int = -1) -> list[str]:
    _text("split", text, separator)
    if count == 0:
        return []
    if separator == "":
        return list(text) if count < 0 or count >= len(text) else [*text[: count - 1], text[count - 1 :]]
    return list(text.split(separator, -1 if count < 0 else count - 1))


def substring(text: Any, start: int, end: int | None = None) -> str:
    _text("substring", text)
    end = len(text) if end is None else end
    if not 0 <= start <= len(text):
        raise EvalError(f"index out of range: {start}")
    if not 0 <= end <= len(text):
        raise EvalError(f"index out of range: {end}")
    if start > end:
        raise EvalError(f"invalid substring range. start: {start}, end: {end}")
    return str(text[start:end])


def join(items: Any, separator: str = "") -> str:
    _text("join", separator, *items)
    return separator.join(items)


_VERB = re.compile(r"%(?:\.(\d+))?([sdfexXob%])")


def format_string(text: Any, args: Any) -> str:
    """fmt's subset of string.format: %s %d %f %e %x %X %o %b %%."""
    position = 0

    def one(match: re.Match[str]) -> str:
        nonlocal position
        if match[2] == "%":
            return "%"
        if position >= len(args):
            raise EvalError(f"index {position} out of range")
        value = args[position]
        position += 1
        return _formatted(match[2], match[1], value)

    return _VERB.sub(one, text)


def _formatted(verb: str, precision: str | None, value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool | Duration)
    if verb == "s":
        return _shown(value)
    if verb == "d" and whole:
        return str(int(value))
    if verb in "fe" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{float(value):.{precision or 6}{verb}}"
    if verb == "b" and (whole or isinstance(value, bool)):
        return f"{int(value):b}"
    if verb == "o" and whole:
        return f"{int(value):o}"
    if verb in "xX":
        text = f"{int(value):x}" if whole else (value.encode() if isinstance(value, str) else value).hex()
        return text.upper() if verb == "X" else text
    raise EvalError(f"could not convert argument to {verb}")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_shown(key)}: {_shown(item)}" for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))) + "}"
    if isinstance(value, float):
        return double_text(value)
    return to_string(value)


def quote(text: Any) -> str:
    _text("strings.quote", text)
    escapes = {"\\": "\\\\", '"': '\\"', "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


# -- lists -----------------------------------------------------------------------------------------------------------------
def is_sorted(items: Any) -> bool:
    return all(compare(a, b) <= 0 for a, b in pairwise(items))


def total(items: Any) -> Any:
    from knarr.api.cel.stdlib import add

    if not items:
        return 0
    return functools.reduce(add, items)


def extreme(sign: int, word: str) -> Function:
    def function(items: Any) -> Any:
        if not items:
            raise EvalError(f"{word} called on empty list")
        found = items[0]
        for item in items[1:]:
            if compare(item, found) * sign > 0:
                found = item
        return found

    return function


def flatten(items: Any) -> list[Any]:
    out: list[Any] = []
    for item in items:
        out += item if isinstance(item, list | tuple) else [item]
    return out


def distinct(items: Any) -> list[Any]:
    out: list[Any] = []
    for item in items:
        if not any(equals(item, other) for other in out):
            out.append(item)
    return out


def list_slice(items: Any, start: int, end: int) -> list[Any]:
    if start < 0 or end < 0 or start > end or end > len(items):
        raise EvalError(f"cannot slice({start}, {end}), invalid range for list of size {len(items)}")
    return list(items[start:end])


def find(text: Any, pattern: Any) -> str:
    _text("find", text, pattern)
    found = compiled(pattern).search(text)
    return found[0] if found is not None else ""


def find_all(text: Any, pattern: Any, count: int = -1) -> list[str]:
    _text("findAll", text, pattern)
    found = [match[0] for match in compiled(pattern).finditer(text)]
    return found if count < 0 else found[:count]


def _subset(outer: Any, inner: Any) -> bool:
    return all(any(equals(item, other) for other in outer) for item in inner)


# -- quantities --------------------------------------------------------------------------------------------------------------
class Quantity(Opaque):
    """A resource quantity."""

    __slots__ = ("number",)
    type_name = "kubernetes.Quantity"

    def __init__(self, number: Fraction) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantity) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)


def quantity(text: Any) -> Quantity:
    _text("quantity", text)
    try:
        return Quantity(quantities.parse(text))
    except quantities.QuantityError as error:
        raise EvalError(str(error)) from error


def succeeds(function: Function) -> Function:
    def test(*args: Any) -> bool:
        if not isinstance(args[0], str):
            raise no_overload(function.__name__, *args)
        try:
            function(*args)
        except EvalError:
            return False
        return True

    return test


def _as_integer(value: Quantity) -> int:
    if value.number.denominator != 1 or not -(1 << 63) <= value.number < 1 << 63:
        raise EvalError("cannot convert value to integer")
    return value.number.numerator


def _sign(number: Fraction) -> int:
    return (number > 0) - (number < 0)


def _number(value: Any) -> Fraction:
    return value.number if isinstance(value, Quantity) else Fraction(value)


# -- URLs --------------------------------------------------------------------------------------------------------------------
class URL(Opaque):
    """An absolute URL or path."""

    __slots__ = ("parts", "text")
    type_name = "kubernetes.URL"

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts = urlsplit(text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, URL) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def url(text: Any) -> URL:
    _text("url", text)
    try:
        made = URL(text)
        _ = made.parts.port
    except ValueError as error:
        raise EvalError(f'URL parse error during conversion from string: parse "{text}": {error}') from error
    if not text or re.search(r"[\x00-\x20\x7f]", text) or not (text.startswith("/") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)):
        raise EvalError(f'URL parse error during conversion from string: parse "{text}": invalid URI for request')
    return made


# -- addresses ---------------------------------------------------------------------------------------------------------------
class IP(Opaque):
    """An IP address."""

    __slots__ = ("address",)
    type_name = "net.IP"

    def __init__(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
        self.address = address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IP) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __str__(self) -> str:
        return str(self.address)


class CIDR(Opaque):
    """An address with a prefix length."""

    __slots__ = ("interface",)
    type_name = "net.CIDR"

    def __init__(self, interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> None:
        self.interface = interface

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CIDR) and other.interface == self.interface

    def __hash__(self) -> int:
        return hash(self.interface)

    def __str__(self) -> str:
        return str(self.interface)


def ip(text: Any) -> IP:
    if isinstance(text, CIDR):
        return IP(text.interface.ip)
    _text("ip", text)
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise EvalError(f'IP Address "{text}" parse error during conversion from string: ParseAddr("{text}"): unable to parse IP') from error
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped is not None or address.scope_id):
        word = "IPv4-mapped IPv6 address" if address.ipv4_mapped is not None else "IPv6 with zone"
        raise EvalError(f'IP Address "{text}" parse error during conversion from string: {word} is not allowed')
    return IP(address)


def cidr(text: Any) -> CIDR:
    _text("cidr", text)
    head, slash, length = text.partition("/")
    if not slash or not re.fullmatch(r"0|[1-9][0-9]{0,2}", length):
        raise EvalError(f'network address parse error during conversion from string: netip.ParsePrefix("{text}"): no \'/\'')
    try:
        address = ip(head).address
        return CIDR(ipaddress.ip_interface(f"{address}/{length}"))
    except (ValueError, EvalError) as error:
        raise EvalError(f'network address parse error during conversion from string: netip.ParsePrefix("{text}"): {error}') from error


def _contains_ip(network: CIDR, other: Any) -> bool:
    address = other if isinstance(other, IP) else ip(other)
    return bool(address.address in network.interface.network)


def _contains_cidr(network: CIDR, other: Any) -> bool:
    inner = other if isinstance(other, CIDR) else cidr(other)
    if inner.interface.version != network.interface.version:
        return False
    return network.interface.network.prefixlen <= inner.interface.network.prefixlen and inner.interface.ip in network.interface.network


def _masked(network: CIDR) -> CIDR:
    return CIDR(ipaddress.ip_interface(str(network.interface.network)))


# -- formats -----------------------------------------------------------------------------------------------------------------
class Format(Opaque):
    """A named format."""

    __slots__ = ("check", "name")
    type_name = "kubernetes.NamedFormat"

    def __init__(self, name: str, check: Callable[[str], list[str]]) -> None:
        self.name = name
        self.check = check

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL_WORDS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character "
    "(e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN_WORDS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric "
    r"character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_1035_WORDS = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric "
    "character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
)


def _pattern(pattern: str, words: str, longest: int) -> Callable[[str], list[str]]:
    compiled_pattern = re.compile(pattern)

    def check(text: str) -> list[str]:
        found: list[str] = []
        if longest and len(text) > longest:
            found.append(f"must be no more than {longest} bytes")
        if compiled_pattern.fullmatch(text) is None:
            found.append(words)
        return found

    return check


def _prefix(check: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    # Names that are made from a prefix: a dash at the end does no harm.
    return lambda text: check(text[:-2] + "a" if text.endswith("-") and len(text) > 1 else text)


def _qualified_name(text: str) -> list[str]:
    from knarr.api.selectors import label_key_errors

    return list(label_key_errors(text))


def _label_value(text: str) -> list[str]:
    from knarr.api.selectors import label_value_errors

    return list(label_value_errors(text))


def _uri(text: str) -> list[str]:
    try:
        url(text)
    except EvalError as error:
        return [str(error)]
    return []


def _byte(text: str) -> list[str]:
    return [] if len(text) % 4 == 0 and re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", text) else ["invalid base64"]


def _date(text: str) -> list[str]:
    from datetime import date

    try:
        date.fromisoformat(text)
    except ValueError:
        return ["invalid date"]
    return [] if len(text) == 10 else ["invalid date"]


def _datetime(text: str) -> list[str]:
    from knarr.api.cel.values import parse_timestamp

    try:
        parse_timestamp(text)
    except EvalError:
        return ["invalid datetime"]
    return []


_label, _subdomain = _pattern(_LABEL, _LABEL_WORDS, 63), _pattern(rf"{_LABEL}(\.{_LABEL})*", _SUBDOMAIN_WORDS, 253)
_label_1035 = _pattern(r"[a-z]([-a-z0-9]*[a-z0-9])?", _1035_WORDS, 63)
_uuid = _pattern(r"[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}", "does not match the UUID format", 0)
FORMATS: dict[str, Format] = {
    name: Format(name, check)
    for name, check in zip(
        _FORMAT_NAMES,
        (
            _label, _subdomain, _label_1035, _prefix(_label), _prefix(_subdomain), _prefix(_label_1035), _qualified_name, _label_value, _uri, _uuid,
            _byte, _date, _datetime,
        ),
        strict=True,
    )
}  # fmt: skip


def _named_format(name: Any) -> Optional:
    found = FORMATS.get(name)
    return Optional(found) if found is not None else Optional(present=False)


def _validate(form: Format, text: Any) -> Optional:
    _text("validate", text)
    found = form.check(text)
    return Optional(found) if found else Optional(present=False)


# -- semantic versions -------------------------------------------------------------------------------------------------------
_SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?"
)


class Semver(Opaque):
    """A semantic version."""

    __slots__ = ("numbers", "pre", "text")
    type_name = "kubernetes.Semver"

    def __init__(self, text: str, match: re.Match[str]) -> None:
        self.text = text
        self.numbers = (int(match[1]), int(match[2]), int(match[3]))
        self.pre = match[4] or ""

    def key(self) -> tuple[tuple[int, ...], bool, tuple[tuple[int, int, str], ...]]:
        parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in self.pre.split(".")) if self.pre else ()
        return (self.numbers, not self.pre, parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Semver) and other.key() == self.key()

    def __hash__(self) -> int:
        return hash(self.key())


def semver(text: Any, normalize: bool = False) -> Semver:
    _text("semver", text)
    given = text
    if normalize:
        given = given.removeprefix("v")
        core, mark, rest = re.match(r"([0-9.]*)([-+]?)(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
        numbers = [number.lstrip("0") or "0" for number in core.split(".") if number] if core else []
        given = ".".join([*numbers, "0", "0"][: max(3, len(numbers))]) + mark + rest
    match = _SEMVER.fullmatch(given)
    if match is None:
        raise EvalError(f'could not parse "{text}" as a semantic version')
    return Semver(given, match)


def _compare_semver(left: Semver, right: Semver) -> int:
    a, b = left.key(), right.key()
    return (a > b) - (a < b)


def _is_canonical(text: Any) -> bool:
    return bool(str(ip(text)) == text)


def _global_unicast(value: IP) -> bool:
    address = value.address
    return not (
        address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local or str(address) == "255.255.255.255"
    )


def _string(value: Any) -> str:
    return to_string(value)


def _must(kind: type, name: str, function: Function) -> Function:
    def checked(target: Any, *args: Any) -> Any:
        if not isinstance(target, kind):
            raise no_overload(name, target, *args)
        return function(target, *args)

    return checked


def _ordered(name: str, quantity_test: Callable[[int], bool]) -> Function:
    def test(left: Any, right: Any) -> bool:
        if isinstance(left, Quantity) and isinstance(right, Quantity):
            return quantity_test(_sign(left.number - right.number))
        if isinstance(left, Semver) and isinstance(right, Semver):
            return quantity_test(_compare_semver(left, right))
        raise no_overload(name, left, right)

    return test


def _compare_to(left: Any, right: Any) -> int:
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        return _sign(left.number - right.number)
    if isinstance(left, Semver) and isinstance(right, Semver):
        return _compare_semver(left, right)
    raise no_overload("compareTo", left, right)


FUNCTIONS: dict[tuple[str, bool], Function] = {
    ("charAt", True): char_at, ("indexOf", True): index_of, ("lastIndexOf", True): last_index_of,
    ("lowerAscii", True): lambda text: str.translate(text, _LOWER), ("upperAscii", True): lambda text: str.translate(text, _UPPER),
    ("replace", True): replace, ("split", True): split, ("substring", True): substring, ("trim", True): lambda text: str.strip(text),
    ("reverse", True): lambda holder: holder[::-1], ("format", True): format_string, ("strings.quote", False): quote, ("join", True): join,
    ("isSorted", True): is_sorted, ("sum", True): total, ("min", True): extreme(-1, "min"), ("max", True): extreme(1, "max"),
    ("slice", True): list_slice, ("flatten", True): flatten, ("distinct", True): distinct,
    ("sort", True): lambda items: sorted(items, key=functools.cmp_to_key(compare)), ("lists.range", False): lambda count: list(range(count)),
    ("find", True): find, ("findAll", True): find_all,
    ("sets.contains", False): _subset, ("sets.equivalent", False): lambda a, b: _subset(a, b) and _subset(b, a),
    ("sets.intersects", False): lambda a, b: any(any(equals(x, y) for y in b) for x in a),
    ("quantity", False): quantity, ("isQuantity", False): succeeds(quantity), ("sign", True): _must(Quantity, "sign", lambda q: _sign(q.number)),
    ("isInteger", True): _must(Quantity, "isInteger", lambda q: q.number.denominator == 1 and -(1 << 63) <= q.number < 1 << 63),
    ("asInteger", True): _must(Quantity, "asInteger", _as_integer), ("asApproximateFloat", True): _must(Quantity, "asApproximateFloat", lambda q: float(q.number)),
    ("isGreaterThan", True): _ordered("isGreaterThan", lambda sign: sign > 0), ("isLessThan", True): _ordered("isLessThan", lambda sign: sign < 0),
    ("compareTo", True): _compare_to,
    ("add", True): _must(Quantity, "add", lambda a, b: Quantity(a.number + _number(b))), ("sub", True): _must(Quantity, "sub", lambda a, b: Quantity(a.number - _number(b))),
    ("url", False): url, ("isURL", False): succeeds(url), ("getScheme", True): _must(URL, "getScheme", lambda u: u.parts.scheme),
    ("getHost", True): _must(URL, "getHost", lambda u: u.parts.netloc.rpartition("@")[2]),
    ("getHostname", True): _must(URL, "getHostname", lambda u: u.parts.hostname or ""), ("getPort", True): _must(URL, "getPort", lambda u: str(u.parts.port or "")),
    ("getEscapedPath", True): _must(URL, "getEscapedPath", lambda u: u.parts.path),
    ("getQuery", True): _must(URL, "getQuery", lambda u: {unquote(key): values for key, values in parse_qs(u.parts.query, keep_blank_values=True).items()}),
    ("ip", False): ip, ("ip", True): ip, ("isIP", False): succeeds(ip), ("ip.isCanonical", False): _is_canonical,
    ("family", True): _must(IP, "family", lambda a: a.address.version), ("isUnspecified", True): _must(IP, "isUnspecified", lambda a: a.address.is_unspecified),
    ("isLoopback", True): _must(IP, "isLoopback", lambda a: a.address.is_loopback),
    ("isLinkLocalMulticast", True): _must(IP, "isLinkLocalMulticast", lambda a: a.address in ipaddress.ip_network("224.0.0.0/24" if a.address.version == 4 else "ff02::/16")),
    ("isLinkLocalUnicast", True): _must(IP, "isLinkLocalUnicast", lambda a: a.address.is_link_local),
    ("isGlobalUnicast", True): _must(IP, "isGlobalUnicast", _global_unicast),
    ("cidr", False): cidr, ("isCIDR", False): succeeds(cidr), ("containsIP", True): _must(CIDR, "containsIP", _contains_ip),
    ("containsCIDR", True): _must(CIDR, "containsCIDR", _contains_cidr), ("masked", True): _must(CIDR, "masked", _masked),
    ("prefixLength", True): _must(CIDR, "prefixLength", lambda c: c.interface.network.prefixlen), ("string", False): _string,
    ("format.named", False): _named_format, ("validate", True): _must(Format, "validate", _validate),
    **{(f"format.{name}", False): (lambda form: lambda: form)(FORMATS[name]) for name in _FORMAT_NAMES},
    ("semver", False): semver, ("isSemver", False): succeeds(semver), ("major", True): _must(Semver, "major", lambda v: v.numbers[0]),
    ("minor", True): _must(Semver, "minor", lambda v: v.numbers[1]), ("patch", True): _must(Semver, "patch", lambda v: v.numbers[2]),
    ("jsonpatch.escapeKey", False): lambda text: text.replace("~", "~0").replace("/", "~1"),
}  # fmt: skip

__all__ = ["DECLARATIONS", "FORMATS", "FUNCTIONS", "NAMESPACES", "type_name"]
