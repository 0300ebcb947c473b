"""How a pod calls itself and finds others: host name, hosts file, resolver settings.

Callers: sandboxes, containers. Pure but for reading the host's resolv.conf and writing the hosts file.
Source: pkg/kubelet/kubelet_pods.go (hosts file, GeneratePodHostNameAndDomain), pkg/kubelet/network/dns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.config import KubeletConfig
from knarr.runtime.cri import DNSConfig

log = get_logger(__name__)

_HEADER = "# Kubernetes-managed hosts file.\n"
_HOST_NETWORK_HEADER = "# Kubernetes-managed hosts file (host network).\n"
_HOSTNAME_MAX = 63
_MAX_SEARCHES = 32
_MAX_SEARCH_CHARACTERS = 2048
_MAX_SERVERS = 3


class IdentityError(Exception):
    """The pod's host name cannot be made."""


def host_name(pod: Object, cluster_domain: str) -> tuple[str, str]:
    """(host name, domain); the domain is empty for a pod without subdomain.

    Raises:
      IdentityError: setHostnameAsFQDN makes a name that the kernel does not take.
    """
    meta, spec = pod["metadata"], pod["spec"]
    if spec.get("hostnameOverride"):
        return _truncated(spec["hostnameOverride"]), ""
    name = _truncated(spec.get("hostname") or meta["name"])
    domain = f"{spec['subdomain']}.{meta.get('namespace', '')}.svc.{cluster_domain}" if spec.get("subdomain") else ""
    return name, domain


def kernel_host_name(pod: Object, cluster_domain: str) -> str:
    """What hostname(1) shows in the pod. Raises IdentityError as `host_name`."""
    name, domain = host_name(pod, cluster_domain)
    if pod["spec"].get("setHostnameAsFQDN") and domain:
        full = f"{name}.{domain}"
        if len(full) > 64:
            raise IdentityError(
                f"failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long (64 characters is the max, {len(full)} characters requested)"
            )
        return full
    return name


def _truncated(name: str) -> str:
    return name if len(name) <= _HOSTNAME_MAX else name[:_HOSTNAME_MAX].rstrip("-.")


def hosts_file(pod: Object, ips: Sequence[str], cluster_domain: str) -> str:
    """The content of /etc/hosts in the pod's containers."""
    aliases = pod["spec"].get("hostAliases") or []
    extra = "".join(f"{a['ip']}\t" + "\t".join(a.get("hostnames") or []) + "\n" for a in aliases)
    if extra:
        extra = "\n# Entries added by HostAliases.\n" + extra
    if podutil.host_network(pod):
        try:
            with open("/etc/hosts", encoding="utf-8", errors="surrogateescape") as file:
                return _HOST_NETWORK_HEADER + file.read() + extra
        except OSError:
            return _HOST_NETWORK_HEADER + extra
    name, domain = host_name(pod, cluster_domain)
    own = f"{name}.{domain}\t{name}" if domain else name
    return (
        _HEADER
        + "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\n"
        + "fe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
        + "".join(f"{ip}\t{own}\n" for ip in ips)
        + extra
    )


def write_hosts_file(pod_dir: str, content: str) -> str:
    """Write the pod's hosts file (0644) in place, so that running containers see it; returns its path."""
    path = os.path.join(pod_dir, "etc-hosts")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
    return path


_RESOLVED = "/run/systemd/resolve/resolv.conf"


def host_dns(path: str) -> DNSConfig:
    """Parse a resolv.conf; missing means empty.

    Where only systemd-resolved's stub on the host's loopback is named, which no pod can reach, its real servers are taken.
    """
    found = _parse(path)
    if found.servers and all(s.startswith("127.") for s in found.servers) and os.path.exists(_RESOLVED):
        return _parse(_RESOLVED)
    return found


def _parse(path: str) -> DNSConfig:
    out = DNSConfig()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return out
    for line in lines:
        words = line.split()
        if not words or line.lstrip()[0] in "#;":
            continue
        if words[0] == "nameserver" and len(words) >= 2:
            out.servers.append(words[1])
        elif words[0] == "search":
            out.searches = [w if w == "." else w.rstrip(".") for w in words[1:]]
        elif words[0] == "options":
            out.options += [w for w in words[1:] if w not in out.options]
    return out


def pod_dns(pod: Object, config: KubeletConfig) -> tuple[DNSConfig, list[str]]:
    """The resolver settings of a pod, and what was cut off (for an event).

    Source: pkg/kubelet/network/dns GetPodDNS.
    """
    policy = pod["spec"].get("dnsPolicy") or "ClusterFirst"
    if policy == "None":
        dns = DNSConfig()
    elif policy == "ClusterFirstWithHostNet" or (policy == "ClusterFirst" and not podutil.host_network(pod)):
        host = host_dns(config.resolv_conf)
        if config.cluster_dns:
            namespace = pod["metadata"].get("namespace", "")
            domain = config.cluster_domain
            searches = [f"{namespace}.svc.{domain}", f"svc.{domain}", domain] if domain else []
            dns = DNSConfig(list(config.cluster_dns), _unique(searches + host.searches), ["ndots:5"])
        else:
            dns = host
    else:
        dns = host_dns(config.resolv_conf)
    _apply_own(dns, pod["spec"].get("dnsConfig") or {})
    return dns, _apply_limits(dns)


def _apply_own(dns: DNSConfig, own: Object) -> None:
    dns.servers = _unique(dns.servers + list(own.get("nameservers") or []))
    dns.searches = _unique(dns.searches + list(own.get("searches") or []))
    options = {o.partition(":")[0]: o for o in dns.options}
    for option in own.get("options") or []:
        value = option.get("value")
        options[option["name"]] = f"{option['name']}:{value}" if value not in (None, "") else option["name"]
    dns.options = list(options.values())


def _apply_limits(dns: DNSConfig) -> list[str]:
    notes = []
    searches = dns.searches[:_MAX_SEARCHES]
    while searches and len(" ".join(searches)) > _MAX_SEARCH_CHARACTERS:
        searches.pop()
    if searches != dns.searches:
        notes.append(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: " + " ".join(searches)
        )
        dns.searches = searches
    if len(dns.servers) > _MAX_SERVERS:
        dns.servers = dns.servers[:_MAX_SERVERS]
        notes.append(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: " + " ".join(dns.servers)
        )
    return notes


def _unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))
