"""Dynamic resources on this node: drivers prepare the claims of a pod before it starts, and take them back after its end.

Callers: kubelet (`run`), watcher (register, deregister), pod_sync (prepare before the sandbox), pod_start (devices of a container),
pod_stop (unprepare once no container runs), all through Node. What is prepared for whom is kept in a check-point, so that a
restarted kubelet neither prepares twice nor forgets to take back. Invariants: a claim is in the check-point before its drivers
are asked; it leaves it after all of them have taken it back.
Source: pkg/kubelet/cm/dra; kubelet dra/v1 and dra/v1beta1 api.proto.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.resources import RESOURCE_CLAIMS, RESOURCE_SLICES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import podutil
from knarr.kubelet.faults import UNREACHABLE
from knarr.kubelet.plugins.wire import Message, Plugin, PluginError

log = get_logger(__name__)

_CHECKPOINT = "dra_manager_state"
_SERVICES = {
    "v1.DRAPlugin": "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/",
    "v1beta1.DRAPlugin": "/k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/",
}
"""What drivers may name at registration, newest first, and how it is called."""
_CALL_SECONDS = 45.0
_WIPE_SECONDS = 30.0
_RECONCILE_SECONDS = 60.0
_RETRY_SECONDS = (1.0, 300.0)


class ClaimError(Exception):
    """A claim cannot be prepared or taken back now; the message is for the pod's event."""


@dataclass(slots=True)
class _Driver:
    endpoint: str
    service: str
    plugin: Plugin


@dataclass(slots=True)
class _Prepared:
    """One claim on this node."""

    uid: str
    namespace: str
    name: str
    drivers: dict[str, list[Message]]
    """By driver, the devices that it has prepared."""
    pods: list[str] = field(default_factory=list)
    prepared: bool = False

    def message(self) -> Message:
        return {"namespace": self.namespace, "uid": self.uid, "name": self.name}


def claim_names(pod: Object) -> dict[str, tuple[str, bool]]:
    """By name within the pod: (name of the ResourceClaim, whether the pod must own it). Raises ClaimError."""
    made = {s["name"]: s.get("resourceClaimName") for s in (pod.get("status") or {}).get("resourceClaimStatuses") or ()}
    found: dict[str, tuple[str, bool]] = {}
    for entry in pod["spec"].get("resourceClaims") or ():
        if entry.get("resourceClaimName"):
            found[entry["name"]] = (entry["resourceClaimName"], False)
        elif entry["name"] not in made:
            metadata = pod["metadata"]
            raise ClaimError(f'pod "{metadata["namespace"]}/{metadata["name"]}": ResourceClaim not created yet')
        elif made[entry["name"]]:
            found[entry["name"]] = (made[entry["name"]], True)
    return found


class DynamicResources:
    """See the module.

    Args:
      folder: where the check-point is kept.
      active: uids of the pods that may still use their claims.
    """

    def __init__(self, folder: str, client: Client, node_name: str, active: Callable[[], Iterable[str]]) -> None:
        self._folder = folder
        self._client = client
        self._node_name = node_name
        self._active = active
        self._drivers: dict[str, list[_Driver]] = {}
        self._claims: dict[tuple[str, str], _Prepared] = {}
        self._wipes: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()
        self._lock = asyncio.Lock()
        self._load()

    # --- check-point ---

    def _load(self) -> None:
        try:
            with open(os.path.join(self._folder, _CHECKPOINT), "rb") as file:
                for entry in orjson.loads(file.read())["claims"]:
                    self._claims[entry["namespace"], entry["name"]] = _Prepared(**entry)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.error("state of dynamic resources is not readable: claims will be prepared anew", error=repr(e))

    def _save(self) -> None:
        os.makedirs(self._folder, 0o750, exist_ok=True)
        path = os.path.join(self._folder, _CHECKPOINT)
        document = [
            {"uid": c.uid, "namespace": c.namespace, "name": c.name, "drivers": c.drivers, "pods": c.pods, "prepared": c.prepared}
            for c in self._claims.values()
        ]
        with open(path + ".new", "wb") as file:
            file.write(orjson.dumps({"version": 1, "claims": document}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)

    # --- drivers ---

    async def run(self, ready: asyncio.Event) -> None:
        """Take back what pods left that are gone. Eternal; waits for `ready` (the pods are known) first."""
        try:
            # No driver has registered yet: devices that nobody may be able to prepare are not to be offered.
            self._tasks.spawn(self._wipe(None), "wipe-resource-slices")
            await ready.wait()
            while True:
                await self._reconcile()
                await asyncio.sleep(_RECONCILE_SECONDS)
        finally:
            await self._tasks.close()
            for drivers in self._drivers.values():
                for driver in drivers:
                    await driver.plugin.close()

    async def register(self, name: str, endpoint: str, versions: list[str], *, known_root: bool = False) -> None:
        """A driver's plugin appeared in the registration folder. Raises PluginError."""
        service = next((path for version, path in _SERVICES.items() if version in versions), None)
        if service is None:
            offered = ", ".join(versions)
            raise PluginError(
                f"invalid supported gRPC versions of DRA driver plugin {name} at endpoint {endpoint}: none of {offered} is supported"
            )
        await self._forget(name, endpoint)
        self._drivers.setdefault(name, []).append(_Driver(endpoint, service, Plugin(endpoint)))
        wipe = self._wipes.pop(name, None)
        if wipe is not None:
            wipe.cancel()

    async def deregister(self, name: str, endpoint: str = "") -> None:
        """A plugin is gone; its node's devices are taken off offer unless one comes back soon."""
        await self._forget(name, endpoint)
        if not self._drivers.get(name):
            self._drivers.pop(name, None)
            self._wipes[name] = self._tasks.spawn(self._wipe(name), f"wipe-{name}")

    async def _forget(self, name: str, endpoint: str) -> None:
        for driver in [d for d in self._drivers.get(name, ()) if d.endpoint == endpoint or not endpoint]:
            self._drivers[name].remove(driver)
            await driver.plugin.close()

    async def _wipe(self, driver: str | None) -> None:
        if driver is not None:
            await asyncio.sleep(_WIPE_SECONDS)
        selector = f"spec.nodeName={self._node_name}" + (f",spec.driver={driver}" if driver else "")
        delay, longest = _RETRY_SECONDS
        while True:
            try:
                await self._client.delete_collection(RESOURCE_SLICES, field_selector=selector)
                return
            except (errors.StatusError, *UNREACHABLE) as e:
                log.info("resource slices not deleted, will retry", selector=selector, error=str(e))
            await asyncio.sleep(delay)
            delay = min(2 * delay, longest)

    def _driver(self, name: str) -> _Driver:
        drivers = self._drivers.get(name)
        if not drivers:
            raise ClaimError(f"DRA driver {name} is not registered")
        # The last one to register is most likely the newest.
        return drivers[-1]

    # --- pods ---

    async def prepare(self, pod: Object) -> None:
        """Have the pod's claims prepared, those that are not yet. Raises ClaimError."""
        if not pod["spec"].get("resourceClaims"):
            return
        async with self._lock:
            claims = [await self._fetch(pod, name, own) for name, own in claim_names(pod).values()]
            # Nothing is noted before all of it can be expected to work: a pod that never got here can be deleted freely.
            for claim in claims:
                for driver in claim.drivers:
                    self._driver(driver)
            wanted = [self._note(claim, podutil.uid(pod)) for claim in claims]
            self._save()
            await self._call_prepare([claim for claim in wanted if not claim.prepared])

    async def _fetch(self, pod: Object, name: str, own: bool) -> _Prepared:
        namespace, uid = pod["metadata"]["namespace"], podutil.uid(pod)
        try:
            claim = await self._client.get(RESOURCE_CLAIMS, name, namespace)
        except (errors.StatusError, *UNREACHABLE) as e:
            raise ClaimError(f"fetch ResourceClaim {name}: {e}") from e
        metadata, status = claim["metadata"], claim.get("status") or {}
        if own and not any(o.get("controller") and o["uid"] == uid for o in metadata.get("ownerReferences") or ()):
            pod_name = f"{namespace}/{pod['metadata']['name']}"
            raise ClaimError(f"ResourceClaim {namespace}/{name} was not created for pod {pod_name} (pod is not owner)")
        if not any(user["uid"] == uid for user in status.get("reservedFor") or ()):
            raise ClaimError(f"pod {pod['metadata']['name']} ({uid}) is not allowed to use ResourceClaim {name} ({metadata['uid']})")
        if not status.get("allocation"):
            raise ClaimError(f"ResourceClaim {name}: not allocated")
        results = (status["allocation"].get("devices") or {}).get("results") or ()
        return _Prepared(metadata["uid"], namespace, name, {result["driver"]: [] for result in results})

    def _note(self, claim: _Prepared, pod_uid: str) -> _Prepared:
        known = self._claims.setdefault((claim.namespace, claim.name), claim)
        if known.uid != claim.uid:
            raise ClaimError(
                f"old ResourceClaim with same name {claim.name} and different UID {known.uid} still exists (previous pod force-deleted?!)"
            )
        if pod_uid not in known.pods:
            known.pods.append(pod_uid)
        return known

    async def _call_prepare(self, claims: list[_Prepared]) -> None:
        if not claims:
            return
        for name in sorted({driver for claim in claims for driver in claim.drivers}):
            batch = [claim for claim in claims if name in claim.drivers]
            answers = await self._call(name, "NodePrepareResources", batch)
            for claim in batch:
                claim.drivers[name] = answers[claim.uid].get("devices") or []
        for claim in claims:
            claim.prepared = True
        self._save()

    async def _call(self, name: str, method: str, claims: list[_Prepared]) -> dict[str, Message]:
        """One call for several claims; gives the answers by uid. Raises ClaimError: for one of them it failed."""
        driver = self._driver(name)
        request = {"claims": [claim.message() for claim in claims]}
        try:
            answer = await driver.plugin.call(driver.service + method, method + "Request", request, method + "Response", _CALL_SECONDS)
        except (PluginError, ValueError) as e:
            raise ClaimError(f"{method}: {e}") from e
        answers: dict[str, Message] = answer.get("claims") or {}
        names = {claim.uid: claim.name for claim in claims}
        for uid, result in answers.items():
            if uid not in names:
                raise ClaimError(f"{method} returned result for unknown claim UID {uid}")
            if result.get("error"):
                raise ClaimError(f"{method} failed for ResourceClaim {names[uid]}: {result['error']}")
        if len(answers) < len(claims):
            raise ClaimError(f"{method} skipped {len(claims) - len(answers)} ResourceClaims")
        return answers

    def cdi_devices(self, pod: Object, container: Object) -> list[str]:
        """Names of the devices that a container asks for. Raises ClaimError."""
        asked = (container.get("resources") or {}).get("claims") or ()
        if not asked:
            return []
        names = claim_names(pod)
        found: list[str] = []
        for reference in asked:
            if reference["name"] not in names:
                continue
            claim = self._claims.get((pod["metadata"]["namespace"], names[reference["name"]][0]))
            if claim is None:
                raise ClaimError(f"unable to get claim info for ResourceClaim {names[reference['name']][0]}")
            request = reference.get("request")
            for device in (device for devices in claim.drivers.values() for device in devices):
                of = [name.partition("/")[0] for name in device.get("request_names") or ()]
                if not request or not of or request in of:
                    found += device.get("cdi_device_ids") or []
        return list(dict.fromkeys(found))

    def needs_unprepare(self, pod_uid: str) -> bool:
        return any(pod_uid in claim.pods for claim in self._claims.values())

    async def unprepare(self, pod_uid: str) -> None:
        """Take back what was prepared for a pod none of whose containers runs; may be called again. Raises ClaimError."""
        if not self.needs_unprepare(pod_uid):
            return
        async with self._lock:
            mine = [claim for claim in self._claims.values() if pod_uid in claim.pods]
            last = [claim for claim in mine if len(claim.pods) == 1]
            for name in sorted({driver for claim in last for driver in claim.drivers}):
                await self._call(name, "NodeUnprepareResources", [claim for claim in last if name in claim.drivers])
            for claim in mine:
                claim.pods.remove(pod_uid)
                if not claim.pods:
                    del self._claims[claim.namespace, claim.name]
            self._save()

    async def _reconcile(self) -> None:
        active = set(self._active())
        for uid in {uid for claim in self._claims.values() for uid in claim.pods} - active:
            try:
                await self.unprepare(uid)
            except ClaimError as e:
                log.info("claims of a pod that is gone not taken back, will retry", pod_uid=uid, error=str(e))

    def metrics(self) -> dict[str, int]:
        """Claims in use on this node, by driver."""
        counts: dict[str, int] = {}
        for claim in self._claims.values():
            for driver in claim.drivers:
                counts[driver] = counts.get(driver, 0) + 1
        return {f'kubelet_dra_resource_claims_in_use{{driver_name="{name}"}}': number for name, number in counts.items()}
