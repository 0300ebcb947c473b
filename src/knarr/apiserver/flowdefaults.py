"""The FlowSchemas and PriorityLevelConfigurations that every cluster starts with, as data.

Source: apiserver apis/flowcontrol/bootstrap/default.go.
"""

from __future__ import annotations

from knarr.api.types import Object

AUTO_UPDATE = {"apf.kubernetes.io/autoupdate-spec": "true"}

# name: (shares, lendable percent, queues, hand size, queue length); queues 0 rejects instead of queueing
LEVELS: dict[str, tuple[int, int, int, int, int]] = {
    "catch-all": (5, 0, 0, 0, 0),
    "system": (30, 33, 64, 6, 50),
    "node-high": (40, 25, 64, 6, 50),
    "leader-election": (10, 0, 16, 4, 50),
    "workload-high": (40, 50, 128, 6, 50),
    "workload-low": (100, 90, 128, 6, 50),
    "global-default": (20, 50, 128, 6, 50),
}


def priority_levels() -> list[Object]:
    out = [_level("exempt", {"type": "Exempt", "exempt": {"nominalConcurrencyShares": 0, "lendablePercent": 0}})]
    for name, (shares, lendable, queues, hand, length) in LEVELS.items():
        response: Object = {"type": "Reject"}
        if queues:
            response = {"type": "Queue", "queuing": {"queues": queues, "handSize": hand, "queueLengthLimit": length}}
        limited = {"nominalConcurrencyShares": shares, "limitResponse": response, "lendablePercent": lendable}
        out.append(_level(name, {"type": "Limited", "limited": limited}))
    return out


def _level(name: str, spec: Object) -> Object:
    return {"metadata": {"name": name, "generation": 1, "annotations": dict(AUTO_UPDATE)}, "spec": spec}


def _subjects(kind: str, *names: str) -> list[Object]:
    if kind == "ServiceAccount":
        return [{"kind": kind, "serviceAccount": {"name": name, "namespace": "kube-system"}} for name in names]
    return [{"kind": kind, kind.lower(): {"name": name}} for name in names]


def _resources(verbs: list[str], groups: list[str], resources: list[str], *, cluster: bool) -> Object:
    rule: Object = {"verbs": verbs, "apiGroups": groups, "resources": resources, "namespaces": ["*"]}
    if cluster:
        rule["clusterScope"] = True
    return rule


EVERYTHING = [_resources(["*"], ["*"], ["*"], cluster=True)]
EVERY_PATH = [{"verbs": ["*"], "nonResourceURLs": ["*"]}]
EVERYBODY = _subjects("Group", "system:unauthenticated", "system:authenticated")


def flow_schemas() -> list[Object]:
    account = _subjects("ServiceAccount", "*")
    leases = ["coordination.k8s.io"]
    return [
        _schema("exempt", "exempt", 1, "", _subjects("Group", "system:masters"), EVERYTHING, EVERY_PATH),
        _schema("catch-all", "catch-all", 10000, "ByUser", EVERYBODY, EVERYTHING, EVERY_PATH),
        _schema("probes", "exempt", 2, "", EVERYBODY, [], [{"verbs": ["get"], "nonResourceURLs": ["/healthz", "/readyz", "/livez"]}]),
        _schema("system-leader-election", "leader-election", 100, "ByUser",
                _subjects("User", "system:kube-controller-manager", "system:kube-scheduler") + account,
                [_resources(["get", "create", "update"], leases, ["leases"], cluster=False)], []),
        _schema("system-node-high", "node-high", 400, "ByUser", _subjects("Group", "system:nodes"), [
            _resources(["*"], [""], ["nodes", "nodes/status"], cluster=True), _resources(["*"], leases, ["leases"], cluster=False)], []),
        _schema("system-nodes", "system", 500, "ByUser", _subjects("Group", "system:nodes"), EVERYTHING, EVERY_PATH),
        _schema("kube-controller-manager", "workload-high", 800, "ByNamespace", _subjects("User", "system:kube-controller-manager"),
                EVERYTHING, EVERY_PATH),
        _schema("kube-scheduler", "workload-high", 800, "ByNamespace", _subjects("User", "system:kube-scheduler"), EVERYTHING, EVERY_PATH),
        _schema("kube-system-service-accounts", "workload-high", 900, "ByNamespace", account, EVERYTHING, EVERY_PATH),
        _schema("service-accounts", "workload-low", 9000, "ByUser", _subjects("Group", "system:serviceaccounts"), EVERYTHING, EVERY_PATH),
        _schema("global-default", "global-default", 9900, "ByUser", EVERYBODY, EVERYTHING, EVERY_PATH),
    ]


def _schema(
    name: str, level: str, precedence: int, distinguisher: str, subjects: list[Object], resources: list[Object], paths: list[Object],
) -> Object:  # fmt: skip
    rule: Object = {"subjects": subjects}
    if resources:
        rule["resourceRules"] = resources
    if paths:
        rule["nonResourceRules"] = paths
    spec: Object = {"priorityLevelConfiguration": {"name": level}, "matchingPrecedence": precedence}
    if distinguisher:
        spec["distinguisherMethod"] = {"type": distinguisher}
    spec["rules"] = [rule]
    return {"metadata": {"name": name, "generation": 1, "annotations": dict(AUTO_UPDATE)}, "spec": spec}
