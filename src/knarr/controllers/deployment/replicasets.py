"""The writes of a rollout: making the new ReplicaSet, scaling sets, deleting old ones.

One `Rollout` object per reconcile holds the working copy of the Deployment, whose annotations and
conditions it may change before they are written with the status.
Source: pkg/controller/deployment/sync.go, rolling.go, recreate.go.
"""

from __future__ import annotations

from collections.abc import Sequence

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import DEPLOYMENTS, REPLICA_SETS
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informer
from knarr.client.rest import Client
from knarr.controllers.deployment import util
from knarr.controllers.hashing import template_hash

_NAME_CHARACTERS = 253


class Rollout:
    """One reconcile of one Deployment.

    Args:
      deployment: a copy of its own; changed in place.
      sets: the ReplicaSets it owns, from the cache.
    """

    def __init__(self, client: Client, recorder: EventRecorder, cache: Informer, deployment: Object, sets: Sequence[Object]) -> None:
        self.client = client
        self.recorder = recorder
        self.deployment = deployment
        self.sets = list(sets)
        self._cache = cache
        self.new: Object | None = None
        self.old: list[Object] = []

    @property
    def all(self) -> list[Object]:
        return [*self.old, *([self.new] if self.new is not None else [])]

    async def write_status(self) -> None:
        """Write status and annotations of the working copy; it becomes what the server answered."""
        updated = await self.client.update(DEPLOYMENTS, self.deployment, subresource="status")
        self.deployment["metadata"]["resourceVersion"] = updated["metadata"]["resourceVersion"]

    async def find_sets(self, create: bool) -> None:
        """Sort the sets into old and new, make the new one if asked, bring revisions up to date."""
        new = util.find_new(self.deployment, self.sets)
        self.old = [rs for rs in util.by_creation(self.sets) if new is None or rs["metadata"]["uid"] != new["metadata"]["uid"]]
        revision = util.max_revision(self.old) + 1
        if new is not None:
            self.new = await self._sync_existing(new, revision)
        elif create:
            self.new = await self._create(revision)

    async def _sync_existing(self, cached: Object, revision: int) -> Object:
        rs = meta.deep_copy(cached)
        min_ready = self.deployment["spec"].get("minReadySeconds") or 0
        changed = util.sync_annotations(self.deployment, rs, revision, True)
        if changed or (rs["spec"].get("minReadySeconds") or 0) != min_ready:
            rs["spec"]["minReadySeconds"] = min_ready
            return await self.client.update(REPLICA_SETS, rs)
        needs_update = self._set_revision(meta.annotations(rs).get(util.REVISION, ""))
        status = self.deployment.setdefault("status", {})
        if util.has_deadline(self.deployment) and util.get_condition(status, "Progressing") is None:
            message = f'Found new replica set "{rs["metadata"]["name"]}"'
            util.set_condition(status, util.new_condition("Progressing", "True", "FoundNewReplicaSet", message))
            needs_update = True
        if needs_update:
            await self.write_status()
        return rs  # type: ignore[no-any-return]

    def _set_revision(self, revision: str) -> bool:
        if meta.annotations(self.deployment).get(util.REVISION) == revision:
            return False
        meta.set_annotation(self.deployment, util.REVISION, revision)
        return True

    def _new_set(self, revision: int) -> Object:
        d = self.deployment
        template = meta.deep_copy(d["spec"]["template"])
        digest = template_hash(template, (d.get("status") or {}).get("collisionCount"))
        meta.set_label(template, util.HASH_LABEL, digest)
        selector = meta.deep_copy(d["spec"].get("selector") or {})
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), util.HASH_LABEL: digest}
        prefix = d["metadata"]["name"][: _NAME_CHARACTERS - 1 - len(digest)]
        rs: Object = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": f"{prefix}-{digest}",
                "namespace": d["metadata"]["namespace"],
                "ownerReferences": [meta.new_controller_ref(d, "apps/v1", "Deployment")],
                "labels": dict(template["metadata"]["labels"]),
            },
            "spec": {"replicas": 0, "selector": selector, "template": template},
        }
        if d["spec"].get("minReadySeconds"):
            rs["spec"]["minReadySeconds"] = d["spec"]["minReadySeconds"]
        rs["spec"]["replicas"] = util.new_set_replicas(d, [*self.old, rs], rs)
        util.sync_annotations(d, rs, revision, False)
        return rs

    async def _create(self, revision: int) -> Object:
        d, rs = self.deployment, self._new_set(revision)
        already_exists = False
        try:
            created = await self.client.create(REPLICA_SETS, rs)
        except StatusError as error:
            if errors.is_already_exists(error):
                created = await self._existing_twin(rs, error)
                already_exists = True
            else:
                if not errors.is_namespace_terminating(error):
                    await self._create_failed(rs, error)
                raise
        if not already_exists and rs["spec"]["replicas"] > 0:
            name, size = created["metadata"]["name"], rs["spec"]["replicas"]
            self.recorder.event(d, "Normal", "ScalingReplicaSet", f"Scaled up replica set {name} from 0 to {size}")
        needs_update = self._set_revision(str(revision))
        if not already_exists and util.has_deadline(d):
            message = f'Created new replica set "{created["metadata"]["name"]}"'
            condition = util.new_condition("Progressing", "True", "NewReplicaSetCreated", message)
            util.set_condition(d.setdefault("status", {}), condition)
            needs_update = True
        if needs_update:
            await self.write_status()
        return created

    async def _existing_twin(self, rs: Object, error: StatusError) -> Object:
        # Either the cache was stale and it is ours already, or two templates have one hash.
        meta_d = self.deployment["metadata"]
        twin = self._cache.get(meta_d["namespace"], rs["metadata"]["name"])
        if twin is None:
            raise error
        owner = meta.controller_of(twin)
        if (
            owner is not None
            and owner["uid"] == meta_d["uid"]
            and util.template_equal(self.deployment["spec"]["template"], twin["spec"]["template"])
        ):
            return twin
        status = self.deployment.setdefault("status", {})
        status["collisionCount"] = (status.get("collisionCount") or 0) + 1
        await self.write_status()
        raise error

    async def _create_failed(self, rs: Object, error: StatusError) -> None:
        message = f'Failed to create new replica set "{rs["metadata"]["name"]}": {error.message}'
        if util.has_deadline(self.deployment):
            condition = util.new_condition("Progressing", "False", "ReplicaSetCreateError", message)
            util.set_condition(self.deployment.setdefault("status", {}), condition)
            await self.write_status()
        self.recorder.event(self.deployment, "Warning", "ReplicaSetCreateError", message)

    # Scaling

    async def scale_to(self, rs: Object, size: int, *, always: bool = False) -> bool:
        """Scale one set; says whether its size changed.

        Args:
          always: write changed annotations even when the size stays.
        """
        before = util.replicas(rs)
        if before == size and not always:
            return False
        annotations = util.replicas_annotations(self.deployment)
        known = meta.annotations(rs)
        if before == size and all(known.get(name) == value for name, value in annotations.items()):
            return False
        changed = meta.deep_copy(rs)
        changed["spec"]["replicas"] = size
        changed["metadata"]["annotations"] = {**known, **annotations}
        updated = await self.client.update(REPLICA_SETS, changed)
        self._replace(rs, updated)
        if before == size:
            return False
        direction, name = "up" if size > before else "down", updated["metadata"]["name"]
        self.recorder.event(
            self.deployment, "Normal", "ScalingReplicaSet", f"Scaled {direction} replica set {name} from {before} to {size}"
        )
        return True

    def _replace(self, rs: Object, updated: Object) -> None:
        uid = rs["metadata"]["uid"]
        if self.new is not None and self.new["metadata"]["uid"] == uid:
            self.new = updated
        self.old = [updated if item["metadata"]["uid"] == uid else item for item in self.old]

    async def scale_proportionally(self) -> None:
        """Follow a changed number of replicas, in the middle of a rollout in proportion to the sets' sizes."""
        d = self.deployment
        only = util.active_or_latest(self.new, self.old)
        if only is not None:
            await self.scale_to(only, util.replicas(d))
            return
        if util.is_saturated(d, self.new):
            for rs in util.active(self.old):
                await self.scale_to(rs, 0)
            return
        if not util.is_rolling(d):
            return
        sets = util.active(self.all)
        wanted = util.replicas(d)
        to_add = (wanted + util.max_surge(d) if wanted > 0 else 0) - util.total(sets)
        if to_add > 0:
            sets = sorted(util.by_creation(sets)[::-1], key=lambda rs: -util.replicas(rs))
        elif to_add < 0:
            sets = sorted(util.by_creation(sets), key=lambda rs: -util.replicas(rs))
        added = 0
        sizes: list[int] = []
        for rs in sets:
            share = util.proportion(rs, d, to_add, added) if to_add else 0
            sizes.append(util.replicas(rs) + share)
            added += share
        if sizes and to_add:
            sizes[0] = max(0, sizes[0] + to_add - added)
        for rs, size in zip(sets, sizes, strict=True):
            await self.scale_to(rs, size, always=True)

    async def grow_new(self) -> bool:
        """One rolling step of the new set; says whether it was scaled."""
        assert self.new is not None
        wanted = util.replicas(self.deployment)
        if util.replicas(self.new) == wanted:
            return False
        size = wanted if util.replicas(self.new) > wanted else util.new_set_replicas(self.deployment, self.all, self.new)
        return await self.scale_to(self.new, size)

    async def shrink_old(self) -> bool:
        """One rolling step of the old sets, unhealthy replicas first; says whether something was scaled."""
        assert self.new is not None
        old = util.active(self.old)
        if not old:
            return False
        least = util.replicas(self.deployment) - util.max_unavailable(self.deployment)
        new_unavailable = util.replicas(self.new) - util.actual(self.new, "availableReplicas")
        room = util.total(self.all) - least - new_unavailable
        if room <= 0:
            return False
        cleaned = 0
        for rs in util.by_creation(old):
            unhealthy = util.replicas(rs) - util.actual(rs, "availableReplicas")
            if cleaned >= room or unhealthy <= 0:
                continue
            count = min(room - cleaned, unhealthy)
            await self.scale_to(rs, util.replicas(rs) - count)
            cleaned += count
        spare = util.total_actual([*util.active(old), self.new], "availableReplicas") - least
        shrunk = 0
        for rs in util.by_creation(util.active(self.old)):
            if shrunk >= spare:
                break
            count = min(util.replicas(rs), spare - shrunk)
            await self.scale_to(rs, util.replicas(rs) - count)
            shrunk += count
        return cleaned + shrunk > 0

    async def clean_up(self) -> None:
        """Delete the oldest empty sets beyond the history limit."""
        limit = util.history_limit(self.deployment)
        if limit is None:
            return
        alive = [rs for rs in self.old if "deletionTimestamp" not in rs["metadata"]]
        excess = len(alive) - limit
        if excess <= 0:
            return
        for rs in sorted(util.by_creation(alive), key=lambda rs: util.revision(rs) or 0)[:excess]:
            observed = (rs.get("status") or {}).get("observedGeneration") or 0
            if util.actual(rs) or util.replicas(rs) or (rs["metadata"].get("generation") or 0) > observed:
                continue
            try:
                await self.client.delete(REPLICA_SETS, rs["metadata"]["name"], rs["metadata"]["namespace"])
            except StatusError as error:
                if not errors.is_not_found(error):
                    raise
