"""The node agent: pod workers, volumes, probes, status, its HTTP server."""
