"""Aggregation: APIServices that name a Service are served by the extension API server behind it.

registration.py  APIServices for what this server serves itself, kept in step with the CRDs
extension.py     proxying, availability and discovery of extension API servers
"""
