"""Writes of the StatefulSet controller: pods with their claims, and the events about them.

Source: pkg/controller/statefulset/stateful_pod_control.go.
"""

from __future__ import annotations

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PODS
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informer
from knarr.client.rest import Client
from knarr.controllers.statefulset import util


class PodWriter:
    """Creates, updates and deletes pods of StatefulSets."""

    def __init__(self, client: Client, recorder: EventRecorder, claims: Informer) -> None:
        self._client = client
        self._recorder = recorder
        self._claims = claims

    def _event(self, verb: str, set_: Object, pod: Object, error: Exception | None) -> None:
        what = f"{verb} Pod {pod['metadata']['name']} in StatefulSet {set_['metadata']['name']}"
        if error is None:
            self._recorder.event(set_, "Normal", f"Successful{verb}", f"{what} successful")
        else:
            self._recorder.event(set_, "Warning", f"Failed{verb}", f"{what} failed error: {error}")

    async def create(self, set_: Object, pod: Object) -> None:
        """Create the claims and then the pod."""
        try:
            await self.create_claims(set_, pod)
            created = await self._client.create(PODS, pod)
        except StatusError as error:
            if not errors.is_already_exists(error):
                self._event("Create", set_, pod, error)
            raise
        await self.fix_claims(set_, {**pod, "metadata": created["metadata"]})
        self._event("Create", set_, pod, None)

    async def delete(self, set_: Object, pod: Object) -> None:
        try:
            await self._client.delete(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], uid=pod["metadata"]["uid"])
        except StatusError as error:
            self._event("Delete", set_, pod, error)
            raise
        self._event("Delete", set_, pod, None)

    async def update(self, set_: Object, pod: Object) -> None:
        """Give a pod back its identity and its claims their owners; volumes of a running pod cannot change."""
        number = util.ordinal(pod)
        labels = {util.POD_NAME: pod["metadata"]["name"], util.POD_INDEX: str(number)}
        changed = False
        try:
            if not util.storage_matches(set_, pod):
                await self.create_claims(set_, pod)
                fresh = meta.deep_copy(await self._client.get(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"]))
                fresh["metadata"]["labels"] = {**meta.labels(fresh), **labels}
                util.with_storage(set_, fresh["spec"], number)
                await self._client.update(PODS, fresh)
                changed = True
            elif not util.identity_matches(set_, pod):
                patch = {"metadata": {"labels": labels, "uid": pod["metadata"]["uid"]}}
                await self._client.patch(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], patch)
                changed = True
            changed = await self.fix_claims(set_, pod) or changed
        except StatusError as error:
            self._event("Update", set_, pod, error)
            raise
        if changed:
            self._event("Update", set_, pod, None)

    async def create_claims(self, set_: Object, pod: Object) -> None:
        """Create the claims of a pod that are not there.

        Raises:
          StatusError: a claim could not be created, or is being deleted.
        """
        failure: StatusError | None = None
        for claim in util.claims(set_, util.ordinal(pod)).values():
            name = claim["metadata"]["name"]
            known = self._claims.get(claim["metadata"]["namespace"], name)
            if known is not None:
                if "deletionTimestamp" in known["metadata"]:
                    failure = errors.internal(f"pvc {name} is being deleted")
                continue
            error = await self._create_claim(set_, pod, claim)
            failure = failure or error
        if failure is not None:
            raise failure

    async def _create_claim(self, set_: Object, pod: Object, claim: Object) -> StatusError | None:
        name, owner = pod["metadata"]["name"], set_["metadata"]["name"]
        what = f"Create Claim {claim['metadata']['name']} Pod {name} in StatefulSet {owner}"
        try:
            await self._client.create(PERSISTENT_VOLUME_CLAIMS, claim)
        except StatusError as error:
            if errors.is_already_exists(error):
                return None
            message = f"Create Claim {claim['metadata']['name']} for Pod {name} in StatefulSet {owner} failed error: {error}"
            self._recorder.event(set_, "Warning", "FailedCreate", message)
            return error
        self._recorder.event(set_, "Normal", "SuccessfulCreate", f"{what} success")
        return None

    def _known_claims(self, set_: Object, pod: Object) -> list[Object]:
        namespace = set_["metadata"]["namespace"]
        names = [util.claim_name(set_, item, util.ordinal(pod)) for item in set_["spec"].get("volumeClaimTemplates") or ()]
        return [claim for name in names if (claim := self._claims.get(namespace, name)) is not None]

    def claims_are_right(self, set_: Object, pod: Object) -> bool:
        """Whether the claims' owners agree with the retention policy."""
        return all(util.claim_is_right(claim, set_, pod) for claim in self._known_claims(set_, pod))

    def has_stale_claim(self, set_: Object, pod: Object) -> bool:
        """Whether a claim still belongs to a deleted pod of this name and will vanish."""
        if util.retention(set_)[1] == "Retain":
            return False
        return any(util.has_stale_pod_ref(claim, pod) for claim in self._known_claims(set_, pod))

    async def fix_claims(self, set_: Object, pod: Object) -> bool:
        """Make the claims' owners agree with the retention policy; says whether something changed."""
        changed = False
        for claim in self._known_claims(set_, pod):
            if util.has_unexpected_controller(claim, set_, pod):
                message = (
                    f"PersistentVolumeClaim {claim['metadata']['name']} has a conflicting OwnerReference that acts as a manging controller, "
                    "the retention policy is ignored for this claim"
                )
                self._recorder.event(set_, "Warning", "ConflictingController", message)
            if not util.claim_is_right(claim, set_, pod):
                owners = util.claim_owners(claim, set_, pod)
                claim_meta = {**claim["metadata"], "ownerReferences": owners}
                await self._client.update(PERSISTENT_VOLUME_CLAIMS, {**claim, "metadata": claim_meta})
                changed = True
        return changed
