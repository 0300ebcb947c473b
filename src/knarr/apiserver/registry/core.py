"""Strategies of namespaces, nodes and certificate signing requests.

Source: pkg/registry/core/{namespace,node}/strategy.go, core/namespace/storage, certificates/certificates/strategy.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.api.types import Object
from knarr.apiserver.registry.base import Strategy

if TYPE_CHECKING:
    from knarr.apiserver.call import Call

KUBERNETES_FINALIZER = "kubernetes"


class Namespace(Strategy):
    """Deleting a namespace marks it; it goes when its finalizers in spec are gone too."""

    field_names = ("status.phase",)
    returns_deleted = True

    def fields(self, obj: Object) -> tuple[str, ...]:
        return ((obj.get("status") or {}).get("phase") or "",)

    def prepare_create(self, call: Call, obj: Object) -> None:
        obj["status"] = {"phase": "Active"}
        spec = obj.get("spec") or {}
        finalizers = spec.get("finalizers") or []
        if KUBERNETES_FINALIZER not in finalizers:
            finalizers = [*finalizers, KUBERNETES_FINALIZER]
        obj["spec"] = {**spec, "finalizers": finalizers}

    def canonicalize(self, obj: Object) -> None:
        metadata = obj["metadata"]
        labels = metadata.get("labels") or {}
        labels["kubernetes.io/metadata.name"] = metadata["name"]
        metadata["labels"] = labels

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        _take(obj, old, "status")
        spec = obj.setdefault("spec", {})
        before = (old.get("spec") or {}).get("finalizers")
        if before:
            spec["finalizers"] = before
        else:
            spec.pop("finalizers", None)

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        _take(obj, old, "spec")

    @staticmethod
    def prepare_finalize(call: Call, obj: Object, old: Object) -> None:
        """The finalize subresource changes spec.finalizers only."""
        _take(obj, old, "status")

    def may_delete_on_update(self, obj: Object, old: Object) -> bool:
        return not (obj.get("spec") or {}).get("finalizers")

    def before_delete(self, call: Call, obj: Object) -> Object | None:
        metadata = obj["metadata"]
        if metadata.get("deletionTimestamp"):
            # A second DELETE removes it only when nothing holds it any more.
            if (obj.get("spec") or {}).get("finalizers") or metadata.get("finalizers"):
                return obj
            return None
        if not (obj.get("spec") or {}).get("finalizers") and not metadata.get("finalizers"):
            return None
        metadata["deletionTimestamp"] = clock.now_rfc3339()
        obj.setdefault("status", {})["phase"] = "Terminating"
        return obj


def _take(obj: Object, old: Object, key: str) -> None:
    if key in old:
        obj[key] = old[key]
    else:
        obj.pop(key, None)


class Node(Strategy):
    """A node may bring its status along when it is created."""

    field_names = ("spec.unschedulable",)

    def fields(self, obj: Object) -> tuple[str, ...]:
        return ("true" if (obj.get("spec") or {}).get("unschedulable") else "false",)

    def prepare_create(self, call: Call, obj: Object) -> None:
        (obj.get("spec") or {}).pop("configSource", None)
        (obj.get("status") or {}).pop("config", None)


class CertificateSigningRequest(Strategy):
    """Who asks is written down by the server; approval and status are changed through their subresources."""

    field_names = ("spec.signerName",)

    def fields(self, obj: Object) -> tuple[str, ...]:
        return ((obj.get("spec") or {}).get("signerName") or "",)

    def prepare_create(self, call: Call, obj: Object) -> None:
        spec = obj.setdefault("spec", {})
        user = call.user
        spec["username"] = user.name
        for key, value in (("uid", user.uid), ("groups", list(user.groups)), ("extra", {k: list(v) for k, v in user.extra.items()})):
            if value:
                spec[key] = value
            else:
                spec.pop(key, None)
        obj["status"] = {}

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        _take(obj, old, "spec")
        _take(obj, old, "status")

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        """The certificate and conditions; validation refuses changes of the decision."""
        _take(obj, old, "spec")
        _conditions(obj, old, (obj.get("status") or {}).get("conditions") or [])

    def prepare_approval(self, call: Call, obj: Object, old: Object) -> None:
        """The conditions only."""
        _take(obj, old, "spec")
        conditions = (obj.get("status") or {}).get("conditions") or []
        status = dict(old.get("status") or {})
        obj["status"] = status
        _conditions(obj, old, conditions)


def _conditions(obj: Object, old: Object, conditions: list[Object]) -> None:
    """Fill in the times that clients left out."""
    now = clock.now_rfc3339()
    before = {c.get("type"): c for c in (old.get("status") or {}).get("conditions") or []}
    for condition in conditions:
        previous = before.get(condition.get("type"))
        if not condition.get("lastUpdateTime"):
            condition["lastUpdateTime"] = now
        if not condition.get("lastTransitionTime"):
            same = previous is not None and previous.get("status") == condition.get("status")
            condition["lastTransitionTime"] = previous["lastTransitionTime"] if same and previous is not None and previous.get("lastTransitionTime") else now
    status = obj.setdefault("status", {})
    if conditions:
        status["conditions"] = conditions
    else:
        status.pop("conditions", None)
