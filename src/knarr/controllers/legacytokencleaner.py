"""Cleaner of legacy tokens: auto-made token secrets that nobody used for a year are marked, a year later deleted.

Source: pkg/controller/serviceaccount/legacy_serviceaccount_token_cleaner.go; KEP-2800.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, SECRETS, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers.context import Context
from knarr.controllers.podutil import created_at

_DAY_SECONDS = 24 * 3600.0
_PERIOD_DAYS = 365
_LAST_USED = "kubernetes.io/legacy-token-last-used"
_INVALID_SINCE = "kubernetes.io/legacy-token-invalid-since"
_TYPE = "kubernetes.io/service-account-token"
_KEY = "all"


class LegacyTokenCleaner:
    """Looks over all token secrets once a day."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._secrets = ctx.informers.get(SECRETS, field_selector=f"type={_TYPE}")
        self._accounts = ctx.informer(SERVICE_ACCOUNTS)
        self._pods = ctx.pods
        self.controller = Controller("legacy-serviceaccount-token-cleaner-controller", self._reconcile, workers=1)

    async def run(self) -> None:
        self.controller.queue.add(_KEY)
        await self.controller.run()

    async def _reconcile(self, key: str) -> Result | None:
        if len(self._secrets):
            tracked_since = await self._tracked_since()
            if tracked_since is not None:
                for secret in list(self._secrets):
                    await self._check(secret, tracked_since)
        return Result(_DAY_SECONDS)

    async def _tracked_since(self) -> datetime | None:
        """Since when the server notes the use of such tokens."""
        try:
            tracking = await self._client.get(CONFIG_MAPS, "kube-apiserver-legacy-service-account-token-tracking", "kube-system")
            return datetime.strptime((tracking.get("data") or {})["since"], "%Y-%m-%d").replace(tzinfo=UTC)
        except StatusError as error:
            if errors.is_not_found(error):
                return None
            raise
        except (KeyError, ValueError):
            return None

    async def _check(self, secret: Object, tracked_since: datetime) -> None:
        limit = datetime.fromtimestamp(clock.now(), UTC) - timedelta(days=_PERIOD_DAYS)
        labels = meta.labels(secret)
        used = _day(labels.get(_LAST_USED, "")) or tracked_since
        created = datetime.fromtimestamp(created_at(secret), UTC)
        if created > limit or used > limit or not self._is_auto_made(secret) or self._is_mounted(secret):
            return
        since = _day(labels.get(_INVALID_SINCE, ""))
        if since is None:
            today = datetime.fromtimestamp(clock.now(), UTC).strftime("%Y-%m-%d")
            patch = {"metadata": {"uid": secret["metadata"]["uid"], "labels": {_INVALID_SINCE: today}}}
            await self._client.patch(SECRETS, secret["metadata"]["name"], secret["metadata"]["namespace"], patch)
        elif since < limit:
            version = secret["metadata"]["resourceVersion"]
            await self._client.delete(SECRETS, secret["metadata"]["name"], secret["metadata"]["namespace"], resource_version=version)

    def _is_auto_made(self, secret: Object) -> bool:
        account = self._accounts.get(secret["metadata"]["namespace"], meta.annotations(secret).get("kubernetes.io/service-account.name", ""))
        return account is not None and any(item.get("name") == secret["metadata"]["name"] for item in account.get("secrets") or ())

    def _is_mounted(self, secret: Object) -> bool:
        name = secret["metadata"]["name"]
        for pod in self._pods.list(secret["metadata"]["namespace"]):
            for volume in pod["spec"].get("volumes") or ():
                if (volume.get("secret") or {}).get("secretName") == name:
                    return True
        return False


def _day(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        return None


