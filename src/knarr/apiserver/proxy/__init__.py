"""Streams and requests that the API server passes on: to kubelets (log, exec, attach, port-forward), nodes, pods and services."""
