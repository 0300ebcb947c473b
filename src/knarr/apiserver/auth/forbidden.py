"""The 403 answer, word for word.

Source: apiserver pkg/endpoints/handlers/responsewriters/errors.go.
"""

from __future__ import annotations

from knarr.api.errors import StatusError, forbidden, go_quote
from knarr.apiserver.attributes import Attributes

_SANITIZE = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def forbidden_error(attributes: Attributes, reason: str = "") -> StatusError:
    """Build the StatusError for attributes that were not allowed."""
    user = go_quote(attributes.user.name)
    verb = attributes.verb
    if not attributes.is_resource:
        message = f"User {user} cannot {verb} path {go_quote(attributes.path)}"
    else:
        resource = f"{attributes.resource}/{attributes.subresource}" if attributes.subresource else attributes.resource
        message = f"User {user} cannot {verb} resource {go_quote(resource)} in API group {go_quote(attributes.group)}"
        message += f" in the namespace {go_quote(attributes.namespace)}" if attributes.namespace else " at the cluster scope"
    message = message.translate(_SANITIZE)
    if reason:
        message = f"{message}: {reason}"
    dotted = f"{attributes.resource}.{attributes.group}" if attributes.group else attributes.resource
    return forbidden(dotted, attributes.name, message)
