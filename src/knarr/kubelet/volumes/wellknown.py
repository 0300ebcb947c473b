"""/var/lib/kubelet: what the world believes a kubelet's folder to be, and the folder that a node really has.

Manifests of CSI drivers and plugins mount folders below /var/lib/kubelet of their node, and drivers mount volumes there for the kubelet and its
pods. Several nodes may live on one machine, beside a kubelet of somebody else, so each has a root of its own elsewhere. Here one is led to
the other: host paths of pods and endpoints of plugins to the node's own root (`own`), and paths that a plugin is told back to where its
container sees them (`known`).
Callers: volumes (host paths, CSI), plugins (endpoints), kubelet (`share`). Pure but for `share`.
"""

from __future__ import annotations

import os
import posixpath

from knarr.aiokits.log import get_logger
from knarr.kubelet.volumes import mounts

log = get_logger(__name__)

ROOT = "/var/lib/kubelet"


def is_known(path: str) -> bool:
    """Whether a path is spelled as below the folder that the world believes in."""
    clean = posixpath.normpath(path)
    return clean == ROOT or clean.startswith(ROOT + "/")


def own(root: str, path: str) -> str:
    """A path as pods and plugins of this node spell it, on this machine; other paths stay as they are. `root` is the kubelet's."""
    return _moved(path, ROOT, root) if is_known(path) else path


def known(root: str, path: str) -> str:
    """The reverse of `own`."""
    root = root.rstrip("/")
    return _moved(path, root, ROOT) if path == root or path.startswith(root + "/") else path


def _moved(path: str, old: str, new: str) -> str:
    return new.rstrip("/") + posixpath.normpath(path)[len(old) :]


def share(root: str) -> bool:
    """Make a kubelet's root a shared mount of its own, so that what containers mount below it is seen by the kubelet and by other containers.

    True when it was not one yet: nothing that an earlier start has mounted below it is left. Idempotent. A root with mounts below it that is no mount itself stays as it is: they would be hidden. Source: pkg/util/mount MakeRShared.

    Raises:
      OSError: the kernel refused.
    """
    real = os.path.realpath(root)
    points = mounts.mount_points(real)
    if real not in points:
        if points:
            log.warning("folder of the kubelet not made a shared mount: it has mounts of an earlier start; they end with their pods", folder=real)
            return False
        mounts.bind(real, real)
    mounts.mount("", real, "", mounts.MS_SHARED | mounts.MS_REC)
    return real not in points
