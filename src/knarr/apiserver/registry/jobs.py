"""Jobs: selector and pod labels made from the uid, suspension and generation.

Source: pkg/registry/batch/job/strategy.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.api.types import Object
from knarr.apiserver.registry.base import ORPHAN, Strategy

if TYPE_CHECKING:
    from knarr.apiserver.call import Call

OLD_UID, UID = "controller-uid", "batch.kubernetes.io/controller-uid"
OLD_NAME, NAME = "job-name", "batch.kubernetes.io/job-name"
GENERATED = frozenset({OLD_UID, UID, OLD_NAME, NAME})


class Job(Strategy):
    has_generation = True
    default_gc = ORPHAN
    warns_of_orphans = True
    field_names = ("status.successful",)

    def fields(self, obj: Object) -> tuple[str, ...]:
        return (str((obj.get("status") or {}).get("succeeded") or 0),)

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        spec = obj.setdefault("spec", {})
        spec.setdefault("template", {})
        self._generate_selector(obj, spec)

    def canonicalize(self, obj: Object) -> None:
        """A Job without labels of its own shows those of its template, generated ones included."""
        labels = ((obj["spec"].get("template") or {}).get("metadata") or {}).get("labels") or {}
        given = {key: value for key, value in labels.items() if key not in GENERATED}
        own = obj["metadata"].get("labels") or {}
        if labels and (not own or own == given):
            obj["metadata"]["labels"] = dict(labels)

    @staticmethod
    def _generate_selector(obj: Object, spec: Object) -> None:
        """A Job selects by its own uid unless the client insists on a selector of its own."""
        if spec.get("manualSelector"):
            spec["template"].setdefault("metadata", {}).setdefault("labels", {})
            return
        uid, name = obj["metadata"]["uid"], obj["metadata"].get("name") or ""
        template = spec["template"]
        metadata = template.get("metadata") or {}
        labels = metadata.get("labels") or {}
        # A label that the client set to something else stays, and makes validation refuse the job.
        for key, value in ((OLD_NAME, name), (NAME, name), (OLD_UID, uid), (UID, uid)):
            labels.setdefault(key, value)
        metadata["labels"] = labels
        template["metadata"] = metadata
        selector = spec.get("selector") or {}
        match = selector.get("matchLabels") or {}
        match.setdefault(UID, uid)
        selector["matchLabels"] = match
        spec["selector"] = selector
