"""Which requests the audit log wants, how much of them, and at which stages: the rules of an audit.k8s.io/v1 Policy.

Source: apiserver pkg/audit/policy (checker.go, reader.go), pkg/apis/audit/validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from knarr.api.types import Object
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.requestinfo import RequestInfo

LEVELS = {"None": 0, "Metadata": 1, "Request": 2, "RequestResponse": 3}
STAGES = ("RequestReceived", "ResponseStarted", "ResponseComplete", "Panic")


class Wanted(NamedTuple):
    """What is written of one request."""

    level: str
    omitted: frozenset[str]
    """Stages."""
    omits_managed_fields: bool

    def reaches(self, level: str) -> bool:
        return LEVELS[self.level] >= LEVELS[level]


class Policy:
    """The rules of one policy file; the first one that matches decides."""

    def __init__(self, path: str) -> None:
        """Raises ValueError for a file that is no valid policy, OSError when it cannot be read."""
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"audit policy {path} cannot be read: {error}") from error
        if not isinstance(document, dict) or document.get("kind") != "Policy" or document.get("apiVersion") != "audit.k8s.io/v1":
            raise ValueError(f"{path} is no audit.k8s.io/v1 Policy")
        self._rules: list[Object] = document.get("rules") or []
        if not self._rules:
            raise ValueError(f"audit policy {path} has no rules")
        self._omitted = frozenset(document.get("omitStages") or ())
        self._omits_managed_fields = bool(document.get("omitManagedFields"))
        for index, rule in enumerate(self._rules):
            if rule.get("level") not in LEVELS:
                raise ValueError(f"audit policy {path}: rules[{index}].level must be one of {', '.join(LEVELS)}")
            if rule.get("nonResourceURLs") and (rule.get("resources") or rule.get("namespaces")):
                raise ValueError(f"audit policy {path}: rules[{index}] cannot apply to both regular resources and non-resource URLs")
        for stage in self._omitted.union(*(rule.get("omitStages") or () for rule in self._rules)):
            if stage not in STAGES:
                raise ValueError(f"audit policy {path}: {stage!r} is no stage; there are {', '.join(STAGES)}")

    def wanted(self, info: RequestInfo, path: str, user: UserInfo) -> Wanted | None:
        """What is to be written of a request; None: nothing."""
        for rule in self._rules:
            if _matches(rule, info, path, user):
                if rule["level"] == "None":
                    return None
                omits = rule.get("omitManagedFields")
                return Wanted(rule["level"], self._omitted | frozenset(rule.get("omitStages") or ()), self._omits_managed_fields if omits is None else bool(omits))
        return None


def _matches(rule: Object, info: RequestInfo, path: str, user: UserInfo) -> bool:
    if rule.get("users") and user.name not in rule["users"]:
        return False
    if rule.get("userGroups") and not set(rule["userGroups"]) & set(user.groups):
        return False
    if rule.get("verbs") and info.verb not in rule["verbs"]:
        return False
    if rule.get("resources") or rule.get("namespaces"):
        return info.is_resource and _matches_resource(rule, info)
    if rule.get("nonResourceURLs"):
        return not info.is_resource and any(_matches_path(pattern, path) for pattern in rule["nonResourceURLs"])
    return True


def _matches_resource(rule: Object, info: RequestInfo) -> bool:
    if rule.get("namespaces") and info.namespace not in rule["namespaces"]:
        return False
    wanted = rule.get("resources")
    if not wanted:
        return True
    combined = f"{info.resource}/{info.subresource}" if info.subresource else info.resource
    for entry in wanted:
        if (entry.get("group") or "") != info.group:
            continue
        names = entry.get("resources") or []
        hit = not names or any(
            name in ("*", combined) or (name.endswith("/*") and name[:-2] == info.resource)
            or (name.startswith("*/") and name[2:] == info.subresource) for name in names
        )  # fmt: skip
        if hit and (not entry.get("resourceNames") or info.name in entry["resourceNames"]):
            return True
    return False


def _matches_path(pattern: str, path: str) -> bool:
    return pattern in ("*", path) or (pattern.endswith("*") and path.startswith(pattern[:-1]))
