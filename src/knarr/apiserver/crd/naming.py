"""Names and conditions of a CRD, as pure functions over its object and its neighbours.

Source: apiextensions-apiserver pkg/controller/{status/naming_controller,establish/establishing_controller,apiapproval}.go.
"""

from __future__ import annotations

from knarr.api.errors import go_quote
from knarr.api.types import Object

FINALIZER = "customresourcecleanup.apiextensions.k8s.io"
APPROVAL = "api-approved.kubernetes.io"


def condition(crd: Object, type: str) -> Object | None:
    for found in (crd.get("status") or {}).get("conditions") or []:
        if found.get("type") == type:
            return dict(found)
    return None


def is_true(crd: Object, type: str) -> bool:
    found = condition(crd, type)
    return found is not None and found.get("status") == "True"


def set_condition(crd: Object, type: str, status: str, reason: str, message: str, now: str) -> None:
    """Put a condition into the CRD's status; the transition time moves only with the status."""
    conditions = list((crd.get("status") or {}).get("conditions") or [])
    wanted = {"type": type, "status": status, "lastTransitionTime": now, "reason": reason, "message": message}
    for index, old in enumerate(conditions):
        if old.get("type") == type:
            if old.get("status") == status:
                wanted["lastTransitionTime"] = old.get("lastTransitionTime") or now
            conditions[index] = wanted
            break
    else:
        conditions.append(wanted)
    crd.setdefault("status", {})["conditions"] = conditions


def _claimed(others: list[Object], group: str) -> tuple[set[str], set[str]]:
    resources: set[str] = set()
    kinds: set[str] = set()
    for other in others:
        if other["spec"]["group"] != group:
            continue
        names = (other.get("status") or {}).get("acceptedNames") or {}
        resources |= {names.get("plural") or "", names.get("singular") or "", *(names.get("shortNames") or [])}
        kinds |= {names.get("kind") or "", names.get("listKind") or ""}
    return resources - {""}, kinds - {""}


def accept_names(crd: Object, others: list[Object], now: str) -> None:
    """Work out acceptedNames and the NamesAccepted condition, in place."""
    resources, kinds = _claimed(others, crd["spec"]["group"])
    wanted = crd["spec"]["names"]
    status = crd.setdefault("status", {})
    accepted = dict(status.get("acceptedNames") or {})
    before = dict(accepted)
    conflict: tuple[str, str] | None = None

    def check(field: str, reason: str, used: set[str]) -> None:
        nonlocal conflict
        name = wanted.get(field) or ""
        if name != (before.get(field) or "") and name in used:
            conflict = (reason, f"{go_quote(name)} is already in use")
        elif name:
            accepted[field] = name
        else:
            accepted.pop(field, None)

    check("plural", "PluralConflict", resources)
    check("singular", "SingularConflict", resources)
    short_names = wanted.get("shortNames") or []
    if short_names != (before.get("shortNames") or []):
        taken = [name for name in short_names if name not in (before.get("shortNames") or []) and name in resources]
        if taken:
            texts = [f"{go_quote(name)} is already in use" for name in taken]
            conflict = ("ShortNamesConflict", texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]")
        elif short_names:
            accepted["shortNames"] = list(short_names)
        else:
            accepted.pop("shortNames", None)
    check("kind", "KindConflict", kinds)
    check("listKind", "ListKindConflict", kinds)
    if wanted.get("categories"):
        accepted["categories"] = list(wanted["categories"])
    else:
        accepted.pop("categories", None)
    order = ("plural", "singular", "shortNames", "kind", "listKind", "categories")
    status["acceptedNames"] = {key: accepted[key] for key in order if key in accepted}
    for key in ("plural", "kind"):
        status["acceptedNames"].setdefault(key, "")
    if conflict is not None:
        set_condition(crd, "NamesAccepted", "False", conflict[0], conflict[1], now)
    else:
        set_condition(crd, "NamesAccepted", "True", "NoConflicts", "no conflicts found", now)


def establish(crd: Object, now: str) -> None:
    """Set Established once the names are accepted; it never goes back."""
    if is_true(crd, "Established"):
        return
    if is_true(crd, "NamesAccepted"):
        set_condition(crd, "Established", "True", "InitialNamesAccepted", "the initial names have been accepted", now)
    else:
        set_condition(crd, "Established", "False", "NotAccepted", "not all names are accepted", now)


def approve(crd: Object, now: str) -> None:
    """Groups of the Kubernetes project need an approval annotation; say whether it is there."""
    group = crd["spec"]["group"]
    if not (group.endswith(".k8s.io") or group.endswith(".kubernetes.io") or group in ("k8s.io", "kubernetes.io")):
        return
    value = (crd["metadata"].get("annotations") or {}).get(APPROVAL, "")
    kind = "KubernetesAPIApprovalPolicyConformant"
    if not value:
        set_condition(crd, kind, "False", "MissingAnnotation", (
            f"protected groups must have approval annotation {go_quote(APPROVAL)}, see https://github.com/kubernetes/enhancements/pull/1111"), now)
    elif value.startswith("unapproved"):
        set_condition(crd, kind, "False", "UnapprovedAnnotation", f"not approved: {go_quote(value)}", now)
    elif "://" in value:
        set_condition(crd, kind, "True", "ApprovedAnnotation", f"approved in {value}", now)
    else:
        set_condition(crd, kind, "False", "InvalidAnnotation", (
            f"protected groups must have approval annotation {go_quote(APPROVAL)} with either a URL or a reason starting with \"unapproved\", "
            "see https://github.com/kubernetes/enhancements/pull/1111"), now)
