"""The API server's command line options, under the names that kube-apiserver's have, as settings.

A subset: what concerns who may do what, and how objects are kept. `knarr up --apiserver-arg NAME=VALUE` takes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from knarr.api import times
from knarr.api.scheme import OPTIONAL, SCHEME
from knarr.apiserver import features
from knarr.apiserver.auth import structured
from knarr.apiserver.config import APIServerConfig

_FILES = {
    "token-auth-file": "token_file", "authorization-webhook-config-file": "authorization_webhook_config",
    "authentication-token-webhook-config-file": "authentication_webhook_config", "encryption-provider-config": "encryption_config",
    "audit-policy-file": "audit_policy", "audit-webhook-config-file": "audit_webhook_config", "tracing-config-file": "tracing_config",
}  # fmt: skip
_TEXTS = {"service-account-issuer": "service_account_issuer", "audit-log-path": "audit_log_path"}
_LISTS = {
    "authorization-mode": "authorization_modes", "enable-admission-plugins": "admission_plugins_on",
    "disable-admission-plugins": "admission_plugins_off", "api-audiences": "api_audiences",
}  # fmt: skip
_NUMBERS = {
    "max-requests-inflight": "max_requests_inflight", "max-mutating-requests-inflight": "max_mutating_requests_inflight",
    "min-request-timeout": "min_request_timeout_seconds", "audit-log-maxsize": "audit_log_max_megabytes", "audit-log-maxbackup": "audit_log_backups",
    "audit-webhook-batch-max-size": "audit_webhook_batch_events",
}  # fmt: skip
_DURATIONS = {
    "event-ttl": "event_ttl_seconds", "audit-webhook-batch-max-wait": "audit_webhook_batch_seconds",
    "shutdown-delay-duration": "shutdown_delay_seconds", "service-account-max-token-expiration": "service_account_max_token_seconds",
}  # fmt: skip
_SWITCHES = {"encryption-provider-config-automatic-reload": "encryption_config_reload"}
_OIDC = frozenset(
    "issuer-url client-id username-claim username-prefix groups-claim groups-prefix required-claim ca-file signing-algs".split()
)
_CONFIGURATION = "admission-control-config-file"
_STRUCTURED: dict[str, Callable[[str], dict[str, Any]]] = {
    "authentication-config": structured.authentication_settings, "authorization-config": structured.authorization_settings,
}  # fmt: skip
KNOWN = sorted([*_FILES, *_TEXTS, *_LISTS, *_NUMBERS, *_DURATIONS, *_SWITCHES, *_STRUCTURED, _CONFIGURATION, "anonymous-auth", "feature-gates", "runtime-config", *(f"oidc-{name}" for name in _OIDC)])


class OptionError(ValueError):
    """An option that is not known or whose value cannot be; the text says which."""


def normalised(arguments: Iterable[str]) -> list[str]:
    """Check NAME=VALUE arguments and make their files' paths absolute. Raises OptionError."""
    out: list[str] = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if name not in KNOWN:
            raise OptionError(f"the API server has no option {name!r}; it has: {', '.join(KNOWN)}")
        if not equals:
            raise OptionError(f"option {name} needs a value: {name}=VALUE")
        if name in _FILES or name in _STRUCTURED or name in (_CONFIGURATION, "oidc-ca-file"):
            value = os.path.abspath(value)
            if not os.access(value, os.R_OK):
                raise OptionError(f"option {name}: cannot read {value}")
        elif name == "audit-log-path" and value != "-":
            value = os.path.abspath(value)
        out.append(f"{name}={value}")
    applied(APIServerConfig(), out)
    return out


def applied(config: APIServerConfig, arguments: Iterable[str]) -> APIServerConfig:
    """Return the settings with NAME=VALUE arguments applied. Raises OptionError."""
    changes: dict[str, Any] = {}
    oidc = dict(config.oidc)
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            if name.startswith("oidc-") and name[5:] in _OIDC:
                oidc[name[5:]] = value
            elif name in _STRUCTURED:
                changes.update(_STRUCTURED[name](value))
            else:
                setting, read = _reader(name)
                changes[setting] = read(value)
        except (ValueError, OSError) as error:
            raise OptionError(f"option {name}: {error}") from error
    return replace(config, oidc=oidc, **changes)


def feature_gates(arguments: Iterable[str]) -> dict[str, bool]:
    """Return the gates that NAME=VALUE arguments switch."""
    values = (value for name, _, value in (argument.partition("=") for argument in arguments) if name == "feature-gates")
    return {name: on for value in values for name, on in features.parse(value).items()}


def _reader(name: str) -> tuple[str, Callable[[str], Any]]:
    if name in _LISTS:
        return _LISTS[name], lambda value: tuple(part.strip() for part in value.split(",") if part.strip())
    if name in _NUMBERS:
        return _NUMBERS[name], int
    if name in _DURATIONS:
        return _DURATIONS[name], _seconds
    if name in _SWITCHES:
        return _SWITCHES[name], _switch
    if name == "anonymous-auth":
        return "anonymous_paths", _anonymous
    if name == "feature-gates":
        return "feature_gates", features.parse
    if name == "runtime-config":
        return "runtime_config", _runtime_config
    if name == _CONFIGURATION:
        return "admission_config", admission_configuration
    setting = _FILES.get(name) or _TEXTS.get(name)
    if setting is None:
        raise OptionError("not known")
    return setting, str


def _switch(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("must be true or false")
    return value == "true"


def _anonymous(value: str) -> tuple[str, ...]:
    return ("*",) if _switch(value) else ()


def _runtime_config(value: str) -> tuple[str, ...]:
    """Read "group/version=true,..." into the versions to be served that are off by default."""
    optional = {one.api_version for one in OPTIONAL.resources()}
    served = {one.api_version for one in SCHEME.resources()}
    wanted: dict[str, bool] = {}
    for part in filter(None, (item.strip() for item in value.split(","))):
        name, equals, text = part.partition("=")
        if text not in ("", "true", "false"):
            raise ValueError(f"invalid value of {name}={text}: true or false")
        on = text != "false" or not equals
        if name not in optional and not (name in served and on):
            raise ValueError(f"{name} cannot be switched {'on' if on else 'off'} here; {', '.join(sorted(optional))} can be switched on")
        wanted[name] = on
    return tuple(name for name, on in wanted.items() if on and name in optional)


def _seconds(value: str) -> int:
    return int(times.parse_duration(value) // 1_000_000_000)


def admission_configuration(path: str) -> dict[str, object]:
    """Read an AdmissionConfiguration: plugin name -> configuration. Raises ValueError, OSError."""
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("kind") != "AdmissionConfiguration":
            raise ValueError(f"{path} is no AdmissionConfiguration")
        out: dict[str, object] = {}
        for plugin in document.get("plugins") or ():
            configuration = plugin.get("configuration")
            if configuration is None and plugin.get("path"):
                configuration = yaml.safe_load((Path(path).parent / plugin["path"]).read_text(encoding="utf-8"))
            out[str(plugin["name"])] = configuration
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return out
