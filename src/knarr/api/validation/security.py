"""Security contexts of pods and containers.

Source: pkg/apis/core/validation ValidateSecurityContext, validatePodSpecSecurityContext, validateWindowsSecurityContextOptions.
"""

from __future__ import annotations

import re

from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required, too_long
from knarr.api.validation.metadata import Errors, Object, add
from knarr.api.validation.strings import dns_subdomain, group_id, user_id

_SYSCTL = "([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?"
_matches_sysctl = re.compile(_SYSCTL).fullmatch
_IPC_SYSCTLS = ("kernel.sem", "kernel.shm", "kernel.msg", "fs.mqueue.")


def _no_backsteps(target: str, path: str, errors: Errors) -> None:
    if target.startswith("/"):
        errors.append(invalid_value(path, target, "must be a relative path"))
    if ".." in target.split("/"):
        errors.append(invalid_value(path, target, "must not contain '..'"))


def validate_seccomp(profile: Object | None, path: str, errors: Errors) -> None:
    if profile is None:
        return
    kind, local = profile.get("type") or "", profile.get("localhostProfile")
    if not kind:
        errors.append(required(f"{path}.type", "type is required when seccompProfile is set"))
    elif kind not in ("Localhost", "RuntimeDefault", "Unconfined"):
        errors.append(not_supported(f"{path}.type", kind, ["Localhost", "RuntimeDefault", "Unconfined"]))
    if kind == "Localhost":
        if local is None:
            errors.append(required(f"{path}.localhostProfile", "must be set when seccomp type is Localhost"))
        else:
            _no_backsteps(local, f"{path}.localhostProfile", errors)
    elif local is not None:
        errors.append(invalid_value(f"{path}.localhostProfile", profile, "can only be set when seccomp type is Localhost"))


def validate_app_armor(profile: Object | None, path: str, errors: Errors) -> None:
    if profile is None:
        return
    kind, local = profile.get("type") or "", profile.get("localhostProfile")
    own = f"{path}.localhostProfile"
    if kind == "Localhost":
        if local is None:
            errors.append(required(own, "must be set when AppArmor type is Localhost"))
        else:
            if local.strip() != local:
                errors.append(invalid_value(own, local, "must not be padded with whitespace"))
            elif not local:
                errors.append(required(own, "must be set when AppArmor type is Localhost"))
            if len(local) > 4095:
                errors.append(too_long(own, 4095))
    elif kind in ("RuntimeDefault", "Unconfined"):
        if local is not None:
            errors.append(invalid_value(own, local, "can only be set when AppArmor type is Localhost"))
    elif not kind:
        errors.append(required(f"{path}.type", "type is required when appArmorProfile is set"))
    else:
        errors.append(not_supported(f"{path}.type", kind, ["Localhost", "RuntimeDefault", "Unconfined"]))


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_USER_CHARACTERS = re.compile(r'["/\\:;|=,+*?<>@\[\]]')
_NETBIOS = re.compile(r'[^\\/:*?"<>|.][^\\/:*?"<>|]{0,14}')
_DNS_DOMAIN = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*")


def validate_windows_options(options: Object | None, path: str, errors: Errors) -> None:
    if options is None:
        return
    name = options.get("gmsaCredentialSpecName")
    if name is not None:
        add(errors, f"{path}.gmsaCredentialSpecName", name, dns_subdomain(name))
    spec = options.get("gmsaCredentialSpec")
    if spec is not None:
        if not spec:
            errors.append(invalid_value(f"{path}.gmsaCredentialSpec", spec, "gmsaCredentialSpec cannot be an empty string"))
        elif len(spec) > 64 * 1024:
            message = "gmsaCredentialSpec size must be under 64 KiB"
            errors.append(invalid_value(f"{path}.gmsaCredentialSpec", spec, message))
    user = options.get("runAsUserName")
    if user is not None:
        _windows_user(user, f"{path}.runAsUserName", errors)


def _windows_user(user: str, path: str, errors: Errors) -> None:
    if not user:
        errors.append(invalid_value(path, user, "runAsUserName cannot be an empty string"))
    elif _CONTROL.search(user):
        errors.append(invalid_value(path, user, "runAsUserName cannot contain control characters"))
    elif len(parts := user.split("\\")) > 2:
        errors.append(invalid_value(path, user, "runAsUserName cannot contain more than one backslash"))
    else:
        domain, own = parts if len(parts) == 2 else ("", parts[0])
        if len(parts) == 2:
            if len(domain) >= 256:
                errors.append(invalid_value(path, user, "runAsUserName's Domain length must be under 256 characters"))
            if not _NETBIOS.fullmatch(domain) and not _DNS_DOMAIN.fullmatch(domain):
                message = "runAsUserName's Domain doesn't match the NetBios nor the DNS format"
                errors.append(invalid_value(path, user, message))
        if not own:
            errors.append(invalid_value(path, user, "runAsUserName's User cannot be empty"))
        elif len(own) > 104:
            errors.append(invalid_value(path, user, "runAsUserName's User length must not be longer than 104 characters"))
        if own and not own.strip(". "):
            errors.append(invalid_value(path, user, "runAsUserName's User cannot contain only periods or spaces"))
        if _USER_CHARACTERS.search(own):
            message = "runAsUserName's User cannot contain the following characters: \"/\\:;|=,+*?<>@[]"
            errors.append(invalid_value(path, user, message))


def validate_container_security(context: Object, path: str, host_users: bool, errors: Errors) -> None:
    """securityContext of a container."""
    for key, rule in (("runAsUser", user_id), ("runAsGroup", group_id)):
        value = context.get(key)
        if value is not None:
            add(errors, f"{path}.{key}", value, rule(value))
    proc_mount = context.get("procMount")
    if proc_mount is not None:
        if proc_mount not in ("Default", "Unmasked"):
            errors.append(not_supported(f"{path}.procMount", proc_mount, ["Default", "Unmasked"]))
        if host_users and proc_mount == "Unmasked":
            errors.append(invalid_value(f"{path}.procMount", proc_mount, "`hostUsers` must be false to use `Unmasked`"))
    validate_seccomp(context.get("seccompProfile"), f"{path}.seccompProfile", errors)
    if context.get("allowPrivilegeEscalation") is False:
        if context.get("privileged"):
            message = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true"
            errors.append(invalid_value(path, context, message))
        for capability in (context.get("capabilities") or {}).get("add") or ():
            if capability == "CAP_SYS_ADMIN":
                message = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN"
                errors.append(invalid_value(path, context, message))
    validate_windows_options(context.get("windowsOptions"), f"{path}.windowsOptions", errors)
    validate_app_armor(context.get("appArmorProfile"), f"{path}.appArmorProfile", errors)


def _sysctls(context: Object, spec: Object, path: str, errors: Errors) -> None:
    names: set[str] = set()
    for index, sysctl in enumerate(context["sysctls"]):
        own, name = f"{path}[{index}].name", sysctl.get("name") or ""
        if not name:
            errors.append(required(own))
        elif len(name) > 253 or not _matches_sysctl(name):
            errors.append(invalid_value(own, name, f"must have at most 253 characters and match regex ^{_SYSCTL}$"))
        elif name in names:
            errors.append(duplicate(own, name))
        dotted = name.replace("/", ".") if "." not in name.split("/")[0] else name
        if spec.get("hostNetwork") and dotted.startswith("net."):
            errors.append(invalid_value(own, name, "may not be specified when 'hostNetwork' is true"))
        elif spec.get("hostIPC") and dotted.startswith(_IPC_SYSCTLS):
            errors.append(invalid_value(own, name, "may not be specified when 'hostIPC' is true"))
        names.add(name)


def validate_pod_security(context: Object, spec: Object, path: str, errors: Errors) -> None:
    """spec.securityContext and what belongs to it."""
    for key, rule in (("fsGroup", group_id), ("runAsUser", user_id), ("runAsGroup", group_id)):
        value = context.get(key)
        if value is not None:
            add(errors, f"{path}.{key}", value, rule(value))
    for index, group in enumerate(context.get("supplementalGroups") or ()):
        add(errors, f"{path}.supplementalGroups[{index}]", group, group_id(group))
    if spec.get("shareProcessNamespace") and spec.get("hostPID"):
        message = "ShareProcessNamespace and HostPID cannot both be enabled"
        errors.append(invalid_value(f"{path}.shareProcessNamespace", True, message))
    if context.get("sysctls"):
        _sysctls(context, spec, f"{path}.sysctls", errors)
    for key, values in (("fsGroupChangePolicy", ["Always", "OnRootMismatch"]),):
        if context.get(key) is not None and context[key] not in values:
            errors.append(not_supported(f"{path}.{key}", context[key], values))
    validate_seccomp(context.get("seccompProfile"), f"{path}.seccompProfile", errors)
    validate_windows_options(context.get("windowsOptions"), f"{path}.windowsOptions", errors)
    validate_app_armor(context.get("appArmorProfile"), f"{path}.appArmorProfile", errors)
    for key, values in (("supplementalGroupsPolicy", ["Merge", "Strict"]), ("seLinuxChangePolicy", ["MountOption", "Recursive"])):
        if context.get(key) is not None and context[key] not in values:
            errors.append(not_supported(f"{path}.{key}", context[key], values))


_WINDOWS_POD = (
    "appArmorProfile",
    "seLinuxOptions",
    "seccompProfile",
    "fsGroup",
    "fsGroupChangePolicy",
    "sysctls",
    "runAsUser",
    "runAsGroup",
)
_WINDOWS_CONTAINER = (
    "appArmorProfile", "seLinuxOptions", "seccompProfile", "capabilities", "readOnlyRootFilesystem", "privileged",
    "allowPrivilegeEscalation", "procMount", "runAsUser", "runAsGroup",
)  # fmt: skip
_FORBIDDEN_ON_WINDOWS = "cannot be set for a windows pod"


def validate_os(spec: Object, path: str, errors: Errors) -> None:
    """spec.os, and that nothing of the other system is set."""
    name = (spec.get("os") or {}).get("name") or ""
    if not name:
        errors.append(required(f"{path}.os.name"))
        return
    if name not in ("linux", "windows"):
        errors.append(not_supported(f"{path}.os", name, ["linux", "windows"]))
        return
    context = spec.get("securityContext") or {}
    if name == "linux":
        if context.get("windowsOptions") is not None:
            errors.append(field_forbidden(f"{path}.securityContext.windowsOptions", "windows options cannot be set for a linux pod"))
    else:
        for key in _WINDOWS_POD:
            if context.get(key) is not None:
                errors.append(field_forbidden(f"{path}.securityContext.{key}", _FORBIDDEN_ON_WINDOWS))
        for key in ("hostUsers", "hostPID", "hostIPC", "shareProcessNamespace"):
            if spec.get(key) is not None:
                errors.append(field_forbidden(f"{path}.{key}", _FORBIDDEN_ON_WINDOWS))
        for key in ("supplementalGroups", "supplementalGroupsPolicy", "seLinuxChangePolicy"):
            if context.get(key) is not None:
                errors.append(field_forbidden(f"{path}.securityContext.{key}", _FORBIDDEN_ON_WINDOWS))
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(kind) or ()):
            own = f"{path}.{kind}[{index}].securityContext"
            inner = container.get("securityContext") or {}
            if name == "linux":
                if inner.get("windowsOptions") is not None:
                    errors.append(field_forbidden(f"{own}.windowsOptions", "windows options cannot be set for a linux pod"))
                continue
            for key in _WINDOWS_CONTAINER:
                if inner.get(key) is not None:
                    errors.append(field_forbidden(f"{own}.{key}", _FORBIDDEN_ON_WINDOWS))
