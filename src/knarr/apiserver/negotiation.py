"""Content negotiation: from an Accept header to what is wanted, from a Content-Type to how a body is read.

Pure; the results are memoised by header text, since clients send the same few.

Source: apiserver endpoints/handlers/negotiation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

JSON = "application/json"
YAML = "application/yaml"
PROTOBUF = "application/vnd.kubernetes.protobuf"
SUPPORTED = (JSON, YAML, PROTOBUF)


class Clause(NamedTuple):
    """One acceptable answer: encoding, and the kind to turn the object into ("" for none)."""

    media_type: str
    as_kind: str = ""
    as_group: str = ""
    as_version: str = ""
    pretty: bool = False


@lru_cache(maxsize=512)
def parse_accept(accept: str) -> tuple[Clause, ...]:
    """Return the clauses of an Accept header that some endpoint could fulfil, the client's favourite first."""
    if not accept:
        return (Clause(JSON),)
    found: list[tuple[float, int, Clause]] = []
    for order, part in enumerate(accept.split(",")):
        pieces = part.split(";")
        media = pieces[0].strip().lower()
        parameters: dict[str, str] = {}
        for piece in pieces[1:]:
            key, _, value = piece.strip().partition("=")
            parameters[key.lower()] = value.strip('"')
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 1.0
        if media in ("*/*", "application/*", "*"):
            media = JSON
        elif media not in SUPPORTED:
            continue
        clause = Clause(media, parameters.get("as", ""), parameters.get("g", ""), parameters.get("v", ""), parameters.get("pretty") == "1")
        found.append((-quality, order, clause))
    found.sort(key=lambda entry: entry[:2])
    return tuple(clause for _, _, clause in found)


@lru_cache(maxsize=256)
def media_type(content_type: str) -> str:
    """Return the media type of a Content-Type header, lower-case, without parameters; JSON when there is none."""
    return content_type.partition(";")[0].strip().lower() or JSON
