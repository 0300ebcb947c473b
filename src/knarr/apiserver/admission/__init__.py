"""Admission: what may enter the store, and what is added to it on the way. One module per plugin, upstream's order in chain.py."""
