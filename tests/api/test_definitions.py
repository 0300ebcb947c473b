"""CustomResourceDefinitions, webhook configurations and policies, judged as a real 1.35 API server judged them."""

import json
from typing import Any

import pytest

from knarr.api import decode, defaulting, errors
from knarr.api.scheme import SCHEME
from knarr.api.validation import validate_create
from tests.api.recorded import load

# Words of Go's own: internal types printed, the regular expression parser.
_OTHER_WORDS = ("openAPIV3Schema: Invalid value: {", "must be a valid regular expression", "auditAnnotations")


def _judge(body: dict[str, Any]) -> list[errors.FieldError]:
    resource = SCHEME.for_kind(body["apiVersion"], body["kind"])
    assert resource is not None
    obj, _ = decode.decode(resource, json.dumps(body).encode())
    defaulting.default(resource, obj)
    if obj["kind"] == "CustomResourceDefinition":
        obj["status"] = {"storedVersions": [version["name"] for version in obj["spec"]["versions"] if version["storage"]]}
    return validate_create(resource, obj)


@pytest.mark.parametrize("case", load("definitions.jsonl") + load("admission.jsonl"), ids=lambda c: c["name"])
def test_causes_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    found = [[error.type, error.field, error.body()] for error in _judge(case["body"])]
    expected = case["causes"]
    assert sorted(cause[:2] for cause in found) == sorted(cause[:2] for cause in expected)
    if not any(words in f"{cause[1]}: {cause[2]}" for cause in expected for words in _OTHER_WORDS):
        assert sorted(found) == sorted(expected)
