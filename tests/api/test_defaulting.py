"""What a real 1.35 API server made of minimal objects, against our decoding and defaulting alone.

What strategies, allocators and admission add on top is not ours here; those paths are named in NOT_DEFAULTING.
"""

import json
import pathlib
import re
from typing import Any

import pytest

from knarr.api import decode, defaulting, errors
from knarr.api.scheme import SCHEME

DATA = pathlib.Path(__file__).parent / "data" / "defaults.jsonl"
CASES = [json.loads(line) for line in DATA.read_text().splitlines()]

NOT_DEFAULTING = re.compile(
    r"^[-+~]\.(metadata\.(generation|namespace|finalizers|name)"
    r"|(Pod|ReplicaSet)?status\.(conditions|phase|qosClass|lastPhaseTransitionTime|replicas)"
    r"|spec\.(clusterIPs?|ipFamil\w+|healthCheckNodePort|ports\[\d+\]\.nodePort)"
    r"|spec\.(tolerations|volumes|serviceAccount\w*|priority|preemptionPolicy|containers\[\d+\]\.volumeMounts|initContainers\[\d+\]\.volumeMounts)"
    r"|spec\.(dataSource|dataSourceRef|taints|finalizers|groups|uid|username)"
    r"|metadata\.annotations=.'deprecated\.daemonset|metadata\.labels=.'batch|spec\.selector=.'matchLabels'|spec\.template\.metadata\.labels"
    r"|spec\.\S*labelSelector\.matchExpressions)",
)


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: list[str] = []
        for key in sorted(set(ours) | set(theirs)):
            if key not in ours:
                found.append(f"-{path}.{key}={theirs[key]!r}")
            elif key not in theirs:
                found.append(f"+{path}.{key}={ours[key]!r}")
            else:
                found += differences(ours[key], theirs[key], f"{path}.{key}")
        return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if ours == theirs or theirs == "*" else [f"~{path}: {ours!r} != {theirs!r}"]


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
