"""HTTP/1.1 server and client, WebSocket and SPDY streams on one event loop; knows nothing of Kubernetes objects."""
