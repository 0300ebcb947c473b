"""The kubelet's HTTPS server: logs, exec, statistics, metrics."""
