"""The standard functions and operators: signatures for the checker, implementations for the evaluator.

Source: the CEL language definition, list of standard definitions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from knarr.api.cel.errors import EvalError
from knarr.api.cel.values import (
    INT_MAX,
    INT_MIN,
    UINT_MAX,
    Duration,
    Optional,
    Timestamp,
    TypeValue,
    UInt,
    compare,
    equals,
    is_number,
    no_overload,
    parse_duration,
    parse_timestamp,
    size,
    type_name,
)  # fmt: skip
from knarr.api.goregex import scoped_flags

Function = Callable[..., Any]

DECLARATIONS = """
_+_(int,int) int
_+_(uint,uint) uint
_+_(double,double) double
_+_(string,string) string
_+_(bytes,bytes) bytes
_+_(list(A),list(A)) list(A)
_+_(duration,duration) duration
_+_(timestamp,duration) timestamp
_+_(duration,timestamp) timestamp
_-_(int,int) int
_-_(uint,uint) uint
_-_(double,double) double
_-_(duration,duration) duration
_-_(timestamp,timestamp) duration
_-_(timestamp,duration) timestamp
_*_(int,int) int
_*_(uint,uint) uint
_*_(double,double) double
_/_(int,int) int
_/_(uint,uint) uint
_/_(double,double) double
_%_(int,int) int
_%_(uint,uint) uint
-_(int) int
-_(double) double
!_(bool) bool
_==_(A,A) bool
_!=_(A,A) bool
@in(A,list(A)) bool
@in(A,map(A,B)) bool
_[_](list(A),int) A
_[_](list(A),uint) A
_[_](map(A,B),A) B
_[_](optional(map(A,B)),A) optional(B)
_[_](optional(list(A)),int) optional(A)
_[?_](list(A),int) optional(A)
_[?_](map(A,B),A) optional(B)
_[?_](optional(map(A,B)),A) optional(B)
_[?_](optional(list(A)),int) optional(A)
size(string) int
size(bytes) int
size(list(A)) int
size(map(A,B)) int
string.size() int
bytes.size() int
list(A).size() int
map(A,B).size() int
string.contains(string) bool
string.startsWith(string) bool
string.endsWith(string) bool
string.matches(string) bool
matches(string,string) bool
bool(bool) bool
bool(string) bool
bytes(bytes) bytes
bytes(string) bytes
double(double) double
double(int) double
double(uint) double
double(string) double
int(int) int
int(uint) int
int(double) int
int(string) int
int(timestamp) int
int(duration) int
uint(uint) uint
uint(int) uint
uint(double) uint
uint(string) uint
string(string) string
string(bool) string
string(bytes) string
string(double) string
string(int) string
string(uint) string
string(timestamp) string
string(duration) string
duration(string) duration
duration(duration) duration
duration(int) duration
timestamp(string) timestamp
timestamp(timestamp) timestamp
timestamp(int) timestamp
type(A) type(A)
dyn(A) dyn
timestamp.getFullYear() int
timestamp.getFullYear(string) int
timestamp.getMonth() int
timestamp.getMonth(string) int
timestamp.getDate() int
timestamp.getDate(string) int
timestamp.getDayOfMonth() int
timestamp.getDayOfMonth(string) int
timestamp.getDayOfWeek() int
timestamp.getDayOfWeek(string) int
timestamp.getDayOfYear() int
timestamp.getDayOfYear(string) int
timestamp.getHours() int
timestamp.getHours(string) int
timestamp.getMinutes() int
timestamp.getMinutes(string) int
timestamp.getSeconds() int
timestamp.getSeconds(string) int
timestamp.getMilliseconds() int
timestamp.getMilliseconds(string) int
duration.getHours() int
duration.getMinutes() int
duration.getSeconds() int
duration.getMilliseconds() int
optional.of(A) optional(A)
optional.ofNonZeroValue(A) optional(A)
optional.none() optional(A)
optional(A).hasValue() bool
optional(A).value() A
optional(A).or(optional(A)) optional(A)
optional(A).orValue(A) A
""" + "\n".join(
    f"_{operator}_({kind},{kind}) bool" for operator in ("<", "<=", ">", ">=")
    for kind in ("int", "uint", "double", "string", "bytes", "bool", "duration", "timestamp")
) + "\n" + "\n".join(
    f"_{operator}_({left},{right}) bool" for operator in ("<", "<=", ">", ">=")
    for left in ("int", "uint", "double") for right in ("int", "uint", "double") if left != right
)  # fmt: skip
NAMESPACES = frozenset({"optional"})


# -- arithmetic ------------------------------------------------------------------------------------------------------------
def _kind(value: Any) -> str:
    return type_name(value)


def _checked(kind: str, value: int) -> Any:
    if kind == "uint":
        if not 0 <= value <= UINT_MAX:
            raise EvalError("unsigned integer overflow")
        return UInt(value)
    if not INT_MIN <= value <= INT_MAX:
        raise EvalError("integer overflow")
    return value


def add(left: Any, right: Any) -> Any:
    a, b = _kind(left), _kind(right)
    if a == b:
        if a in ("int", "uint"):
            return _checked(a, int(left) + int(right))
        if a in ("double", "string", "bytes"):
            return left + right
        if a == "list":
            return [*left, *right]
        if isinstance(left, Duration):
            return Duration(_bounded(int(left) + int(right), "duration"))
    if isinstance(left, Timestamp) and isinstance(right, Duration):
        return _moment(int(left) + int(right))
    if isinstance(left, Duration) and isinstance(right, Timestamp):
        return _moment(int(left) + int(right))
    raise no_overload("_+_", left, right)


def subtract(left: Any, right: Any) -> Any:
    a, b = _kind(left), _kind(right)
    if a == b:
        if a in ("int", "uint"):
            return _checked(a, int(left) - int(right))
        if a == "double":
            return left - right
        if isinstance(left, Duration | Timestamp):
            return Duration(_bounded(int(left) - int(right), "duration"))
    if isinstance(left, Timestamp) and isinstance(right, Duration):
        return _moment(int(left) - int(right))
    raise no_overload("_-_", left, right)


def _bounded(value: int, word: str) -> int:
    if not INT_MIN <= value <= INT_MAX:
        raise EvalError(f"{word} overflow")
    return value


_OLDEST, _NEWEST = -62135596800 * 10**9, 253402300800 * 10**9


def _moment(nanos: int) -> Timestamp:
    if not _OLDEST <= nanos < _NEWEST:
        raise EvalError("timestamp overflow")
    return Timestamp(nanos)


def multiply(left: Any, right: Any) -> Any:
    a, b = _kind(left), _kind(right)
    if a == b and a in ("int", "uint"):
        return _checked(a, int(left) * int(right))
    if a == b == "double":
        return left * right
    raise no_overload("_*_", left, right)


def divide(left: Any, right: Any) -> Any:
    a, b = _kind(left), _kind(right)
    if a == b and a in ("int", "uint"):
        if right == 0:
            raise EvalError("division by zero")
        quotient = abs(int(left)) // abs(int(right))
        return _checked(a, quotient if (left < 0) == (right < 0) else -quotient)
    if a == b == "double":
        if right == 0:
            return math.nan if left == 0 or left != left else math.copysign(math.inf, left) * math.copysign(1, right)
        return left / right
    raise no_overload("_/_", left, right)


def modulo(left: Any, right: Any) -> Any:
    a, b = _kind(left), _kind(right)
    if a == b and a in ("int", "uint"):
        if right == 0:
            raise EvalError("modulus by zero")
        rest = abs(int(left)) % abs(int(right))
        return _checked(a, rest if left >= 0 else -rest)
    raise no_overload("_%_", left, right)


def negate(value: Any) -> Any:
    kind = _kind(value)
    if kind == "int":
        return _checked("int", -value)
    if kind == "double":
        return -value
    raise no_overload("-_", value)


def logical_not(value: Any) -> bool:
    if not isinstance(value, bool):
        raise no_overload("!_", value)
    return not value


# -- containers ------------------------------------------------------------------------------------------------------------
def contains_item(item: Any, container: Any) -> bool:
    if isinstance(container, Mapping):
        return _find_key(container, item) is not _MISSING
    if isinstance(container, list | tuple):
        return any(equals(item, other) for other in container)
    raise no_overload("@in", item, container)


_MISSING = object()


def _find_key(container: Mapping[Any, Any], key: Any) -> Any:
    if isinstance(key, bool):
        # Python takes 1 for True as a key.
        return next((value for other, value in container.items() if other is key), _MISSING)
    try:
        found = container.get(key, _MISSING)
    except TypeError:
        return _MISSING
    return found


def index(container: Any, key: Any) -> Any:
    if isinstance(container, Optional):
        return optional_index(container, key)
    if isinstance(container, Mapping):
        found = _find_key(container, key)
        if found is _MISSING:
            raise EvalError(f"no such key: {shown(key)}")
        return found
    if isinstance(container, list | tuple):
        if not is_number(key) or int(key) != key:
            raise no_overload("_[_]", container, key)
        if not 0 <= key < len(container):
            raise EvalError(f"index out of bounds: {int(key)}")
        return container[int(key)]
    raise no_overload("_[_]", container, key)


def optional_index(container: Any, key: Any) -> Optional:
    if isinstance(container, Optional):
        if not container.present:
            return container
        container = container.value
    try:
        return Optional(index(container, key))
    except EvalError as error:
        if str(error).startswith(("no such key", "index out of bounds")):
            return Optional(present=False)
        raise


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


# -- strings ---------------------------------------------------------------------------------------------------------------
def _strings(function: str, *args: Any) -> None:
    if not all(isinstance(arg, str) for arg in args):
        raise no_overload(function, *args)


def contains(text: Any, part: Any) -> bool:
    _strings("contains", text, part)
    return part in text


def starts_with(text: Any, part: Any) -> bool:
    _strings("startsWith", text, part)
    return bool(text.startswith(part))


def ends_with(text: Any, part: Any) -> bool:
    _strings("endsWith", text, part)
    return bool(text.endswith(part))


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """Compile RE2 syntax with Python's engine: what RE2 does not have is refused, what is spelt otherwise is translated."""
    if re.search(r"\\[1-9]|\(\?[=!>]|\(\?<[=!]|\(\?P=|\(\?\(|[*+?}]\+", re.sub(r"\\\\|\[[^\]]*\]", "", pattern)):
        raise EvalError(f"error parsing regexp: invalid or unsupported Perl syntax: `{pattern}`")
    translated = scoped_flags(pattern)
    translated = translated.replace("(?<", "(?P<") if "(?<" in translated else translated
    translated = re.sub(r"\\z", r"\\Z", translated)
    for name, body in (("alpha", "a-zA-Z"), ("digit", "0-9"), ("alnum", "a-zA-Z0-9"), ("lower", "a-z"), ("upper", "A-Z"), ("space", r"\s"), ("punct", r"!-/:-@\[-`{-~"), ("xdigit", "0-9A-Fa-f"), ("word", r"\w")):
        translated = translated.replace(f"[:{name}:]", body)
    translated = re.sub(r"(?<!\\)\$(?=$|\)|\|)", r"\\Z", translated)
    try:
        return re.compile(translated, re.ASCII)
    except re.error as error:
        raise EvalError(f"error parsing regexp: {error}: `{pattern}`") from error


def matches(text: Any, pattern: Any) -> bool:
    _strings("matches", text, pattern)
    return compiled(pattern).search(text) is not None


# -- conversions -----------------------------------------------------------------------------------------------------------
def to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise no_overload("int", value)
    if isinstance(value, Timestamp):
        return int(value) // 1_000_000_000
    if isinstance(value, int):
        return int(_checked("int", int(value)))
    if isinstance(value, float):
        if value != value or not -9.223372036854776e18 < value < 9.223372036854776e18:
            raise EvalError("integer overflow")
        return int(value)
    if isinstance(value, str):
        if re.fullmatch(r"[+-]?[0-9]+", value):
            return int(_checked("int", int(value)))
        raise EvalError(f'strconv.ParseInt: parsing "{value}": invalid syntax')
    raise no_overload("int", value)


def to_uint(value: Any) -> UInt:
    if isinstance(value, bool | Duration | Timestamp):
        raise no_overload("uint", value)
    if isinstance(value, int):
        return UInt(_checked("uint", int(value)))
    if isinstance(value, float):
        if value != value or not 0 <= value < 1.8446744073709552e19:
            raise EvalError("unsigned integer overflow")
        return UInt(int(value))
    if isinstance(value, str):
        if re.fullmatch(r"[0-9]+", value):
            return UInt(_checked("uint", int(value)))
        raise EvalError(f'strconv.ParseUint: parsing "{value}": invalid syntax')
    raise no_overload("uint", value)


def to_double(value: Any) -> float:
    if is_number(value):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise EvalError(f'strconv.ParseFloat: parsing "{value}": invalid syntax') from error
    raise no_overload("double", value)


def to_string(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Duration | Timestamp):
        return str(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return double_text(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise EvalError("invalid UTF-8 in bytes, cannot convert to string") from error
    if type_name(value) in _TEXT_TYPES:
        return str(value)
    raise no_overload("string", value)


_TEXT_TYPES = frozenset({"net.IP", "net.CIDR"})


def double_text(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if value == int(value) and abs(value) < 1e21:
        return str(int(value))
    return repr(value)


def to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise no_overload("bytes", value)


def to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value in ("1", "t", "T", "true", "TRUE", "True"):
            return True
        if value in ("0", "f", "F", "false", "FALSE", "False"):
            return False
        raise EvalError(f'strconv.ParseBool: parsing "{value}": invalid syntax')
    raise no_overload("bool", value)


def to_duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    if isinstance(value, str):
        return parse_duration(value)
    if type_name(value) == "int":
        return Duration(value)
    raise no_overload("duration", value)


def to_timestamp(value: Any) -> Timestamp:
    if isinstance(value, Timestamp):
        return value
    if isinstance(value, str):
        return parse_timestamp(value)
    if type_name(value) == "int":
        return _moment(value * 1_000_000_000)
    raise no_overload("timestamp", value)


# -- time --------------------------------------------------------------------------------------------------------------------
def _local(moment: Any, zone: Any = None) -> datetime:
    if not isinstance(moment, Timestamp):
        raise no_overload("getFullYear", moment)
    utc = moment.datetime()
    if zone is None:
        return utc
    offset = re.fullmatch(r"([+-]?)(\d\d):(\d\d)", zone) if isinstance(zone, str) else None
    if offset is not None:
        minutes = int(offset[2]) * 60 + int(offset[3])
        return utc.astimezone(timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes)))
    try:
        return utc.astimezone(ZoneInfo(zone))
    except (ZoneInfoNotFoundError, ValueError, TypeError) as error:
        raise EvalError(f"unknown time zone {zone}") from error


def _of_time(pick: Callable[[datetime], int], per_duration: int = 0) -> Function:
    def function(value: Any, zone: Any = None) -> int:
        if isinstance(value, Duration) and per_duration:
            whole = abs(int(value)) // per_duration
            return whole if value >= 0 else -whole
        return pick(_local(value, zone))

    return function


def _milliseconds(value: Any, zone: Any = None) -> int:
    if isinstance(value, Duration):
        return int(abs(int(value)) // 1_000_000 * (1 if value >= 0 else -1))
    return _local(value, zone).microsecond // 1000


# -- optionals ---------------------------------------------------------------------------------------------------------------
def optional_value(option: Any) -> Any:
    if not option.present:
        raise EvalError("optional.none() dereference")
    return option.value


def _of_non_zero(value: Any) -> Optional:
    from knarr.api.cel.values import is_zero

    return Optional(present=False) if is_zero(value) else Optional(value)


FUNCTIONS: dict[tuple[str, bool], Function] = {
    ("_+_", False): add, ("_-_", False): subtract, ("_*_", False): multiply, ("_/_", False): divide, ("_%_", False): modulo,
    ("-_", False): negate, ("!_", False): logical_not, ("_==_", False): equals, ("_!=_", False): lambda a, b: not equals(a, b),
    ("_<_", False): lambda a, b: compare(a, b) < 0, ("_<=_", False): lambda a, b: compare(a, b) <= 0,
    ("_>_", False): lambda a, b: compare(a, b) > 0, ("_>=_", False): lambda a, b: compare(a, b) >= 0,
    ("@in", False): contains_item, ("_[_]", False): index, ("_[?_]", False): optional_index,
    ("size", False): size, ("size", True): size, ("contains", True): contains, ("startsWith", True): starts_with, ("endsWith", True): ends_with,
    ("matches", True): matches, ("matches", False): matches,
    ("int", False): to_int, ("uint", False): to_uint, ("double", False): to_double, ("string", False): to_string, ("bytes", False): to_bytes,
    ("bool", False): to_bool, ("duration", False): to_duration, ("timestamp", False): to_timestamp,
    ("type", False): lambda value: TypeValue(type_name(value)), ("dyn", False): lambda value: value,
    ("getFullYear", True): _of_time(lambda t: t.year), ("getMonth", True): _of_time(lambda t: t.month - 1),
    ("getDate", True): _of_time(lambda t: t.day), ("getDayOfMonth", True): _of_time(lambda t: t.day - 1),
    ("getDayOfWeek", True): _of_time(lambda t: t.isoweekday() % 7), ("getDayOfYear", True): _of_time(lambda t: t.timetuple().tm_yday - 1),
    ("getHours", True): _of_time(lambda t: t.hour, 3_600_000_000_000), ("getMinutes", True): _of_time(lambda t: t.minute, 60_000_000_000),
    ("getSeconds", True): _of_time(lambda t: t.second, 1_000_000_000), ("getMilliseconds", True): _milliseconds,
    ("optional.of", False): Optional, ("optional.none", False): lambda: Optional(present=False),
    ("optional.ofNonZeroValue", False): _of_non_zero, ("hasValue", True): lambda option: option.present, ("value", True): optional_value,
    ("or", True): lambda option, other: option if option.present else other,
    ("orValue", True): lambda option, other: option.value if option.present else other,
}  # fmt: skip
