"""Strategies: what differs from kind to kind, one small module per family of kinds; all.py has the whole table."""
