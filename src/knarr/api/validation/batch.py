"""Jobs and CronJobs. Source: pkg/apis/batch/validation."""

from __future__ import annotations

import re
from zoneinfo import ZoneInfo

from knarr.api.errors import OMIT_VALUE, duplicate, invalid_value, not_supported, required, too_long, too_many
from knarr.api.validation.apps import NOT_MATCHING, matches
from knarr.api.validation.cron import CronError, parse_schedule
from knarr.api.validation.jobstatus import intervals, update_job_status
from knarr.api.validation.metadata import Errors, Object, add, immutable, nonnegative, validate_label_selector
from knarr.api.validation.pod import validate_pod_template
from knarr.api.validation.strings import dns_label, dns_subdomain, http_path, label_key_errors

_HIGH = 100_000
_ACTIONS = ("Count", "FailIndex", "FailJob", "Ignore")
_LABELS = ("controller-uid", "job-name", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name")


def _go_list(values: tuple[str, ...]) -> str:
    return "[" + " ".join(f'"{v}"' for v in values) + "]"


def domain_prefixed_path(value: str, path: str, errors: Errors) -> None:
    """ "acme.io/foo"."""
    if not value:
        errors.append(required(path))
        return
    host, slash, rest = value.partition("/")
    if not host or not slash or not rest:
        errors.append(invalid_value(path, value, 'must be a domain-prefixed path (such as "acme.io/foo")'))
        return
    add(errors, path, host, dns_subdomain(host))
    add(errors, path, rest, http_path(rest))


def _indexed(spec: Object, path: str, errors: Errors) -> None:
    parallelism, completions, failed = spec.get("parallelism"), spec.get("completions"), spec.get("maxFailedIndexes")
    if completions is None:
        errors.append(required(f"{path}.completions", "when completion mode is Indexed"))
    if parallelism is not None and parallelism > _HIGH:
        message = f"must be less than or equal to {_HIGH} when completion mode is Indexed"
        errors.append(invalid_value(f"{path}.parallelism", parallelism, message))
    if completions is not None and failed is not None and failed > completions:
        errors.append(invalid_value(f"{path}.maxFailedIndexes", failed, "must be less than or equal to completions"))
    if failed is not None and failed > _HIGH:
        errors.append(invalid_value(f"{path}.maxFailedIndexes", failed, f"must be less than or equal to {_HIGH}"))
    if completions is not None and completions > _HIGH and spec.get("backoffLimitPerIndex") is not None:
        if failed is None:
            errors.append(required(f"{path}.maxFailedIndexes", f"must be specified when completions is above {_HIGH}"))
        tail = f"must be less than or equal to 10000 when completions are above {_HIGH} and used with backoff limit per index"
        if parallelism is not None and parallelism > 10_000:
            errors.append(invalid_value(f"{path}.parallelism", parallelism, tail))
        if failed is not None and failed > 10_000:
            errors.append(invalid_value(f"{path}.maxFailedIndexes", failed, tail))


def _failure_rule(rule: Object, spec: Object, containers: set[str], path: str, errors: Errors) -> None:
    action = rule.get("action") or ""
    if not action:
        errors.append(required(f"{path}.action", f"valid values: {_go_list(_ACTIONS)}"))
    elif action == "FailIndex":
        if spec.get("backoffLimitPerIndex") is None:
            errors.append(invalid_value(f"{path}.action", action, "requires the backoffLimitPerIndex to be set"))
    elif action not in _ACTIONS:
        errors.append(not_supported(f"{path}.action", action, _ACTIONS))
    codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions") or []
    if codes is not None:
        _exit_codes(codes, containers, f"{path}.onExitCodes", errors)
    if conditions:
        _pod_conditions(conditions, f"{path}.onPodConditions", errors)
    if codes is not None and conditions:
        errors.append(invalid_value(path, OMIT_VALUE, "specifying both OnExitCodes and OnPodConditions is not supported"))
    if codes is None and not conditions:
        errors.append(invalid_value(path, OMIT_VALUE, "specifying one of OnExitCodes and OnPodConditions is required"))


def _pod_conditions(conditions: list[Object], path: str, errors: Errors) -> None:
    if len(conditions) > 20:
        errors.append(too_many(path, len(conditions), 20))
    for index, pattern in enumerate(conditions):
        own, status = f"{path}[{index}]", pattern.get("status") or ""
        add(errors, f"{own}.type", pattern.get("type") or "", label_key_errors(pattern.get("type") or ""))
        if not status:
            errors.append(required(f"{own}.status", f"valid values: {_go_list(('False', 'True', 'Unknown'))}"))
        elif status not in ("True", "False", "Unknown"):
            errors.append(not_supported(f"{own}.status", status, ["False", "True", "Unknown"]))


def _exit_codes(codes: Object, containers: set[str], path: str, errors: Errors) -> None:
    operator, values, name = codes.get("operator") or "", codes.get("values") or [], codes.get("containerName")
    if not operator:
        errors.append(required(f"{path}.operator", f"valid values: {_go_list(('In', 'NotIn'))}"))
    elif operator not in ("In", "NotIn"):
        errors.append(not_supported(f"{path}.operator", operator, ["In", "NotIn"]))
    if name is not None and name not in containers:
        errors.append(
            invalid_value(f"{path}.containerName", name, "must be one of the container or initContainer names in the pod template")
        )
    if not values:
        errors.append(invalid_value(f"{path}.values", values, "at least one value is required"))
    elif len(values) > 255:
        errors.append(too_many(f"{path}.values", len(values), 255))
    seen: set[int] = set()
    for index, value in enumerate(values):
        own = f"{path}.values[{index}]"
        if operator == "In" and value == 0:
            errors.append(invalid_value(own, value, "must not be 0 for the In operator"))
        if value in seen:
            errors.append(duplicate(own, value))
        seen.add(value)
    if values != sorted(values):
        errors.append(invalid_value(f"{path}.values", values, "must be ordered"))


def _success_policy(spec: Object, path: str, errors: Errors) -> None:
    rules, completions = spec["successPolicy"].get("rules") or [], spec.get("completions")
    if not rules:
        errors.append(required(f"{path}.rules", "at least one rules must be specified when the successPolicy is specified"))
    if len(rules) > 20:
        errors.append(too_many(f"{path}.rules", len(rules), 20))
    for index, rule in enumerate(rules):
        own, count, indexes = f"{path}.rules[{index}]", rule.get("succeededCount"), rule.get("succeededIndexes")
        if count is None and indexes is None:
            errors.append(required(own, "at least one of succeededCount or succeededIndexes must be specified"))
        total = 0
        if indexes is not None:
            if len(indexes) > 64 * 1024:
                errors.append(too_long(f"{own}.succeededIndexes", 64 * 1024))
            try:
                total = intervals(indexes, completions or 0) if indexes else 0
            except ValueError as error:
                errors.append(invalid_value(f"{own}.succeededIndexes", indexes, f"error parsing succeededIndexes: {error}"))
        if count is not None:
            nonnegative(errors, f"{own}.succeededCount", count)
            if completions is not None and count > completions:
                message = f"must be less than or equal to {completions} (the number of specified completions)"
                errors.append(invalid_value(f"{own}.succeededCount", count, message))
            if indexes is not None and count > total:
                message = f"must be less than or equal to {total} (the number of indexes in the specified succeededIndexes field)"
                errors.append(invalid_value(f"{own}.succeededCount", count, message))


def _job_spec(spec: Object, path: str, errors: Errors) -> None:
    for key in ("parallelism", "completions", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished", "backoffLimitPerIndex"):
        nonnegative(errors, f"{path}.{key}", spec.get(key))
    if spec.get("maxFailedIndexes") is not None:
        nonnegative(errors, f"{path}.maxFailedIndexes", spec["maxFailedIndexes"])
        if spec.get("backoffLimitPerIndex") is None:
            errors.append(required(f"{path}.backoffLimitPerIndex", "when maxFailedIndexes is specified"))
    manager = spec.get("managedBy")
    if manager is not None:
        domain_prefixed_path(manager, f"{path}.managedBy", errors)
        if len(manager) > 63:
            errors.append(too_long(f"{path}.managedBy", 63))
    mode = spec.get("completionMode")
    if mode is not None and mode not in ("NonIndexed", "Indexed"):
        errors.append(not_supported(f"{path}.completionMode", mode, ["NonIndexed", "Indexed"]))
    if mode == "Indexed":
        _indexed(spec, path, errors)
    elif mode in (None, "NonIndexed"):
        for key in ("backoffLimitPerIndex", "maxFailedIndexes"):
            if spec.get(key) is not None:
                errors.append(invalid_value(f"{path}.{key}", spec[key], "requires indexed completion mode"))
    _policies(spec, path, errors)
    template = spec.get("template") or {}
    validate_pod_template(template, f"{path}.template", errors)
    restart, own = (template.get("spec") or {}).get("restartPolicy") or "", f"{path}.template.spec.restartPolicy"
    if restart in ("", "Always"):
        errors.append(required(own, 'valid values: "OnFailure", "Never"'))
    elif restart not in ("OnFailure", "Never"):
        errors.append(not_supported(own, restart, ["OnFailure", "Never"]))
    elif spec.get("podFailurePolicy") is not None and restart != "Never":
        errors.append(invalid_value(own, restart, 'only "Never" is supported when podFailurePolicy is specified'))


def _policies(spec: Object, path: str, errors: Errors) -> None:
    policy = spec.get("podFailurePolicy")
    pod = (spec.get("template") or {}).get("spec") or {}
    if policy is not None:
        rules = policy.get("rules") or []
        if len(rules) > 20:
            errors.append(too_many(f"{path}.podFailurePolicy.rules", len(rules), 20))
        containers = {c.get("name") or "" for key in ("containers", "initContainers") for c in pod.get(key) or ()}
        for index, rule in enumerate(rules):
            _failure_rule(rule, spec, containers, f"{path}.podFailurePolicy.rules[{index}]", errors)
    if spec.get("successPolicy") is not None:
        if spec.get("completionMode") != "Indexed":
            errors.append(invalid_value(f"{path}.successPolicy", spec["successPolicy"], "requires indexed completion mode"))
        else:
            _success_policy(spec, f"{path}.successPolicy", errors)
    replacement = spec.get("podReplacementPolicy")
    if replacement is not None:
        values = ["Failed"] if policy is not None else ["Failed", "TerminatingOrFailed"]
        if replacement not in values:
            errors.append(not_supported(f"{path}.podReplacementPolicy", replacement, values))


def _selected_spec(spec: Object, errors: Errors) -> None:
    _job_spec(spec, "spec", errors)
    selector, labels = spec.get("selector"), ((spec.get("template") or {}).get("metadata") or {}).get("labels")
    if selector is None:
        errors.append(required("spec.selector"))
    else:
        validate_label_selector(selector, "spec.selector", errors)
    if (matches(selector, labels) if selector is not None else False) is False:
        errors.append(invalid_value("spec.template.metadata.labels", labels, NOT_MATCHING))


def create_job(obj: Object, errors: Errors) -> None:
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    if not spec.get("manualSelector") and spec.get("selector") is not None:
        _generated_selector(spec, metadata, errors)
    _selected_spec(spec, errors)
    if spec.get("completionMode") == "Indexed" and (spec.get("completions") or 0) > 0:
        name = f"{metadata.get('name', '')}-{spec['completions'] - 1}"
        if dns_label(name):
            message = f"will not able to create pod with invalid DNS label: {name}"
            errors.append(invalid_value("metadata.name", metadata.get("name") or "", message))


def _generated_selector(spec: Object, metadata: Object, errors: Errors) -> None:
    uid, name = metadata.get("uid") or "", metadata.get("name") or ""
    if not uid:
        errors.append(required("metadata.uid"))
    labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
    wanted = dict(zip(_LABELS, (uid, name, uid, name), strict=True))
    for key, value in wanted.items():
        path = f"spec.template.metadata.labels[{key}]"
        if key not in labels:
            errors.append(required(path, f'must be "{value}"'))
        elif labels[key] != value:
            errors.append(invalid_value("spec.template.metadata.labels", labels, f'must be "{value}"'))
    if matches(spec["selector"], wanted) is False:
        errors.append(invalid_value("spec.selector", spec["selector"], "`selector` not auto-generated"))


def _template_for_compare(template: Object, like: Object) -> Object:
    """The old template with the scheduling directives of the new one: those may change while a Job is suspended."""
    pod, wanted = dict(template.get("spec") or {}), like.get("spec") or {}
    for key in ("nodeSelector", "tolerations", "schedulingGates"):
        pod.pop(key, None)
        if key in wanted:
            pod[key] = wanted[key]
    affinity = {key: value for key, value in (pod.get("affinity") or {}).items() if key != "nodeAffinity"}
    if (wanted.get("affinity") or {}).get("nodeAffinity") is not None:
        affinity["nodeAffinity"] = wanted["affinity"]["nodeAffinity"]
    pod.pop("affinity", None)
    if affinity or "affinity" in wanted:
        pod["affinity"] = affinity
    metadata = dict(template.get("metadata") or {})
    for key in ("labels", "annotations"):
        metadata.pop(key, None)
        if key in (like.get("metadata") or {}):
            metadata[key] = like["metadata"][key]
    return {**template, "metadata": metadata, "spec": pod}


def _never_started(job: Object) -> bool:
    return bool((job.get("spec") or {}).get("suspend")) and (job.get("status") or {}).get("startTime") is None


def update_job(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        update_job_status(new, old, errors)
        return
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    # Upstream checks the whole Job, then the update, which checks the spec again: causes may come twice.
    create_job(new, errors)
    _selected_spec(spec, errors)
    if spec.get("completionMode") != "Indexed":
        immutable(errors, "spec.completions", spec.get("completions"), before.get("completions"))
    elif spec.get("completions") not in (None, before.get("completions")) and spec["completions"] != spec.get("parallelism"):
        errors.append(invalid_value("spec.completions", spec["completions"], "can only be modified in tandem with spec.parallelism"))
    immutable(errors, "spec.selector", spec.get("selector"), before.get("selector"))
    template, old_template = spec.get("template") or {}, before.get("template") or {}
    if _never_started(old):
        old_template = _template_for_compare(old_template, template)
        template = _template_for_compare(template, template)
    immutable(errors, "spec.template", template, old_template)
    for key in ("completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"):
        immutable(errors, f"spec.{key}", spec.get(key), before.get(key))


_ZONE_PART = re.compile(r"[A-Za-z._0-9+-]{1,14}")


def _time_zone(zone: str | None, path: str, errors: Errors) -> None:
    if zone is None:
        return
    if not zone:
        errors.append(invalid_value(path, zone, "timeZone must be nil or non-empty string"))
        return
    for part in zone.split("/"):
        if part in (".", "..") or part.startswith("-") or not _ZONE_PART.fullmatch(part):
            errors.append(invalid_value(path, zone, f"unknown time zone {zone}"))
            return
    if zone.lower() == "local":
        message = "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones"
        errors.append(invalid_value(path, zone, message))
        return
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        errors.append(invalid_value(path, zone, f"unknown time zone {zone}"))


def _cron_spec(spec: Object, before: Object | None, errors: Errors) -> None:
    schedule = spec.get("schedule") or ""
    if not schedule:
        errors.append(required("spec.schedule"))
    else:
        try:
            parse_schedule(schedule)
        except CronError as error:
            errors.append(invalid_value("spec.schedule", schedule, str(error)))
        tolerated = before is not None and "TZ" in (before.get("schedule") or "")
        if "TZ" in schedule:
            if not tolerated:
                message = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead"
                errors.append(invalid_value("spec.schedule", schedule, message))
            elif spec.get("timeZone") is not None:
                message = "cannot use both timeZone field and TZ or CRON_TZ in schedule"
                errors.append(invalid_value("spec.schedule", schedule, message))
    nonnegative(errors, "spec.startingDeadlineSeconds", spec.get("startingDeadlineSeconds"))
    if before is None or before.get("timeZone") != spec.get("timeZone"):
        _time_zone(spec.get("timeZone"), "spec.timeZone", errors)
    policy = spec.get("concurrencyPolicy") or ""
    if not policy:
        errors.append(required("spec.concurrencyPolicy"))
    elif policy not in ("Allow", "Forbid", "Replace"):
        errors.append(not_supported("spec.concurrencyPolicy", policy, ["Allow", "Forbid", "Replace"]))
    job = (spec.get("jobTemplate") or {}).get("spec") or {}
    _job_spec(job, "spec.jobTemplate.spec", errors)
    if job.get("selector") is not None:
        errors.append(invalid_value("spec.jobTemplate.spec.selector", job["selector"], "`selector` will be auto-generated"))
    if job.get("manualSelector"):
        errors.append(not_supported("spec.jobTemplate.spec.manualSelector", True, ["nil", "false"]))
    for key in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        nonnegative(errors, f"spec.{key}", spec.get(key))


def create_cron_job(obj: Object, errors: Errors) -> None:
    _cron_spec(obj.get("spec") or {}, None, errors)
    name = obj["metadata"].get("name") or ""
    if len(name) > 52:
        errors.append(invalid_value("metadata.name", name, "must be no more than 52 characters"))


def update_cron_job(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource != "status":
        _cron_spec(new.get("spec") or {}, old.get("spec") or {}, errors)
