"""The one shape in which Kubernetes objects travel through this project.

Everything is the wire form: plain dicts with camelCase keys, as JSON gives them. `Any` is allowed here only: this is
the JSON boundary. Cached objects are shared and must never be mutated; copy with `knarr.api.meta.deep_copy` first.
"""

from typing import Any, TypeAlias

Object: TypeAlias = dict[str, Any]
"""A Kubernetes object, or any JSON object, in wire form."""
