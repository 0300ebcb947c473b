"""Routes that need more than host and path: conditions on a request, and changes to it and to its answer.

Role: `model` and `gateway` collect `Alternative`s for a place (kind, host, path); `settle` turns each place into one entry
of the proxy's maps: a plain one where host and path decide alone, else a reference to a list that the proxy's script
(`script`) walks through. Pure.
Invariants: a list ends with the first alternative without conditions; without one of its own it goes on with those of
shorter paths and wider hosts, so that a request that meets no condition is served as if the list were not there.
Source: gateway-api HTTPRouteRule (precedence of matches).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

if TYPE_CHECKING:
    from knarr.network.ingress.routes import Routes

Kind = Literal["exact", "prefix", "regex"]
Place = tuple[Kind, str, str]
"""Kind of path, host ("*" for any) or site of a Gateway's door (with a "/"), path (prefixes end in "/")."""
LISTED = "L"
"""Flag of a map entry whose target names a list."""
ONLY_PLAIN, ONLY_TLS = "P", "T"

Condition = tuple[str, str, str]
"""(what, name, value): "m" method, "h"/"H" header equals or matches, "q"/"Q" query parameter, "t" over TLS, "w" share in percent, "i" source addresses, "c" cookie equals, "p" the path has a prefix, "d" as "w", but of no weight in the order; with "!" in front it must not hold."""
Action = tuple[str, ...]
"""What to do: see `script`."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to serve a place.

    Attributes:
      only: ONLY_PLAIN or ONLY_TLS restricts it to one of the proxy's doors.
      rank: Among alternatives of a place with equally many conditions the lowest comes first.
    """

    target: str
    flags: str = ""
    argument: str = ""
    conditions: tuple[Condition, ...] = ()
    actions: tuple[Action, ...] = ()
    only: str = ""
    rank: tuple[str | int, ...] = ()

    def order(self) -> tuple[object, ...]:
        """Sorting key: the method counts most, then the number of headers, then of query parameters."""
        kinds = [what.lower().lstrip("!") for what, _name, _value in self.conditions if what != "d"]
        return "m" not in kinds, -kinds.count("h"), -kinds.count("q"), -len(kinds), self.rank

    def plain(self) -> str | None:
        """The map entry for one that needs no list; None when it does."""
        return None if self.conditions or self.actions else f"{self.target}|{self.only}{self.flags}|{self.argument}"

    def encode(self) -> str:
        """The text that the script reads."""
        conditions = self.conditions
        if self.only:
            conditions = (*conditions, ("t", "", "1" if self.only == ONLY_TLS else "0"))
        actions = self.actions
        if self.argument:
            actions = (*actions, ("path", self.argument))
        fields = (_fields(conditions), quote(self.target, safe=""), self.flags, _fields(actions))
        return "~".join(fields)


def _fields(items: Iterable[tuple[str, ...]]) -> str:
    return ",".join(":".join(quote(part, safe="").replace("~", "%7E") for part in item) for item in items)


def _merged(found: Iterable[Alternative]) -> list[Alternative]:
    """In order of precedence; twins that differ only in their door become one that has none."""
    out: list[Alternative] = []
    for item in sorted(found, key=Alternative.order):
        twin = next((i for i, known in enumerate(out) if replace(known, only="") == replace(item, only="")), None)
        if twin is None:
            out.append(item)
        elif out[twin].only != item.only:
            out[twin] = replace(item, only="")
    return out


def settle(routes: Routes) -> None:
    """Write all collected alternatives into the maps."""
    collected = {place: _merged(found) for place, found in routes.alternatives.items()}
    for (kind, host, path), found in collected.items():
        table = {"exact": routes.exact, "prefix": routes.prefix, "regex": routes.regex}[kind]
        key = f"{host}|{path}" if kind != "regex" else regex_key(host, path)
        chain = [*found, *_given(table.get(key))]
        entry = chain[0].plain()
        if entry is not None and (len(chain) == 1 or not chain[0].only):
            table[key] = entry
            continue
        chain += _wider(routes, collected, kind, host, path)
        last = next((i for i, item in enumerate(chain) if not item.conditions and not item.only), len(chain) - 1)
        text = ";".join(item.encode() for item in chain[: last + 1])
        name = "list/" + hashlib.blake2b(text.encode(), digest_size=9).hexdigest()
        routes.rules[name] = text
        routes.lists[kind, host, path] = name
    for (kind, host, path), name in routes.lists.items():
        table = {"exact": routes.exact, "prefix": routes.prefix, "regex": routes.regex}[kind]
        table[f"{host}|{path}" if kind != "regex" else regex_key(host, path)] = f"{name}|{LISTED}|"


def regex_key(host: str, pattern: str) -> str:
    """Key of the map of regular expressions, which are matched against "host|path"."""
    return f"^{re.escape(host)}[|]{pattern}"


def _given(entry: str | None) -> list[Alternative]:
    """A plain map entry as an alternative."""
    if entry is None:
        return []
    target, flags, argument = entry.split("|", 2)
    only = flags[:1] if flags[:1] in (ONLY_PLAIN, ONLY_TLS) else ""
    return [Alternative(target, flags[len(only) :], argument, only=only)]


def _wider(routes: Routes, collected: dict[Place, list[Alternative]], kind: Kind, host: str, path: str) -> Iterator[Alternative]:
    """What would serve the place if its own list were not there: shorter prefixes first of this host, then of wider ones."""
    # What an expression matches is known of a request only, so it is asked for the prefix.
    whole = path.rstrip("/") + "/" if kind != "regex" else None
    wild = "*" + host[host.find(".") :] if "." in host and not host.startswith("*") else ""
    # What belongs to a door of a Gateway is nobody else's.
    sites = (host,) if "/" in host else dict.fromkeys((host, *((wild,) if wild else ()), "*"))
    for site in sites:
        keys = {key for key in routes.prefix if key.startswith(f"{site}|")} | {f"{site}|{p}" for k, s, p in collected if (k, s) == ("prefix", site)}
        for key in sorted(keys, key=len, reverse=True):
            prefix = key[len(site) + 1 :]
            if (whole is None or whole.startswith(prefix)) and (kind, host, path) != ("prefix", site, prefix):
                asked: tuple[Condition, ...] = (("p", "", prefix),) if whole is None and prefix != "/" else ()
                for found in (*collected.get(("prefix", site, prefix), ()), *_given(routes.prefix.get(key))):
                    yield replace(found, conditions=(*found.conditions, *asked))
