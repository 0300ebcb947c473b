"""SELinux warnings: pods that share a volume, but not its label or how it is labelled, are told before a node refuses one of them.

Off by default, as upstream's: who switches it on says that the nodes have SELinux. Only volumes that can be mounted with a label
are looked at, for all others are labelled file by file and nothing conflicts: persistent volumes of CSI drivers that say so, of
Fibre Channel and of iSCSI.
Source: pkg/controller/volume/selinuxwarning, pkg/volume/util/selinux.go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from knarr.api.resources import CSI_DRIVERS, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.client.informer import Informers
from knarr.controllers.context import Context, object_key
from knarr.controllers.volume.attachdetach import unique_name
from knarr.controllers.volume.binder import claims_of_pod

NAME = "selinux-warning-controller"
_GROUPS = ("containers", "initContainers", "ephemeralContainers")
_PARTS = ("user", "role", "type", "level")
_OUTCOME = "If both pods land on the same node, only one of them may access the volume."


class _Use(NamedTuple):
    """How a pod uses a volume."""

    label: str
    policy: str


class SELinuxWarningController:
    """Keys are pods, "namespace/name"."""

    def __init__(self, ctx: Context) -> None:
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._volumes = ctx.informer(PERSISTENT_VOLUMES)
        self._drivers = ctx.informer(CSI_DRIVERS)
        # The shared informer's pods have lost what this is about.
        self._own = Informers(ctx.client)
        self._pods = self._own.get(PODS, transform=_trim)
        self._recorder = ctx.recorder(NAME)
        self._used: dict[str, dict[str, _Use]] = {}
        """Volume to pods."""
        self._of_pod: dict[str, set[str]] = {}
        self.controller = Controller(NAME, self._reconcile, workers=1)
        self._pods.add_index("claims", claims_of_pod)
        self._pods.add_handler(self._pod_changed, lambda _, new: self._pod_changed(new), self._pod_changed)
        self._claims.add_handler(self._claim_changed, self._claim_updated, None)
        self._volumes.add_handler(self._volume_changed, self._volume_updated, None)
        self._drivers.add_handler(self._driver_changed, self._driver_updated, self._driver_changed)

    async def run(self) -> None:
        try:
            await self._own.start()
            await self.controller.run()
        finally:
            await self._own.close()

    # Events

    def _pod_changed(self, pod: Object) -> None:
        self.controller.queue.add(object_key(pod))

    def _claim_changed(self, claim: Object) -> None:
        for pod in self._pods.by_index("claims", object_key(claim)):
            self._pod_changed(pod)

    def _claim_updated(self, old: Object, new: Object) -> None:
        if old["spec"].get("volumeName") != new["spec"].get("volumeName"):
            self._claim_changed(new)

    def _volume_changed(self, volume: Object) -> None:
        reference = volume["spec"].get("claimRef") or {}
        for pod in self._pods.by_index("claims", f"{reference.get('namespace')}/{reference.get('name')}"):
            self._pod_changed(pod)

    def _volume_updated(self, old: Object, new: Object) -> None:
        before, after = ((volume["spec"].get("claimRef") or {}).get("uid") for volume in (old, new))
        if before != after:
            self._volume_changed(new)

    def _driver_changed(self, driver: Object) -> None:
        name = driver["metadata"]["name"]
        for volume in self._volumes.list():
            if (volume["spec"].get("csi") or {}).get("driver") == name:
                self._volume_changed(volume)

    def _driver_updated(self, old: Object, new: Object) -> None:
        if bool(old["spec"].get("seLinuxMount")) != bool(new["spec"].get("seLinuxMount")):
            self._driver_changed(new)

    # Work

    async def _reconcile(self, key: str) -> None:
        pod = self._pods.get_key(key)
        uses = dict(self._uses(pod)) if pod is not None else {}
        for gone in self._of_pod.pop(key, set()) - uses.keys():
            held = self._used[gone]
            del held[key]
            if not held:
                del self._used[gone]
        if not uses:
            return
        self._of_pod[key] = set(uses)
        for volume, use in uses.items():
            held = self._used.setdefault(volume, {})
            held[key] = use
            for other, theirs in held.items():
                if use.policy != theirs.policy:
                    self._tell("SELinuxChangePolicy", (key, use.policy), (other, theirs.policy))
                if conflict(use.label, theirs.label):
                    self._tell("SELinuxLabel", (key, use.label), (other, theirs.label))

    def _tell(self, what: str, one: tuple[str, str], other: tuple[str, str]) -> None:
        """Tell both pods."""
        for (key, value), (their_key, their_value) in ((one, other), (other, one)):
            pod = self._pods.get_key(key)
            if pod is None:
                continue
            namespace, _, name = their_key.partition("/")
            if namespace == pod["metadata"]["namespace"]:
                text = f'{what} "{value}" conflicts with pod {name} that uses the same volume as this pod with {what} "{their_value}". {_OUTCOME}'
            else:
                # Who it is in another namespace is not for these eyes.
                text = f'{what}"{value}" conflicts with another pod that uses the same volume as this pod with a different {what}. {_OUTCOME}'
            self._recorder.event(pod, "Normal", f"{what}Conflict", text)

    def _uses(self, pod: Object) -> Iterator[tuple[str, _Use]]:
        meta, spec = pod["metadata"], pod["spec"]
        policy = (spec.get("securityContext") or {}).get("seLinuxChangePolicy") or "MountOption"
        mounted = _labels(spec)
        for entry in spec.get("volumes") or ():
            if entry["name"] not in mounted:
                continue
            claim = self._claims.get(meta["namespace"], _claim_name(meta["name"], entry))
            volume = self._volumes.get(None, claim["spec"].get("volumeName") or "") if claim is not None else None
            if volume is None:
                continue
            labels = mounted[entry["name"]]
            if len(labels) > 1:
                text = f'Volume "{entry["name"]}" is mounted twice with different SELinux labels inside this pod'
                self._recorder.event(pod, "Warning", "MultipleSELinuxLabels", text)
                continue
            if self._mounts_with_label(volume):
                label = "" if policy == "Recursive" else next(iter(labels), "")
                yield _volume_key(volume), _Use(label, policy)

    def _mounts_with_label(self, volume: Object) -> bool:
        csi = volume["spec"].get("csi")
        if csi is None:
            return "fc" in volume["spec"] or "iscsi" in volume["spec"]
        driver = self._drivers.get(None, csi["driver"])
        return driver is not None and bool(driver["spec"].get("seLinuxMount"))


def conflict(one: str, other: str) -> bool:
    """Whether two labels, user:role:type:level, cannot be the same once a node has filled in what is left out; it leaves the level alone."""
    left, right = ([*label.split(":", 3), "", "", ""][:4] for label in (one, other))
    if left[3] != right[3]:
        return True
    return any(a != b and a and b for a, b in zip(left[:3], right[:3], strict=True))


def _labels(spec: Object) -> dict[str, set[str]]:
    """The labels that a pod's containers want, by volume mounted."""
    of_pod = (spec.get("securityContext") or {}).get("seLinuxOptions")
    found: dict[str, set[str]] = {}
    for group in _GROUPS:
        for container in spec.get(group) or ():
            options = (container.get("securityContext") or {}).get("seLinuxOptions") or of_pod
            for mount in container.get("volumeMounts") or ():
                labels = found.setdefault(mount["name"], set())
                if options is not None:
                    label = ":".join(options.get(part) or "" for part in _PARTS)
                    labels.add("" if label == ":::" else label)
    return found


def _claim_name(pod: str, volume: Object) -> str:
    if "ephemeral" in volume:
        return f"{pod}-{volume['name']}"
    name: str = (volume.get("persistentVolumeClaim") or {}).get("claimName") or ""
    return name


def _volume_key(volume: Object) -> str:
    return unique_name(volume) if volume["spec"].get("csi") else str(volume["metadata"]["name"])


def _trim(pod: Object) -> Object:
    meta, spec = pod["metadata"], pod["spec"]
    kept: Object = {key: spec[key] for key in ("volumes", "securityContext") if key in spec}
    for group in _GROUPS:
        if group in spec:
            kept[group] = [{key: one[key] for key in ("name", "securityContext", "volumeMounts") if key in one} for one in spec[group]]
    names = {key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion") if key in meta}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": names, "spec": kept}
