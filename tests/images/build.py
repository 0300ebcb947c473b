"""Small images for tests, from static binaries of Debian: no registry, no network.

`busybox()` has every busybox applet, with bash as `sh` (as the recorded runs had); `pause()` is a program that only waits.
Archives are cached per content of the binaries. Run as a program to write them to a folder:
`python -m tests.images.build DIRECTORY`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.images import oci
from tests.images.debian import cache_folder

BUSYBOX, BASH = Path("/usr/bin/busybox"), Path("/usr/bin/bash-static")
_VERSION = "3"


def _cached(name: str, sources: list[Path], make: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(_VERSION.encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = cache_folder() / f"{name}-{digest.hexdigest()[:16]}.tar"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.new")
        make(temporary)
        temporary.replace(path)
    return path


def busybox_root(folder: Path, shell: str = "bash") -> None:
    """Fill a folder with a root file system: busybox, bash (or busybox) as sh, users root, nobody and `test` (uid 1000, groups 2000 and 3000)."""
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "root", "home/test", "var", "usr/bin", "usr/sbin", "sbin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, folder / "bin/busybox")
    shutil.copy(BASH, folder / "bin/bash")
    (folder / "bin/bash").chmod(0o755)
    for applet in subprocess.run([str(BUSYBOX), "--list"], check=True, capture_output=True, text=True).stdout.split():
        link = folder / "bin" / applet
        if not link.is_symlink() and not link.exists():
            link.symlink_to(shell if applet == "sh" else "busybox")
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\ntest:x:1000:1000::/home/test:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    (folder / "etc/group").write_text("root:x:0:\ntest:x:1000:\nextra:x:2000:test\nmore:x:3000:test,root\nnobody:x:65534:\n")
    # A setuid copy shows whether no_new_privs and the unpacker's modes are right.
    shutil.copy(BASH, folder / "usr/bin/suid-bash")
    (folder / "usr/bin/suid-bash").chmod(0o4755)


def busybox(names: tuple[str, ...] = ("docker.io/library/busybox:latest",), shell: str = "bash") -> Path:
    """Path of an archive with the busybox image; `shell` is what its sh is."""

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            busybox_root(Path(folder), shell)
            os.chmod(folder, 0o755)
            layer = oci.layer_from_folder(Path(folder))
        oci.write_archive(path, [(names, [layer], oci.ImageConfig(cmd=["sh"]))])

    return _cached("busybox-" + hashlib.sha256(repr((names, shell)).encode()).hexdigest()[:8], [BUSYBOX, BASH], make)


def pause(names: tuple[str, ...] = ("registry.k8s.io/pause:3.10.1",)) -> Path:
    """Path of an archive with an image that only waits, and ends on SIGTERM."""

    def make(path: Path) -> None:
        script = b"#!/bin/busybox sh\ntrap 'exit 0' TERM INT\nwhile :; do /bin/busybox sleep 3600 & wait $!; done\n"
        layer = oci.layer_from_files({"bin/busybox": (BUSYBOX.read_bytes(), 0o755), "pause": (script, 0o755)})
        oci.write_archive(path, [(names, [layer], oci.ImageConfig(entrypoint=["/pause"]))])

    return _cached("pause-" + hashlib.sha256(repr(names).encode()).hexdigest()[:8], [BUSYBOX], make)


_TEST_SERVER = b"""#!/bin/bash
port=8080 delay=0 mode=$1
for word; do case $word in --http-port=*) port=${word#*=};; --delay-shutdown=*) delay=${word#*=};; esac; done
case $mode in
pause) trap 'exit 2' TERM; while :; do sleep 3600 & wait $!; done;;
grpc-health-checking) port=5000 answer=/answer-grpc;;
*) answer=/answer;;
esac
[ $mode = liveness ] && date +%s >/started
trap '[ $delay = 0 ] && exit 2; sleep $delay; exit 0' TERM
nc -ll -p $port -e $answer &
while :; do wait $!; done
"""
_ANSWER = b"""#!/bin/bash
read -r _ path _
while read -r line && [ "${line%?}" ]; do :; done
status="200 OK"
case $path in
/echo?code=404*) status="404 Not Found";;
/redirect*) status="302 Found"; extra=$'Location: /\\r\\n';;
/healthz) [ $(($(date +%s) - $(cat /started))) -gt 10 ] && status="500 Internal Server Error";;
esac
printf 'HTTP/1.1 %s\\r\\n%bContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n' "$status" "$extra"
"""
_ANSWER_GRPC = b"""#!/bin/bash
head -c 100 >/dev/null
printf '\\0\\0\\0\\4\\0\\0\\0\\0\\0'
printf '\\0\\0\\1\\1\\4\\0\\0\\0\\1\\x88'
printf '\\0\\0\\7\\0\\0\\0\\0\\0\\1\\0\\0\\0\\0\\2\\x08\\1'
printf '\\0\\0\\17\\1\\5\\0\\0\\0\\1\\0\\13grpc-status\\0010'
cat >/dev/null
"""


def test_server(names: tuple[str, ...]) -> Path:
    """Path of an archive with a stand-in for upstream's test server: as much of netexec, liveness, pause and grpc-health-checking as probes ask for."""

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            busybox_root(folder)
            for program, text in (("server", _TEST_SERVER), ("answer", _ANSWER), ("answer-grpc", _ANSWER_GRPC)):
                (folder / program).write_bytes(text)
                (folder / program).chmod(0o755)
            os.chmod(folder, 0o755)
            layer = oci.layer_from_folder(folder)
        oci.write_archive(path, [(names, [layer], oci.ImageConfig(entrypoint=["/server"], cmd=["pause"]))])

    key = hashlib.sha256(b"".join((repr(names).encode(), _TEST_SERVER, _ANSWER, _ANSWER_GRPC))).hexdigest()[:8]
    return _cached(f"test-server-{key}", [BUSYBOX, BASH], make)


def nonroot(names: tuple[str, ...]) -> Path:
    """Path of an archive with an image of a user of its own, whose program ends well."""

    def make(path: Path) -> None:
        layer = oci.layer_from_files({"bin/true": (BUSYBOX.read_bytes(), 0o755)})
        oci.write_archive(path, [(names, [layer], oci.ImageConfig(entrypoint=["/bin/true"], user="1234"))])

    return _cached("nonroot-" + hashlib.sha256(repr(names).encode()).hexdigest()[:8], [BUSYBOX], make)


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for archive in (busybox(), pause()):
        shutil.copy(archive, target / archive.name)
        print(target / archive.name)


if __name__ == "__main__":
    main()
