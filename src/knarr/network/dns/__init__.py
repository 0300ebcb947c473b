"""Cluster DNS: names of Services and pods from informers, everything else forwarded."""

from knarr.network.dns.publish import DNSPublisher
from knarr.network.dns.server import DNSServer

__all__ = ["DNSPublisher", "DNSServer"]
