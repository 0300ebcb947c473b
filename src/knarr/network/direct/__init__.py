"""The direct path: eBPF programs that spare packets between pods the node's IP stack, and Services their translation.

Role: an accelerator in front of the nf_tables data path, which stays complete: whatever a program does not take, and
everything on a kernel without these programs, goes the old way. See `path`.
"""
