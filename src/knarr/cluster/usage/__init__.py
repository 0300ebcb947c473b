"""metrics.k8s.io built in: what nodes and pods use now, for `kubectl top` and the horizontal pod autoscaler.

An extension API server inside the control process, registered as any other: whoever installs metrics-server takes the
APIService over and this one falls idle. Nothing is measured while nobody asks.
"""
