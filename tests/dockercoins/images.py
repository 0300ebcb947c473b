"""The five images of the DockerCoins application, made from Debian packages and the small services of this folder.

`python -m tests.dockercoins.images` prints the path of one OCI archive with all of them, for `knarr image load`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.images import debian, oci

HERE = Path(__file__).parent
SERVICES = ("hasher", "rng", "webui", "worker")
STRIP = ("usr/lib/python3*/test", "usr/lib/python3*/idlelib", "usr/lib/python3*/lib2to3", "usr/lib/python3*/pydoc_data", "usr/share/python3", "usr/lib/systemd", "usr/lib/python3*/ensurepip")


def archive() -> Path:
    """The archive with dockercoins/{hasher,rng,webui,worker}:v0.1 and redis; made once per content of this folder."""
    key = hashlib.sha256(b"".join((HERE / f"{name}.py").read_bytes() for name in (*SERVICES, "images"))).hexdigest()[:12]
    path = debian.cache_folder() / f"dockercoins-{key}.tar"
    if path.exists():
        return path
    python = oci.layer_from_folder(debian.root_file_system(["python3-minimal", "python3", "libpython3-stdlib"], STRIP))
    images = []
    for name in SERVICES:
        program = oci.layer_from_files({f"app/{name}.py": ((HERE / f"{name}.py").read_bytes(), 0o644)})
        config = oci.ImageConfig(entrypoint=["/usr/bin/python3", "-u", f"/app/{name}.py"], ports=["80/tcp"])
        images.append(([f"dockercoins/{name}:v0.1"], [python, program], config))
    redis = oci.layer_from_folder(debian.root_file_system(["redis-server"], ("usr/lib/systemd", "usr/lib/x86_64-linux-gnu/perl*", "lib/systemd")))
    config = oci.ImageConfig(entrypoint=["/usr/bin/redis-server"], cmd=["--protected-mode", "no", "--save", ""], ports=["6379/tcp"])
    images.append((["redis:latest"], [redis], config))
    return oci.write_archive(path, images)


if __name__ == "__main__":
    print(archive())
