"""Pod network, service proxy, network policy, DNS."""
