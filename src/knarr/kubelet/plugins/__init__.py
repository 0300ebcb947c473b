"""Plugins that register with the kubelet over sockets: CSI drivers, device plugins, drivers of dynamic resources."""
