"""`kubectl cp` from a pod that answers with an archive made to write elsewhere."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, wait_for

pytestmark = pytest.mark.root

POD = """
apiVersion: v1
kind: Pod
metadata: {name: liar}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: dockercoins/rng:v0.1
    imagePullPolicy: Never
    command: [python3, -c, "import time; time.sleep(1000)"]
    env: [{name: PATH, value: "/evil:/usr/local/bin:/usr/bin:/bin"}]
    volumeMounts: [{name: v, mountPath: /evil}]
  volumes: [{name: v, emptyDir: {}}]
"""
TAR = "#!/usr/bin/python3\nimport shutil, sys\nshutil.copyfileobj(open('/evil/archive', 'rb'), sys.stdout.buffer)\n"


def archive(outside: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:

        def add(name: str, data: bytes = b"", link: str = "", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.linkname, info.type = len(data), link, tarfile.SYMTYPE if link and kind == tarfile.REGTYPE else kind
            out.addfile(info, io.BytesIO(data))

        add("data/good", b"fine")
        for name in (f"data/../../{outside.name}/dots", f"data/..//../{outside.name}/dots2"):
            add(name, b"planted")
        add("data/link", link=str(outside))
        add("data/link/through", b"planted")
        add("data/up", link=f"../../{outside.name}")
        add("data/up/through", b"planted")
        add("data/hard", link=str(outside / "kept"), kind=tarfile.LNKTYPE)
        add("data/last", b"fine")
        for name in (f"../../{outside.name}/dots3", f"{outside}/absolute"):
            add(name, b"planted")
    return buffer.getvalue()


def test_a_pod_cannot_write_outside_of_the_folder_that_its_files_are_copied_to(cluster: Cluster, tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    cluster.kubectl("apply", "-f", "-", stdin=POD)
    try:
        wait_for("the pod", lambda: cluster.get("pod", "liar")["status"].get("phase") == "Running")
        for name, content in (("archive", archive(outside)), ("tar", TAR.encode())):
            program = f"import base64, os, sys; open('/evil/{name}', 'wb').write(base64.b64decode(sys.stdin.read())); os.chmod('/evil/{name}', 0o755)"
            cluster.kubectl("exec", "-i", "liar", "--", "python3", "-c", program, stdin=base64.b64encode(content).decode())
        cluster.kubectl("cp", "liar:/data", str(target), check=False)
        assert (target / "good").read_text() == (target / "last").read_text() == "fine"
        assert [item.name for item in outside.iterdir()] == ["kept"]
        assert (outside / "kept").read_text() == "kept"
        assert sorted(item.name for item in tmp_path.iterdir()) == ["outside", "target"]
    finally:
        cluster.kubectl("delete", "pod", "liar", "--force", "--grace-period=0", "--ignore-not-found")
