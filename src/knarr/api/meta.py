"""Reading and writing the metadata every object has, owner references and conditions. Pure; used by everybody.

All getters accept objects without metadata and never create anything; only the set_/add_ functions mutate.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from knarr.api.types import Object

_NOTHING: Mapping[str, Any] = {}


def metadata(obj: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata, or an empty mapping."""
    return obj.get("metadata") or _NOTHING


def name(obj: Mapping[str, Any]) -> str:
    return (obj.get("metadata") or _NOTHING).get("name") or ""


def namespace(obj: Mapping[str, Any]) -> str:
    return (obj.get("metadata") or _NOTHING).get("namespace") or ""


def uid(obj: Mapping[str, Any]) -> str:
    return (obj.get("metadata") or _NOTHING).get("uid") or ""


def resource_version(obj: Mapping[str, Any]) -> str:
    return (obj.get("metadata") or _NOTHING).get("resourceVersion") or ""


def generation(obj: Mapping[str, Any]) -> int:
    return int((obj.get("metadata") or _NOTHING).get("generation") or 0)


def labels(obj: Mapping[str, Any]) -> Mapping[str, str]:
    return (obj.get("metadata") or _NOTHING).get("labels") or _NOTHING


def annotations(obj: Mapping[str, Any]) -> Mapping[str, str]:
    return (obj.get("metadata") or _NOTHING).get("annotations") or _NOTHING


def finalizers(obj: Mapping[str, Any]) -> list[str]:
    return (obj.get("metadata") or _NOTHING).get("finalizers") or []


def creation_timestamp(obj: Mapping[str, Any]) -> str:
    return (obj.get("metadata") or _NOTHING).get("creationTimestamp") or ""


def deletion_timestamp(obj: Mapping[str, Any]) -> str:
    """RFC 3339 text, "" while the object is not being deleted."""
    return (obj.get("metadata") or _NOTHING).get("deletionTimestamp") or ""


def is_deleting(obj: Mapping[str, Any]) -> bool:
    return bool((obj.get("metadata") or _NOTHING).get("deletionTimestamp"))


def key(obj: Mapping[str, Any]) -> str:
    """ "namespace/name", or "name" for a cluster-scoped object."""
    meta = obj.get("metadata") or _NOTHING
    ns = meta.get("namespace")
    return f"{ns}/{meta.get('name', '')}" if ns else meta.get("name") or ""


def split_key(text: str) -> tuple[str, str]:
    """(namespace, name) of a key; namespace "" for a cluster-scoped object."""
    ns, slash, rest = text.partition("/")
    return (ns, rest) if slash else ("", ns)


def api_version(obj: Mapping[str, Any]) -> str:
    return obj.get("apiVersion") or ""


def kind(obj: Mapping[str, Any]) -> str:
    return obj.get("kind") or ""


def split_api_version(text: str) -> tuple[str, str]:
    """(group, version): ("apps", "v1") of "apps/v1", ("", "v1") of "v1"."""
    group, slash, version = text.rpartition("/")
    return (group, version) if slash else ("", text)


def owner_references(obj: Mapping[str, Any]) -> list[Object]:
    return (obj.get("metadata") or _NOTHING).get("ownerReferences") or []


def controller_of(obj: Mapping[str, Any]) -> Object | None:
    """The owner reference with controller=true, or None."""
    for reference in owner_references(obj):
        if reference.get("controller"):
            return reference
    return None


def is_controlled_by(obj: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    """True if the controller reference names exactly this owner (by uid)."""
    reference = controller_of(obj)
    return reference is not None and reference.get("uid") == uid(owner)


def new_controller_ref(owner: Mapping[str, Any], owner_api_version: str = "", owner_kind: str = "") -> Object:
    """An owner reference that makes owner the controller and blocks its deletion.

    Args:
      owner: The owner, with uid. Objects from lists may lack apiVersion and kind: then give the other two.
    """
    reference = new_owner_ref(owner, owner_api_version, owner_kind)
    reference["controller"] = True
    reference["blockOwnerDeletion"] = True
    return reference


def new_owner_ref(owner: Mapping[str, Any], owner_api_version: str = "", owner_kind: str = "") -> Object:
    """A plain owner reference."""
    return {
        "apiVersion": owner_api_version or api_version(owner), "kind": owner_kind or kind(owner),
        "name": name(owner), "uid": uid(owner),
    }


def object_reference(obj: Mapping[str, Any]) -> Object:
    """A core/v1 ObjectReference to the object, empty parts left out."""
    meta = obj.get("metadata") or _NOTHING
    reference = {
        "kind": kind(obj), "namespace": meta.get("namespace"), "name": meta.get("name"), "uid": meta.get("uid"),
        "apiVersion": api_version(obj), "resourceVersion": meta.get("resourceVersion"),
    }
    return {k: v for k, v in reference.items() if v}


def set_label(obj: Object, label: str, value: str) -> None:
    meta = obj.setdefault("metadata", {})
    meta["labels"] = {**(meta.get("labels") or {}), label: value}


def set_annotation(obj: Object, annotation: str, value: str) -> None:
    meta = obj.setdefault("metadata", {})
    meta["annotations"] = {**(meta.get("annotations") or {}), annotation: value}


def add_finalizer(obj: Object, finalizer: str) -> bool:
    """Add once; True if it was not there."""
    if finalizer in finalizers(obj):
        return False
    obj.setdefault("metadata", {})["finalizers"] = [*finalizers(obj), finalizer]
    return True


def remove_finalizer(obj: Object, finalizer: str) -> bool:
    """Remove; True if it was there. The last one takes the key along."""
    present = finalizers(obj)
    if finalizer not in present:
        return False
    rest = [f for f in present if f != finalizer]
    if rest:
        obj["metadata"]["finalizers"] = rest
    else:
        del obj["metadata"]["finalizers"]
    return True


def deep_copy(obj: Any) -> Any:
    """Copy a JSON value: dicts and lists are new, scalars are shared."""
    if type(obj) is dict:
        return {k: (deep_copy(v) if type(v) is dict or type(v) is list else v) for k, v in obj.items()}
    if type(obj) is list:
        return [deep_copy(v) if type(v) is dict or type(v) is list else v for v in obj]
    return obj


def get_condition(conditions: Iterable[Object] | None, type: str) -> Object | None:
    """The condition of this type in a list such as status.conditions, or None."""
    for condition in conditions or ():
        if condition.get("type") == type:
            return condition
    return None


def is_condition_true(conditions: Iterable[Object] | None, type: str) -> bool:
    condition = get_condition(conditions, type)
    return condition is not None and condition.get("status") == "True"


def set_condition(
    conditions: list[Object], type: str, status: str, *, reason: str = "", message: str = "", now: str, **extra: Any,
) -> bool:
    """Set or append a condition in place; lastTransitionTime changes only when the status does.

    Args:
      conditions: The list to change; the caller puts it into the object.
      status: "True", "False" or "Unknown".
      now: RFC 3339 text for lastTransitionTime.
      extra: Further fields, e.g. observedGeneration=3, lastProbeTime=None (None leaves a field out).

    Returns:
      True if anything other than a field of `extra` that ends in "Time" changed.
    """
    wanted: Object = {"type": type, "status": status, "reason": reason, "message": message, **extra}
    wanted = {k: v for k, v in wanted.items() if v is not None and (v != "" or k in ("type", "status"))}
    for index, old in enumerate(conditions):
        if old.get("type") != type:
            continue
        wanted["lastTransitionTime"] = old.get("lastTransitionTime", now) if old.get("status") == status else now
        before = {k: v for k, v in old.items() if not k.endswith("Time") or k == "lastTransitionTime"}
        after = {k: v for k, v in wanted.items() if not k.endswith("Time") or k == "lastTransitionTime"}
        conditions[index] = wanted
        return before != after
    wanted["lastTransitionTime"] = now
    conditions.append(wanted)
    return True


def remove_condition(conditions: list[Object], type: str) -> bool:
    """Remove the condition of this type in place; True if it was there."""
    for index, condition in enumerate(conditions):
        if condition.get("type") == type:
            del conditions[index]
            return True
    return False
