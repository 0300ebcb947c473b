"""`knarr why` on a cluster: what is stuck is named, by what its components have said of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster

_OBJECTS = """
{apiVersion: v1, kind: Service, metadata: {name: nobody}, spec: {selector: {app: nobody}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: http, port: 80}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: fast}
spec: {storageClassName: fast, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: lonely}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {nodeSelector: {disk: none}, containers: [{name: c, image: "rec.invalid/none:1"}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec: {nodeSelector: {disk: none}, containers: [{name: c, image: "rec.invalid/none:1"}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec: {nodeSelector: {disk: none}, containers: [{name: c, image: "rec.invalid/none:1"}]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: report}
spec: {suspend: true, template: {spec: {restartPolicy: Never, containers: [{name: c, image: "rec.invalid/none:1"}]}}}
"""


@pytest.fixture(scope="module")
def stuck(cluster: Cluster) -> Iterator[Cluster]:
    cluster.kubectl("create", "namespace", "why")
    cluster.kubectl("apply", "-n", "why", "-f", "-", stdin=_OBJECTS)
    cluster.kubectl("wait", "-n", "why", "--for=jsonpath={.status.unavailableReplicas}=2", "deployment/web")
    cluster.kubectl("wait", "-n", "why", "--for=condition=PodScheduled=false", "pod", "--all")
    cluster.kubectl("wait", "-n", "why", "--for=jsonpath={.status.phase}=Pending", "pvc", "--all")
    yield cluster
    cluster.kubectl("delete", "namespace", "why", "--wait=false")


def why(cluster: Cluster, *words: str) -> tuple[int, str]:
    result = cluster.knarr("why", "-n", "why", *words, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("svc/nobody", ["the selector app=nobody of service why/nobody matches none of the 3 pods", "nobody.why.svc.cluster.local is 10."]),
        ("svc/web", ["service why/web selects 2 pods, but none is ready"]),
        ("svc/web:81", ["service why/web has no port 81/TCP; it has 80/TCP"]),
        ("pvc/fast", ["StorageClass fast does not exist; there is local-path", "ProvisioningFailed"]),
        ("pvc/lonely", ["waits for the first pod that uses the claim, and none does", "WaitForFirstConsumer"]),
        ("deploy/web", ["0 of 2 pods are available", "has no node: 0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector"]),
        ("sts/db", ["all others wait for db-0", "pod db-0 has no node"]),
        ("ds/agent", ["1 of 1 nodes are left out"]),
        ("job/report", ["it is suspended"]),
        ("deploy/none", ["Deployment why/none does not exist"]),
    ],
)
def test_what_is_stuck_is_told_why(stuck: Cluster, question: str, answers: list[str]) -> None:
    code, text = why(stuck, question)
    assert code == 1
    for answer in answers:
        assert answer in text


def test_a_service_that_answers_and_a_namespace_that_lives_have_nothing_against_them(stuck: Cluster) -> None:
    for question in ("svc/default/kubernetes", "ns/default"):
        code, text = why(stuck, question)
        assert (code, "✗" in text) == (0, False), text


def test_a_refused_request_names_who_asks_and_the_roles_that_would_allow_it(stuck: Cluster) -> None:
    code, text = why(stuck, "can-i", "--as", "jane", "create", "deployments")
    assert code == 1
    assert "jane (groups system:authenticated) may not create deployments.apps in namespace why" in text
    assert "ClusterRole edit" in text
    stuck.kubectl("create", "rolebinding", "-n", "why", "jane", "--clusterrole=edit", "--user=jane")
    code, text = why(stuck, "can-i", "--as", "jane", "create", "deployments")
    assert (code, 'RBAC: allowed by RoleBinding "jane/why"' in text) == (0, True), text
    code, text = why(stuck, "can-i", "--as", "jane", "get", "/metrics")
    assert (code, "may not get /metrics" in text) == (1, True), text


def test_a_namespace_that_does_not_end_names_what_is_left_and_who_keeps_it(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "why-stuck")
    cluster.kubectl("apply", "-n", "why-stuck", "-f", "-", stdin="{apiVersion: v1, kind: ConfigMap, metadata: {name: held, finalizers: [knarr.test/hold]}}")
    cluster.kubectl("delete", "namespace", "why-stuck", "--wait=false")
    cluster.kubectl("wait", "--for=condition=NamespaceFinalizersRemaining", "namespace/why-stuck")
    code, text = why(cluster, "ns/why-stuck")
    assert code == 1
    assert "knarr.test/hold in 1 resource instances" in text
    assert "configmaps/held is being deleted since" in text
    cluster.kubectl("patch", "-n", "why-stuck", "configmap", "held", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    cluster.kubectl("wait", "--for=delete", "namespace/why-stuck")
