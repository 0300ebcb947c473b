"""HAProxy's configuration, rendered from where it listens and from nothing that changes with a route. Pure.

Role: `haproxy` writes it and starts the child with it. Every look-up goes through maps, whose content `haproxy` changes in the
running child; servers that speak TLS in a certain way, and authorities, are added to it at run time, and stand in the
configuration for the next start only.
Invariants: host first, then path. Who comes to a Gateway's own address (a door) is looked up among that Gateway's names only.
TLS of Gateways that is not looked into comes to a door of its own (`tls`), which hands on to the others what is to be decrypted.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knarr.network.ingress.alternatives import LISTED, ONLY_PLAIN, ONLY_TLS
from knarr.network.ingress.annotations import AS_ASKED, HTTP2_BACKEND, HTTPS_BACKEND, MOVED, TO_HTTPS
from knarr.network.ingress.forwarding import CONNECT_SECONDS
from knarr.network.ingress.routes import NOWHERE, PASS, REFUSE, TERMINATE, TO_HTTPS_301, TO_HTTPS_302, Server

LIMITS = {"rps": ("(5s)", "http_req_rate"), "rpm": ("(60s)", "http_req_rate"), "connections": ("", "conn_cur")}
"""Kinds of limits: the table's window and what it counts."""
KINDS = ("http", "https", "streams")
"""Of listening sockets: the two usual ones, and one for TLS of Gateways."""
SECURE, VERIFIED = "secure", "verified"
"""Sections with servers that speak TLS: as the backend wants, and each in a way of its own."""

_COMMON = """  http-request set-header X-Forwarded-For %[src]
  http-request set-dst var(txn.address)
  http-request set-dst-port var(txn.port)
  http-request set-timeout server var(txn.timeout) if { var(txn.timeout) -m found }
  http-request disable-l7-retry if { var(txn.timeout) -m found } or { var(txn.once) -m found }
  retry-on conn-failure empty-response response-timeout 0rtt-rejected
  http-reuse safe"""
"""What every section says through which requests leave."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the proxy listens."""

    addresses: tuple[str, ...] = ("*",)
    http_port: int = 80
    https_port: int = 443
    threads: int = 2


def _door(folder: Path, rule: str) -> str:
    """Find out whether somebody came to a Gateway's own address."""
    return f"""  {rule} set-var(txn.entry) dst_port
  {rule} set-var(txn.door) dst,concat(:,txn.entry),map_str({folder}/doors.map)"""


def _site(folder: Path, rule: str, host: str = "host", site: str = "site") -> str:
    """Find what stands for a host name (a variable) in the maps, behind a door."""
    named = f"txn.named_{site}"
    return f"""  {rule} set-var({named}) var(txn.door),concat(,txn.{host}) if {{ var(txn.door) -m found }} {{ var(txn.{host}) -m found }}
  {rule} set-var(txn.{site}) var({named}),map_str({folder}/hosts.map) if {{ var({named}) -m found }}
  {rule} set-var(txn.{site}) var({named}),map_reg({folder}/patterns.map) if {{ var({named}) -m found }} !{{ var(txn.{site}) -m found }}
  {rule} set-var(txn.{site}) var(txn.door),concat(*) if {{ var(txn.door) -m found }} !{{ var(txn.{site}) -m found }}"""


def _misdirected(folder: Path) -> str:
    """Who opened a connection for a name of one listener and asks on it for a name of another is told to open another."""
    return f"""  http-request set-var(txn.sni) ssl_fc_sni,lower if {{ var(txn.door) -m found }}
{_site(folder, "http-request", "sni", "opened")}
  http-request set-var(txn.opened_by) var(txn.opened),map_str({folder}/owners.map) if {{ var(txn.sni) -m len gt 0 }}
  http-request set-var(txn.owner) var(txn.site),map_str({folder}/owners.map) if {{ var(txn.opened_by) -m found }}
  http-request return status 421 content-type text/plain string "421 Misdirected Request" if {{ var(txn.owner) -m found }} !{{ var(txn.owner),strcmp(txn.opened_by) eq 0 }}"""


def _route(folder: Path, *, tls: bool) -> str:
    """Find the rule of a request: host first, then path."""
    misdirected = "\n" + _misdirected(folder) if tls else ""
    return f"""  http-request set-var(txn.host) req.hdr(host),field(1,:),lower
{_door(folder, "http-request")}
{_site(folder, "http-request")}{misdirected}
  http-request set-var(txn.site) var(txn.host),map_str({folder}/hosts.map) unless {{ var(txn.site) -m found }}
  http-request set-var(txn.wild) var(txn.host),regsub(^[^.]*,*) unless {{ var(txn.site) -m found }}
  http-request set-var(txn.site) var(txn.wild),map_str({folder}/hosts.map) unless {{ var(txn.site) -m found }}
  http-request set-var(txn.site) str(*) unless {{ var(txn.site) -m found }}
  http-request set-var(txn.path) path
  http-request set-var(txn.exact) var(txn.site),concat(|,txn.path)
  http-request set-var(txn.prefix) var(txn.exact),concat(/)
  http-request set-var(txn.rule) var(txn.exact),map_str({folder}/exact.map)
  http-request set-var(txn.rule) var(txn.exact),map_reg({folder}/regex.map) unless {{ var(txn.rule) -m found }}
  http-request set-var(txn.rule) var(txn.prefix),map_beg({folder}/prefix.map) unless {{ var(txn.rule) -m found }}
  http-request set-var(txn.spare) str(*),concat(|,txn.path),concat(/) unless {{ var(txn.door) -m found }}
  http-request set-var(txn.rule) var(txn.spare),map_beg({folder}/prefix.map) unless {{ var(txn.rule) -m found }}
  http-request return status 404 content-type text/plain string "default backend - 404" unless {{ var(txn.rule) -m found }}
  http-request set-var(txn.target) var(txn.rule),field(1,|)
  http-request set-var(txn.flags) var(txn.rule),field(2,|)
  http-request set-var(txn.argument) var(txn.rule),field(3,|)
  http-request set-header X-Forwarded-Host %[req.hdr(host)]
  http-request lua.choose if {{ var(txn.flags) -m sub {LISTED} }}
{_limits()}
  http-request wait-for-body time 2s if {{ var(txn.mirror) -m found }}
  http-request lua.mirror if {{ var(txn.mirror) -m found }}
  http-response set-header Server knarr unless {{ res.hdr(Server) -m found }}
  http-response lua.stand_in if {{ var(txn.errors) -m found }}
  http-response lua.answered if {{ var(txn.after) -m found }}"""


def _limits() -> str:
    """Refuse who comes too often; the script has set what is counted and how much is allowed."""
    lines = []
    for counter, (kind, (_window, measure)) in enumerate(LIMITS.items()):
        found = f"{{ var(txn.{kind}_key) -m found }}"
        lines += [
            f"  http-request track-sc{counter} var(txn.{kind}_key) table {kind} if {found}",
            f"  http-request deny deny_status 503 if {found} {{ sc_{measure}({counter}),sub(txn.{kind}_limit) gt 0 }}",
        ]
    return "\n".join(lines)


def _tables() -> str:
    return "\n".join(
        f"backend {kind}\n  stick-table type string len 64 size 100k expire {10 if window.endswith('s)') else 70}s store {measure}{window}"
        for kind, (window, measure) in LIMITS.items()
    )


def _place(folder: Path, rule: str) -> str:
    """Draw one of a target's places."""
    return f"""  {rule} set-var(txn.index) rand,mod(txn.count) unless {{ var(txn.place) -m found }}
  {rule} set-var(txn.place) var(txn.target),concat(\\#,txn.index),map_str({folder}/targets.map) unless {{ var(txn.place) -m found }}
  {rule} set-var(txn.address) var(txn.place),field(1,|)
  {rule} set-var(txn.port) var(txn.place),field(2,|)"""


def _forward(folder: Path) -> str:
    """Send a request to where its rule says."""
    return f"""  http-request redirect location %[var(txn.argument)] code 301 if {{ var(txn.flags) -m sub {MOVED} }}
  http-request set-var(txn.count) var(txn.target),map_str({folder}/targets.map,0),add(0)
  http-request return status 503 content-type text/plain string "no endpoints" if {{ var(txn.count) -m int 0 }}
{_place(folder, "http-request")}
  http-request return status 500 content-type text/plain string "no such backend" if {{ var(txn.address) -m str {NOWHERE[0]} }}
  http-request set-path %[var(txn.argument)] if {{ var(txn.argument) -m len gt 0 }}
  http-request set-header X-Real-IP %[src]
  http-request set-header X-Forwarded-Port %[dst_port]
  http-request set-var(txn.kind) str({SECURE}) if {{ var(txn.flags) -m sub {HTTPS_BACKEND} }}
  http-request set-var(txn.kind) str({SECURE}) if {{ var(txn.flags) -m sub {AS_ASKED} }} {{ ssl_fc }}
  http-request set-var(txn.kind) str(http2) if !{{ var(txn.kind) -m found }} {{ var(txn.flags) -m sub {HTTP2_BACKEND} }}
  use_backend {VERIFIED} if {{ var(txn.server) -m found }}
  use_backend %[var(txn.kind)]%[var(txn.variant)] if {{ var(txn.kind) -m found }}
  use_backend plain%[var(txn.variant)] if {{ var(txn.variant) -m found }}
  default_backend plain"""


def _streams(folder: Path) -> str:
    """Sections for TLS that goes on as it is, or decrypted but not looked into."""
    look_up = f"""{_door(folder, "tcp-request content")}
{_site(folder, "tcp-request content")}
  tcp-request content set-var(txn.wild) var(txn.host),regsub(^[^.]*,*) if !{{ var(txn.door) -m found }} {{ var(txn.host) -m found }}
  tcp-request content set-var(txn.stream) var(txn.site),map_str({folder}/streams.map)
  tcp-request content set-var(txn.stream) var(txn.host),map_str({folder}/streams.map) if {{ var(txn.wild) -m found }}
  tcp-request content set-var(txn.stream) var(txn.wild),map_str({folder}/streams.map) if {{ var(txn.wild) -m found }} !{{ var(txn.stream) -m found }}
  tcp-request content set-var(txn.flags) var(txn.stream),field(1,|)
  tcp-request content set-var(txn.target) var(txn.stream),field(2,|)"""
    return f"""  timeout client 1h
  tcp-request inspect-delay 5s
  tcp-request content reject unless {{ req.ssl_hello_type 1 }}
  tcp-request content set-var(txn.host) req.ssl_sni,lower
{look_up}
  tcp-request content reject if {{ var(txn.flags) -m str {REFUSE} }}
  use_backend streams if {{ var(txn.flags) -m str {PASS} }}
  use_backend to_decrypted if {{ var(txn.flags) -m str {TERMINATE} }}
  default_backend to_https
frontend decrypted
  mode tcp
  timeout client 1h
  bind unix@{folder}/decrypted.sock mode 600 accept-proxy ssl crt-list {folder}/certs.list
  tcp-request content set-var(txn.host) ssl_fc_sni,lower
{look_up}
  default_backend streams
backend to_decrypted
  mode tcp
  timeout server 1h
  server decrypted unix@{folder}/decrypted.sock send-proxy-v2
backend to_https
  mode tcp
  timeout server 1h
  server https unix@{folder}/https.sock send-proxy-v2
backend streams
  mode tcp
  timeout server 1h
  tcp-request content set-var(txn.count) var(txn.target),map_str({folder}/targets.map,0),add(0)
  tcp-request content reject if {{ var(txn.count) -m int 0 }}
{_place(folder, "tcp-request content")}
  tcp-request content reject if {{ var(txn.address) -m str {NOWHERE[0]} }}
  tcp-request content set-dst var(txn.address)
  tcp-request content set-dst-port var(txn.port)
  server any 0.0.0.0:0
"""


def server_line(folder: Path, server: Server) -> str:
    """The arguments of a server that speaks TLS."""
    words = ["0.0.0.0:0", "weight", "0", "ssl", "alpn", "h2,http/1.1", "sni", f"str({server.sni})" if server.sni else "req.hdr(host),field(1,:)"]
    if server.authority:
        words += ["verify", "required", "ca-file", server.authority if server.authority.startswith("@") else f"{folder}/{server.authority}"]
        words += ["verifyhost", server.name] if server.name else []
    else:
        words += ["verify", "none"]
    if server.certificate:
        words += ["crt", f"{folder}/{server.certificate}"]
    return " ".join(words)


def _verified(folder: Path, servers: Mapping[str, Server]) -> str:
    """The section with servers that speak TLS in a way of their own: the one that the script chose, or none. Their weight keeps them from being drawn."""
    own = "".join(f"  server {name} {server_line(folder, server)}\n" for name, server in sorted(servers.items()))
    return f"""backend {VERIFIED}
{_COMMON}
  use-server %[var(txn.server)] if {{ var(txn.server) -m found }}
{own}"""


def _backends(suffix: str, special: str) -> str:
    """The sections that requests leave through: as they are, with TLS, with HTTP/2; with what is special about those of a suffix."""
    common = special + _COMMON
    return f"""backend plain{suffix}
{common}
  server any 0.0.0.0:0
backend {SECURE}{suffix}
{common}
  server any 0.0.0.0:0 ssl verify none sni req.hdr(host),field(1,:) alpn h2,http/1.1
backend http2{suffix}
{common}
  server any 0.0.0.0:0 proto h2
"""


def render(folder: Path, listen: Listen, sockets: Mapping[str, Sequence[int]], servers: Mapping[str, Server], *, passing: bool) -> str:
    """The configuration; but for the servers it never changes while the listening places stay.

    Args:
      sockets: Numbers of the listening sockets of each of KINDS, which the child inherits.
      passing: TLS for some names that come to the usual port goes on as it is, so that all of it is looked at first.
    """
    binds = "\n".join(f"  bind fd@{number}" for number in sockets["http"])
    looked_at = [*sockets["streams"], *(sockets["https"] if passing else ())]
    tls = f"ssl crt-list {folder}/certs.list alpn h2,http/1.1"
    secure = "".join(f"  bind fd@{number} {tls}\n" for number in sockets["https"] if not passing)
    streams = "\n".join(f"  bind fd@{number}" for number in looked_at)
    forward = _forward(folder)
    variants = [("", ""), ("-sized", "  filter lua.size\n"), *((f"-{seconds}", f"  timeout connect {seconds}s\n") for seconds in CONNECT_SECONDS)]
    backends = _verified(folder, servers) + "".join(_backends(*kind) for kind in variants)
    # Each connection needs two descriptors, and HAProxy refuses to start with fewer than it was promised.
    connections = max(100, min(20_000, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2 - 100))
    return f"""global
  stats socket {folder}/admin.sock mode 600 level admin
  maxconn {connections}
  nbthread {listen.threads}
  tune.ssl.default-dh-param 2048
  ssl-default-bind-options ssl-min-ver TLSv1.2
  hard-stop-after 60s
  lua-load-per-thread {folder}/script.lua
defaults
  mode http
  timeout connect 3s
  timeout client 65s
  timeout server 65s
  timeout http-request 15s
  timeout http-keep-alive 65s
  timeout tunnel 1h
  retries 3
  option redispatch
frontend http
{binds}
{_route(folder, tls=False)}
  http-request return status 404 content-type text/plain string "default backend - 404" if {{ var(txn.flags) -m sub {ONLY_TLS} }}
  http-request redirect scheme https code 308 if {{ var(txn.flags) -m sub {TO_HTTPS} }}
  http-request redirect scheme https code 301 if {{ var(txn.flags) -m sub {TO_HTTPS_301} }}
  http-request redirect scheme https code 302 if {{ var(txn.flags) -m sub {TO_HTTPS_302} }}
  http-request set-header X-Forwarded-Proto http
{forward}
frontend https
{secure}  bind unix@{folder}/https.sock mode 600 accept-proxy {tls}
{_route(folder, tls=True)}
  http-request return status 404 content-type text/plain string "default backend - 404" if {{ var(txn.flags) -m sub {ONLY_PLAIN} }}
  http-request set-header X-Forwarded-Proto https
{forward}
frontend tls
  mode tcp
{streams}
{_streams(folder)}{backends}{_tables()}
"""
