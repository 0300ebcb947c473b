"""Volumes of pods: one source each, the rules of every source.

Source: pkg/apis/core/validation validateVolumeSource and the functions it calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from knarr.api import quantity
from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required, too_long
from knarr.api.validation.claims import validate_claim_spec
from knarr.api.validation.fieldrefs import VOLUME_FIELDS, validate_field_ref, validate_resource_field_ref
from knarr.api.validation.metadata import Errors, Object, add, validate_annotations, validate_label_selector, validate_labels
from knarr.api.validation.signers import validate_signer_name
from knarr.api.validation.strings import dns_label, dns_subdomain, range_message

FILE_MODE = "must be a number between 0 and 0777 (octal), both inclusive"
HOST_PATH_TYPES = ("", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
ONE_TYPE = "may not specify more than 1 volume type"


def _mode(value: int | None, path: str, errors: Errors) -> None:
    if value is not None and not 0 <= value <= 0o777:
        errors.append(invalid_value(path, value, FILE_MODE))


def no_backsteps(target: str, path: str, errors: Errors) -> None:
    if ".." in target.split("/"):
        errors.append(invalid_value(path, target, "must not contain '..'"))


def local_descending_path(target: str, path: str, errors: Errors) -> None:
    if target.startswith("/"):
        errors.append(invalid_value(path, target, "must be a relative path"))
    no_backsteps(target, path, errors)


def local_path(target: str, path: str, errors: Errors) -> None:
    """Relative, below its start, and not the "..data" of atomic writers."""
    local_descending_path(target, path, errors)
    if target.startswith("..") and not target.startswith("../"):
        errors.append(invalid_value(path, target, "must not start with '..'"))


def _need(source: Object, key: str, path: str, errors: Errors) -> None:
    if not source.get(key):
        errors.append(required(f"{path}.{key}"))


def _key_to_path(item: Object, path: str, errors: Errors) -> None:
    _need(item, "key", path, errors)
    _need(item, "path", path, errors)
    local_path(item.get("path") or "", f"{path}.path", errors)
    _mode(item.get("mode"), f"{path}.mode", errors)


def _items(source: Object, path: str, errors: Errors) -> None:
    for index, item in enumerate(source.get("items") or ()):
        _key_to_path(item, f"{path}.items[{index}]", errors)


def _empty_dir(source: Object, path: str, errors: Errors) -> None:
    limit = source.get("sizeLimit")
    if limit is not None and quantity.parse(limit) < 0:
        errors.append(field_forbidden(f"{path}.sizeLimit", "SizeLimit field must be a valid resource quantity"))


def _host_path(source: Object, path: str, errors: Errors) -> None:
    target = source.get("path") or ""
    if not target:
        errors.append(required(f"{path}.path"))
        return
    no_backsteps(target, f"{path}.path", errors)
    kind = source.get("type")
    if kind is not None and kind not in HOST_PATH_TYPES:
        errors.append(not_supported(f"{path}.type", kind, HOST_PATH_TYPES))


def _git_repo(source: Object, path: str, errors: Errors) -> None:
    _need(source, "repository", path, errors)
    local_descending_path(source.get("directory") or "", f"{path}.directory", errors)


def _disk(source: Object, path: str, errors: Errors) -> None:
    path = path.rpartition(".")[0] + ".persistentDisk"
    _need(source, "pdName", path, errors)
    _partition(source, path, errors, 0)


def _partition(source: Object, path: str, errors: Errors, least: int) -> None:
    if not least <= (source.get("partition") or 0) <= 255:
        errors.append(invalid_value(f"{path}.partition", source.get("partition") or 0, range_message(least, 255)))


def _aws(source: Object, path: str, errors: Errors) -> None:
    path = path.rpartition(".")[0] + ".awsElasticBlockStore"
    _need(source, "volumeID", path, errors)
    _partition(source, path, errors, 0)


def _secret(source: Object, path: str, errors: Errors) -> None:
    _need(source, "secretName", path, errors)
    _mode(source.get("defaultMode"), f"{path}.defaultMode", errors)
    _items(source, path, errors)


def _config_map(source: Object, path: str, errors: Errors) -> None:
    _need(source, "name", path, errors)
    _mode(source.get("defaultMode"), f"{path}.defaultMode", errors)
    _items(source, path, errors)


def _claim(source: Object, path: str, errors: Errors) -> None:
    _need(source, "claimName", path, errors)


def nfs(source: Object, path: str, errors: Errors) -> None:
    _need(source, "server", path, errors)
    _need(source, "path", path, errors)
    if not (source.get("path") or "").startswith("/"):
        errors.append(invalid_value(f"{path}.path", source.get("path") or "", "must be an absolute path"))


_ISCSI_NAMES = {
    "iqn": re.compile(r"iqn\.[0-9]{4}-[0-9]{2}\.([0-9A-Za-z.-]+)(:[^,;*&$|\t\n\f\r ]+)\Z"),
    "eui": re.compile(r"\Aeui.[0-9A-Za-z]{16}\Z"),
    "naa": re.compile(r"\Anaa.[0-9A-Za-z]{32}\Z"),
}


def iscsi(source: Object, path: str, errors: Errors) -> None:
    _need(source, "targetPortal", path, errors)
    iqn = source.get("iqn") or ""
    if not iqn:
        errors.append(required(f"{path}.iqn"))
    else:
        _iscsi_name(iqn, f"{path}.iqn", path, errors)
    if not 0 <= (source.get("lun") or 0) <= 255:
        errors.append(invalid_value(f"{path}.lun", source.get("lun"), range_message(0, 255)))
    if (source.get("chapAuthDiscovery") or source.get("chapAuthSession")) and not source.get("secretRef"):
        errors.append(required(f"{path}.secretRef"))
    if source.get("initiatorName") is not None:
        _iscsi_name(source["initiatorName"], f"{path}.initiatorname", path, errors)


def _iscsi_name(name: str, field: str, path: str, errors: Errors) -> None:
    """A qualified name of a target or initiator; only pods' volumes are told how one begins."""
    pattern = _ISCSI_NAMES.get(name[:3])
    if pattern is None:
        message = "must be valid format" if path == "spec.iscsi" else "must be valid format starting with iqn, eui, or naa"
        errors.append(invalid_value(field, name, message))
    elif not pattern.search(name):
        errors.append(invalid_value(field, name, "must be valid format"))


def fc(source: Object, path: str, errors: Errors) -> None:
    names, ids = source.get("targetWWNs") or (), source.get("wwids") or ()
    if not names and not ids:
        errors.append(required(f"{path}.targetWWNs", "must specify either targetWWNs or wwids, but not both"))
    if names and ids:
        errors.append(invalid_value(f"{path}.targetWWNs", list(names), "targetWWNs and wwids can not be specified simultaneously"))
    if names:
        if source.get("lun") is None:
            errors.append(required(f"{path}.lun", "lun is required if targetWWNs is specified"))
        elif not 0 <= source["lun"] <= 255:
            errors.append(invalid_value(f"{path}.lun", source["lun"], range_message(0, 255)))


def _downward_file(item: Object, path: str, errors: Errors) -> None:
    _need(item, "path", path, errors)
    local_path(item.get("path") or "", f"{path}.path", errors)
    if item.get("fieldRef") is not None:
        validate_field_ref(item["fieldRef"], VOLUME_FIELDS, f"{path}.fieldRef", errors)
        if item.get("resourceFieldRef") is not None:
            errors.append(invalid_value(path, "resource", "fieldRef and resourceFieldRef can not be specified simultaneously"))
    elif item.get("resourceFieldRef") is not None:
        validate_resource_field_ref(item["resourceFieldRef"], f"{path}.resourceFieldRef", errors, in_volume=True)
    else:
        errors.append(required(path, "one of fieldRef and resourceFieldRef is required"))
    _mode(item.get("mode"), f"{path}.mode", errors)


def _downward(source: Object, path: str, errors: Errors) -> None:
    _mode(source.get("defaultMode"), f"{path}.defaultMode", errors)
    for item in source.get("items") or ():
        _downward_file(item, path, errors)


class _Paths:
    """Paths written into one projected volume."""

    def __init__(self, path: str, errors: Errors) -> None:
        self._seen: set[str] = set()
        self._path = path
        self._errors = errors

    def take(self, target: str, shown: str) -> None:
        if target in self._seen:
            self._errors.append(invalid_value(self._path, shown, "conflicting duplicate paths"))
        self._seen.add(target)


def _project_named(source: Object, path: str, errors: Errors, paths: _Paths) -> None:
    _need(source, "name", path, errors)
    for index, item in enumerate(source.get("items") or ()):
        _key_to_path(item, f"{path}.items[{index}]", errors)
        if item.get("path"):
            paths.take(item["path"], source.get("name") or "")


def _project_token(source: Object, path: str, errors: Errors, volume_path: str) -> None:
    seconds = source.get("expirationSeconds") or 0
    if seconds < 600:
        errors.append(invalid_value(f"{path}.expirationSeconds", seconds, "may not specify a duration less than 10 minutes"))
    if seconds > 1 << 32:
        errors.append(invalid_value(f"{path}.expirationSeconds", seconds, "may not specify a duration larger than 2^32 seconds"))
    if not source.get("path"):
        errors.append(required(f"{volume_path}.path"))
    else:
        local_path(source["path"], f"{volume_path}.path", errors)


def _project_bundle(source: Object, path: str, errors: Errors, paths: _Paths) -> None:
    name, signer = source.get("name"), source.get("signerName")
    if name is not None and signer is not None:
        errors.append(invalid_value(path, source, "only one of name and signerName may be used"))
    elif name is not None:
        if name == "":
            errors.append(required(f"{path}.name", "must be a valid object name"))
        for message in dns_subdomain(name.rpartition(":")[2]):
            errors.append(invalid_value(f"{path}.name", name, f"not a valid clustertrustbundlename: {message}"))
        if source.get("labelSelector") is not None:
            message = "labelSelector must be unset if name is specified"
            errors.append(invalid_value(f"{path}.labelSelector", source["labelSelector"], message))
    elif signer is not None:
        if signer == "":
            errors.append(required(f"{path}.signerName", "must be a valid signer name"))
        validate_signer_name(signer, f"{path}.signerName", errors)
        validate_label_selector(source.get("labelSelector"), f"{path}.labelSelector", errors)
    else:
        errors.append(required(path, "either name or signerName must be specified"))
    target = source.get("path") or ""
    if not target:
        errors.append(required(f"{path}.path"))
    local_path(target, f"{path}.path", errors)
    paths.take(target, target)


def _projected(source: Object, path: str, errors: Errors) -> None:
    _mode(source.get("defaultMode"), f"{path}.defaultMode", errors)
    paths = _Paths(path, errors)
    for index, projection in enumerate(source.get("sources") or ()):
        own = f"{path}.sources[{index}]"
        if projection.get("secret") is not None:
            _project_named(projection["secret"], f"{own}.secret", errors, paths)
        if projection.get("configMap") is not None:
            _project_named(projection["configMap"], f"{own}.configMap", errors, paths)
        if projection.get("downwardAPI") is not None:
            for item in projection["downwardAPI"].get("items") or ():
                _downward_file(item, f"{own}.downwardAPI", errors)
                if item.get("path"):
                    paths.take(item["path"], item["path"])
        if projection.get("serviceAccountToken") is not None:
            _project_token(projection["serviceAccountToken"], f"{own}.serviceAccountToken", errors, path)
        if projection.get("clusterTrustBundle") is not None:
            _project_bundle(projection["clusterTrustBundle"], f"{own}.clusterTrustBundle", errors, paths)
        if len(projection) > 1:
            errors.append(field_forbidden(own, "may not specify more than 1 volume type per source"))


def driver_name(name: str, path: str, errors: Errors) -> None:
    """The name of a CSI driver."""
    if not name:
        errors.append(required(path))
        return
    if len(name) > 63:
        errors.append(too_long(path, 63))
    for message in dns_subdomain(name.lower()):
        errors.append(invalid_value(path, name, message))


def _csi(source: Object, path: str, errors: Errors) -> None:
    driver_name(source.get("driver") or "", f"{path}.driver", errors)
    secret = source.get("nodePublishSecretRef")
    if secret is not None:
        if not secret.get("name"):
            errors.append(required(f"{path}.nodePublishSecretRef.name"))
        else:
            add(errors, f"{path}.name", secret["name"], dns_subdomain(secret["name"]))


def validate_template_meta(metadata: Object, path: str, errors: Errors) -> None:
    """Metadata of a claim template: labels and annotations only."""
    validate_annotations(metadata.get("annotations"), f"{path}.annotations", errors)
    validate_labels(metadata.get("labels"), f"{path}.labels", errors)
    for key, value in metadata.items():
        if key not in ("annotations", "labels") and value not in (None, "", [], {}):
            errors.append(field_forbidden(f"{path}.{key}", "cannot be set"))


def _ephemeral(source: Object, path: str, errors: Errors) -> None:
    template = source.get("volumeClaimTemplate")
    if template is None:
        errors.append(required(f"{path}.volumeClaimTemplate"))
        return
    validate_template_meta(template.get("metadata") or {}, f"{path}.volumeClaimTemplate.metadata", errors)
    validate_claim_spec(template.get("spec") or {}, f"{path}.volumeClaimTemplate.spec", errors)


def _needs(*keys: str) -> Source:
    def check(source: Object, path: str, errors: Errors) -> None:
        for key in keys:
            _need(source, key, path, errors)

    return check


def _rbd(source: Object, path: str, errors: Errors) -> None:
    if not source.get("monitors"):
        errors.append(required(f"{path}.monitors"))
    _need(source, "image", path, errors)


def _cinder(source: Object, path: str, errors: Errors) -> None:
    _need(source, "volumeID", path, errors)
    if source.get("secretRef") is not None and not source["secretRef"].get("name"):
        errors.append(required(f"{path}.secretRef.name"))


_DISK_KINDS = ("Dedicated", "Managed", "Shared")
_DISK_CACHING = ("None", "ReadOnly", "ReadWrite")


def azure_disk(source: Object, path: str, errors: Errors) -> None:
    uri = source.get("diskURI") or ""
    _need(source, "diskName", path, errors)
    _need(source, "diskURI", path, errors)
    caching, kind = source.get("cachingMode"), source.get("kind")
    if caching is not None and caching not in _DISK_CACHING:
        errors.append(not_supported(f"{path}.cachingMode", caching, _DISK_CACHING))
    if kind is not None and kind not in _DISK_KINDS:
        errors.append(not_supported(f"{path}.kind", kind, _DISK_KINDS))
    if kind == "Managed" and not uri.startswith("/subscriptions/"):
        values = ["/subscriptions/{sub-id}/resourcegroups/{group-name}/providers/microsoft.compute/disks/{disk-id}"]
        errors.append(not_supported(f"{path}.diskURI", uri, values))
    if kind is not None and kind != "Managed" and not uri.startswith("http"):
        errors.append(
            not_supported(f"{path}.diskURI", uri, ["https://{account-name}.blob.core.windows.net/{container-name}/{disk-name}.vhd"])
        )


def _image(source: Object, path: str, errors: Errors) -> None:
    validate_pull_policy(source.get("pullPolicy") or "", f"{path}.pullPolicy", errors)


def validate_pull_policy(policy: str, path: str, errors: Errors) -> None:
    if not policy:
        errors.append(required(path))
    elif policy not in PULL_POLICIES:
        errors.append(not_supported(path, policy, PULL_POLICIES))


Source = Callable[[Object, str, Errors], None]

# In upstream's order: the first source given is checked, further ones are refused.
SOURCES: dict[str, Source] = {
    "emptyDir": _empty_dir,
    "hostPath": _host_path,
    "gitRepo": _git_repo,
    "gcePersistentDisk": _disk,
    "awsElasticBlockStore": _aws,
    "secret": _secret,
    "nfs": nfs,
    "iscsi": iscsi,
    "glusterfs": _needs("endpoints", "path"),
    "flocker": _needs("datasetName"),
    "persistentVolumeClaim": _claim,
    "rbd": _rbd,
    "cinder": _cinder,
    "cephfs": _needs("monitors"),
    "quobyte": _needs("registry", "volume"),
    "downwardAPI": _downward,
    "fc": fc,
    "flexVolume": _needs("driver"),
    "configMap": _config_map,
    "azureFile": _needs("secretName", "shareName"),
    "vsphereVolume": _needs("volumePath"),
    "photonPersistentDisk": _needs("pdID"),
    "portworxVolume": _needs("volumeID"),
    "azureDisk": azure_disk,
    "storageos": _needs(),
    "projected": _projected,
    "scaleIO": _needs("gateway", "system", "volumeName"),
    "csi": _csi,
    "ephemeral": _ephemeral,
    "image": _image,
}


def validate_source(volume: Object, path: str, pod_name: str, errors: Errors) -> None:
    """One volume's source."""
    given = [kind for kind in volume if kind in SOURCES and volume[kind] is not None]
    if len(given) == 1:
        kind = given[0]
        SOURCES[kind](volume[kind], f"{path}.{kind}", errors)
    elif not given:
        errors.append(required(path, "must specify a volume type"))
    else:
        first, *others = (kind for kind in SOURCES if kind in given)
        SOURCES[first](volume[first], f"{path}.{first}", errors)
        errors.extend(field_forbidden(f"{path}.{kind}", ONE_TYPE) for kind in others)
    if volume.get("ephemeral") is not None and pod_name and volume.get("name"):
        claim_name = f"{pod_name}-{volume['name']}"
        for message in dns_subdomain(claim_name):
            errors.append(invalid_value(f"{path}.name", volume["name"], f'PVC name "{claim_name}": {message}'))


def validate_volumes(volumes: list[Object], pod_name: str, path: str, errors: Errors, *, is_pod: bool = True) -> dict[str, Object]:
    """All volumes of a pod.

    Returns:
      The valid ones by name: mounts are checked against these.
    """
    created = {f"{pod_name}-{v.get('name')}" for v in volumes if v.get("ephemeral") is not None} if pod_name else set()
    result: dict[str, Any] = {}
    for index, volume in enumerate(volumes):
        own = f"{path}[{index}]"
        name = volume.get("name") or ""
        before = len(errors)
        validate_source(volume, own, pod_name, errors)
        if is_pod and volume.get("image") is not None and not volume["image"].get("reference"):
            errors.append(required(f"{own}.image.reference"))
        if not name:
            errors.append(required(f"{own}.name"))
        else:
            add(errors, f"{own}.name", name, dns_label(name))
        if name in result:
            errors.append(duplicate(f"{own}.name", name))
        if len(errors) == before:
            result[name] = volume
        claim = volume.get("persistentVolumeClaim")
        if claim is not None and claim.get("claimName") in created:
            message = "must not reference a PVC that gets created for an ephemeral volume"
            errors.append(invalid_value(f"{own}.persistentVolumeClaim.claimName", claim["claimName"], message))
    return result
