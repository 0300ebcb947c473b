"""Root file systems from Debian packages, without running any of their scripts: downloaded once, unpacked, cached.

The cache is a folder of this machine (KNARR_TEST_CACHE, or ~/.cache/knarr-tests); a key of the package list names the result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

# Needed by package scripts or administration only; a container that runs one program does without them.
LEAVE_OUT = {
    "adduser", "cdebconf", "debconf", "debconf-2.0", "dpkg", "install-info", "perl", "perl-base", "perl-modules-5.36", "perl-modules-5.40", "libperl5.36", "libperl5.40",
    "passwd", "tar", "usr-is-merged", "usrmerge", "sysvinit-utils", "init-system-helpers", "lsb-base", "libpam-modules", "libpam-modules-bin", "libpam0g", "libpam-runtime",
    "libdb5.3", "libdb5.3t64", "libelogind0", "libfile-find-rule-perl", "libnumber-compare-perl", "libtext-glob-perl", "libnewt0.52", "libslang2", "libtextwrap1",
    "libdebian-installer4", "libsemanage2", "libsemanage-common", "libsepol2", "libaudit1", "libaudit-common", "libgdbm6", "libgdbm-compat4", "media-types", "mime-support",
}  # fmt: skip


def cache_folder() -> Path:
    """Where downloads and finished archives are kept between runs."""
    folder = Path(os.environ.get("KNARR_TEST_CACHE") or Path.home() / ".cache" / "knarr-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def closure(packages: Sequence[str]) -> list[str]:
    """The packages and what they depend on, without what only their scripts need."""
    options = ["--recurse", *(f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"))]
    answer = subprocess.run(["apt-cache", "depends", *options, *packages], check=True, capture_output=True, text=True).stdout
    names = {line.strip() for line in answer.splitlines() if line and not line[0].isspace() and "<" not in line}
    return sorted((names - LEAVE_OUT) | set(packages))


def root_file_system(packages: Sequence[str], strip: Sequence[str] = ()) -> Path:
    """A folder with the unpacked packages, made once per list.

    Args:
      strip: glob patterns below the root that are removed, e.g. documentation.
    """
    key = hashlib.sha256("\n".join([*packages, "--", *strip]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"rootfs-{key}"
    if folder.is_dir():
        return folder
    downloads = cache_folder() / "debs"
    downloads.mkdir(exist_ok=True)
    if subprocess.run(["apt-cache", "show", packages[0]], capture_output=True).returncode != 0:
        subprocess.run(["apt-get", "update"], check=True, capture_output=True)
    names = closure(packages)
    # The sandbox user of apt cannot write here, and there is nothing to protect: the files are verified by apt itself.
    subprocess.run(["apt-get", "-o", "APT::Sandbox::User=root", "download", *names], check=True, capture_output=True, cwd=downloads)
    work = folder.with_name(folder.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    for name in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "tmp", "proc", "sys", "dev", "run", "root", "var/tmp"):
        (work / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (work / name).symlink_to(f"usr/{name}")
    for name in names:
        for package in downloads.glob(f"{name}_*.deb"):
            # Through tar and not dpkg-deb -x, because that would replace the /lib symlinks by folders.
            files = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=subprocess.PIPE).stdout
            subprocess.run(["tar", "-C", str(work), "--keep-directory-symlink", "-xf", "-"], input=files, check=True)
    for pattern in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "var/lib/dpkg", *strip):
        for path in work.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (work / "tmp").chmod(0o1777)
    (work / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n")
    (work / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (work / "etc/nsswitch.conf").write_text("hosts: files dns\n")
    work.rename(folder)
    return folder
