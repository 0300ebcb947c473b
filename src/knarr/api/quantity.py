"""Resource quantities: exact numbers written as "500m", "1Gi", "1e3".

Used by decoding (canonical text), validation, quota, scheduler, kubelet. Numbers are exact fractions; every function
accepts what the wire carries: text, or a JSON number. Results are cached by text, as a cluster uses few distinct ones.

Source: apimachinery api/resource (quantity.go, suffix.go, amount.go).
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

DECIMAL_SI = "DecimalSI"
BINARY_SI = "BinarySI"
DECIMAL_EXPONENT = "DecimalExponent"

_MESSAGE_FORMAT = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
_MESSAGE_NUMERIC = "unable to parse numeric part of quantity"
_MESSAGE_SUFFIX = "unable to parse quantity's suffix"

_DECIMAL = {"": 0, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_DECIMAL_NAMES = {exponent: name for name, exponent in _DECIMAL.items()}
_BINARY_NAMES = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
_PATTERN = re.compile(r"([+-]?)0*([0-9]*)(\.([0-9]*))?([eEinumkKMGTP]*[-+]?[0-9]*)", re.ASCII)
_NANO = 10**9
_MAX_INT64 = 2**63 - 1


class QuantityError(ValueError):
    """The text is not a quantity; the message is upstream's."""


class Parsed(NamedTuple):
    """number: the exact value; form: one of the three formats; text: canonical text."""

    number: Fraction
    form: str
    text: str


@lru_cache(maxsize=8192)
def parse_full(text: str) -> Parsed:
    """Parse text into number, format and canonical text.

    Raises:
      QuantityError: not a quantity.
    """
    match = _PATTERN.fullmatch(text)
    if match is None or not text:
        raise QuantityError(_MESSAGE_FORMAT)
    sign, digits, dot, decimals, suffix = match.groups()
    digits_or_zero = digits or "0"
    decimals = decimals or ""
    exponent, form = _interpret(suffix)
    # Beyond these bounds the fraction itself would be gigabytes; upstream's arbitrary decimals are bounded by its scale type.
    if abs(exponent) > 4096 and form == DECIMAL_EXPONENT:
        raise QuantityError(_MESSAGE_SUFFIX)
    shifted = digits_or_zero + decimals
    if not digits and not dot and "0" not in text[: match.start(5)]:
        # Upstream's parser sees an empty number such as "m" or "-" as zero digits and lets the decimal parser refuse it.
        if suffix:
            raise QuantityError(_MESSAGE_NUMERIC)
        return Parsed(Fraction(0), DECIMAL_SI, "0")
    unscaled = int(shifted)
    scale = -len(decimals)
    if form == BINARY_SI:
        number = Fraction(unscaled * 2**exponent, 10**-scale)
    else:
        scale += exponent
        number = Fraction(unscaled * 10**scale) if scale >= 0 else Fraction(unscaled, 10**-scale)
    if number.denominator != 1 and _NANO % number.denominator:
        number = Fraction(-(-number.numerator * _NANO // number.denominator), _NANO)
    keep_text = _keeps_text(form, shifted, scale, exponent, bool(decimals), unscaled, len(digits_or_zero) + len(decimals))
    if form == BINARY_SI:
        number = min(number, Fraction(_MAX_INT64))
        if 0 < number < 1:
            form = DECIMAL_SI
    if sign == "-":
        number = -number
    return Parsed(number, form, text if keep_text else format(number, form))


def _keeps_text(form: str, shifted: str, scale: int, exponent: int, has_decimals: bool, unscaled: int, digits: int) -> bool:
    """Whether upstream's fast path takes the text as canonical without rewriting it."""
    if form == BINARY_SI:
        return (
            not has_decimals and 15 - digits - int(exponent * 3 / 10) - 1 >= 0 and exponent % 10 == 0 and unscaled & 7 != 0
        )
    return digits <= 18 and scale >= -9 and scale % 3 == 0 and not shifted.endswith("000") and shifted[0] != "0"


def _interpret(suffix: str) -> tuple[int, str]:
    exponent = _DECIMAL.get(suffix)
    if exponent is not None:
        return exponent, DECIMAL_SI
    exponent = _BINARY.get(suffix)
    if exponent is not None:
        return exponent, BINARY_SI
    if len(suffix) > 1 and suffix[0] in "eE":
        try:
            return int(suffix[1:]), DECIMAL_EXPONENT
        except ValueError:
            pass
    raise QuantityError(_MESSAGE_SUFFIX)


def _text(value: "str | int | float | Fraction") -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    return format(value)


def parse(value: "str | int | float | Fraction") -> Fraction:
    """The exact number of a quantity; fractions pass through.

    Raises:
      QuantityError: not a quantity.
    """
    if isinstance(value, Fraction):
        return value
    return parse_full(_text(value)).number


def canonical(value: "str | int | float") -> str:
    """The text that Go writes after reading this value: "0.5" gives "500m", "1024Mi" gives "1Gi".

    Raises:
      QuantityError: not a quantity.
    """
    return parse_full(_text(value).strip()).text


def format_of(value: "str | int | float") -> str:
    """DECIMAL_SI, BINARY_SI or DECIMAL_EXPONENT."""
    return parse_full(_text(value)).form


def value(quantity: "str | int | float | Fraction") -> int:
    """The whole number, rounded up (away from zero, as upstream rounds)."""
    return _value_of_text(quantity) if quantity.__class__ is str else _round_up(parse(quantity))


def cpu_millicores(quantity: "str | int | float | Fraction") -> int:
    """Thousandths, rounded up: "100m" gives 100, "2" gives 2000."""
    return _milli_of_text(quantity) if quantity.__class__ is str else milli_value(quantity)


@lru_cache(maxsize=4096)
def _milli_of_text(text: str) -> int:
    return milli_value(text)


@lru_cache(maxsize=4096)
def _value_of_text(text: str) -> int:
    return _round_up(parse(text))


def milli_value(quantity: "str | int | float | Fraction") -> int:
    """Thousandths, rounded up."""
    return _round_up(parse(quantity) * 1000)


def _round_up(number: Fraction) -> int:
    if number.denominator == 1:
        return number.numerator
    if number >= 0:
        return -(-number.numerator // number.denominator)
    return number.numerator // number.denominator


def round_up_milli(text: str) -> str:
    """Round up to thousandths, as upstream does with resource lists when it defaults them."""
    parsed = parse_full(text)
    thousandfold = parsed.number * 1000
    if thousandfold.denominator == 1:
        return parsed.text
    return format(Fraction(_round_up(thousandfold), 1000), parsed.form)


def add(left: str, right: str) -> str:
    """Canonical text of the sum, in the format of the left side (of the right if the left is zero)."""
    return _combine(parse_full(left), parse_full(right), 1)


def subtract(left: str, right: str) -> str:
    """Canonical text of the difference, formatted as `add` does."""
    return _combine(parse_full(left), parse_full(right), -1)


def _combine(left: Parsed, right: Parsed, sign: int) -> str:
    return format(left.number + sign * right.number, left.form if left.number else right.form)


def compare(left: "str | int | float", right: "str | int | float") -> int:
    """-1, 0 or 1."""
    difference = parse(left) - parse(right)
    return (difference > 0) - (difference < 0)


def format(number: "Fraction | int", form: str = DECIMAL_SI) -> str:
    """Canonical text of a number in a format: format(1024**3, BINARY_SI) gives "1Gi"."""
    number = Fraction(number)
    if not number:
        return "0"
    if form == BINARY_SI and (-1024 < number < 1024 or number.denominator != 1):
        form = DECIMAL_SI
    if form == BINARY_SI:
        whole, power = number.numerator, 0
        while whole % 1024 == 0 and power < 6:
            whole //= 1024
            power += 1
        return f"{whole}{_BINARY_NAMES[power]}"
    nanos = _round_up(number * _NANO)
    mantissa, exponent = nanos, -9
    while mantissa % 10 == 0:
        mantissa //= 10
        exponent += 1
    while exponent % 3:
        mantissa *= 10
        exponent -= 1
    if form == DECIMAL_EXPONENT:
        return f"{mantissa}e{exponent}" if exponent else str(mantissa)
    while exponent > 18:
        mantissa *= 1000
        exponent -= 3
    return f"{mantissa}{_DECIMAL_NAMES[exponent]}"
