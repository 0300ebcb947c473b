"""storage.k8s.io: classes, attachments, CSI objects. Source: pkg/apis/storage/validation."""

from __future__ import annotations

from knarr.api import quantity
from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required, too_long
from knarr.api.validation.core import validate_volume_spec
from knarr.api.validation.metadata import Errors, Object, add, immutable, validate_label_selector
from knarr.api.validation.strings import IMMUTABLE, Messages, dns_subdomain, label_key_errors, range_message
from knarr.api.validation.volumes import driver_name

_LIMIT = 256 * 1024


def _provisioner(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
    else:
        add(errors, path, name.lower(), label_key_errors(name.lower()))


def _parameters(parameters: Object, errors: Errors, *, needed: bool = False) -> None:
    if len(parameters) > 512:
        errors.append(too_long("parameters", 512))
        return
    for key in parameters:
        if not key:
            errors.append(invalid_value("parameters", key, "field can not be empty."))
    if sum(len(k) + len(v) for k, v in parameters.items()) > _LIMIT:
        errors.append(too_long("parameters", _LIMIT))
    if needed and not parameters:
        errors.append(required("parameters", "must contain at least one key/value pair"))


def _topologies(terms: list[Object], errors: Errors) -> None:
    # As upstream compares them: a term without expressions equals the places not yet filled.
    earlier: list[dict[str, frozenset[str]]] = [{} for _ in terms]
    for index, term in enumerate(terms):
        path, own = f"allowedTopologies[{index}].matchLabelExpressions", {}
        for position, item in enumerate(term.get("matchLabelExpressions") or ()):
            where, key, values = f"{path}[{position}]", item.get("key") or "", item.get("values") or []
            if not values:
                errors.append(required(f"{where}.values"))
            for number, value in enumerate(values):
                if value in values[:number]:
                    errors.append(duplicate(f"{where}.values[{number}]", value))
            add(errors, f"{where}.key", key, label_key_errors(key))
            if key in own:
                errors.append(duplicate(f"{where}.key", key))
            own[key] = frozenset(values)
        errors += [duplicate(path, "") for other in earlier if own == other]
        earlier.append(own)


def create_storage_class(obj: Object, errors: Errors) -> None:
    _provisioner(obj.get("provisioner") or "", "provisioner", errors)
    _parameters(obj.get("parameters") or {}, errors)
    policy, mode = obj.get("reclaimPolicy"), obj.get("volumeBindingMode")
    if policy and policy not in ("Delete", "Retain"):
        errors.append(not_supported("reclaimPolicy", policy, ["Delete", "Retain"]))
    if mode is None:
        errors.append(required("volumeBindingMode"))
    elif mode not in ("Immediate", "WaitForFirstConsumer"):
        errors.append(not_supported("volumeBindingMode", mode, ["Immediate", "WaitForFirstConsumer"]))
    _topologies(obj.get("allowedTopologies") or [], errors)


def _fixed(new: Object, old: Object, keys: tuple[str, ...], errors: Errors) -> None:
    for key in keys:
        if (new.get(key) or {}) != (old.get(key) or {}):
            errors.append(field_forbidden(key, f"updates to {key} are forbidden."))


def update_storage_class(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_storage_class(new, errors)
    _fixed(new, old, ("parameters", "provisioner", "reclaimPolicy"), errors)
    immutable(errors, "volumeBindingMode", new.get("volumeBindingMode"), old.get("volumeBindingMode"))


def create_attributes_class(obj: Object, errors: Errors) -> None:
    _provisioner(obj.get("driverName") or "", "driverName", errors)
    _parameters(obj.get("parameters") or {}, errors, needed=True)


def update_attributes_class(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    for key in ("driverName", "parameters"):
        if new.get(key) != old.get(key):
            errors.append(field_forbidden(key, f"updates to {key} are forbidden."))
    create_attributes_class(new, errors)


def create_attachment(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    if not spec.get("attacher"):
        errors.append(required("spec.attacher"))
    source, path = spec.get("source") or {}, "spec.source"
    inline, name = source.get("inlineVolumeSpec"), source.get("persistentVolumeName")
    message = "must specify exactly one of inlineVolumeSpec and persistentVolumeName"
    if inline is None and name is None:
        errors.append(required(path, message))
    elif inline is not None and name is not None:
        errors.append(field_forbidden(path, message))
    elif inline is not None:
        _inline(inline, f"{path}.inlineVolumeSpec", errors)
    elif not name:
        errors.append(required(f"{path}.persistentVolumeName", "must specify non empty persistentVolumeName"))
    node = spec.get("nodeName") or ""
    add(errors, "spec.nodeName", node, dns_subdomain(node))
    _attachment_status(obj, errors)
    driver_name(spec.get("attacher") or "", "spec.attacher", errors)
    if name:
        add(errors, "spec.source.persistentVolumeName", name, dns_subdomain(name))


def _inline(spec: Object, path: str, errors: Errors) -> None:
    where = "in the context of inline volumes"
    for key in ("claimRef", "capacity"):
        if spec.get(key):
            errors.append(field_forbidden(f"{path}.{key}", f"may not be specified {where}"))
    if spec.get("csi") is None:
        errors.append(required(f"{path}.csi", f"has to be specified {where}"))
    if spec.get("persistentVolumeReclaimPolicy") not in (None, "", "Retain"):
        errors.append(field_forbidden(f"{path}.persistentVolumeReclaimPolicy", f"may only be Retain {where}"))
    if spec.get("storageClassName"):
        errors.append(field_forbidden(f"{path}.storageClassName", f"may not be specified {where}"))
    if spec.get("nodeAffinity") is not None:
        errors.append(field_forbidden(f"{path}.nodeAffinity", f"may not be specified {where}"))
    if spec.get("volumeMode") not in (None, "Filesystem"):
        errors.append(field_forbidden(f"{path}.volumeMode", f"may not specify volumeMode other than Filesystem {where}"))
    inner = {key: value for key, value in spec.items() if key not in ("claimRef", "storageClassName", "nodeAffinity")}
    inner["capacity"] = {"storage": "1"}
    validate_volume_spec(inner, path, errors)


def _attachment_status(obj: Object, errors: Errors) -> None:
    status = obj.get("status") or {}
    if sum(len(k) + len(v) for k, v in (status.get("attachmentMetadata") or {}).items()) > _LIMIT:
        errors.append(too_long("status.attachmentMetadata", _LIMIT))
    for key in ("attachError", "detachError"):
        found = status.get(key) or {}
        if len(found.get("message") or "") > 1024:
            errors.append(too_long(f"status.{key}.message", _LIMIT))
        if (found.get("errorCode") or 0) < 0:
            errors.append(invalid_value(f"status.{key}.errorCode", found["errorCode"], range_message(0, 2**31 - 1)))


def update_attachment(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_attachment(new, errors)
    if new.get("spec") != old.get("spec"):
        errors.append(invalid_value("spec", new.get("spec"), IMMUTABLE))


def csi_driver_name(value: str) -> Messages:
    return dns_subdomain(value)


def create_driver(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    for key in ("attachRequired", "podInfoOnMount", "storageCapacity"):
        if spec.get(key) is None:
            errors.append(required(f"spec.{'attachedRequired' if key == 'attachRequired' else key}"))
    policy = spec.get("fsGroupPolicy")
    if policy is not None and policy not in ("ReadWriteOnceWithFSType", "File", "None"):
        errors.append(not_supported("spec.fsGroupPolicy", policy, ["File", "None", "ReadWriteOnceWithFSType"]))
    seen: set[str] = set()
    for index, request in enumerate(spec.get("tokenRequests") or ()):
        path, audience, seconds = f"spec.tokenRequests[{index}]", request.get("audience") or "", request.get("expirationSeconds")
        if audience in seen:
            errors.append(duplicate(f"{path}.audience", audience))
        seen.add(audience)
        if seconds is not None:
            if seconds < 600:
                errors.append(invalid_value(f"{path}.expirationSeconds", seconds, "may not specify a duration less than 10 minutes"))
            if seconds > 1 << 32:
                errors.append(invalid_value(f"{path}.expirationSeconds", seconds, "may not specify a duration larger than 2^32 seconds"))
    for mode in spec.get("volumeLifecycleModes") or ():
        if mode not in ("Persistent", "Ephemeral"):
            errors.append(not_supported("spec.volumeLifecycleModes", mode, ["Persistent", "Ephemeral"]))
    period = spec.get("nodeAllocatableUpdatePeriodSeconds")
    if period is not None and period < 10:
        errors.append(invalid_value("spec.nodeAllocatableUpdatePeriodSeconds", period, "must be greater than or equal to 10 seconds"))


def update_driver(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_driver(new, errors)
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    immutable(errors, "spec.attachedRequired", spec.get("attachRequired"), before.get("attachRequired"))
    immutable(errors, "spec.volumeLifecycleModes", spec.get("volumeLifecycleModes"), before.get("volumeLifecycleModes"))


def create_csi_node(obj: Object, errors: Errors) -> None:
    seen: set[str] = set()
    for index, driver in enumerate((obj.get("spec") or {}).get("drivers") or ()):
        path, name, node = f"spec.drivers[{index}]", driver.get("name") or "", driver.get("nodeID") or ""
        driver_name(name, f"{path}.name", errors)
        if not node:
            errors.append(required(f"{path}.nodeID", ""))
        if len(node) > 256:
            errors.append(invalid_value(f"{path}.nodeID", node, "must be 256 characters or less"))
        count = (driver.get("allocatable") or {}).get("count")
        if count is not None and count < 0:
            errors.append(invalid_value(f"{path}.allocatable.count", count, "must be greater than or equal to 0"))
        if name in seen:
            errors.append(duplicate(f"{path}.name", name))
        seen.add(name)
        keys: set[str] = set()
        for key in driver.get("topologyKeys") or ():
            if not key:
                errors.append(required(path))
            if key in keys:
                errors.append(duplicate(path, key))
            keys.add(key)
            add(errors, path, key, label_key_errors(key))


def update_csi_node(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_csi_node(new, errors)
    after = {d.get("name"): d for d in (new.get("spec") or {}).get("drivers") or ()}
    for driver in (old.get("spec") or {}).get("drivers") or ():
        now = after.get(driver.get("name"))
        if now is None:
            continue
        left = {key: value for key, value in now.items() if key != "allocatable"}
        if left != {key: value for key, value in driver.items() if key != "allocatable"}:
            errors.append(invalid_value("spec.drivers", now, IMMUTABLE))


def create_capacity(obj: Object, errors: Errors) -> None:
    name = obj.get("storageClassName") or ""
    add(errors, "storageClassName", name, dns_subdomain(name))
    validate_label_selector(obj.get("nodeTopology"), "nodeTopology", errors)
    capacity = obj.get("capacity")
    if capacity is not None and quantity.parse(capacity) < 0:
        errors.append(invalid_value("capacity", str(capacity), "must be greater than or equal to 0"))


def update_capacity(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_capacity(new, errors)
    immutable(errors, "nodeTopology", new.get("nodeTopology"), old.get("nodeTopology"))
    immutable(errors, "storageClassName", new.get("storageClassName"), old.get("storageClassName"))
