"""Custom resources against recorded ones: pruning, defaults, warnings, causes of refusals."""

import json
import re
from typing import Any

import pytest

from knarr.api import decode, errors
from knarr.api.scheme import Resource, Subresource
from knarr.api.structural import CustomSchema
from knarr.api.structural.formats import FORMATS, PatternError, go_regex
from tests.api.recorded import body_bytes, differences, load, query

# CEL is not part of the schema's functions, and these steps depend on what is stored or on changes of the CRD.
OTHERS = {("crd.create-and-get", 23), ("crd.cluster-scoped", 3), ("crd.cluster-scoped", 4), ("crd.update-schema", 8), ("crd.versions", 1)}
CASES = [case for case in load("crds.jsonl") if case["scenario"] != "crd.cel"]


def compiled(crd: dict[str, Any]) -> dict[tuple[str, str, str], tuple[Resource, CustomSchema]]:
    spec, found = crd["spec"], {}
    for version in spec["versions"]:
        names = version.get("subresources") or {}
        subresources = {name: Subresource(name, spec["group"], version["name"], spec["names"]["kind"], ("get",)) for name in names}
        resource = Resource(
            spec["group"], version["name"], spec["names"]["plural"], spec["names"].get("singular", ""), spec["names"]["kind"],
            spec["scope"] == "Namespaced", custom=True, subresources=subresources,
        )
        made = CustomSchema(resource, version, preserve_unknown_fields=spec.get("preserveUnknownFields", False))
        found[resource.group, resource.version, resource.plural] = resource, made
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["scenario"])
def test_created_custom_objects_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    served: dict[tuple[str, str, str], tuple[Resource, CustomSchema]] = {}
    for number, step in enumerate(case["steps"]):
        path = step["path"].split("?")[0]
        if step["method"] != "POST" or (case["scenario"], number) in OTHERS:
            continue
        if path.endswith("/customresourcedefinitions"):
            if step["status"] == 201:
                served.update(compiled(step["object"]))
            continue
        match = re.match(r"/apis/([^/]+)/([^/]+)/(?:namespaces/[^/]+/)?([^/]+)$", path)
        if match and match.groups() in served:
            check(step, *served[match.groups()])


def check(step: dict[str, Any], resource: Resource, schema: CustomSchema) -> None:
    validation = query(step["path"], "fieldValidation", "Warn")
    try:
        obj, warnings = decode.decode(resource, body_bytes(step["body"]), step.get("contentType", ""), validation)
        warnings += schema.prune(obj, validation)
        schema.default(obj)
        if resource.namespaced:
            obj["metadata"].setdefault("namespace", "rec")
        obj["metadata"].setdefault("name", "gen-x")
        found = schema.validate(obj, None)
        if found:
            raise errors.invalid(resource, obj["metadata"]["name"], found)
    except errors.StatusError as error:
        assert error.code == step["status"], error.message  # noqa: PT017
        assert sorted([c["reason"], c.get("field", "")] for c in error.causes) == step.get("causes", [])  # noqa: PT017
        return
    assert step["status"] == 201
    if schema.has_status:
        obj.pop("status", None)
    found_differences = [
        d for d in differences(obj, step["object"]) if not re.match(r".\.metadata\.(generation|namespace|managedFields|name|finalizers)", d)
    ]
    assert found_differences == []
    assert len(warnings) == step.get("warnings", [0])[0]


def make(schema: dict[str, Any], **version: Any) -> CustomSchema:
    resource = Resource("x.example.com", "v1", "foos", "foo", "Foo", True, custom=True)
    return CustomSchema(resource, {"schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": schema}}}, **version})


def foo(spec: Any) -> dict[str, Any]:
    return {"apiVersion": "x.example.com/v1", "kind": "Foo", "metadata": {"name": "f", "namespace": "d", "resourceVersion": "1"}, "spec": spec}


def test_a_type_error_is_worded_as_upstream_does() -> None:
    schema = make({"type": "object", "properties": {"replicas": {"type": "integer"}}})
    assert str(schema.validate(foo({"replicas": "3"}), None)[0]) == (
        'spec.replicas: Invalid value: "string": spec.replicas in body must be of type integer: "string"'
    )


def test_what_an_update_leaves_alone_is_not_refused() -> None:
    schema = make({"type": "object", "properties": {
        "a": {"type": "string", "maxLength": 1},
        "l": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"], "items": {
            "type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "integer", "maximum": 1}}}}}})
    old = foo({"a": "long", "l": [{"k": "x", "v": 5}, {"k": "y", "v": 0}]})
    assert schema.validate(foo({"a": "long", "l": [{"k": "new", "v": 1}, {"k": "x", "v": 5}]}), old) == []
    assert [e.field for e in schema.validate(foo({"a": "longer", "l": [{"k": "x", "v": 6}]}), old)] == ["spec.a", "spec.l[0].v"]


def test_fast_and_exact_checks_agree_on_random_values() -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from knarr.api.structural import compiled as fast
    from knarr.api.structural import explain

    scalars = st.sampled_from([None, True, 0, 1, 5, 1.5, 2.0, "", "a", "abcdef", "2020-01-01", "x@y.z"])
    values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("abc"), v, max_size=3), max_leaves=8)
    leaf = st.sampled_from([
        {"type": "string"}, {"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 1}, {"type": "number", "multipleOf": 0.5},
        {"type": "boolean", "nullable": True}, {"x-kubernetes-int-or-string": True}, {"type": "string", "enum": ["a", "b"]},
        {"type": "string", "format": "date"}, {"type": "string", "pattern": "^a"}, {},
    ])
    schemas = st.recursive(leaf, lambda s: st.one_of(
        st.builds(lambda p, r: {"type": "object", "properties": p, "required": r}, st.dictionaries(st.sampled_from("abc"), s, max_size=2),
                  st.lists(st.sampled_from("abc"), max_size=1)),
        st.builds(lambda i: {"type": "array", "items": i, "maxItems": 2}, s),
        st.builds(lambda a: {"type": "object", "additionalProperties": a, "minProperties": 1}, s),
        st.builds(lambda k, a: {k: a}, st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(s, min_size=1, max_size=2)),
        st.builds(lambda a: {"not": a}, s),
    ), max_leaves=5)

    @settings(max_examples=400, deadline=None)
    @given(schemas, values)
    def agree(schema: dict[str, Any], value: Any) -> None:
        valid = fast.validator(schema)
        assert (valid is None or valid(value)) == (not explain.explain(schema, value)), json.dumps([schema, value])

    agree()


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("date-time", "2014-12-15T19:30:20.000Z", "2014-12-15 x"), ("date", "2020-02-29", "2021-02-29"), ("ipv4", "1.2.3.4", "1.2.3.256"),
    ("ipv6", "::1", "1.2.3.4"), ("cidr", "10.0.0.0/8", "10.0.0.0"), ("uuid", "123e4567-e89b-12d3-a456-426614174000", "x"),
    ("email", "a@b.c", "a"), ("byte", "aGk=", "a"), ("duration", "22 ns", "x"), ("hexcolor", "#FFF", "#GGG"), ("isbn", "0321751043", "1"),
    ("mac", "01:23:45:67:89:ab", "01"), ("hostname", "a.example.com", "a_b"), ("k8s-short-name", "a-b", "A"),
])
def test_formats_tell_good_from_bad(name: str, good: str, bad: str) -> None:
    check_format = FORMATS[name.replace("-", "")]
    assert (check_format(good), check_format(bad)) == (True, False)


def test_go_patterns_mean_what_they_mean_in_go() -> None:
    assert go_regex(r"^[[:alpha:]]+$").search("abc\n") is None
    assert go_regex(r"^\d+\z").search("12") is not None
    assert go_regex(r"^\d$").search("٣") is None
    for broken in (r"(?=a)", r"(a)\1", "(", "[z-a]"):
        with pytest.raises(PatternError):
            go_regex(broken)
