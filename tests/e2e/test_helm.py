"""The real Helm: install, upgrade, roll back and remove a chart with a custom resource definition and hooks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import tools
from tests.e2e.cluster import Cluster

CHART = Path(__file__).parent / "chart"

pytestmark = pytest.mark.root


def helm(cluster: Cluster, *arguments: str) -> str:
    environment = {**cluster.environment, "HELM_CACHE_HOME": str(cluster.folder), "HELM_CONFIG_HOME": str(cluster.folder), "HELM_DATA_HOME": str(cluster.folder)}
    result = subprocess.run([tools.helm(), *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}{result.stderr}\n{cluster.logs()}"
    return result.stdout


def test_a_chart_with_hooks_and_a_definition_goes_through_its_life(cluster: Cluster) -> None:
    helm(cluster, "install", "port", str(CHART), "--wait", "--timeout", "90s")
    assert cluster.get("ship.harbour.test", "port-ship")["spec"]["masts"] == 1
    assert cluster.get("job", "port-before")["status"]["succeeded"] == 1
    helm(cluster, "upgrade", "port", str(CHART), "--set", "replicas=2,greeting=ahoy", "--wait", "--timeout", "90s")
    assert cluster.get("configmap", "port-config")["data"]["greeting"] == "ahoy"
    assert cluster.get("deployment", "port")["status"]["readyReplicas"] == 2
    helm(cluster, "rollback", "port", "1", "--wait", "--timeout", "90s")
    assert cluster.get("configmap", "port-config")["data"]["greeting"] == "hello"
    history = json.loads(helm(cluster, "history", "port", "-o", "json"))
    assert [entry["status"] for entry in history] == ["superseded", "superseded", "deployed"]
    helm(cluster, "uninstall", "port", "--wait", "--timeout", "90s")
    assert "port" not in cluster.kubectl("get", "deployments,configmaps", "-o", "name").replace("kube-root-ca.crt", "")
    cluster.kubectl("delete", "crd", "ships.harbour.test")
    cluster.kubectl("delete", "job", "port-before", "--ignore-not-found")
