"""A claim without anything prepared: the default storage class makes its volume, on the node of its pod."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, wait_for

pytestmark = pytest.mark.root

CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 100Mi}}}
"""


def pod(name: str, program: str) -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  securityContext: {{runAsUser: 1000}}
  containers:
  - {{name: c, image: "dockercoins/rng:v0.1", imagePullPolicy: Never, command: [python3, -c, "{program}"], volumeMounts: [{{name: v, mountPath: /data}}]}}
  volumes: [{{name: v, persistentVolumeClaim: {{claimName: data}}}}]
"""


def phase(cluster: Cluster, name: str) -> str:
    return str(cluster.get("pod", name)["status"].get("phase"))


def test_what_a_pod_writes_the_next_one_reads_until_the_claim_is_deleted(cluster: Cluster) -> None:
    try:
        cluster.kubectl("apply", "-f", "-", stdin=CLAIM + "---" + pod("writer", "open('/data/f', 'w').write('kept')"))
        wait_for("the first pod", lambda: phase(cluster, "writer") == "Succeeded")
        cluster.kubectl("patch", "pvc", "data", "-p", '{"spec": {"resources": {"requests": {"storage": "200Mi"}}}}')
        wait_for("the claim to grow", lambda: cluster.get("pvc", "data")["status"]["capacity"]["storage"] == "200Mi")
        cluster.kubectl("apply", "-f", "-", stdin=pod("reader", "print(open('/data/f').read())"))
        wait_for("the second pod", lambda: phase(cluster, "reader") == "Succeeded")
        assert cluster.kubectl("logs", "reader").strip() == "kept"
        volume = cluster.get("pv", cluster.get("pvc", "data")["spec"]["volumeName"])
        folder = Path(volume["spec"]["local"]["path"])
        assert (folder / "f").read_text() == "kept"
    finally:
        cluster.kubectl("delete", "pod", "writer", "reader", "--force", "--grace-period=0", "--ignore-not-found")
        cluster.kubectl("delete", "pvc", "data", "--ignore-not-found")
    wait_for("the volume to go", lambda: volume["metadata"]["name"] not in cluster.kubectl("get", "pv"))
    assert not folder.exists()
