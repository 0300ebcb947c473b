"""Notes the day on which a legacy token was last used, on its Secret, so that the cleaner can tell the unused ones.

Since when that is done stands in a ConfigMap. Source: kubernetes pkg/serviceaccount/legacy.go,
pkg/controlplane/controller/legacytokentracking; KEP-2799.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import meta
from knarr.api.errors import StatusError, is_already_exists
from knarr.api.types import Object
from knarr.apiserver.attributes import Store

LAST_USED = "kubernetes.io/legacy-token-last-used"
TRACKING = "kube-apiserver-legacy-service-account-token-tracking"
_DAY = "%Y-%m-%d"

log = get_logger(__name__)


def _today() -> datetime:
    return datetime.fromtimestamp(clock.now(), UTC)


class LegacyTokenUse:
    """One write a day and token; `tasks` owns the writes under way, one per Secret."""

    def __init__(self, secrets: Store, config_maps: Store, tasks: Tasks) -> None:
        self._secrets = secrets
        self._config_maps = config_maps
        self._tasks = tasks
        self._writing: set[tuple[str, str]] = set()

    async def start(self) -> None:
        """Write down since when use is noted, if that is not known."""
        since = _today().strftime(_DAY)

        def repaired(obj: Object) -> Object | None:
            try:
                datetime.strptime((obj.get("data") or {})["since"], _DAY)
            except (KeyError, TypeError, ValueError):
                return {**obj, "data": {**(obj.get("data") or {}), "since": since}}
            return None

        try:
            if self._config_maps.get_nowait("kube-system", TRACKING) is None:
                await self._config_maps.create({
                    "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": TRACKING, "namespace": "kube-system"}, "data": {"since": since},
                })  # fmt: skip
            else:
                await self._config_maps.update("kube-system", TRACKING, repaired)
        except StatusError as error:
            # Another API server starts at the same time.
            if not is_already_exists(error):
                raise

    def note(self, secret: Object) -> None:
        """Remember that a Secret's token was used today."""
        now = _today()
        today = now.strftime(_DAY)
        key = (meta.namespace(secret), meta.name(secret))
        # Another server's clock may be a little ahead.
        if meta.labels(secret).get(LAST_USED) in (today, (now + timedelta(days=1)).strftime(_DAY)) or key in self._writing:
            return
        self._writing.add(key)
        self._tasks.spawn(self._write(key, meta.uid(secret), today), "legacy-token-use")

    async def _write(self, key: tuple[str, str], uid: str, today: str) -> None:
        def labelled(obj: Object) -> Object | None:
            if meta.uid(obj) != uid:
                return None
            metadata = obj["metadata"]
            return {**obj, "metadata": {**metadata, "labels": {**(metadata.get("labels") or {}), LAST_USED: today}}}

        try:
            await self._secrets.update(*key, labelled)
        except StatusError as error:
            log.warning("use of a legacy token not noted", namespace=key[0], secret=key[1], error=str(error))
        finally:
            self._writing.discard(key)
