"""The container runtime behind a CRI-shaped Protocol: images, snapshots, sandboxes, containers."""
