"""Which CPUs and which memory nodes a container may use: CPU manager, memory manager, topology manager.

Off by default as upstream; `cpuManagerPolicy`, `memoryManagerPolicy` and `topologyManagerPolicy` of KubeletConfiguration turn them on.
"""
