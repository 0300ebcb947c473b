"""Strategies that need little more than the conventions: workloads and most policy kinds.

Source: pkg/registry/{apps,batch,autoscaling,coordination,discovery,flowcontrol,networking,node,policy,rbac,scheduling,storage,
admissionregistration,resource}/*/strategy.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from knarr.api.errors import FieldError
from knarr.api.types import Object
from knarr.apiserver.registry.base import ORPHAN, UNSUPPORTED, Strategy, rest_of

if TYPE_CHECKING:
    from knarr.apiserver.call import Call


METADATA_NOT_OF_STATUS = ("labels", "annotations", "ownerReferences", "finalizers", "generation", "deletionTimestamp", "selfLink")


class Plain(Strategy):
    """No status, no generation."""

    resets_status = False


class Conditional(Plain):
    """Updates need a resourceVersion."""

    unconditional_update = False


class CreateOnUpdate(Plain):
    """PUT of an absent object creates it."""

    create_on_update = True


class Generation(Strategy):
    """Spec changes raise the generation."""

    has_generation = True


class Workload(Generation):
    """Status updates leave labels alone."""

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        self.keep_metadata(obj, old)


class Deployment(Workload):
    """Annotations count as spec, since they are copied to ReplicaSets."""

    def changed(self, obj: Object, old: Object) -> bool:
        return rest_of(obj) != rest_of(old) or (obj["metadata"].get("annotations") or {}) != (old["metadata"].get("annotations") or {})


class DaemonSet(Generation):
    """The template generation follows template changes, for the deprecated field that still shows it."""

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        annotations = obj["metadata"].setdefault("annotations", {})
        annotations["deprecated.daemonset.template.generation"] = "1"

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        # The annotation is part of the spec, which a status update leaves alone.
        key = "deprecated.daemonset.template.generation"
        before = (old["metadata"].get("annotations") or {}).get(key)
        if before is not None:
            obj["metadata"].setdefault("annotations", {})[key] = before

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        key = "deprecated.daemonset.template.generation"
        before = (old["metadata"].get("annotations") or {}).get(key, "")
        number = int(before) if before.isdecimal() else 0
        if obj["spec"].get("template") != old["spec"].get("template"):
            number += 1
        if number:
            obj["metadata"].setdefault("annotations", {})[key] = str(number)


class ReplicaSet(Generation):
    pass


class ReplicationController(Generation):
    default_gc = ORPHAN
    field_names = ("status.replicas",)

    def fields(self, obj: Object) -> tuple[str, ...]:
        return (str((obj.get("status") or {}).get("replicas") or 0),)


class StatefulSet(Generation):
    """maxUnavailable is behind a gate: dropped without it, unless it has been stored before; 1 by default with it."""

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        _gate_max_unavailable(call, obj, {})

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        _gate_max_unavailable(call, obj, old)
        super().prepare_update(call, obj, old)


def _gate_max_unavailable(call: Call, obj: Object, old: Object) -> None:
    rolling = _rolling_update(obj)
    if rolling is None:
        return
    if call.server.config.feature_gates.get("MaxUnavailableStatefulSet"):
        if rolling.get("maxUnavailable") is None:
            rolling["maxUnavailable"] = 1
    elif (_rolling_update(old) or {}).get("maxUnavailable") is None:
        rolling.pop("maxUnavailable", None)


def _rolling_update(obj: Object) -> Object | None:
    found: Object | None = ((obj.get("spec") or {}).get("updateStrategy") or {}).get("rollingUpdate")
    return found


class CronJob(Generation):
    default_gc = "delete"


class ControllerRevision(Plain):
    pass


class PodTemplate(Plain):
    has_generation = True
    returns_deleted = True


class DeviceClass(Plain):
    returns_deleted = True
    has_generation = True


class StorageVersionMigration(Strategy):
    unconditional_update = False

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        self.keep_metadata(obj, old, names=METADATA_NOT_OF_STATUS)


class ClusterTrustBundle(Conditional):
    field_names = ("spec.signerName",)

    def fields(self, obj: Object) -> tuple[str, ...]:
        return ((obj.get("spec") or {}).get("signerName") or "",)


class PodCertificateRequest(Strategy):
    unconditional_update = False
    field_names = ("spec.signerName", "spec.podName", "spec.nodeName")

    def fields(self, obj: Object) -> tuple[str, ...]:
        spec = obj.get("spec") or {}
        return spec.get("signerName") or "", spec.get("podName") or "", spec.get("nodeName") or ""

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        self.keep_metadata(obj, old, names=METADATA_NOT_OF_STATUS)


class HorizontalPodAutoscaler(Strategy):
    pass


class Lease(Plain):
    """The fields of coordinated leader election are behind a gate that is off."""

    unconditional_update = False
    create_on_update = True

    def prepare_create(self, call: Call, obj: Object) -> None:
        for key in ("strategy", "preferredHolder"):
            (obj.get("spec") or {}).pop(key, None)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        self.prepare_create(call, obj)


class LimitRange(CreateOnUpdate):
    """A name is made up when none is given."""

    def prepare_create(self, call: Call, obj: Object) -> None:
        metadata = obj["metadata"]
        if not metadata.get("name"):
            metadata["name"] = metadata["uid"]


HOSTNAME = "kubernetes.io/hostname"


class EndpointSlice(Plain):
    """The generation counts changes of endpoints, ports, labels and annotations."""

    has_generation = True

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        for endpoint in obj.get("endpoints") or []:
            endpoint.pop("deprecatedTopology", None)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        if obj.get("endpoints") == old.get("endpoints"):
            return
        # v1 takes no topology; a node named there before the change is still the endpoint's node.
        known = {(e.get("deprecatedTopology") or {}).get(HOSTNAME) for e in old.get("endpoints") or []}
        for endpoint in obj.get("endpoints") or []:
            node = (endpoint.pop("deprecatedTopology", None) or {}).get(HOSTNAME)
            if node and endpoint.get("nodeName") is None and node in known:
                endpoint["nodeName"] = node

    def changed(self, obj: Object, old: Object) -> bool:
        mine, theirs = obj["metadata"], old["metadata"]
        return (
            rest_of(obj) != rest_of(old) or (mine.get("labels") or {}) != (theirs.get("labels") or {})
            or (mine.get("annotations") or {}) != (theirs.get("annotations") or {})
        )  # fmt: skip


class _CompilesExpressions(Strategy):
    """Expressions in it must compile."""

    def validate_create(self, call: Call, obj: Object) -> list[FieldError]:
        from knarr.apiserver.admission.expression_check import expression_errors

        return expression_errors(call.endpoint.resource, obj, None)

    def validate_update(self, call: Call, obj: Object, old: Object) -> list[FieldError]:
        from knarr.apiserver.admission.expression_check import expression_errors

        return expression_errors(call.endpoint.resource, obj, old)


class AdmissionConfiguration(_CompilesExpressions, Plain):
    """Webhook configurations and policies: generation, updates need a resourceVersion, expressions must compile."""

    has_generation = True
    unconditional_update = False


class KeepsMetadataOnStatus(Generation):
    """The status subresource leaves all metadata but managedFields alone."""

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        mine = obj["metadata"].get("managedFields")
        version = obj["metadata"].get("resourceVersion")
        obj["metadata"] = {**old["metadata"]}
        if mine is not None:
            obj["metadata"]["managedFields"] = mine
        if version is not None:
            obj["metadata"]["resourceVersion"] = version


class KeepsMostOnStatus(Generation):
    """The status subresource leaves alone what people and controllers write into metadata."""

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        self.keep_metadata(obj, old, names=METADATA_NOT_OF_STATUS)


class FlowControl(KeepsMetadataOnStatus):
    pass


class AdmissionPolicy(_CompilesExpressions, KeepsMostOnStatus):
    unconditional_update = False


class PodDisruptionBudget(Generation):
    unconditional_update = False


class ResourceQuota(Strategy):
    returns_deleted = True


class Event(Plain):
    """Events expire; they can be selected by what they are about."""

    create_on_update = True
    default_gc = UNSUPPORTED
    field_names = (
        "involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid", "involvedObject.apiVersion",
        "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason", "reportingComponent", "source", "type",
    )  # fmt: skip
    versioned_fields = {
        "events.k8s.io": {
            **{f"regarding.{part}": f"involvedObject.{part}" for part in (
                "kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")},
            "reason": "reason", "reportingController": "reportingComponent", "type": "type", "metadata.name": "metadata.name",
            "metadata.namespace": "metadata.namespace",
        },
    }  # fmt: skip

    def fields(self, obj: Object) -> tuple[str, ...]:
        about = obj.get("involvedObject") or {}
        source = (obj.get("source") or {}).get("component") or ""
        reporting = obj.get("reportingComponent") or ""
        get = about.get
        return (
            get("kind") or "", get("namespace") or "", get("name") or "", get("uid") or "", get("apiVersion") or "",
            get("resourceVersion") or "", get("fieldPath") or "", obj.get("reason") or "", reporting, source or reporting,
            obj.get("type") or "",
        )  # fmt: skip


class Secret(Plain):
    field_names = ("type",)

    def fields(self, obj: Object) -> tuple[str, ...]:
        return (obj.get("type") or "",)

    def prepare_create(self, call: Call, obj: Object) -> None:
        _string_data(obj)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        _string_data(obj)
        # The type cannot be changed, so leaving it out keeps it.
        if not obj.get("type"):
            obj["type"] = old.get("type", "")


def _string_data(obj: Object) -> None:
    """stringData is write-only: it becomes data."""
    from base64 import b64encode

    text = obj.pop("stringData", None)
    if text:
        data = obj.get("data") or {}
        for key, value in text.items():
            data[key] = b64encode((value or "").encode("utf-8", "surrogatepass")).decode()
        obj["data"] = data


class NetworkPolicy(Plain):
    has_generation = True


class Ingress(Generation):
    pass


class IngressClass(Plain):
    has_generation = True


class RuntimeClass(Plain):
    unconditional_update = False


class PriorityClass(Plain):
    has_generation = True

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        return None

    def prepare_create(self, call: Call, obj: Object) -> None:
        obj["metadata"]["generation"] = 1


class CSIDriver(Plain):
    """The period after which nodes report anew is behind a gate that is off: dropped, unless it is stored already."""

    returns_deleted = True
    unconditional_update = False
    has_generation = False

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        (obj.get("spec") or {}).pop("nodeAllocatableUpdatePeriodSeconds", None)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        if (old.get("spec") or {}).get("nodeAllocatableUpdatePeriodSeconds") is None:
            (obj.get("spec") or {}).pop("nodeAllocatableUpdatePeriodSeconds", None)
        # Counted from the first change on, not from the creation.
        if (obj.get("spec") or {}) != (old.get("spec") or {}):
            obj["metadata"]["generation"] = (old["metadata"].get("generation") or 0) + 1


class VolumeAttachment(KeepsMostOnStatus):
    returns_deleted = True
    unconditional_update = False
    has_generation = False


class PersistentVolume(Strategy):
    returns_deleted = True

    def prepare_create(self, call: Call, obj: Object) -> None:
        from knarr.aiokits import clock

        super().prepare_create(call, obj)
        obj["status"] = {"phase": "Pending", "lastPhaseTransitionTime": clock.now_rfc3339()}

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        from knarr.aiokits import clock

        super().prepare_status(call, obj, old)
        status, before = obj.setdefault("status", {}), old.get("status") or {}
        changed, told, known = status.get("phase") != before.get("phase"), status.get("lastPhaseTransitionTime"), before.get("lastPhaseTransitionTime")
        if changed and (told is None or told == known):
            status["lastPhaseTransitionTime"] = clock.now_rfc3339()
        elif not changed and told is None and known is not None:
            status["lastPhaseTransitionTime"] = known


class PersistentVolumeClaim(Strategy):
    returns_deleted = True

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        obj["status"] = {"phase": "Pending"}
        _data_sources(obj.get("spec") or {})

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        _data_sources(obj.get("spec") or {})


DATA_SOURCES = frozenset({("", "PersistentVolumeClaim"), ("snapshot.storage.k8s.io", "VolumeSnapshot")})


def _data_sources(spec: Object) -> None:
    """dataSource and dataSourceRef mirror each other where both can say the same."""
    if (spec.get("dataSourceRef") or {}).get("namespace"):
        # Sources in other namespaces are behind a gate that is off.
        del spec["dataSourceRef"]
    if spec.get("dataSource") is not None and spec.get("dataSourceRef") is None:
        source = spec["dataSource"]
        if (source.get("apiGroup") or "", source.get("kind")) not in DATA_SOURCES:
            del spec["dataSource"]
    source, reference = spec.get("dataSource"), spec.get("dataSourceRef")
    if source is not None and reference is None:
        spec["dataSourceRef"] = dict(source)
    elif reference is not None and source is None and not reference.get("namespace"):
        if (reference.get("apiGroup") or "", reference.get("kind")) in DATA_SOURCES:
            spec["dataSource"] = {key: value for key, value in reference.items() if key != "namespace"}


class ServiceAccount(Plain):
    returns_deleted = True

    def prepare_create(self, call: Call, obj: Object) -> None:
        self._name_secrets(obj)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        self._name_secrets(obj)

    @staticmethod
    def _name_secrets(obj: Object) -> None:
        """Secrets are of the account's namespace: what else a reference says is dropped."""
        if obj.get("secrets"):
            obj["secrets"] = [{"name": secret["name"]} if secret.get("name") else {} for secret in obj["secrets"]]


class APIService(Strategy):
    """Without a Service it is served by this server, and available from the start."""

    unconditional_update = False

    def prepare_create(self, call: Call, obj: Object) -> None:
        from knarr.apiserver.aggregation.registration import local_status

        super().prepare_create(call, obj)
        if not (obj.get("spec") or {}).get("service"):
            obj["status"] = local_status()

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        self.keep_metadata(obj, old, names=("labels", "annotations", "ownerReferences", "finalizers"))


class CustomResourceDefinition(Generation):
    """The storage version of every write is remembered."""

    unconditional_update = False

    def validate_create(self, call: Call, obj: Object) -> list[FieldError]:
        return self._rule_errors(obj, {})

    def validate_update(self, call: Call, obj: Object, old: Object) -> list[FieldError]:
        return self._rule_errors(obj, {version.get("name"): version for version in (old.get("spec") or {}).get("versions") or ()})

    @staticmethod
    def _rule_errors(obj: Object, stored: dict[str, Object]) -> list[FieldError]:
        """What is wrong with CEL rules; in a schema that is itself wrong nothing can be said about them."""
        from knarr.api.validation import definitions, schemas
        from knarr.apiserver.crd import rules

        found: list[FieldError] = []
        for path, version, schema in definitions.schemas(obj.get("spec") or {}):
            broken: list[FieldError] = []
            same = stored.get(version.get("name") or "", {}).get("schema") == version.get("schema")
            if same or b'"x-kubernetes-validations"' not in orjson.dumps(schema):
                continue
            schemas.validate_schema(schema, path, broken, has_status=False)
            if not broken:
                found += rules.compile_errors(schema, path)
        return found

    def prepare_create(self, call: Call, obj: Object) -> None:
        super().prepare_create(call, obj)
        obj["status"] = {"conditions": None, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": []}
        self._note_stored(obj)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_update(call, obj, old)
        if "status" in obj:
            obj["status"] = dict(obj["status"])
        self._note_stored(obj)

    def before_delete(self, call: Call, obj: Object) -> Object | None:
        from knarr.aiokits import clock
        from knarr.apiserver.crd import naming

        metadata = obj["metadata"]
        if metadata.get("deletionTimestamp"):
            return obj if metadata.get("finalizers") else None
        now = clock.now_rfc3339()
        metadata["deletionTimestamp"] = now
        if naming.FINALIZER not in (metadata.get("finalizers") or []):
            metadata["finalizers"] = [*(metadata.get("finalizers") or []), naming.FINALIZER]
        message = "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon"
        naming.set_condition(obj, "Terminating", "True", "InstanceDeletionPending", message, now)
        return obj

    @staticmethod
    def _note_stored(obj: Object) -> None:
        status = obj.setdefault("status", {})
        stored = status.get("storedVersions") or []
        for version in (obj.get("spec") or {}).get("versions") or []:
            if version.get("storage"):
                if version.get("name") not in stored:
                    status["storedVersions"] = [*stored, version.get("name")]
                break


class ReturnsDeleted(Plain):
    """DELETE answers with the object that was."""

    returns_deleted = True


class CSINode(ReturnsDeleted):
    unconditional_update = False
