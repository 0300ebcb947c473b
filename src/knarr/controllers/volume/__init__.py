"""Volumes: binding claims to volumes, protection, expansion, attachment, ephemeral claims."""
