"""The scheduler: queue, node table (arrays), framework, plugins (one module each), preemption.

It meets the other components only through the API. numpy is imported here and nowhere else.
"""
