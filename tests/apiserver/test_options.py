"""The API server's options by kube-apiserver's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.options import OptionError, applied, feature_gates, normalised


def test_options_become_settings() -> None:
    config = applied(
        APIServerConfig(port=7),
        ["authorization-mode=Node,RBAC,Webhook", "oidc-issuer-url=https://issuer", "oidc-client-id=me", "event-ttl=1h30m", "anonymous-auth=true",
         "max-requests-inflight=50", "disable-admission-plugins=PodSecurity,Priority", "audit-log-path=-"],
    )  # fmt: skip
    assert config.port == 7
    assert config.authorization_modes == ("Node", "RBAC", "Webhook")
    assert config.oidc == {"issuer-url": "https://issuer", "client-id": "me"}
    assert config.event_ttl_seconds == 5400
    assert config.anonymous_paths == ("*",)
    assert config.max_requests_inflight == 50
    assert config.admission_plugins_off == ("PodSecurity", "Priority")
    assert config.audit_log_path == "-"


def test_files_are_named_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens.csv").write_text("t,u,1\n")
    monkeypatch.chdir(tmp_path)
    assert normalised(["--token-auth-file=tokens.csv"]) == [f"token-auth-file={tmp_path}/tokens.csv"]


def test_the_admission_configuration_is_read_with_the_files_it_names(tmp_path: Path) -> None:
    (tmp_path / "pod-security.yaml").write_text("kind: PodSecurityConfiguration\ndefaults: {enforce: baseline}\n")
    path = tmp_path / "admission.yaml"
    path.write_text("apiVersion: apiserver.config.k8s.io/v1\nkind: AdmissionConfiguration\nplugins: [{name: PodSecurity, path: pod-security.yaml}]\n")
    config = applied(APIServerConfig(), normalised([f"admission-control-config-file={path}"]))
    assert config.admission_config == {"PodSecurity": {"kind": "PodSecurityConfiguration", "defaults": {"enforce": "baseline"}}}


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("no-such-option=1", "has no option 'no-such-option'"),
        ("event-ttl", "needs a value"),
        ("event-ttl=soon", "event-ttl"),
        ("max-requests-inflight=many", "max-requests-inflight"),
        ("anonymous-auth=perhaps", "true or false"),
        ("token-auth-file=/nowhere/tokens", "cannot read /nowhere/tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(argument: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        normalised([argument])


def test_gates_and_versions_that_are_off_by_default_are_switched_by_upstreams_names() -> None:
    given = ["feature-gates=StorageVersionMigrator=true,DRADeviceTaints=True,ContainerCheckpoint=true", "runtime-config=storagemigration.k8s.io/v1alpha1=true,v1"]
    config = applied(APIServerConfig(), normalised(given))
    assert config.feature_gates == {"StorageVersionMigrator": True, "DRADeviceTaints": True}
    assert config.runtime_config == ("storagemigration.k8s.io/v1alpha1",)
    assert feature_gates(given) == config.feature_gates


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("feature-gates=NoSuchGate=true", "unrecognized feature gate: NoSuchGate"),
        ("feature-gates=ContainerCheckpoint=false", "ContainerCheckpoint cannot be switched here, it is true"),
        ("feature-gates=StorageVersionMigrator", "missing bool value for StorageVersionMigrator"),
        ("runtime-config=batch/v2alpha1=true", "batch/v2alpha1 cannot be switched on here"),
        ("runtime-config=apps/v1=false", "apps/v1 cannot be switched off here"),
    ],
)
def test_what_cannot_be_switched_is_refused(argument: str, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        normalised([argument])
