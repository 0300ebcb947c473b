"""Gateway API resources become routes and conditions."""

from __future__ import annotations

import re
from typing import Any

from knarr.network.ingress.alternatives import settle
from knarr.network.ingress.backendtls import Policies
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


OWN = Published(("10.9.0.1",), own=True)


def test_a_gateway_with_its_own_address_serves_each_listener_by_its_own_routes():
    wide, narrow, port = listener("any"), listener("narrow", hostname="*.x.test"), listener("other", port=8080)
    table, outcome = build([gateway(wide, narrow, port)], [route(to("a"), hostnames=["a.x.test", "b.test"], sectionName="any")], published=OWN)
    door = table.doors["10.9.0.1:80"]
    assert table.doors["10.9.0.1:8080"] != door
    # The name lies in those of the other listener, which has no routes.
    assert f"{door}b.test|/" in table.prefix
    assert f"{door}a.x.test|/" not in table.prefix
    assert table.owners[f"{door}*"] == "any"
    [pattern] = table.patterns
    assert table.owners[table.patterns[pattern]] == "narrow"
    assert re.match(pattern, f"{door}deep.a.x.test")
    assert not re.match(pattern, f"{door}x.test")
    # Through the machine's own address names are all there is.
    assert "a.x.test|/" in table.prefix
    attached = {item["name"]: item["attachedRoutes"] for item in outcome.gateways["infra/gw"]["listeners"]}
    assert attached == {"any": 1, "narrow": 0, "other": 0}


def test_tls_that_nobody_decrypts_goes_by_name():
    through = listener("tls", port=443, protocol="TLS", hostname="*.x.test", tls={"mode": "Passthrough"})
    ended = listener("ended", port=8443, protocol="TLS", tls={"certificateRefs": [{"name": "cert"}]})
    table, outcome = build([gateway(through, ended)], [route({"backendRefs": [{"name": "a", "port": 80}]}, hostnames=["a.x.test"])], kind="TLSRoute", has_secret={"infra/cert": True}, published=OWN)
    door, other = table.doors["10.9.0.1:443"], table.doors["10.9.0.1:8443"]
    kind, _mark, target = table.streams[f"{door}a.x.test"].partition("|")
    assert (kind, table.targets[f"{target}#0"]) == ("P", "10.0.0.1|80")
    assert table.streams[f"{other}a.x.test"].startswith("T|")
    assert table.streams[f"{door}*.x.test"] == table.streams[f"{door}*"] == table.streams[f"{other}*"] == "R"
    assert told(outcome, "TLSRoute")["Accepted"] == ("True", "Accepted")
    _table, outcome = build([gateway(listener())], [route(to("a"))], kind="TLSRoute")
    assert told(outcome, "TLSRoute")["Accepted"] == ("False", "NotAllowedByListeners")


def test_listeners_say_what_is_wrong_with_them():
    def one(*listeners: dict[str, Any]) -> list[tuple[dict[str, tuple[str, str]], list[str]]]:
        _table, outcome = build([gateway(*listeners)], [])
        return [(state(item["conditions"]), [kind["kind"] for kind in item["supportedKinds"]]) for item in outcome.gateways["infra/gw"]["listeners"]]

    [(conditions, kinds)] = one(listener(allowedRoutes={"kinds": [{"kind": "HTTPRoute"}, {"kind": "Nonsense"}]}))
    assert (conditions["ResolvedRefs"], conditions["Programmed"][0], kinds) == (("False", "InvalidRouteKinds"), "True", ["HTTPRoute"])
    [(conditions, kinds)] = one(listener(protocol="UDP"))
    assert (conditions["Accepted"], kinds) == (("False", "UnsupportedProtocol"), [])
    tls = {"certificateRefs": [{"name": "cert", "kind": "Bag"}]}
    [(conditions, _kinds)] = one(listener(port=443, protocol="HTTPS", tls=tls))
    assert conditions["ResolvedRefs"] == ("False", "InvalidCertificateRef")
    both = one(listener("a"), listener("b", protocol="TLS", tls={"mode": "Passthrough"}))
    assert [conditions["Conflicted"][1] for conditions, _kinds in both] == ["ProtocolConflict"] * 2
    twins = one(listener("a"), listener("b"))
    assert [conditions["Accepted"] for conditions, _kinds in twins] == [("False", "HostnameConflict")] * 2


def test_a_gateway_waits_for_its_address_and_refuses_what_is_no_address():
    waiting = Published(pending=("AddressNotAssigned", "soon"), own=True)
    _table, outcome = build([gateway(listener())], [], published=waiting)
    assert state(outcome.gateways["infra/gw"]["conditions"]) == {"Accepted": ("True", "Accepted"), "Programmed": ("False", "AddressNotAssigned")}
    named = gateway(listener())
    named["spec"]["addresses"] = [{"type": "Hostname", "value": "a.test"}]
    _table, outcome = build([named], [])
    assert state(outcome.gateways["infra/gw"]["conditions"])["Accepted"] == ("False", "UnsupportedAddress")


def test_backends_with_filters_of_their_own_are_ways_with_their_share():
    ref = lambda name, weight: {"name": name, "port": 80, "weight": weight, "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "To", "value": name}]}}]}
    table, _outcome = build([gateway(listener())], [route({"backendRefs": [ref("a", 1), ref("b", 3)]})])
    ways = table.rules[table.prefix["*|/"].split("|")[0]].split(";")
    assert [way.split("~")[0].split(",")[0] for way in ways] == ["d::25", "t::0"]
    assert ways[1].endswith("request-set:To:b")


def test_a_backend_that_does_not_exist_keeps_its_share_of_requests():
    table, outcome = build([gateway(listener())], [route(to("a", "nothing", weights=(1, 1)))])
    places = sorted(value for key, value in table.targets.items() if "#" in key)
    assert places == ["10.0.0.1|80", "nowhere|0"]
    assert told(outcome)["ResolvedRefs"] == ("False", "BackendNotFound")


def test_policies_for_tls_to_backends_need_an_authority_and_the_older_counts():
    def policy(name: str, age: int, **validation: Any) -> dict[str, Any]:
        meta = {"namespace": "app", "name": name, "generation": 1, "creationTimestamp": f"2026-01-0{age}T00:00:00Z"}
        return {"metadata": meta, "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "a"}], "validation": {"hostname": "a.test", **validation}}}

    system = {"wellKnownCACertificates": "System"}
    for objects, expected, action in (
        ([policy("old", 1, **system), policy("new", 2, **system)], {"old": "Accepted", "new": "Conflicted"}, "server:"),
        ([policy("blind", 1, caCertificateRefs=[{"group": "", "kind": "ConfigMap", "name": "none"}])], {"blind": "NoValidCACertificate"}, "reply:500"),
    ):
        policies = Policies(objects=objects)
        table, outcome = build([gateway(listener())], [route(to("a"))], policies=policies)
        found = {key.partition("/")[2]: state(status["ancestors"][0]["conditions"])["Accepted"][1] for key, status in outcome.policies.items()}
        assert found == expected
        assert action in table.rules[table.prefix["*|/"].split("|")[0]]


def test_an_expression_whose_conditions_do_not_hold_leaves_the_request_to_prefixes():
    asked = {"headers": [{"name": "X-A", "value": "1"}], "path": {"type": "RegularExpression", "value": "/p/[0-9]+"}}
    rules = [{"matches": [asked], "backendRefs": [{"name": "a", "port": 80}]}, to("b", path="/p"), to("b")]
    table, _outcome = build([gateway(listener())], [route(*rules)])
    [entry] = table.regex.values()
    ways = [way.split("~")[0] for way in table.rules[entry.split("|")[0]].split(";")]
    assert ways == ["h:X-A:1,t::0", "p::%2Fp%2F,t::0", "t::0"]
