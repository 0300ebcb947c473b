"""Images: references, the content-addressed store, archives, registries, unpacked layers."""
