"""What a real 1.35 API server made of minimal objects, against our decoding and defaulting alone.

What strategies, allocators and admission add on top is not ours here; those paths are named in NOT_DEFAULTING.
"""

import json
import re
from typing import Any

import pytest

from knarr.api import decode, defaulting, errors
from knarr.api.scheme import SCHEME
from tests.api.recorded import body_bytes, differences, load, resource_of

CASES = load("defaults.jsonl")

NOT_DEFAULTING = re.compile(
    r"^[-+~]\.(metadata\.(generation|namespace|finalizers|name)"
    r"|(Pod|ReplicaSet)?status\.(conditions|phase|qosClass|lastPhaseTransitionTime|replicas)"
    r"|spec\.(clusterIPs?|ipFamil\w+|healthCheckNodePort|ports\[\d+\]\.nodePort)"
    r"|spec\.(tolerations|volumes|serviceAccount\w*|priority|preemptionPolicy|containers\[\d+\]\.volumeMounts|initContainers\[\d+\]\.volumeMounts)"
    r"|spec\.(dataSource|dataSourceRef|taints|devices\[\d+\]\.taints|finalizers|groups|uid|username)"
    r"|metadata\.annotations(=.'|\.)deprecated\.daemonset|metadata\.labels=.'batch|spec\.selector=.'matchLabels'|spec\.template\.metadata\.labels"
    r"|spec\.\S*labelSelector\.matchExpressions)",
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["scenario"])
def test_defaults_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    body = case["body"]
    resource = SCHEME.for_kind(body["apiVersion"], body["kind"])
    assert resource is not None
    obj, warnings = decode.decode(resource, json.dumps(body).encode())
    defaulting.default(resource, obj)
    assert not warnings
    assert [d for d in differences(obj, case["object"]) if not NOT_DEFAULTING.match(d)] == []


def test_defaulting_twice_changes_nothing() -> None:
    for case in CASES:
        resource = SCHEME.for_kind(case["body"]["apiVersion"], case["body"]["kind"])
        assert resource is not None
        obj, _ = decode.decode(resource, json.dumps(case["body"]).encode())
        defaulting.default(resource, obj)
        once = json.dumps(obj)
        defaulting.default(resource, obj)
        assert json.dumps(obj) == once, case["scenario"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"spec":{"containers":"x"}}',
         'Pod in version "v1" cannot be handled as a Pod: json: cannot unmarshal string into Go struct field '
         "PodSpec.spec.containers of type []v1.Container"),
        (b'{"metadata":{"name":5}}',
         'Pod in version "v1" cannot be handled as a Pod: json: cannot unmarshal number into Go struct field '
         "ObjectMeta.metadata.name of type string"),
        (b'{"kind":"Secret","apiVersion":"v1"}',
         'Secret in version "v1" cannot be handled as a Pod: converting (v1.Secret) to (core.Pod): unknown conversion'),
        (b"", "the object provided is unrecognized (must be of type Pod): couldn't get version/kind; json parse error: "
              "unexpected end of JSON input (<empty>)"),
        (b'{"apiVersion":"v1","kind":"Pod","spec":{"unknownField":1,"dnsPolicy":"a","dnsPolicy":"b"}}',
         'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field "spec.unknownField", '
         'duplicate field "spec.dnsPolicy"'),
    ],
)
def test_bad_bodies_get_upstreams_message(body: bytes, message: str) -> None:
    resource = SCHEME.resource("", "v1", "pods")
    assert resource is not None
    with pytest.raises(errors.StatusError) as caught:
        decode.decode(resource, body, "application/json", decode.STRICT)
    assert (caught.value.code, caught.value.message) == (400, message)


@pytest.mark.parametrize("case", load("undecodable.jsonl"), ids=lambda c: c["scenario"])
def test_what_upstream_cannot_decode_is_a_bad_request(case: dict[str, Any]) -> None:
    resource, _ = resource_of(case["path"])
    assert resource is not None
    try:
        obj, _ = decode.decode(resource, body_bytes(case["body"]))
    except errors.StatusError as error:
        assert (error.code, error.reason) == (400, "BadRequest")  # noqa: PT017
        return
    # The rest is refused by the request handler: the namespace of the body is not the one of the path.
    assert obj["metadata"].get("namespace") not in (None, "rec")
