from __future__ import annotations

import socket
from pathlib import Path

import pytest

from knarr.cluster import config as cluster_config
from knarr.cluster import preflight
from knarr.cluster.config import ClusterConfig, ConfigError
from knarr.runtime.probe import probe


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    monkeypatch.setattr(cluster_config, "DATA_ROOT", tmp_path / "root")
    return cluster_config.new_cluster("default", str(tmp_path / "data"))


def test_a_taken_port_names_its_holder(config: ClusterConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        config.api_port = taken.getsockname()[1]
        findings = [finding for finding in preflight.check(config) if str(config.api_port) in finding.problem]
    assert len(findings) == 1
    assert "(pid " in findings[0].problem


def test_a_missing_program_names_its_package(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "which", lambda program, path: None)
    texts = [str(finding) for finding in preflight.check(config)]
    assert "the program nft is missing; install it: apt-get install nftables" in texts


def test_without_root_it_says_so_first(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "geteuid", lambda: 1000)
    assert "not root" in preflight.check(config)[0].problem


def test_missing_cgroup_controllers_are_named(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "cgroup_controllers", lambda: ("v2", {"cpu", "pids"}))
    assert any("memory" in finding.problem and "cgroup_enable=memory" in finding.remedy for finding in preflight.check(config))


def test_a_bad_cluster_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower-case"):
        cluster_config.new_cluster("Big_Cluster", str(tmp_path))


def test_a_saved_cluster_is_read_back_whole(config: ClusterConfig) -> None:
    config.save()
    assert cluster_config.load("default", config.data_dir) == config
    assert cluster_config.load("default") == config, "the link finds it by name"


def test_a_runtime_that_cannot_make_containers_here_is_found_out_with_its_own_words(tmp_path: Path) -> None:
    """A program in crun's place; what Debian's crun says depends on the machine."""
    program = tmp_path / "crun"
    program.write_text("#!/bin/sh\n[ \"$3\" = create ] && { echo 'some words' >&2; echo 'cgroups in hybrid mode not supported' >&2; exit 1; }\nexit 0\n")
    program.chmod(0o755)
    assert probe(str(program)) == "cgroups in hybrid mode not supported"


@pytest.mark.root
def test_runc_makes_a_container_here_and_leaves_nothing() -> None:
    assert probe("runc") == ""
    assert not list(Path("/sys/fs/cgroup").glob("**/knarr-probe-*"))
