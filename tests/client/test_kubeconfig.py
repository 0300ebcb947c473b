"""Kubeconfig files: other people's entries stay, ours go again."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from knarr.client import kubeconfig
from knarr.client.config import ClientConfig

_OTHER = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "other", "cluster": {"server": "https://other", "certificate-authority": "ca.crt", "x": 1}}],
    "users": [{"name": "other", "user": {"token": "t"}}],
    "contexts": [{"name": "other", "context": {"cluster": "other", "user": "other"}}],
    "current-context": "other",
    "extensions": [{"name": "kept"}],
}
_CLUSTER = {"server": "https://127.0.0.1:6443"}


def _write(path: Path, content: object) -> None:
    path.write_text(yaml.safe_dump(content))


def test_adding_and_removing_a_context_leaves_the_rest_untouched(tmp_path: Path) -> None:
    path = tmp_path / "config"
    _write(path, _OTHER)
    kubeconfig.merge_context("ours", _CLUSTER, {"token": "x"}, path=path)
    merged = kubeconfig.load_file(path)
    assert merged["current-context"] == "ours"
    assert kubeconfig.entry(merged, "clusters", "ours") == _CLUSTER
    assert kubeconfig.remove_context("ours", path=path) == [path]
    assert yaml.safe_load(path.read_text()) == {**_OTHER, "current-context": ""}
    assert kubeconfig.remove_context("ours", path=path) == []


def test_file_is_made_private_and_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "real", tmp_path / "link"
    link.symlink_to(target)
    kubeconfig.merge_context("a", _CLUSTER, {}, path=link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [item.name for item in target.parent.iterdir()] == ["real"]


def test_namespace_chosen_by_the_user_survives(tmp_path: Path) -> None:
    path = tmp_path / "config"
    kubeconfig.merge_context("a", _CLUSTER, {}, path=path, namespace="mine")
    kubeconfig.merge_context("a", _CLUSTER, {}, path=path)
    assert kubeconfig.entry(kubeconfig.load_file(path), "contexts", "a")["namespace"] == "mine"


def test_several_files_are_merged_and_each_entry_is_written_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, missing = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    _write(first, _OTHER)
    _write(second, {"clusters": [{"name": "other", "cluster": {"server": "https://shadowed"}}], "contexts": [], "current-context": "z"})
    kubeconfig.merge_context("ours", _CLUSTER, {}, path=second, set_current=False)
    monkeypatch.setenv("KUBECONFIG", f"{first}:{second}:{missing}:{first}")
    merged = kubeconfig.load()
    assert kubeconfig.entry(merged, "clusters", "other")["server"] == "https://other"
    assert merged["current-context"] == "other"
    assert kubeconfig.file_of("contexts", "ours") == second
    assert kubeconfig.file_of("contexts", "new") == second
    assert kubeconfig.remove_context("ours") == [second]


def test_relative_file_names_are_relative_to_their_file(tmp_path: Path) -> None:
    _write(tmp_path / "config", _OTHER)
    (tmp_path / "ca.crt").write_bytes(b"CA")
    config = ClientConfig.from_kubeconfig(tmp_path / "config")
    assert (config.ca_data, config.token, config.namespace) == (b"CA", "t", "default")


@pytest.mark.parametrize("content", ["- a list", "a: [unclosed", "\x00"])
def test_bad_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad").write_text(content)
    with pytest.raises(kubeconfig.KubeconfigError, match="bad"):
        kubeconfig.load_file(tmp_path / "bad")


def test_missing_context_is_an_error() -> None:
    with pytest.raises(kubeconfig.KubeconfigError, match="'no' does not exist"):
        ClientConfig.from_kubeconfig_dict(_OTHER, "no")
    with pytest.raises(kubeconfig.KubeconfigError, match="no current context"):
        ClientConfig.from_kubeconfig_dict(kubeconfig.empty())
