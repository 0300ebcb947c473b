"""Rules for single strings and numbers, as tuples of messages: empty means valid.

Used by all validation modules. Results are cached by value, since names, labels and images of a
cluster repeat. Source: apimachinery util/validation, api/validation/generic.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from knarr.api.selectors import label_key_errors, label_value_errors

__all__ = ["label_key_errors", "label_value_errors"]

Messages = tuple[str, ...]
Rule = Callable[[str], Messages]

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = _LABEL + r"(\." + _LABEL + ")*"
_UNDERSCORE_LABEL = "_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?"
_UNDERSCORE_SUBDOMAIN = _UNDERSCORE_LABEL + r"(\." + _UNDERSCORE_LABEL + ")*"
_LABEL_1035 = "[a-z]([-a-z0-9]*[a-z0-9])?"
_WILDCARD = r"\*\." + _SUBDOMAIN
_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"
_PERCENT = "[0-9]+%"
_HEADER = "[-A-Za-z0-9]+"
_ENV_NAME = "[-._a-zA-Z][-._a-zA-Z0-9]*"
_CONFIG_KEY = "[-._a-zA-Z0-9]+"
_HTTP_PATH = r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+"
_REASON = "[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"

_matches_label = re.compile(_LABEL).fullmatch
_matches_subdomain = re.compile(_SUBDOMAIN).fullmatch
_matches_underscore_subdomain = re.compile(_UNDERSCORE_SUBDOMAIN).fullmatch
_matches_label_1035 = re.compile(_LABEL_1035).fullmatch
_matches_wildcard = re.compile(_WILDCARD).fullmatch
_matches_identifier = re.compile(_IDENTIFIER).fullmatch
_matches_percent = re.compile(_PERCENT).fullmatch
_matches_header = re.compile(_HEADER).fullmatch
_matches_env_name = re.compile(_ENV_NAME).fullmatch
_matches_config_key = re.compile(_CONFIG_KEY).fullmatch
_matches_http_path = re.compile(_HTTP_PATH).fullmatch
_matches_reason = re.compile(_REASON).fullmatch
_matches_port_characters = re.compile("[-a-z0-9]+").fullmatch

EMPTY = "must be non-empty"
NEGATIVE = "must be greater than or equal to 0"
POSITIVE = "must be greater than 0"
IMMUTABLE = "field is immutable"


def regex_message(words: str, pattern: str, *examples: str) -> str:
    """Put together upstream's message for a pattern that did not match."""
    if not examples:
        return f"{words} (regex used for validation is '{pattern}')"
    listed = " or ".join(f"'{e}', " for e in examples)
    return f"{words} (e.g. {listed}regex used for validation is '{pattern}')"


def too_many_characters(limit: int) -> str:
    return f"must be no more than {limit} characters"


def range_message(low: int, high: int) -> str:
    return f"must be between {low} and {high}, inclusive"


def _length(value: str, limit: int) -> list[str]:
    return [too_many_characters(limit)] if len(value.encode()) > limit else []


_LABEL_MESSAGE = regex_message(
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character",
    _LABEL,
    "my-name",
    "123-abc",
)
_SUBDOMAIN_MESSAGE = regex_message(
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
    "and must start and end with an alphanumeric character",
    _SUBDOMAIN,
    "example.com",
)
_UNDERSCORE_SUBDOMAIN_MESSAGE = regex_message(
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', "
    "and must start and end with an alphanumeric character",
    _UNDERSCORE_SUBDOMAIN,
    "example.com",
)
_LABEL_1035_MESSAGE = regex_message(
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character",
    _LABEL_1035,
    "my-name",
    "abc-123",
)
_WILDCARD_MESSAGE = regex_message(
    "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case "
    "alphanumeric characters, '-' or '.' and end with an alphanumeric character",
    _WILDCARD,
    "*.example.com",
)


@lru_cache(maxsize=16384)
def dns_label(value: str) -> Messages:
    if len(value) <= 63 and _matches_label(value):
        return ()
    errors = _length(value, 63)
    if not _matches_label(value):
        errors.append("must not contain dots" if _matches_subdomain(value) else _LABEL_MESSAGE)
    return tuple(errors)


@lru_cache(maxsize=16384)
def dns_subdomain(value: str) -> Messages:
    if len(value) <= 253 and _matches_subdomain(value):
        return ()
    errors = _length(value, 253)
    if not _matches_subdomain(value):
        errors.append(_SUBDOMAIN_MESSAGE)
    return tuple(errors)


def dns_subdomain_with_underscore(value: str) -> Messages:
    errors = _length(value, 253)
    if not _matches_underscore_subdomain(value):
        errors.append(_UNDERSCORE_SUBDOMAIN_MESSAGE)
    return tuple(errors)


@lru_cache(maxsize=4096)
def dns_1035_label(value: str) -> Messages:
    errors = _length(value, 63)
    if not _matches_label_1035(value):
        errors.append(_LABEL_1035_MESSAGE)
    return tuple(errors)


def wildcard_subdomain(value: str) -> Messages:
    errors = _length(value, 253)
    if not _matches_wildcard(value):
        errors.append(_WILDCARD_MESSAGE)
    return tuple(errors)


def c_identifier(value: str) -> Messages:
    if _matches_identifier(value):
        return ()
    words = "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_'"
    return (regex_message(words, _IDENTIFIER, "my_name", "MY_NAME", "MyName"),)


@lru_cache(maxsize=1024)
def port_name(value: str) -> Messages:
    errors = _length(value, 15)
    if not _matches_port_characters(value):
        errors.append("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    if not any("a" <= c <= "z" for c in value):
        errors.append("must contain at least one letter (a-z)")
    if "--" in value:
        errors.append("must not contain consecutive hyphens")
    if value.startswith("-") or value.endswith("-"):
        errors.append("must not begin or end with a hyphen")
    return tuple(errors)


def percent(value: str) -> Messages:
    if _matches_percent(value):
        return ()
    words = "a valid percent string must be a numeric string followed by an ending '%'"
    return (regex_message(words, _PERCENT, "1%", "93%"),)


def http_header_name(value: str) -> Messages:
    if _matches_header(value):
        return ()
    return (regex_message("a valid HTTP header must consist of alphanumeric characters or '-'", _HEADER, "X-Header-Name"),)


def _parent_directory(value: str) -> list[str]:
    if value == ".":
        return ["must not be '.'"]
    if value == "..":
        return ["must not be '..'"]
    return ["must not start with '..'"] if value.startswith("..") else []


@lru_cache(maxsize=4096)
def config_key(value: str) -> Messages:
    errors = _length(value, 253)
    if not _matches_config_key(value):
        words = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
        errors.append(regex_message(words, _CONFIG_KEY, "key.name", "KEY_NAME", "key-name"))
    return tuple(errors + _parent_directory(value))


@lru_cache(maxsize=4096)
def env_name(value: str) -> Messages:
    """Environment variable names: any printable ASCII but "=" (RelaxedEnvironmentVariableValidation)."""
    errors = []
    if not value:
        errors.append("environment variable name must be non-empty")
    if any(not " " <= c <= "~" or c == "=" for c in value):
        errors.append("a valid environment variable name must consist only of printable ASCII characters other than '='")
    return tuple(errors)


def path_segment(value: str) -> Messages:
    """Names that may stand in a URL path; all object names must."""
    if "/" not in value and "%" not in value and value != "." and value != "..":
        return ()
    if value == ".":
        return ("may not be '.'",)
    if value == "..":
        return ("may not be '..'",)
    return path_segment_prefix(value)


def path_segment_prefix(value: str) -> Messages:
    return tuple(f"may not contain '{c}'" for c in "/%" if c in value)


def http_path(value: str) -> Messages:
    return () if _matches_http_path(value) else (regex_message("Invalid path", _HTTP_PATH),)


def condition_reason(value: str) -> Messages:
    if _matches_reason(value):
        return ()
    words = (
        "a condition reason must start with alphabetic character, optionally followed by a string of alphanumeric characters or '_,:', "
        "and must end with an alphanumeric character or '_'"
    )
    return (regex_message(words, _REASON, "my_name", "MY_NAME", "MyName", "ReasonA,ReasonB", "ReasonA:ReasonB"),)


def port_number(value: int) -> Messages:
    return () if 1 <= value <= 65535 else (range_message(1, 65535),)


def user_id(value: int) -> Messages:
    return () if 0 <= value <= 2**31 - 1 else (range_message(0, 2**31 - 1),)


group_id = user_id


def mask_trailing_dash(value: str) -> str:
    """generateName may end in a dash, as characters will follow it."""
    return value[:-2] + "a" if len(value) > 1 and value.endswith("-") else value
