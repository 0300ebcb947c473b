"""Knarr's benchmarks: `./run bench` prints a table and writes JSON. Ratios and medians, never pass or fail."""
