"""What an admission plugin is, and the words it refuses with.

A plugin says once per (operation, resource, subresource) whether it has anything to do there; the chain remembers. `admit` may
change the object, `validate` must not. Both answer None at once, or an awaitable when they have to wait; so the plugins that only
look at memory cost a plain call each.

Source: apiserver pkg/admission.
"""

from __future__ import annotations

from collections.abc import Awaitable

from knarr.api.errors import StatusError, forbidden
from knarr.api.scheme import Resource
from knarr.apiserver.attributes import AdmissionRequest, Store

CREATE, UPDATE, DELETE, CONNECT = "CREATE", "UPDATE", "DELETE", "CONNECT"


class Plugin:
    """Base of all plugins: does nothing, nowhere."""

    name = ""
    by_default = True
    """Whether it runs without being asked for."""

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        """Whether this plugin may have something to do there; must not change over time."""
        return False

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        """Whether it has something to do there now; only asked where it handles at all, and again after a change of `sources`."""
        return True

    def sources(self) -> tuple[Store, ...]:
        """The stores on whose objects the answers of `concerns` depend."""
        return ()

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        """Change the request's object, or refuse it by a StatusError."""
        return None

    def validate(self, request: AdmissionRequest) -> Awaitable[None] | None:
        """Refuse the request by a StatusError."""
        return None

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        return []

    async def start(self) -> None:
        """Called once the stores are loaded."""

    async def close(self) -> None:
        """Called when the server stops."""


def is_resource(resource: Resource, group: str, plural: str) -> bool:
    return resource.plural == plural and resource.group == group


def object_name(request: AdmissionRequest) -> str:
    """The name for messages: names are not generated yet when a create is admitted."""
    if request.name:
        return request.name
    metadata = (request.object or {}).get("metadata") or {}
    return metadata.get("name") or metadata.get("generateName") or "Unknown"


def refuse(request: AdmissionRequest, why: str) -> StatusError:
    """A 403 as admission plugins give it."""
    return forbidden(request.resource, object_name(request), why)
