"""The real kubectl against our API server: every verb that needs no node."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import tools

MANIFEST = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: web:1, ports: [{containerPort: 80}]}
"""


class Kubectl:
    def __init__(self, config: Path) -> None:
        self.environment = {**os.environ, "KUBECONFIG": str(config), "HOME": str(config.parent)}

    def __call__(self, *arguments: str, stdin: str = "", codes: tuple[int, ...] = (0,), **environment: str) -> str:
        result = subprocess.run([tools.kubectl(), *arguments], input=stdin, capture_output=True, text=True, env={**self.environment, **environment}, timeout=60)
        assert result.returncode in codes, f"{arguments}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout + result.stderr


@pytest.fixture
def kubectl(config_path: Path) -> Kubectl:
    return Kubectl(config_path)


def test_apply_diff_edit_and_delete(kubectl: Kubectl) -> None:
    assert "created" in kubectl("apply", "-f", "-", stdin=MANIFEST)
    assert "unchanged" in kubectl("apply", "-f", "-", stdin=MANIFEST)
    changed = MANIFEST.replace("web:1", "web:2")
    difference = kubectl("diff", "-f", "-", stdin=changed, codes=(1,))
    assert "web:1" in difference
    assert "web:2" in difference
    assert "configured" in kubectl("apply", "-f", "-", stdin=changed)
    kubectl("edit", "deployment/web", KUBE_EDITOR="sed -i s/web:2/web:3/")
    assert kubectl("get", "deployment/web", "-o", "jsonpath={.spec.template.spec.containers[0].image}") == "web:3"
    assert "deleted" in kubectl("delete", "deployment/web")


def test_server_side_apply_reports_conflicts_and_takes_over_by_force(kubectl: Kubectl) -> None:
    assert "serverside-applied" in kubectl("apply", "--server-side", "-f", "-", stdin=MANIFEST)
    other = MANIFEST.replace("replicas: 2", "replicas: 5")
    refused = kubectl("apply", "--server-side", "--field-manager=other", "-f", "-", stdin=other, codes=(1,))
    assert "conflict" in refused
    assert ".spec.replicas" in refused
    kubectl("apply", "--server-side", "--field-manager=other", "--force-conflicts", "-f", "-", stdin=other)
    owners = {entry["manager"] for entry in json.loads(kubectl("get", "deployment/web", "-o", "json", "--show-managed-fields"))["metadata"]["managedFields"]}
    assert owners == {"kubectl", "other"}
    kubectl("delete", "deployment/web")


@pytest.mark.parametrize("what", ["pods", "deployments.spec.strategy", "services.spec.ports", "networkpolicies.spec.ingress"])
def test_explain_names_the_fields(kubectl: Kubectl, what: str) -> None:
    text = kubectl("explain", what)
    assert "FIELDS:" in text or "FIELD:" in text


def test_wait_sees_a_condition_and_a_deletion(kubectl: Kubectl) -> None:
    kubectl("create", "configmap", "awaited", "--from-literal=a=1")
    kubectl("wait", "--for=jsonpath={.data.a}=1", "configmap/awaited", "--timeout=10s")
    kubectl("delete", "configmap", "awaited", "--wait=false")
    kubectl("wait", "--for=delete", "configmap/awaited", "--timeout=10s")


def test_auth_can_i_answers_for_others(kubectl: Kubectl) -> None:
    kubectl("create", "role", "reader", "--verb=get,list", "--resource=pods")
    kubectl("create", "rolebinding", "reader", "--role=reader", "--user=ann")
    assert kubectl("auth", "can-i", "list", "pods", "--as=ann").strip() == "yes"
    assert kubectl("auth", "can-i", "delete", "pods", "--as=ann", codes=(1,)).strip().startswith("no")
    assert "pods" in kubectl("auth", "can-i", "--list", "--as=ann")
    assert "system:masters" in kubectl("auth", "whoami")


def test_every_kind_that_can_be_listed_is_shown_wide(kubectl: Kubectl) -> None:
    names = kubectl("api-resources", "--verbs=list", "-o", "name").split()
    assert len(names) > 50
    for name in names:
        kubectl("get", name, "-A", "-o", "wide")


def test_unknown_fields_and_wrong_types_are_named(kubectl: Kubectl) -> None:
    text = kubectl("apply", "-f", "-", stdin=MANIFEST.replace("replicas: 2", "replicaz: 2"), codes=(1,))
    assert 'unknown field "spec.replicaz"' in text
    text = kubectl("create", "-f", "-", stdin=MANIFEST.replace("replicas: 2", "replicas: many"), codes=(1,))
    assert "spec.replicas" in text
