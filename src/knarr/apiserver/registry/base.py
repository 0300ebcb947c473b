"""What a kind may decide about its own reads and writes. The verbs (knarr.apiserver.verbs) call these hooks.

A Strategy is made once per stored kind and holds no state of a request. The defaults here follow the conventions most kinds
keep: status is reset on create and belongs to the status subresource; spec changes raise the generation where the kind
has one. Kinds override what differs.

Source: apiserver registry/rest (RESTCreateStrategy, RESTUpdateStrategy, RESTDeleteStrategy), pkg/registry/*/*/strategy.go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from knarr.api.errors import FieldError
from knarr.api.types import Object

if TYPE_CHECKING:
    from knarr.apiserver.attributes import Services
    from knarr.apiserver.call import Call

ORPHAN = "orphan"
DELETE = "delete"
UNSUPPORTED = "unsupported"


def rest_of(obj: Object) -> Object:
    """Return what is neither type nor metadata nor status: the part whose changes count as a new generation."""
    return {key: value for key, value in obj.items() if key not in ("kind", "apiVersion", "metadata", "status")}


class Strategy:
    """See the module's docstring. Class attributes are the simple decisions."""

    field_names: tuple[str, ...] = ()
    """Selectable fields beyond metadata.name and metadata.namespace."""
    field_aliases: dict[str, str] = {}
    """Further names for fields, as old clients use them."""
    versioned_fields: dict[str, dict[str, str]] = {}
    """Group -> all its names for the fields, where a second served group has names of its own."""
    trigger = ""
    """The field most watches select by; events are then found by its value instead of asking each watcher."""
    unconditional_update = True
    """An update without resourceVersion is taken."""
    create_on_update = False
    """PUT (and apply) of an absent object creates it. Apply always may."""
    has_generation = False
    makes_names = True
    """generateName is a prefix (False: the name itself)."""
    resets_status = True
    """Status is owned by the status subresource (False: a plain field, as Node's on create)."""
    default_gc = DELETE
    warns_of_orphans = False
    graceful = False
    returns_deleted = False
    """DELETE answers with the object, not a Status, even when it is gone at once."""
    lease_seconds = 0
    status_owned_metadata = True
    """The status subresource may change metadata (labels, annotations) as upstream's do unless they say otherwise."""

    def bind(self, services: Services) -> None:
        """Take what the hooks need of the server (other stores); called once."""
        self.services = services

    # -- selecting -----------------------------------------------------------------------------------------------------------
    def fields(self, obj: Object) -> tuple[str, ...]:
        """Return the values of field_names, in order."""
        return ()

    @property
    def field_function(self) -> Callable[[Object], tuple[str, ...]] | None:
        return self.fields if self.field_names else None

    # -- create --------------------------------------------------------------------------------------------------------------
    def prepare_create(self, call: Call, obj: Object) -> None:
        """Put what clients may not choose into its first state."""
        if self.resets_status:
            obj.pop("status", None)
        if self.has_generation:
            obj["metadata"]["generation"] = 1

    async def begin_create(self, call: Call, obj: Object) -> Callable[[bool], None] | None:
        """Claim what the object needs (addresses, ports); the returned function is told whether the create happened."""
        return None

    def validate_create(self, call: Call, obj: Object) -> list[FieldError]:
        """Rules that need the server's state; the pure rules are in knarr.api.validation."""
        return []

    def canonicalize(self, obj: Object) -> None:
        """Bring a valid object into its stored form."""

    # -- update --------------------------------------------------------------------------------------------------------------
    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        """Take over from old what this path may not change; raise the generation for a new spec."""
        if self.resets_status:
            if "status" in old:
                obj["status"] = old["status"]
            else:
                obj.pop("status", None)
        if self.has_generation and self.changed(obj, old):
            obj["metadata"]["generation"] = (old["metadata"].get("generation") or 0) + 1

    def changed(self, obj: Object, old: Object) -> bool:
        """Whether the difference makes a new generation."""
        return rest_of(obj) != rest_of(old)

    def validate_update(self, call: Call, obj: Object, old: Object) -> list[FieldError]:
        return []

    async def begin_update(self, call: Call, obj: Object, old: Object) -> Callable[[bool], None] | None:
        """As begin_create."""
        return None

    # -- status subresource --------------------------------------------------------------------------------------------------
    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        """Take over everything but status (and metadata) from old."""
        for key in [key for key in obj if key not in ("kind", "apiVersion", "metadata", "status")]:
            if key not in old:
                del obj[key]
        for key, value in old.items():
            if key not in ("kind", "apiVersion", "metadata", "status"):
                obj[key] = value
        if not self.status_owned_metadata:
            self.keep_metadata(obj, old)

    def validate_status(self, call: Call, obj: Object, old: Object) -> list[FieldError]:
        return []

    @staticmethod
    def keep_metadata(obj: Object, old: Object, *, names: tuple[str, ...] = ("labels",)) -> None:
        """Take the named parts of metadata over from old."""
        for name in names:
            if name in old["metadata"]:
                obj["metadata"][name] = old["metadata"][name]
            else:
                obj["metadata"].pop(name, None)

    # -- delete --------------------------------------------------------------------------------------------------------------
    def check_graceful(self, call: Call, obj: Object, options: Object) -> bool:
        """Whether deletion waits for someone else; if so options["gracePeriodSeconds"] must be set on return."""
        return False

    def may_delete_on_update(self, obj: Object, old: Object) -> bool:
        """Whether an update that takes off the last finalizer deletes the object."""
        return True

    def before_delete(self, call: Call, obj: Object) -> Object | None:
        """Return a changed object to store instead of deleting (namespaces), None to go on."""
        return None

    def after_delete(self, obj: Object) -> None:
        """The object is gone: give back what it held."""
