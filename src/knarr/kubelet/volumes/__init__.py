"""Volumes of pods on this node: what they contain, where they are mounted, and their end."""
