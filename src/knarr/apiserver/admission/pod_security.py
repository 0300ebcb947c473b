"""PodSecurity: namespaces say by labels how much their pods may; enforced on pods, warned about on their controllers too.

Source: pod-security-admission admission/admission.go, api/helpers.go.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from knarr.api import errors, meta
from knarr.api.errors import FieldError, invalid_value
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, object_name
from knarr.apiserver.admission.pod_security_checks import LATEST, evaluate
from knarr.apiserver.attributes import AdmissionRequest, Store
from knarr.apiserver.instruments import Counters

LEVELS = ("privileged", "baseline", "restricted")
_PREFIX = "pod-security.kubernetes.io/"
_IGNORED_SUBRESOURCES = frozenset({"exec", "attach", "binding", "eviction", "log", "portforward", "proxy", "status"})
_VERSION = re.compile(r"v1\.([0-9]|[1-9][0-9]*)")
_MOST_PODS = 3000
_TEMPLATES = {
    ("", "replicationcontrollers"): ("spec", "template"), ("", "podtemplates"): ("template",), ("apps", "replicasets"): ("spec", "template"),
    ("apps", "deployments"): ("spec", "template"), ("apps", "statefulsets"): ("spec", "template"), ("apps", "daemonsets"): ("spec", "template"),
    ("batch", "jobs"): ("spec", "template"), ("batch", "cronjobs"): ("spec", "jobTemplate", "spec", "template"),
}  # fmt: skip


class LevelVersion(NamedTuple):
    """A level in a policy version, e.g. restricted:latest."""

    level: str = "privileged"
    version: str = "latest"

    def __str__(self) -> str:
        return f"{self.level}:{self.version}"

    def violations(self, metadata: Object, spec: Object) -> list[tuple[str, str]]:
        minor = LATEST if self.version == "latest" else int(self.version.removeprefix("v1."))
        return evaluate(self.level, minor, metadata, spec)


class Policy(NamedTuple):
    """What a namespace asks for."""

    enforce: LevelVersion
    audit: LevelVersion
    warn: LevelVersion


def policy_of(labels: dict[str, str] | None, defaults: Policy) -> tuple[Policy, list[FieldError]]:
    """Read a namespace's labels; malformed ones give errors and the strict reading (lenient for audit and warn)."""
    labels = labels or {}
    found: list[FieldError] = []
    modes: dict[str, LevelVersion] = {}
    valid_enforce = False
    for mode, default in zip(("enforce", "audit", "warn"), defaults, strict=True):
        level, version = default
        asked = labels.get(_PREFIX + mode)
        if asked is not None:
            if asked in LEVELS:
                level = asked
                valid_enforce = valid_enforce or mode == "enforce"
            else:
                level = "restricted" if mode == "enforce" else "privileged"
                found.append(invalid_value(f"metadata.labels[{_PREFIX}{mode}]", asked, f"must be one of {', '.join(LEVELS)}"))
        asked = labels.get(f"{_PREFIX}{mode}-version")
        if asked is not None:
            version = asked
            if asked != "latest" and _VERSION.fullmatch(asked) is None:
                version = "latest"
                found.append(invalid_value(f"metadata.labels[{_PREFIX}{mode}-version]", asked, 'must be "latest" or "v1.x"'))
        modes[mode] = LevelVersion(level, version)
    enforce, warn = modes["enforce"], modes["warn"]
    if _PREFIX + "warn" not in labels and valid_enforce and LEVELS.index(enforce.level) > LEVELS.index(warn.level):
        warn = LevelVersion(enforce.level, warn.version if _PREFIX + "warn-version" in labels else enforce.version)
    return Policy(enforce, modes["audit"], warn), found


def _detail(violations: list[tuple[str, str]]) -> str:
    return ", ".join(f"{reason} ({detail})" if detail else reason for reason, detail in violations)


class PodSecurity(Plugin):
    name = "PodSecurity"

    def __init__(self, namespaces: Store, pods: Store, configuration: Object | None = None) -> None:
        configuration = configuration or {}
        defaults = configuration.get("defaults") or {}
        self._defaults = Policy(*(
            LevelVersion(defaults.get(mode) or "privileged", defaults.get(f"{mode}-version") or "latest") for mode in ("enforce", "audit", "warn")
        ))  # fmt: skip
        exemptions = configuration.get("exemptions") or {}
        self._exempt_users = frozenset(exemptions.get("usernames") or ())
        self._exempt_namespaces = frozenset(exemptions.get("namespaces") or ())
        self._exempt_classes = frozenset(exemptions.get("runtimeClasses") or ())
        self._namespaces = namespaces
        self._pods = pods
        where = ("request_operation", "resource", "subresource")
        self._evaluations = Counters(
            "pod_security_evaluations_total", "[ALPHA] Number of policy evaluations that occurred, not counting ignored or exempt requests.",
            ("decision", "mode", "policy_level", "policy_version", *where),
        )  # fmt: skip
        self._exemptions = Counters(
            "pod_security_exemptions_total", "[ALPHA] Number of exempt requests, not counting ignored or out of scope requests.", where
        )
        self._errors = Counters(
            "pod_security_errors_total", "[ALPHA] Number of errors preventing normal evaluation. Non-fatal errors may result in the latest "
            "restricted profile being used for evaluation.", ("fatal", *where),
        )  # fmt: skip

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        return [*self._evaluations.lines(), *self._exemptions.lines(), *self._errors.lines()]

    def _evaluated(self, request: AdmissionRequest, mode: str, policy: LevelVersion, *, allowed: bool) -> None:
        version = "latest" if policy.level == "privileged" else policy.version
        self._evaluations.add("allow" if allowed else "deny", mode, policy.level, version, *_labels(request))

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        if operation not in (CREATE, UPDATE):
            return False
        key = (resource.group, resource.plural)
        if key == ("", "pods"):
            return subresource not in _IGNORED_SUBRESOURCES
        return not subresource and (key == ("", "namespaces") or key in _TEMPLATES)

    def validate(self, request: AdmissionRequest) -> None:
        if request.object is None:
            return
        if request.resource.plural == "namespaces":
            self._namespace(request, request.object)
            return
        if request.namespace in self._exempt_namespaces or request.user.name in self._exempt_users:
            self._exemptions.add(*_labels(request))
            request.audit_annotations["pod-security.kubernetes.io/exempt"] = "namespace" if request.namespace in self._exempt_namespaces else "user"
            return
        namespace = self._namespaces.get_nowait("", request.namespace)
        labels = (namespace or {}).get("metadata", {}).get("labels")
        policy, problems = policy_of(labels, self._defaults)
        is_pod = request.resource.plural == "pods"
        if not problems and policy.audit.level == policy.warn.level == "privileged" and not (is_pod and policy.enforce.level != "privileged"):
            if is_pod:
                self._evaluated(request, "enforce", policy.enforce, allowed=True)
            return
        template: Object | None = request.object
        if is_pod:
            if request.operation == UPDATE and not _significant(request.object, request.old_object or {}):
                return
        else:
            for key in _TEMPLATES[(request.resource.group, request.resource.plural)]:
                template = (template or {}).get(key)
            if template is None:
                return
        self._evaluate(request, policy, problems, template or {}, enforce=is_pod)

    def _evaluate(self, request: AdmissionRequest, policy: Policy, problems: list[FieldError], pod: Object, *, enforce: bool) -> None:
        metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
        annotations = request.audit_annotations
        if spec.get("runtimeClassName") in self._exempt_classes:
            self._exemptions.add(*_labels(request))
            annotations["pod-security.kubernetes.io/exempt"] = "runtimeClass"
            return
        if problems:
            self._errors.add("false", *_labels(request))
            annotations["pod-security.kubernetes.io/error"] = f"Failed to parse policy: {'; '.join(str(problem) for problem in problems)}"
        results: dict[LevelVersion, list[tuple[str, str]]] = {}
        denied: errors.StatusError | None = None
        if enforce:
            annotations["pod-security.kubernetes.io/enforce-policy"] = str(policy.enforce)
            results[policy.enforce] = policy.enforce.violations(metadata, spec)
            self._evaluated(request, "enforce", policy.enforce, allowed=not results[policy.enforce])
            if results[policy.enforce]:
                text = f'violates PodSecurity "{policy.enforce}": {_detail(results[policy.enforce])}'
                denied = errors.forbidden(request.resource, object_name(request), text)
        audit = results.get(policy.audit)
        if audit is None:
            audit = results[policy.audit] = policy.audit.violations(metadata, spec)
        if audit:
            self._evaluated(request, "audit", policy.audit, allowed=False)
            annotations["pod-security.kubernetes.io/audit-violations"] = f'would violate PodSecurity "{policy.audit}": {_detail(audit)}'
        if denied is not None:
            raise denied
        warn = results.get(policy.warn)
        if warn is None:
            warn = policy.warn.violations(metadata, spec)
        if warn:
            self._evaluated(request, "warn", policy.warn, allowed=False)
            request.warnings.append(f'would violate PodSecurity "{policy.warn}": {_detail(warn)}')

    # -- namespaces ------------------------------------------------------------------------------------------------------
    def _namespace(self, request: AdmissionRequest, namespace: Object) -> None:
        labels = namespace["metadata"].get("labels")
        policy, problems = policy_of(labels, self._defaults)
        name = meta.name(namespace)
        exempt = name in self._exempt_namespaces
        if request.operation == CREATE:
            if problems:
                raise errors.invalid(request.resource, name, problems)
            if exempt:
                self._warn_exempt(request, name, policy)
            return
        before, before_problems = policy_of(((request.old_object or {}).get("metadata") or {}).get("labels"), self._defaults)
        if problems and [str(problem) for problem in problems] != [str(problem) for problem in before_problems]:
            raise errors.invalid(request.resource, name, problems)
        new, old = policy.enforce, before.enforce
        if new == old or new.level == "privileged" or (new.version == old.version and LEVELS.index(new.level) <= LEVELS.index(old.level)):
            return
        if exempt:
            self._warn_exempt(request, name, policy)
            return
        request.warnings += self._pod_warnings(name, new)

    def _warn_exempt(self, request: AdmissionRequest, name: str, policy: Policy) -> None:
        if policy == self._defaults or all(mode.level == "privileged" for mode in policy):
            return
        shown = ", ".join(f"{word}={mode}" for word, mode in zip(("enforce", "audit", "warn"), policy, strict=True) if mode.level != "privileged")
        request.warnings.append(f'namespace "{name}" is exempt from Pod Security, and the policy ({shown}) will be ignored')

    def _pod_warnings(self, namespace: str, enforce: LevelVersion) -> list[str]:
        """Say which pods that are there already would not be admitted under the new level; one pod per controller comes first."""
        first: list[Object] = []
        rest: list[Object] = []
        controllers: set[str] = set()
        for pod in self._pods.list_nowait(namespace):
            if pod["spec"].get("runtimeClassName") in self._exempt_classes:
                continue
            owner = meta.controller_of(pod)
            if owner is not None and owner.get("uid") in controllers:
                rest.append(pod)
                continue
            if owner is not None:
                controllers.add(owner.get("uid", ""))
            first.append(pod)
        pods = first + rest
        warnings: list[str] = []
        if len(pods) > _MOST_PODS:
            warnings.append(f"new PodSecurity enforce level only checked against the first {_MOST_PODS} of {len(pods)} existing pods")
        names: dict[str, list[str]] = {}
        for pod in pods[:_MOST_PODS]:
            violations = enforce.violations(pod["metadata"], pod["spec"])
            if violations:
                names.setdefault(", ".join(reason for reason, _ in violations), []).append(meta.name(pod))
        if names:
            warnings.append(f'existing pods in namespace "{namespace}" violate the new PodSecurity enforce level "{enforce}"')
        lines: list[str] = []
        for reasons, found in names.items():
            others = len(found) - 1
            also = "" if not others else " (and 1 other pod)" if others == 1 else f" (and {others} other pods)"
            lines.append(f"{min(found)}{also}: {reasons}")
        return warnings + sorted(lines)


def _labels(request: AdmissionRequest) -> tuple[str, str, str]:
    resource = request.resource.plural
    told = "pod" if resource == "pods" else "namespace" if resource == "namespaces" else "controller"
    return request.operation.lower(), told, request.subresource


def _significant(new: Object, old: Object) -> bool:
    """Whether an update touches what the checks look at and what updates may change: images, seccomp annotations, new containers."""
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    for field in ("containers", "initContainers"):
        now, then = spec.get(field) or [], before.get(field) or []
        if len(now) != len(then) or any(a.get("image") != b.get("image") for a, b in zip(now, then, strict=True)):
            return True
    annotations, old_annotations = meta.annotations(new), meta.annotations(old)
    for prefix in ("seccomp.security.alpha.kubernetes.io/pod", "container.seccomp.security.alpha.kubernetes.io/", "container.apparmor.security.beta.kubernetes.io/"):
        for key in {*annotations, *old_annotations}:
            if key.startswith(prefix) and annotations.get(key) != old_annotations.get(key):
                return True
    known = {container.get("name"): container.get("image") for container in before.get("ephemeralContainers") or ()}
    return any(known.get(c.get("name"), object()) != c.get("image") for c in spec.get("ephemeralContainers") or ())
