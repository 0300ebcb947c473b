"""Types of the variables that admission gives to expressions, for the plugins that run them and the controller that checks them.

Source: apiserver pkg/admission/plugin/cel/compile.go (BuildRequestType, BuildNamespaceType).
"""

from __future__ import annotations

from knarr.api.cel import types as T

_KIND = T.ObjectType("kubernetes.GroupVersionKind", {"group": T.STRING, "version": T.STRING, "kind": T.STRING})
_RESOURCE = T.ObjectType("kubernetes.GroupVersionResource", {"group": T.STRING, "version": T.STRING, "resource": T.STRING})
_STRINGS = ("list", T.STRING)
_TEXTS = ("map", T.STRING, T.STRING)
_USER = T.ObjectType("kubernetes.UserInfo", {
    "username": T.STRING, "uid": T.STRING, "groups": _STRINGS, "extra": ("map", T.STRING, _STRINGS),
})  # fmt: skip
REQUEST = T.ObjectType("kubernetes.AdmissionRequest", {
    "kind": _KIND, "resource": _RESOURCE, "subResource": T.STRING, "requestKind": _KIND, "requestResource": _RESOURCE,
    "requestSubResource": T.STRING, "name": T.STRING, "namespace": T.STRING, "operation": T.STRING, "userInfo": _USER, "dryRun": T.BOOL,
    "options": T.DYN,
})  # fmt: skip
_CONDITION = T.ObjectType("kubernetes.NamespaceCondition", {
    "status": T.STRING, "type": T.STRING, "lastTransitionTime": T.TIMESTAMP, "message": T.STRING, "reason": T.STRING,
})  # fmt: skip
_METADATA = T.ObjectType("kubernetes.NamespaceMetadata", {
    "name": T.STRING, "generateName": T.STRING, "namespace": T.STRING, "labels": _TEXTS, "annotations": _TEXTS, "UID": T.STRING,
    "creationTimestamp": T.TIMESTAMP, "deletionGracePeriodSeconds": T.INT, "deletionTimestamp": T.TIMESTAMP, "generation": T.INT,
    "resourceVersion": T.STRING, "finalizers": _STRINGS,
})  # fmt: skip
NAMESPACE = T.ObjectType("kubernetes.Namespace", {
    "metadata": _METADATA, "spec": T.ObjectType("kubernetes.NamespaceSpec", {"finalizers": _STRINGS}),
    "status": T.ObjectType("kubernetes.NamespaceStatus", {"conditions": ("list", _CONDITION), "phase": T.STRING}),
})  # fmt: skip
