"""Quantities, selectors, times, YAML and errors: small texts with exact meanings."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knarr.api import errors, quantity, selectors, times, yamldoc
from knarr.api.resources import DEPLOYMENTS, PODS


@pytest.mark.parametrize(("text", "canonical"), [
    ("0.5", "500m"), ("1024Mi", "1Gi"), ("1.5Gi", "1536Mi"), ("1000", "1k"), ("1500m", "1500m"), ("1.500", "1.500"), ("0", "0"), ("00", "0"),
    ("1e3", "1e3"), ("9Ki", "9Ki"), ("0.1Ki", "102400m"), ("1000k", "1M"), ("-1.5", "-1500m"), ("1n", "1n"), ("0.1n", "1n"), ("12E", "12E"),
    ("1.0", "1"), ("100m", "100m"), ("0.0001", "100u"),
])
def test_quantities_have_one_canonical_text(text: str, canonical: str) -> None:
    assert quantity.canonical(text) == canonical
    assert quantity.parse(quantity.canonical(text)) == quantity.parse(text)


@pytest.mark.parametrize("text", ["", "x", "1x", "1..2", "1e", "m", "1Kii", " 1", "1 ", "0x1", "١"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(quantity.QuantityError):
        quantity.parse(text)


@given(st.fractions(min_value=-10**12, max_value=10**12, max_denominator=1000), st.sampled_from(["DecimalSI", "BinarySI", "DecimalExponent"]))
def test_formatting_never_makes_a_quantity_smaller_in_size(number: Fraction, form: str) -> None:
    parsed = quantity.parse(quantity.format(number, form))
    assert abs(parsed) >= abs(number)
    assert abs(parsed - number) < Fraction(1, 10**8)


def test_quantities_add_in_the_format_of_the_first() -> None:
    assert quantity.add("1Gi", "512Mi") == "1536Mi"
    assert quantity.add("0", "1Ki") == "1Ki"
    assert quantity.subtract("2", "500m") == "1500m"
    assert (quantity.cpu_millicores("0.1"), quantity.value("1500m"), quantity.value("-1500m"), quantity.value("1Ki")) == (100, 2, -2, 1024)


@pytest.mark.parametrize(("selector", "labels", "matches"), [
    ("a=b", {"a": "b"}, True), ("a==b,c!=d", {"a": "b"}, True), ("a in (b,c)", {"a": "c"}, True), ("a notin (b)", {}, True),
    ("!a", {"a": ""}, False), ("a", {"a": ""}, True), ("a>5", {"a": "6"}, True), ("a<5", {"a": "x"}, False), ("", {}, True),
    ("a=", {"a": ""}, True), ("x in ()", {"x": ""}, True), ("a in (in, notin)", {"a": "in"}, True),
])
def test_label_selectors(selector: str, labels: dict[str, str], matches: bool) -> None:
    compiled = selectors.parse_label_selector(selector)
    assert compiled.matches(labels) is matches
    assert selectors.parse_label_selector(str(compiled)).matches(labels) is matches


@pytest.mark.parametrize("text", ["a b", "=a", "a,,b", "a in", "a in (b", "!a=b", "a/b/c", "a=b c", "a>x", "a=" + "x" * 64, ","])
def test_broken_label_selectors_are_refused(text: str) -> None:
    with pytest.raises(selectors.SelectorError):
        selectors.parse_label_selector(text)


def test_label_selector_objects() -> None:
    assert selectors.from_label_selector(None).matches({}) is False
    assert selectors.from_label_selector({}).matches({}) is True
    made = selectors.from_label_selector({"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "Exists"}]})
    assert (made.matches({"a": "b"}), made.matches({"a": "b", "c": ""})) == (False, True)
    with pytest.raises(selectors.SelectorError, match="not a valid label selector operator"):
        selectors.from_label_selector({"matchExpressions": [{"key": "c", "operator": "Foo"}]})


def test_field_selectors() -> None:
    selector = selectors.parse_field_selector(r"metadata.name=a\,b,spec.x!=1")
    assert selector.matches({"metadata.name": "a,b", "spec.x": ""})
    assert not selector.matches({"metadata.name": "a,b", "spec.x": "1"})
    assert selector.required_value("metadata.name") == "a,b"
    assert selectors.parse_field_selector(str(selector)).matches({"metadata.name": "a,b"})
    for broken in ("a", r"a=\x", "a=b=c"):
        with pytest.raises(selectors.SelectorError):
            selectors.parse_field_selector(broken)


@pytest.mark.parametrize(("text", "value"), [
    ("y", True), ("Off", False), ("0777", 511), ("0x1F", 31), ("0b11", 3), ("1_000", 1000), ("1e3", 1000.0), (".5", 0.5), ("~", None),
    ("2001-01-01", "2001-01-01"), ("12:30:45", "12:30:45"), ("'5'", "5"), ("!!str 5", "5"), ("", None), ("abc", "abc"), ("-7", -7),
    ("0o17", 15), ("09", 9.0),
])
def test_yaml_scalars_are_read_by_the_rules_of_version_1_1(text: str, value: Any) -> None:
    loaded = yamldoc.load(f"a: {text}")[0]["a"]
    assert (type(loaded), loaded) == (type(value), value)


def test_yaml_bombs_are_refused_and_duplicates_named() -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i-1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(yamldoc.YAMLError, match="excessive aliasing"):
        yamldoc.load(bomb)
    with pytest.raises(yamldoc.YAMLError):
        yamldoc.load("[" * 5000)
    assert yamldoc.load("\na: 1\nb:\n  c: 1\n  c: 2", strict=True) == (
        {"a": 1, "b": {"c": 2}}, 'line 5: key "c" already set in map')
    assert yamldoc.load("x: &x {a: 1}\nz: {<<: *x, b: 2}")[0]["z"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(("text", "canonical"), [
    ("2020-01-02T03:04:05Z", "2020-01-02T03:04:05Z"), ("2020-01-02T03:04:05.999+02:00", "2020-01-02T01:04:05Z"), ("0001-01-01T00:00:00Z", None),
])
def test_times_become_utc_seconds(text: str, canonical: str | None) -> None:
    assert times.canonical_seconds(text) == canonical


@given(st.integers(min_value=-(10**17), max_value=10**17))
def test_durations_survive_being_written(nanos: int) -> None:
    assert times.parse_duration(times.format_duration(nanos)) == nanos


def test_errors_speak_as_upstream_does() -> None:
    found = errors.not_found(DEPLOYMENTS, "x")
    assert found.message == 'deployments.apps "x" not found'
    assert found.status() == {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": 'deployments.apps "x" not found',
        "reason": "NotFound", "details": {"name": "x", "group": "apps", "kind": "deployments"}, "code": 404,
    }
    invalid = errors.invalid(PODS, "x", [errors.required("spec.a"), errors.not_supported("spec.b", "q", ["r", "s"])])
    assert invalid.message == (
        'Pod "x" is invalid: [spec.a: Required value, spec.b: Unsupported value: "q": supported values: "r", "s"]'
    )
    again = errors.StatusError.from_status(invalid.status())
    assert errors.is_invalid(again)
    assert again.causes == invalid.causes
    assert errors.too_long("f", 1).body() == "Too long: may not be more than 1 byte"
    assert errors.too_many("f", 3, 2).body() == "Too many: 3: must have at most 2 items"
    assert errors.go_quote('a"\n\x01é\u200b') == '"a\\"\\n\\x01é\\u200b"'
