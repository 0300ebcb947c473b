"""Services in nftables: one table, a few shared maps, changed in transactions."""

from knarr.network.proxy.service_proxy import ServiceProxy

__all__ = ["ServiceProxy"]
