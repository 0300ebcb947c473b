"""Plugins that register with the kubelet over sockets: CSI drivers and device plugins."""
