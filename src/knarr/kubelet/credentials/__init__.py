"""Credentials for image pulls: where they come from, and which images were pulled with whose."""
