"""Metrics of the DNS server under the names that dashboards for CoreDNS know.

Role: `server` counts and asks for the text. Source: CoreDNS's plugins metrics, cache and forward.
"""

from __future__ import annotations

from collections.abc import Mapping

from knarr.network.dns.wire import TYPE_NAMES

_CODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


def render(counts: Mapping[str, int]) -> str:
    """Prometheus text of the server's counters."""
    lines = [
        "# HELP coredns_dns_requests_total Counter of DNS requests made per zone, protocol and family.",
        "# TYPE coredns_dns_requests_total counter",
    ]
    for key, count in sorted(counts.items()):
        if key.startswith("type "):
            name = TYPE_NAMES.get(int(key[5:]), "other")
            lines.append(f'coredns_dns_requests_total{{server="dns://:53",zone=".",type="{name}"}} {count}')
    lines += ["# HELP coredns_dns_responses_total Counter of response status codes.", "# TYPE coredns_dns_responses_total counter"]
    for key, count in sorted(counts.items()):
        if key.startswith("code "):
            lines.append(f'coredns_dns_responses_total{{server="dns://:53",zone=".",rcode="{_CODES.get(int(key[5:]), key[5:])}"}} {count}')
    asked = sum(count for key, count in counts.items() if key.startswith("type "))
    counts = {**counts, "requests": asked, "misses": asked - counts.get("hits", 0)}
    for name, key, kind, words in (
        ("coredns_cache_hits_total", "hits", "counter", "The count of cache hits."),
        ("coredns_cache_misses_total", "misses", "counter", "The count of cache misses."),
        ("coredns_cache_requests_total", "requests", "counter", "The count of cache requests."),
        ("coredns_cache_entries", "answers cached", "gauge", "The number of elements in the cache."),
        ("coredns_autopath_success_total", "autopath", "counter", "Questions whose search path was walked to an answer."),
        ("coredns_forward_requests_total", "forward misses", "counter", "Counter of requests made per upstream."),
        ("coredns_forward_cache_hits_total", "forward hits", "counter", "Forwarded names answered from the cache."),
        ("coredns_forward_healthcheck_failures_total", "forward failures", "counter", "Questions that no upstream answered."),
    ):
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", f"{name} {counts.get(key, 0)}"]
    return "\n".join(lines) + "\n"
