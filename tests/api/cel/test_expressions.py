"""Expressions: what they evaluate to, how they fail, and what is refused before they run."""

import pytest

from knarr.api import cel
from knarr.api.cel.values import Optional
from knarr.api.structural.formats import go_regex

OBJECT = {
    "metadata": {"name": "x", "namespace": "ns", "labels": {"a": "b"}},
    "spec": {"replicas": 3, "none": None, "containers": [{"name": "c", "image": "nginx:1"}, {"name": "d", "image": "redis"}]},
}


def run(source: str, **variables: object) -> object:
    given = {"object": OBJECT, **variables}
    value = cel.base().compile(source, dict.fromkeys(given, cel.DYN)).evaluate(given)
    return ("some", value.value) if isinstance(value, Optional) and value.present else "none" if isinstance(value, Optional) else value


@pytest.mark.parametrize(("source", "expected"), [
    ("1 + 2 * 3 - 4 / 2", 5), ("-7 / 2", -3), ("-7 % 3", -1), ("1u + 2u", 3), ("0x10", 16), ("-9223372036854775808", -(1 << 63)),
    ("'a' + \"b\"", "ab"), ("r'\\d'", "\\d"), ("'\\u00e9\\x41\\n'", "éA\n"), ("b'abc'", b"abc"), ("size('héllo')", 5), ("'''a'b'''", "a'b"),
    ("dyn(1) == 1.0", True), ("1 < 1.5", True), ("object.spec.none == null", True), ("[1, 2] == [1, 2]", True), ("dyn(true) == 1", False),
    ("object.metadata.namespace", "ns"), ("has(object.spec.foo)", False), ("has(object.spec.none)", True), ("'a' in object.metadata.labels", True),
    ("object.spec.foo == 1 || true", True), ("true || object.spec.foo", True), ("false && object.spec.foo == 1", False),
    ("object.spec.containers.all(c, c.image != '')", True), ("object.spec.containers.exists(c, c.name == 'd')", True),
    ("object.spec.containers.exists_one(c, c.name == 'd')", True), ("object.spec.containers.map(c, c.name)", ["c", "d"]),
    ("object.spec.containers.filter(c, c.name == 'd')[0].image", "redis"), ("[1, 2, 3].map(x, x > 1, x * 2)", [4, 6]),
    ("{'a': 1, 'b': 2}.all(k, v, v > 0 && k < 'c')", True), ("object.metadata.labels.transformMap(k, v, v + k)", {"a": "ba"}),
    ("[10, 20].transformList(i, v, i + v)", [10, 21]), ("object.?spec.?foo.orValue(5)", 5), ("object.?spec.?replicas", ("some", 3)),
    ("object.spec[?'foo']", "none"), ("[1, ?optional.none(), 2]", [1, 2]), ("{?'a': optional.of(1)}", {"a": 1}),
    ("optional.of(1).optMap(x, x + 1)", ("some", 2)), ("type(1) == int", True), ("int('42') + int(3.9)", 45), ("string(1.5)", "1.5"),
    ("duration('1h30m') == duration('90m')", True), ("timestamp('2020-01-02T03:04:05Z').getMonth()", 0),
    ("timestamp('2020-01-02T03:04:05Z') + duration('1h') > timestamp('2020-01-02T03:04:05Z')", True),
    ("timestamp('2020-01-01T00:00:00Z').getHours('+02:00')", 2), ("'abc'.matches('^a.c$')", True), ("'a,b,c'.split(',')", ["a", "b", "c"]),
    ("['a', 'b'].join('-')", "a-b"), ("'Hello'.lowerAscii().substring(1, 3)", "el"), ("'%s is %d'.format(['x', 3])", "x is 3"),
    ("'abc 123'.find('[0-9]+')", "123"), ("[3, 1, 2].min() + [3, 1, 2].sum()", 7), ("[1, 2].isSorted()", True), ("sets.contains([1, 2], [1])", True),
    ("quantity('1Gi').isGreaterThan(quantity('1G'))", True), ("quantity('500m').add(quantity('0.5')).asInteger()", 1), ("isQuantity('1x')", False),
    ("url('https://h:80/p?a=b').getHost()", "h:80"), ("isURL('nope')", False), ("ip('10.0.0.1').family()", 4), ("ip.isCanonical('::0001')", False),
    ("cidr('10.0.0.0/8').containsIP('10.1.1.1')", True), ("cidr('10.0.0.0/8').containsCIDR('11.0.0.0/16')", False),
    ("format.dns1123Label().validate('ok').hasValue()", False), ("semver('1.2.3').isLessThan(semver('1.10.0'))", True),
    ("object.spec.replicas > 5 ? 'many' : 'few'", "few"),
])  # fmt: skip
def test_values(source: str, expected: object) -> None:
    assert run(source) == expected


@pytest.mark.parametrize(("source", "message"), [
    ("object.spec.foo", "no such key: foo"), ("1 / 0", "division by zero"), ("9223372036854775807 + 1", "integer overflow"),
    ("[1][5]", "index out of bounds: 5"), ("'got ' + object.spec.replicas", "no such overload: _+_(string, int)"),
    ("object.spec.foo == 1 && true", "no such key: foo"), ("optional.none().value()", "optional.none() dereference"),
    ("object.metadata.name ? 1 : 2", "no such overload"),
])  # fmt: skip
def test_run_time_errors(source: str, message: str) -> None:
    with pytest.raises(cel.EvalError, match=message.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+")):
        run(source)


@pytest.mark.parametrize(("source", "message"), [
    ("[] bad expression", "<input>:1:4: Syntax error: mismatched input 'bad'"), ("... [] bad", "Syntax error"),
    ("unknown + 1", "undeclared reference to 'unknown' (in container '')"), ("'a' + 1", "found no matching overload for '_+_' applied to '(string, int)'"),
    ("nothing(1)", "undeclared reference to 'nothing'"), ("'a'.size(1)", "found no matching overload for 'size' applied to 'string.(int)'"),
    ("1 == 'a'", "found no matching overload for '_==_' applied to '(int, string)'"), ("true && 1", "found no matching overload for '_&&_'"),
    ("[1].all(x, x)", "expected type 'bool' but found 'int'"), ("while", "reserved identifier: while"), ("1 +", "mismatched input '<EOF>'"),
    ("(" * 300 + "1" + ")" * 300, "recursion limit"),
])  # fmt: skip
def test_compile_errors(source: str, message: str) -> None:
    with pytest.raises(cel.CompileError) as caught:
        run(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(("pattern", "good", "bad"), [
    ("^(?i)[a-z]+$", "ABC", "1"), ("a(?i)b|c", "aB C", "Ab"), ("(x(?i)y)z", "xYz", "xyZ"), ("[(?i)]", "?", "x"), (r"\(?i", "(i", "x"), ("(?i)ab", "AB", "b"),
])  # fmt: skip
def test_flags_of_patterns_may_stand_anywhere(pattern: str, good: str, bad: str) -> None:
    matches = cel.base().compile("t.matches(p)", {"t": cel.STRING, "p": cel.STRING})
    assert matches.evaluate({"t": good, "p": pattern}) is True
    assert matches.evaluate({"t": bad, "p": pattern}) is False
    assert go_regex(pattern).search(good)
    assert not go_regex(pattern).search(bad)


def test_fields_of_typed_objects_are_checked() -> None:
    kind = cel.ObjectType("thing", {"size": cel.INT})
    with pytest.raises(cel.CompileError, match="undefined field 'sise'"):
        cel.base().compile("self.sise > 1", {"self": kind})
    assert cel.base().compile("self.size > 1", {"self": kind}, result=cel.BOOL).evaluate({"self": {"size": 2}}) is True


def test_the_result_must_have_the_wanted_type() -> None:
    with pytest.raises(cel.CompileError, match="must evaluate to bool"):
        cel.base().compile("1 + 1", {}, result=cel.BOOL)


def test_the_budget_ends_what_costs_too_much() -> None:
    items = list(range(1000))
    with pytest.raises(cel.CostExceeded, match="cost limit exceeded"):
        cel.base().compile("l.all(x, l.all(y, l.all(z, x + y + z >= 0)))", {"l": cel.DYN}).evaluate({"l": items})
    with pytest.raises(cel.CostExceeded):
        cel.base().compile("l.all(x, l.all(y, l.all(z, x + y + z >= 0))) || true", {"l": cel.DYN}).evaluate({"l": items})
