"""Which recorded steps may be answered otherwise here, and why: (pattern of the scenario, pattern of the difference, reason)."""

from __future__ import annotations

import re

CONTROLLERS = "the recording ran with controllers, which write status, conditions, annotations and finalizers; this replay runs none"
CALLER = "the recording's caller was user admin with a uid and a token; ours is kubernetes-admin with a certificate"
NAMESPACE = "the recording's namespace had another name, so a field selector on its value matched nothing"
WATCH_LIST = "the recording's store could not do watch lists"
FLOW_SCHEMA = "the recording asked before the schema had its condition; here, and beside the real server today, it has it by then"
ESTABLISHED = "the recording changed the definition in the moment before it was established, when names and scope may still change; here it is established sooner"
IMAGE_VOLUMES = "the recording's server had the gate ImageVolume off; here image volumes are on"

REASONS: list[tuple[str, str, str]] = [
    (r"", r"node\.alpha\.kubernetes\.io/ttl|service-cidr-finalizer", CONTROLLERS),
    (r"generation\.|status\.patch\.|delete\.|jobs|deployments|flowschemas|default-objects|patch\.strategic",
     r"status\.(conditions|observedGeneration|hard|phase|capacity|acceptedNames|addresses)|object\.items\[0\]\.status", CONTROLLERS),
    (r"eviction\.", r"retryAfter|reason|code|DisruptionBudget", CONTROLLERS),
    (r"persistentvolumes", r"status\.phase", CONTROLLERS),
    (r"", r"spec\.uid: missing|'kubernetes-admin'", CALLER),
    (r"^selfsubjectreview$", r"authentication\.kubernetes\.io/credential-id", CALLER),
    (r"apply\.deploy-args-atomic", r"managedFields: 2 items, expected 3.*", CONTROLLERS),
    (r"^(defaults|invalid)\.pods\.spec\.volumes=\[\{name:_v_image:", r"volumes\[0\]\.image|FieldValue\w+', 'spec\.volumes\[0\]\.image\.", IMAGE_VOLUMES),
    (r"^invalid\.customresourcedefinitions\.update\.spec\.(names\.kind|scope|group)=", r"causes: unexpected|generation: '1', expected '2'|'InitialNamesAccepted', expected 'Installing'|^\.code|^\.status", ESTABLISHED),
    (r"^table\.flowschemas$", r"rows\[0\]\[5\]: 'False', expected '\?'", FLOW_SCHEMA),
    (r"", r"data\.ca\.crt: 'x'|data: unexpected \{'ca\.crt'", CALLER),
    (r"list\.fieldSelector\.events\.involvedObject\.namespace=rec", r"", NAMESPACE),
    (r"default-objects", r"spec\.cidrs", NAMESPACE),
    (r"vap\.enforce", r"causes", NAMESPACE),
    (r"watch\.send-initial-events", r"", WATCH_LIST),
    (r"quota\.exceeded", r"code", CONTROLLERS),
    (r"ownerrefs", r"uid: '\*'", "replay normalises uids everywhere; here the expected ones were given by the request"),
]


def reason_for(scenario: str, what: str) -> str:
    """Return why this difference is expected, "" if it is not."""
    for pattern, difference, reason in REASONS:
        if re.search(pattern, scenario) and re.search(difference, what):
            return reason
    return ""
