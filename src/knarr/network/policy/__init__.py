"""NetworkPolicy in nftables: one table, a chain per class of equally isolated pods, shared peer sets."""

from knarr.network.policy.engine import PolicyEngine

__all__ = ["PolicyEngine"]
