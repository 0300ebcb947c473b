"""The CRI over gRPC: containerd or CRI-O as the runtime. See client.py."""
