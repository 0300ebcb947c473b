"""Knarr: Kubernetes written anew in Python."""
