"""Dynamic resource allocation: devices, claims, the search for an allocation, and its writing to the API.

Caller: plugins/dynamic_resources. Source: KEP-4381; dynamic-resource-allocation.
"""
