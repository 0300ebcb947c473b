"""Which rules hold for which kind.

A kind without an entry is checked by its metadata alone, names as DNS subdomains.
Source: the strategies under pkg/registry, registry/rest/create.go and update.go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from knarr.api.errors import FieldError
from knarr.api.scheme import Resource
from knarr.api.validation.metadata import (
    Errors,
    validate_core_finalizers,
    validate_generic_meta,
    validate_object_meta,
    validate_object_meta_update,
    validate_path_names,
)
from knarr.api.validation.strings import Rule, dns_subdomain, path_segment

Object = dict[str, Any]
Create = Callable[[Object, Errors], None]
Update = Callable[[Object, Object, Errors, str], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """Rules of one kind.

    create: checks everything but the metadata. update: checks what may change and what may not;
    None means that `create` must hold for the new object and nothing more. `update` gets the
    subresource as its last argument. `core_finalizers`: finalizers without a domain must be well
    known, with `status_core_finalizers` also where a status is written. `generate_name`: the prefix has to fit the rule too. `rechecks_metadata`: an update checks the whole metadata by the kind's rules again.
    """

    create: Create | None = None
    update: Update | None = None
    name: Rule = dns_subdomain
    core_finalizers: bool = True
    status_core_finalizers: bool = True
    generate_name: bool = True
    rechecks_metadata: bool = False


_DEFAULT = Kind()
KINDS: dict[tuple[str, str], Kind] = {
    ("rbac.authorization.k8s.io", plural): Kind(name=path_segment)
    for plural in ("roles", "rolebindings", "clusterroles", "clusterrolebindings")
}


def create_errors(resource: Resource, obj: Object) -> list[FieldError]:
    """See validate_create. The generic check comes last and only for objects that their kind's rules accept."""
    kind = KINDS.get((resource.group, resource.plural), _DEFAULT)
    errors: Errors = []
    metadata = obj.get("metadata") or {}
    validate_object_meta(metadata, resource.namespaced, kind.name, errors, core_finalizers=kind.core_finalizers, prefix=kind.generate_name)
    if kind.create is not None:
        kind.create(obj, errors)
    if not errors:
        # Everything else that the generic check asks has just been found right.
        validate_path_names(metadata, errors)
    return errors


def update_errors(resource: Resource, new: Object, old: Object, subresource: str) -> list[FieldError]:
    """See validate_update. Upstream checks metadata up to four times; the causes of its answer repeat accordingly."""
    kind = KINDS.get((resource.group, resource.plural), _DEFAULT)
    errors: Errors = []
    new_metadata, old_metadata = new.get("metadata") or {}, old.get("metadata") or {}
    validate_generic_meta(new_metadata, resource.namespaced, errors)
    validate_object_meta_update(new_metadata, old_metadata, errors)
    if errors or not _same_metadata(new_metadata, old_metadata):
        validate_object_meta_update(new_metadata, old_metadata, errors)
        if kind.core_finalizers and (kind.status_core_finalizers or subresource != "status"):
            validate_core_finalizers(new_metadata.get("finalizers"), "metadata.finalizers", errors)
        if kind.rechecks_metadata and not subresource:
            validate_object_meta(new_metadata, resource.namespaced, kind.name, errors, core_finalizers=kind.core_finalizers, prefix=kind.generate_name)
    if kind.update is not None:
        kind.update(new, old, errors, subresource)
    elif kind.create is not None and not subresource:
        kind.create(new, errors)
    return errors


def _same_metadata(new: Object, old: Object) -> bool:
    """What was valid and has not changed is valid; most updates change a status."""
    return all(new.get(key) == old.get(key) for key in ("labels", "annotations", "ownerReferences", "finalizers", "generateName"))
