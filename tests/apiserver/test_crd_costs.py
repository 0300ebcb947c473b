"""The greatest cost of a custom resource's rules."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.api.cel.cost import greatest_cost
from knarr.api.cel.parser import parse
from knarr.apiserver.crd import costs
from knarr.apiserver.crd.rules import compile_errors

OBJECT = {"type": "object", "required": ["required"], "properties": {"required": {"type": "string"}, "optional": {"type": "string"}}}


def kind(name: str) -> dict[str, Any]:
    if name == "int-or-string":
        return {"x-kubernetes-int-or-string": True}
    return {"type": "string", "format": name} if name in ("duration", "date", "date-time", "byte") else {"type": name}


def array(items: dict[str, Any] | str, limit: int | None = None) -> dict[str, Any]:
    out: dict[str, Any] = {"type": "array", "items": kind(items) if isinstance(items, str) else items}
    return out if limit is None else {**out, "maxItems": limit}


def mapping(values: dict[str, Any] | str, limit: int | None = None) -> dict[str, Any]:
    out: dict[str, Any] = {"type": "object", "additionalProperties": kind(values) if isinstance(values, str) else values}
    return out if limit is None else {**out, "maxProperties": limit}


def text(limit: int | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "string", **more} if limit is None else {"type": "string", "maxLength": limit, **more}


@pytest.mark.parametrize(
    ("schema", "rule", "expected"),
    [
        (array("number"), "self.all(x, true)", 4718591),
        (array("number", 10), "self.all(x, true)", 32),
        (array("string"), "self.all(x, true)", 3145727),
        (array("boolean"), "self.all(x, true)", 1887437),
        (array(array("number")), "self.all(x, true)", 3145727),
        (array(OBJECT), "self.all(x, true)", 555128),
        (mapping("number"), "self.all(x, true)", 1348169),
        (mapping("string"), "self.all(x, true)", 1179647),
        (mapping("number"), "has(self.x)", 1),
        (text(), "self.contains('test')", 314574),
        (text(10), "self.contains('test')", 5),
        (text(), "self.startsWith('test')", 2),
        (text(), "size(self + 'hello') > size('hello')", 314578),
        (text(4), "size(self + 'hello') > size('hello')", 7),
        (array("number"), "self[1] == 0.0", 2),
        (array("string"), "self[1] == self[1]", 314577),
        (array("number", 10), "self.all(x, self.all(y, true))", 352),
        (array("number", 10), "self.all(x, self.all(y, self.all(z, true)))", 3552),
        (text(), "self.matches('x')", 314574),
        (text(50), "self.matches('x')", 22),
        (text(), "''.matches('(((((((((())))))))))[0-9]')", 7),
        (text(), "self.matches('')", 1),
        (mapping("string"), "self.all(x, x.contains(self[x]))", 2752507),
        (mapping(text(10), 10), "self.all(x, x.contains(self[x]))", 72),
        (text(), "self == 'x'", 2),
        (text(0), "self == 'x'", 1),
        (text(0, format="byte"), "self == b'x'", 1),
        (array("number"), "self.all(x, x == 0.0)", 6291454),
        (array("int-or-string"), "self[0] == 5", 3),
        (array(OBJECT), "self[0] == null", 2),
        (array(mapping("number")), "self.all(x, x.y == 25.2)", 6291452),
        (array(mapping("number")), "self[0].x > 2.0", 4),
        (array("duration"), "self.all(x, true)", 2359295),
        (array("duration"), "self[0].getHours() == 2", 4),
        (array("date"), "self.all(x, true)", 725936),
        (array("date-time"), "self.all(x, true)", 428963),
        (mapping(OBJECT), "self.all(x, true)", 428963),
        (array(mapping(OBJECT)), "self.all(x, x['y'].required == 'z')", 7340027),
    ],
)  # fmt: skip
def test_cost_of_a_rule_is_what_its_schema_allows(schema: dict[str, Any], rule: str, expected: int) -> None:
    root = costs.root({"type": "object", "properties": {"spec": schema}})
    assert root is not None
    place = root.child(schema, "spec")
    assert place is not None
    assert greatest_cost(parse(rule), {"self": place.size}) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("'ABCDEFGHIJ abcdefghij'.lowerAscii() == 'abcdefghij ABCDEFGHIJ'.lowerAscii()", 9),
        ("strings.quote('ABCDEFGHIJ abcdefghij')", 3),
        ("'abc 123 def 123'.replace('', 'x')", 3),
        ("'abc 123 def 123'.split(' ', 1)", 3),
        ("'abc 123 def 123'.substring(5)", 2),
        ("'abc 123 def 123'.find('123')", 2),
        ("sets.contains([1], [1, 1])", 23),
        ("sets.equivalent([1, 2, 3], [3u, 2.0, 1])", 39),
        ("[1, 2, 3].all(x, x > 0)", 10 + 3 * 5 + 1),
        ("[1, 2, 3].exists(x, x > 0)", 10 + 3 * 6 + 1),
        ("[1, 2, 3].filter(x, x > 0)", 10 + 10 + 3 * 15 + 1),
        ("{'a': 1}.transformMap(k, v, v + 1)", 30 + 30 + 5 + 1),
    ],
)
def test_cost_of_functions_and_macros(expression: str, expected: int) -> None:
    assert greatest_cost(parse(expression), {}) == expected


def version(rule: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"spec": {"type": "object", "properties": {"x": {**schema, "x-kubernetes-validations": [rule]}}}}}


def test_a_rule_within_its_limit_is_accepted_and_one_beyond_it_names_the_factor() -> None:
    cheap = version({"rule": "self.all(s, s.size() > 0)"}, array("string", 100))
    assert compile_errors(cheap, "schema") == []
    dear = array({**array("string"), "x-kubernetes-validations": [{"rule": "self.all(s, s == 'string constant')"}]})
    found = compile_errors({"type": "object", "properties": {"x": dear}}, "schema")
    assert [(error.type, error.field) for error in found] == [
        ("FieldValueForbidden", "schema.properties[x].items.x-kubernetes-validations[0].rule"),
        ("FieldValueForbidden", "schema.properties[x].items.x-kubernetes-validations[0].rule"),
        ("FieldValueForbidden", "schema"),
    ]
    assert "estimated rule cost exceeds budget by factor of more than 100x" in found[0].detail


def test_rules_that_are_each_within_the_limit_can_be_too_much_together() -> None:
    rule = {"rule": "self.all(x, x == 0.0)"}
    schema = {"type": "object", "properties": {f"x{n}": {**array("number"), "x-kubernetes-validations": [rule]} for n in range(17)}}
    found = compile_errors(schema, "schema")
    assert [error.field for error in found][-1] == "schema"
    assert len(found) == 5, "the four dearest rules and the sum"


def test_a_limit_on_the_outer_list_bounds_the_rules_of_its_items() -> None:
    inner = {**array("string", 10), "x-kubernetes-validations": [{"rule": "self.all(s, s.size() > 0)"}]}
    assert compile_errors({"type": "object", "properties": {"x": array(inner, 1000)}}, "schema") == []
    assert compile_errors({"type": "object", "properties": {"x": array(inner)}}, "schema") != []
