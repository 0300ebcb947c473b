"""Gateway API resources become routes and conditions."""

from __future__ import annotations

from typing import Any

from knarr.network.ingress.alternatives import settle
from knarr.network.ingress.gateway import Published, World, add_routes, intersect
from knarr.network.ingress.gateways import _keep_times
from knarr.network.ingress.routes import Routes

SHARED = Published(("192.0.2.7",))


def gateway(*listeners: dict[str, Any], namespace: str = "infra") -> dict[str, Any]:
    return {
        "metadata": {"namespace": namespace, "name": "gw", "generation": 2},
        "spec": {"gatewayClassName": "knarr", "listeners": list(listeners)},
    }


def listener(name: str = "http", **more: Any) -> dict[str, Any]:
    return {"name": name, "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}, **more}


def route(*rules: dict[str, Any], hostnames: list[str] | None = None, **parent: Any) -> dict[str, Any]:
    spec = {"parentRefs": [{"name": "gw", "namespace": "infra", **parent}], "hostnames": hostnames or [], "rules": list(rules)}
    return {"metadata": {"namespace": "app", "name": "r", "generation": 1}, "spec": spec}


def to(
    *names: str, path: str = "/", kind: str = "PathPrefix", weights: tuple[int, ...] = (), filters: tuple[Any, ...] = ()
) -> dict[str, Any]:
    refs = [{"name": name, "port": 80, **({"weight": weights[i]} if weights else {})} for i, name in enumerate(names)]
    return {"matches": [{"path": {"type": kind, "value": path}}], "backendRefs": refs, "filters": list(filters)}


def build(
    gateways: list[dict[str, Any]],
    routes: list[dict[str, Any]],
    *,
    kind: str = "HTTPRoute",
    has_secret: dict[str, bool] | None = None,
    grants: list[dict[str, Any]] | None = None,
    published: Published = SHARED,
    **more: Any,
) -> tuple[Routes, Any]:
    table = Routes()
    known = {"a": [("10.0.0.1", 80)], "b": [("10.0.0.2", 80)]}
    find = lambda _namespace, name, _port: known.get(name, f"service {name} does not exist")
    labels = {"app": {"team": "x"}}
    world = World(addresses=find, has_secret=has_secret or {}, namespace_labels=labels, published=lambda _gateway: published, grants=grants or [], **more)
    outcome = add_routes(table, gateways, {kind: routes}, world)
    settle(table)
    return table, outcome


def told(outcome: Any, kind: str = "HTTPRoute", parent: int = 0) -> dict[str, tuple[str, str]]:
    """The conditions of the one route."""
    return state(outcome.routes[kind]["app/r"]["parents"][parent]["conditions"])


def state(conditions: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {item["type"]: (item["status"], item["reason"]) for item in conditions}


def test_a_route_of_an_allowed_namespace_is_served_and_accepted():
    table, outcome = build([gateway(listener())], [route(to("a"), to("b", path="/exact", kind="Exact"), hostnames=["Foo.test"])])
    target = table.prefix["foo.test|/"].split("|")[0]
    assert table.targets[f"{target}#0"] == "10.0.0.1|80"
    assert "foo.test|/exact" in table.exact
    assert told(outcome) == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")}
    status = outcome.gateways["infra/gw"]
    assert status["addresses"] == [{"type": "IPAddress", "value": "192.0.2.7"}]
    assert status["listeners"][0]["attachedRoutes"] == 1
    assert state(status["conditions"])["Programmed"] == ("True", "Programmed")


def test_weights_decide_how_often_a_backend_is_drawn():
    table, _outcome = build([gateway(listener())], [route(to("a", "b", weights=(30, 10)))])
    places = [value for key, value in table.targets.items() if "#" in key]
    assert sorted(places) == ["10.0.0.1|80"] * 3 + ["10.0.0.2|80"]


def test_what_is_not_allowed_or_supported_is_told_and_not_served():
    cases = {
        "NotAllowedByListeners": ([gateway(listener(allowedRoutes={"namespaces": {"from": "Same"}}))], route(to("a"))),
        "NoMatchingListenerHostname": ([gateway(listener(hostname="*.one.test"))], route(to("a"), hostnames=["x.two.test"])),
        "NoMatchingParent": ([gateway(listener())], route(to("a"), sectionName="other")),
        "UnsupportedValue": ([gateway(listener())], route({"filters": [{"type": "ExtensionRef"}], "backendRefs": []})),
    }
    for reason, (gateways, wanted) in cases.items():
        table, outcome = build(gateways, [wanted])
        assert not table.prefix, reason
        assert told(outcome)["Accepted"] == ("False", reason)


def test_namespaces_may_be_selected_and_missing_backends_answer_500():
    selector = {"namespaces": {"from": "Selector", "selector": {"matchLabels": {"team": "x"}}}}
    table, outcome = build([gateway(listener(allowedRoutes=selector))], [route(to("nothing"))])
    assert table.targets[table.prefix["*|/"].split("|")[0] + "#0"] == "nowhere|0"
    assert told(outcome)["ResolvedRefs"] == ("False", "BackendNotFound")


def test_https_listeners_bring_their_certificate_and_keep_plain_requests_out():
    secure = listener("https", port=443, protocol="HTTPS", hostname="safe.test", tls={"certificateRefs": [{"name": "cert"}]})
    table, outcome = build([gateway(secure)], [route(to("a"))], has_secret={"infra/cert": True})
    assert table.certificates == {"safe.test": "infra/cert"}
    assert table.prefix["safe.test|/"].endswith("|T|")
    table, outcome = build([gateway(secure, listener("http", hostname="safe.test"))], [route(to("a"))], has_secret={"infra/cert": True})
    assert table.prefix["safe.test|/"].endswith("||")
    _table, outcome = build([gateway(secure)], [])
    assert state(outcome.gateways["infra/gw"]["listeners"][0]["conditions"])["ResolvedRefs"] == ("False", "InvalidCertificateRef")


def test_redirects_and_rewrites():
    redirect = {"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "statusCode": 301}}
    rewrite = {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"}}}
    table, _outcome = build([gateway(listener())], [route(to("a", path="/r", filters=(redirect,)), to("a", path="/w", filters=(rewrite,)))])
    assert table.prefix["*|/r/"].endswith("|P1|")
    assert table.prefix["*|/w/"].endswith("|P|/new")


def test_conditions_are_tried_in_order_of_precedence_and_fall_back_to_shorter_paths():
    header = {"headers": [{"name": "X-A", "value": "1"}], "path": {"type": "PathPrefix", "value": "/p"}}
    method = {"method": "POST", "path": {"type": "PathPrefix", "value": "/p"}}
    rules = [
        {"matches": [header], "backendRefs": [{"name": "a", "port": 80}]},
        {"matches": [method], "backendRefs": [{"name": "b", "port": 80}]},
        to("b"),
    ]
    table, outcome = build([gateway(listener())], [route(*rules)])
    assert told(outcome)["Accepted"] == ("True", "Accepted")
    ways = table.rules[table.prefix["*|/p/"].split("|")[0]].split(";")
    assert [way.split("~")[0].split(":")[0] for way in ways] == ["m", "h", "t"]
    assert table.prefix["*|/"].split("|")[0].startswith("gw/")


def test_host_names_of_listener_and_route_are_intersected():
    assert intersect("", "a.test") == "a.test"
    assert intersect("*.test", "a.test") == "a.test"
    assert intersect("a.test", "*.test") == "a.test"
    assert intersect("*.test", "") == "*.test"
    assert intersect("a.test", "b.test") is None


def test_a_condition_keeps_its_time_until_its_status_changes():
    before = {
        "conditions": [
            {"type": "Accepted", "status": "True", "lastTransitionTime": "then"},
            {"type": "Programmed", "status": "False", "lastTransitionTime": "then"},
        ]
    }
    after = {"conditions": [{"type": "Accepted", "status": "True"}, {"type": "Programmed", "status": "True"}]}
    _keep_times(before, after)
    assert after["conditions"][0]["lastTransitionTime"] == "then"
    assert after["conditions"][1]["lastTransitionTime"] != "then"


def test_another_namespace_is_used_only_if_it_grants_that():
    elsewhere = {"backendRefs": [{"name": "a", "port": 80, "namespace": "data"}]}
    table, outcome = build([gateway(listener())], [route(elsewhere)])
    assert told(outcome)["ResolvedRefs"] == ("False", "RefNotPermitted")
    grant = {
        "metadata": {"namespace": "data", "name": "g"},
        "spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "app"}], "to": [{"group": "", "kind": "Service"}]},
    }
    table, outcome = build([gateway(listener())], [route(elsewhere)], grants=[grant])
    assert told(outcome)["ResolvedRefs"] == ("True", "ResolvedRefs")
    assert table.targets[table.prefix["*|/"].split("|")[0] + "#0"] == "10.0.0.1|80"
    for side, change in (("to", {"name": "b"}), ("to", {"kind": "Secret"}), ("from", {"namespace": "other"}), ("from", {"kind": "Gateway"})):
        spec = {**grant["spec"], side: [{**grant["spec"][side][0], **change}]}
        _table, outcome = build([gateway(listener())], [route(elsewhere)], grants=[{**grant, "spec": spec}])
        assert told(outcome)["ResolvedRefs"][1] == "RefNotPermitted", change
    tls = {"certificateRefs": [{"name": "cert", "namespace": "data"}]}
    secure = gateway(listener("https", port=443, protocol="HTTPS", hostname="safe.test", tls=tls))
    permit = {**grant, "spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "infra"}], "to": [{"group": "", "kind": "Secret", "name": "cert"}]}}
    for grants, reason in (([], "RefNotPermitted"), ([permit], "ResolvedRefs")):
        _table, outcome = build([secure], [], has_secret={"data/cert": True}, grants=grants)
        assert state(outcome.gateways["infra/gw"]["listeners"][0]["conditions"])["ResolvedRefs"][1] == reason


def test_timeouts_and_copies_are_actions():
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "b", "port": 80}, "fraction": {"numerator": 1, "denominator": 4}}}
    table, _outcome = build([gateway(listener())], [route({**to("a", filters=(mirror,)), "timeouts": {"request": "1m30s", "backendRequest": "500ms"}})])
    text = table.rules[table.prefix["*|/"].split("|")[0]]
    assert "timeout:500," in text
    assert "mirror:25:" in text
    table, outcome = build([gateway(listener())], [route({**to("a"), "timeouts": {"request": "soon"}})])
    assert told(outcome)["Accepted"] == ("False", "UnsupportedValue")
    table, _outcome = build([gateway(listener())], [route({**to("a"), "timeouts": {"request": "0s"}})])
    assert table.prefix["*|/"].endswith("|P|")


def test_a_grpc_route_leads_its_methods_over_http_2():
    method = lambda **asked: {"matches": [{"method": asked}], "backendRefs": [{"name": "a", "port": 80}]}
    rules = [method(service="shop.Cart", method="Add"), method(service="shop.Cart"), method(method="Ping"), {"backendRefs": [{"name": "b", "port": 80}]}]
    table, outcome = build([gateway(listener())], [route(*rules, hostnames=["g.test"])], kind="GRPCRoute")
    assert table.exact["g.test|/shop.Cart/Add"].split("|")[1] == "PG"
    assert table.prefix["g.test|/shop.Cart/"].split("|")[1] == "PG"
    assert "^g\\.test[|](?:/[^/]+/Ping)$" in table.regex
    assert told(outcome, "GRPCRoute")["Accepted"][0] == "True"
