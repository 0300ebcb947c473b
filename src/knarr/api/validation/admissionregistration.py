"""Webhook configurations, validating admission policies and their bindings, but for their expressions.

Expressions are compiled by the admission plugin that knows their variables. Updates may keep what older servers took: hence
Leniency.

Source: pkg/apis/admissionregistration/validation/validation.go, apiserver pkg/util/webhook/validation.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required, too_many
from knarr.api.validation.metadata import Errors, Object, add, validate_label_selector
from knarr.api.validation.strings import dns_1035_label, dns_subdomain, label_key_errors, path_segment, port_number

GROUP = "admissionregistration.k8s.io"
_REVIEW_VERSIONS = ("v1", "v1beta1")
_NO_SIDE_EFFECTS = ("None", "NoneOnDryRun")
_SIDE_EFFECTS = ("None", "NoneOnDryRun", "Some", "Unknown")
_OPERATIONS = ("*", "CONNECT", "CREATE", "DELETE", "UPDATE")
_URL_FORM = "; desired format: https://host[/path]"
_IDENTIFIER = re.compile(r"[_a-zA-Z][_a-zA-Z0-9]*")
_RESERVED = frozenset(
    "true false null in as break const continue else for function if import let loop package namespace return var void while".split()
)
_MAX_AUDIT_ANNOTATIONS = 20
_MAX_AUDIT_EXPRESSION = 5 * 1024


@dataclass(frozen=True, slots=True)
class Leniency:
    """What an update is not asked for, because the stored configuration does not have it either."""

    side_effects: bool = False
    versions: bool = False
    unique_names: bool = False
    label_values: bool = False
    conditions: bool = False


def _one_of(path: str, value: str | None, allowed: Iterable[str], errors: Errors) -> None:
    if value is not None and value not in allowed:
        errors.append(not_supported(path, value, allowed))


# --- webhooks -----------------------------------------------------------------------------------------------------------


def create_validating(obj: Object, errors: Errors) -> None:
    _configuration(obj, errors, Leniency(), mutating=False)


def create_mutating(obj: Object, errors: Errors) -> None:
    _configuration(obj, errors, Leniency(), mutating=True)


def update_validating(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _configuration(new, errors, _leniency(new, old), mutating=False)


def update_mutating(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _configuration(new, errors, _leniency(new, old), mutating=True)


def _leniency(new: Object, old: Object) -> Leniency:
    hooks, stored = new.get("webhooks") or [], old.get("webhooks") or []
    selectors: Errors = []
    for hook in stored:
        validate_label_selector(hook.get("namespaceSelector"), "", selectors)
        validate_label_selector(hook.get("objectSelector"), "", selectors)
    names = [hook.get("name") for hook in stored]
    versions = [hook.get("admissionReviewVersions") or () for hook in stored]
    return Leniency(
        side_effects=any(hook.get("sideEffects") not in _NO_SIDE_EFFECTS for hook in stored),
        versions=any(given and not set(given) & set(_REVIEW_VERSIONS) for given in versions),
        unique_names=len(set(names)) != len(names),
        label_values=bool(selectors),
        conditions=[hook.get("matchConditions") for hook in hooks] == [hook.get("matchConditions") for hook in stored],
    )


def _configuration(obj: Object, errors: Errors, leniency: Leniency, *, mutating: bool) -> None:
    names: set[str] = set()
    for index, hook in enumerate(obj.get("webhooks") or ()):
        path = f"webhooks[{index}]"
        _webhook(hook, path, errors, leniency, mutating=mutating)
        _review_versions(hook.get("admissionReviewVersions") or [], f"{path}.admissionReviewVersions", errors, leniency)
        name = hook.get("name") or ""
        if name and not leniency.unique_names:
            if name in names:
                errors.append(duplicate(f"{path}.name", name))
            names.add(name)


def _webhook(hook: Object, path: str, errors: Errors, leniency: Leniency, *, mutating: bool) -> None:
    _qualified_domain(hook.get("name") or "", f"{path}.name", errors)
    for index, rule in enumerate(hook.get("rules") or ()):
        _rule(rule, f"{path}.rules[{index}]", errors)
    _one_of(f"{path}.failurePolicy", hook.get("failurePolicy"), ("Fail", "Ignore"), errors)
    _one_of(f"{path}.matchPolicy", hook.get("matchPolicy"), ("Equivalent", "Exact"), errors)
    allowed = _SIDE_EFFECTS if leniency.side_effects else _NO_SIDE_EFFECTS
    if hook.get("sideEffects") is None:
        errors.append(required(f"{path}.sideEffects", f"must specify one of {', '.join(allowed)}"))
    _one_of(f"{path}.sideEffects", hook.get("sideEffects"), allowed, errors)
    timeout = hook.get("timeoutSeconds")
    if timeout is not None and not 1 <= timeout <= 30:
        errors.append(invalid_value(f"{path}.timeoutSeconds", timeout, "the timeout value must be between 1 and 30 seconds"))
    for key in ("namespaceSelector", "objectSelector"):
        validate_label_selector(hook.get(key), f"{path}.{key}", errors, allow_invalid_values=leniency.label_values)
    if mutating:
        _one_of(f"{path}.reinvocationPolicy", hook.get("reinvocationPolicy"), ("IfNeeded", "Never"), errors)
    validate_webhook_client(hook.get("clientConfig") or {}, f"{path}.clientConfig", errors)
    if not leniency.conditions:
        _conditions(hook.get("matchConditions") or (), f"{path}.matchConditions", errors)


def validate_webhook_client(client: Object, path: str, errors: Errors) -> None:
    """Check how to reach a webhook."""
    url, service = client.get("url"), client.get("service")
    if (url is None) == (service is None):
        errors.append(required(path, "exactly one of url or service is required"))
    elif service is None:
        _url(url or "", f"{path}.url", errors)
    else:
        _service(service, f"{path}.service", errors)


def _qualified_domain(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
    elif messages := dns_subdomain(name):
        errors.append(invalid_value(path, name, ",".join(messages)))
    elif name.count(".") < 2:
        errors.append(invalid_value(path, name, "should be a domain with at least three segments separated by dots"))


def _review_versions(versions: list[str], path: str, errors: Errors, leniency: Leniency) -> None:
    if not versions:
        errors.append(required(path, f"must specify one of {', '.join(_REVIEW_VERSIONS)}"))
        return
    for index, version in enumerate(versions):
        if version in versions[:index]:
            errors.append(invalid_value(f"{path}[{index}]", version, "duplicate version"))
            continue
        add(errors, f"{path}[{index}]", version, dns_1035_label(version))
    if not leniency.versions and not set(versions) & set(_REVIEW_VERSIONS):
        errors.append(invalid_value(path, versions, f"must include at least one of {', '.join(_REVIEW_VERSIONS)}"))


def _url(text: str, path: str, errors: Errors) -> None:
    try:
        url = urlsplit(text)
        user = url.netloc.rpartition("@")[0]
    except ValueError as error:
        errors.append(required(path, f"url must be a valid URL: {error}{_URL_FORM}"))
        return
    if url.scheme != "https":
        errors.append(invalid_value(path, url.scheme, f"'https' is the only allowed URL scheme{_URL_FORM}"))
    if not url.netloc.rpartition("@")[2]:
        errors.append(invalid_value(path, "", f"host must be specified{_URL_FORM}"))
    if user:
        errors.append(invalid_value(path, user, "user information is not permitted in the URL"))
    if url.fragment:
        errors.append(invalid_value(path, url.fragment, "fragments are not permitted in the URL"))
    if url.query:
        errors.append(invalid_value(path, url.query, "query parameters are not permitted in the URL"))


def _service(service: Object, path: str, errors: Errors) -> None:
    # Upstream hands over name and namespace the wrong way round, which shows in the paths.
    for value, key in ((service.get("namespace"), "name"), (service.get("name"), "namespace")):
        if not value:
            errors.append(required(f"{path}.{key}"))
    port = service.get("port") or 0
    if messages := port_number(port):
        errors.append(invalid_value(f"{path}.port", port, f"port is not valid: {', '.join(messages)}"))
    url_path = service.get("path")
    if not url_path or url_path == "/":
        return
    own = f"{path}.path"
    if url_path == "//":
        errors.append(invalid_value(own, url_path, "segment[0] may not be empty"))
        return
    if not url_path.startswith("/"):
        errors.append(invalid_value(own, url_path, "must start with a '/'"))
    for index, step in enumerate(url_path[1:].removesuffix("/").split("/")):
        if not step:
            errors.append(invalid_value(own, url_path, f"segment[{index}] may not be empty"))
            continue
        for message in dns_subdomain(step):
            errors.append(invalid_value(own, url_path, f"segment[{index}]: {message}"))


def _conditions(conditions: Iterable[Object], path: str, errors: Errors) -> None:
    conditions = list(conditions)
    if len(conditions) > 64:
        errors.append(too_many(path, len(conditions), 64))
    names: set[str] = set()
    for index, condition in enumerate(conditions):
        own, name = f"{path}[{index}]", condition.get("name") or ""
        if not (condition.get("expression") or "").strip():
            errors.append(required(f"{own}.expression"))
        if not name:
            errors.append(required(f"{own}.name"))
            continue
        add(errors, f"{own}.name", name, tuple(label_key_errors(name)))
        if name in names:
            errors.append(duplicate(f"{own}.name", name))
        names.add(name)


# --- rules --------------------------------------------------------------------------------------------------------------


def _rule(rule: Object, path: str, errors: Errors) -> None:
    operations = rule.get("operations") or []
    if not operations:
        errors.append(required(f"{path}.operations"))
    if len(operations) > 1 and "*" in operations:
        errors.append(invalid_value(f"{path}.operations", operations, "if '*' is present, must not specify other operations"))
    for index, operation in enumerate(operations):
        _one_of(f"{path}.operations[{index}]", operation, _OPERATIONS, errors)
    groups, versions = rule.get("apiGroups") or [], rule.get("apiVersions") or []
    if not groups:
        errors.append(required(f"{path}.apiGroups"))
    if len(groups) > 1 and "*" in groups:
        errors.append(invalid_value(f"{path}.apiGroups", groups, "if '*' is present, must not specify other API groups"))
    if not versions:
        errors.append(required(f"{path}.apiVersions"))
    if len(versions) > 1 and "*" in versions:
        errors.append(invalid_value(f"{path}.apiVersions", versions, "if '*' is present, must not specify other API versions"))
    for index, version in enumerate(versions):
        if not version:
            errors.append(required(f"{path}.apiVersions[{index}]"))
    _resources(rule.get("resources") or [], f"{path}.resources", errors)
    _one_of(f"{path}.scope", rule.get("scope"), ("*", "Cluster", "Namespaced"), errors)


def _resources(resources: list[str], path: str, errors: Errors) -> None:
    if not resources:
        errors.append(required(path))
    whole: set[str] = set()
    everywhere: set[str] = set()
    plain = False
    for index, text in enumerate(resources):
        own = f"{path}[{index}]"
        if not text:
            errors.append(required(own))
            continue
        resource, slash, sub = text.partition("/")
        if not slash:
            # Only the last one without a subresource counts, as upstream has it.
            plain = text != "*"
            continue
        if resource in whole:
            errors.append(invalid_value(own, text, f"if '{resource}/*' is present, must not specify {text}"))
        if sub in everywhere:
            errors.append(invalid_value(own, text, f"if '*/{sub}' is present, must not specify {text}"))
        if sub == "*":
            whole.add(resource)
        if resource == "*":
            everywhere.add(sub)
    if len(resources) > 1 and "*/*" in resources:
        errors.append(invalid_value(path, resources, "if '*/*' is present, must not specify other resources"))
    if "*" in resources and plain:
        errors.append(invalid_value(path, resources, "if '*' is present, must not specify other resources without subresources"))


def _match_resources(match: Object | None, path: str, errors: Errors) -> None:
    if match is None:
        return
    policy = match.get("matchPolicy")
    if policy is None:
        errors.append(required(f"{path}.matchPolicy"))
    _one_of(f"{path}.matchPolicy", policy, ("Equivalent", "Exact"), errors)
    for key in ("namespaceSelector", "objectSelector"):
        if match.get(key) is None:
            errors.append(required(f"{path}.{key}"))
        validate_label_selector(match.get(key), f"{path}.{key}", errors)
    for key in ("resourceRules", "excludeResourceRules"):
        for index, rule in enumerate(match.get(key) or ()):
            own = f"{path}.{key}[{index}]"
            names = rule.get("resourceNames") or []
            for position, name in enumerate(names):
                add(errors, f"{own}.resourceNames[{position}]", name, path_segment(name))
                if name in names[:position]:
                    errors.append(duplicate(f"{own}.resourceNames[{position}]", name))
            _rule(rule, own, errors)


# --- policies -----------------------------------------------------------------------------------------------------------


def create_policy(obj: Object, errors: Errors) -> None:
    _policy(obj, errors, same_conditions=False)


def update_policy(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource:
        return
    given, stored = new.get("spec") or {}, old.get("spec") or {}
    _policy(new, errors, same_conditions=all(given.get(key) == stored.get(key) for key in ("paramKind", "matchConditions")))


def _policy(obj: Object, errors: Errors, *, same_conditions: bool) -> None:
    spec = obj.get("spec") or {}
    if spec.get("failurePolicy") is None:
        errors.append(required("spec.failurePolicy"))
    _one_of("spec.failurePolicy", spec.get("failurePolicy"), ("Fail", "Ignore"), errors)
    if spec.get("paramKind") is not None:
        _param_kind(spec["paramKind"], "spec.paramKind", errors)
    match = spec.get("matchConstraints")
    if match is None:
        errors.append(required("spec.matchConstraints"))
    else:
        _match_resources(match, "spec.matchConstraints", errors)
        if not match.get("resourceRules"):
            errors.append(required("spec.matchConstraints.resourceRules"))
    if not same_conditions:
        _conditions(spec.get("matchConditions") or (), "spec.matchConditions", errors)
    for index, variable in enumerate(spec.get("variables") or ()):
        own, name = f"spec.variables[{index}]", variable.get("name") or ""
        if not name.strip():
            errors.append(required(f"{own}.name", "name is not specified"))
        elif _IDENTIFIER.fullmatch(name) is None or name in _RESERVED:
            errors.append(invalid_value(f"{own}.name", name, "must be a valid CEL identifier"))
        if not (variable.get("expression") or "").strip():
            errors.append(required(f"{own}.expression", "expression is not specified"))
    validations, annotations = spec.get("validations") or (), spec.get("auditAnnotations") or []
    if not validations and not annotations:
        for key in ("validations", "auditAnnotations"):
            errors.append(required(f"spec.{key}", "validations or auditAnnotations must contain at least one item"))
        return
    for index, validation in enumerate(validations):
        _validation(validation, f"spec.validations[{index}]", errors)
    if len(annotations) > _MAX_AUDIT_ANNOTATIONS:
        message = f"must not have more than {_MAX_AUDIT_ANNOTATIONS} auditAnnotations"
        errors.append(invalid_value("spec.auditAnnotations", annotations, message))
    keys: set[str] = set()
    for index, annotation in enumerate(annotations):
        own, key = f"spec.auditAnnotations[{index}]", annotation.get("key") or ""
        _audit_annotation(annotation, obj["metadata"].get("name") or "", own, errors)
        if key in keys:
            errors.append(duplicate(f"{own}.key", key))
        keys.add(key)


def _param_kind(kind: Object, path: str, errors: Errors) -> None:
    text, name = kind.get("apiVersion") or "", kind.get("kind") or ""
    if not text:
        errors.append(required(f"{path}.apiVersion"))
    elif text.count("/") > 1:
        errors.append(invalid_value(f"{path}.apiVersion", text, f"unexpected GroupVersion string: {text}"))
    else:
        group, _, version = text.rpartition("/")
        if group and (messages := dns_subdomain(group)):
            errors.append(invalid_value(f"{path}.apiVersion", group, ",".join(messages)))
        if not version:
            errors.append(invalid_value(f"{path}.apiVersion", text, "version must be specified"))
        elif messages := dns_1035_label(version):
            errors.append(invalid_value(f"{path}.apiVersion", version, ",".join(messages)))
    if not name:
        errors.append(required(f"{path}.kind"))
    elif messages := dns_1035_label(name.lower()):
        errors.append(invalid_value(f"{path}.kind", name, f"may have mixed case, but should otherwise match: {','.join(messages)}"))


def _validation(validation: Object, path: str, errors: Errors) -> None:
    if not (validation.get("expression") or "").strip():
        errors.append(required(f"{path}.expression", "expression is not specified"))
    expression, message = validation.get("messageExpression") or "", validation.get("message") or ""
    if expression and not expression.strip():
        errors.append(invalid_value(f"{path}.messageExpression", expression, "must be non-empty if specified"))
    if message and not message.strip():
        errors.append(invalid_value(f"{path}.message", message, "must be non-empty if specified"))
    elif "\n" in message.strip() or "\r" in message.strip():
        errors.append(invalid_value(f"{path}.message", message, "must not contain line breaks"))
    _one_of(f"{path}.reason", validation.get("reason"), ("Forbidden", "Invalid", "RequestEntityTooLarge"), errors)


def _audit_annotation(annotation: Object, policy: str, path: str, errors: Errors) -> None:
    key, expression = annotation.get("key") or "", (annotation.get("valueExpression") or "").strip()
    if policy:
        add(errors, f"{path}.key", f"{policy}/{key}", tuple(label_key_errors(f"{policy}/{key}")))
    else:
        errors.append(invalid_value(f"{path}.key", key, "requires metadata.name be non-empty"))
    if not expression:
        errors.append(required(f"{path}.valueExpression", "valueExpression is not specified"))
    elif len(expression.encode()) > _MAX_AUDIT_EXPRESSION:
        errors.append(required(f"{path}.valueExpression", f"must not exceed {_MAX_AUDIT_EXPRESSION} bytes in length"))


def create_binding(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    policy = spec.get("policyName") or ""
    if not policy:
        errors.append(required("spec.policyName"))
    else:
        add(errors, "spec.policyName", policy, dns_subdomain(policy))
    if spec.get("paramRef") is not None:
        _param_ref(spec["paramRef"], "spec.paramRef", errors)
    _match_resources(spec.get("matchResources"), "spec.matchResources", errors)
    actions = spec.get("validationActions") or []
    path = "spec.validationActions"
    for index, action in enumerate(actions):
        _one_of(f"{path}[{index}]", action, ("Audit", "Deny", "Warn"), errors)
        if action in actions[:index]:
            errors.append(duplicate(f"{path}[{index}]", action))
    if "Deny" in actions and "Warn" in actions:
        why = "repeating the same validation failure information in the API response and headers serves no purpose"
        errors.append(invalid_value(path, actions, f"must not contain both Deny and Warn ({why})"))
    if not actions:
        errors.append(required(path, "at least one validation action is required"))


def _param_ref(reference: Object, path: str, errors: Errors) -> None:
    name, selector, action = reference.get("name") or "", reference.get("selector"), reference.get("parameterNotFoundAction")
    if name:
        add(errors, f"{path}.name", name, path_segment(name))
        if selector is not None:
            errors.append(field_forbidden(f"{path}.name", "name and selector are mutually exclusive"))
    if selector is not None:
        validate_label_selector(selector, f"{path}.selector", errors)
        if name:
            errors.append(field_forbidden(f"{path}.selector", "name and selector are mutually exclusive"))
    if not name and selector is None:
        errors.append(required(path, "one of name or selector must be specified"))
    if not action:
        errors.append(required(f"{path}.parameterNotFoundAction"))
    else:
        _one_of(f"{path}.parameterNotFoundAction", action, ("Deny", "Allow"), errors)
