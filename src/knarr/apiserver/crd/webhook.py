"""Conversion of custom resources by webhook.

One converter per CRD with `conversion.strategy: Webhook`. Endpoints await `convert` wherever an object in another version
than theirs is to be shown or stored; a list is converted in one call. What is converted once is kept beside the object
(CachedObject.forms), so that a version nobody wrote in costs one call per object and change.

Source: apiextensions-apiserver pkg/apiserver/conversion/webhook_converter.go.
"""

from __future__ import annotations

import asyncio

import orjson

from knarr.api import errors
from knarr.api.types import Object
from knarr.apiserver.admission.webhook_client import CallFailed, WebhookClient
from knarr.apiserver.store import new_uid

TIMEOUT_SECONDS = 30
REVIEW_VERSIONS = ("v1", "v1beta1")
BATCH = 1000
IDENTITY = ("name", "namespace", "uid")


class WebhookConverter:
    """Converts objects of one CRD."""

    def __init__(self, crd: Object, client: WebhookClient) -> None:
        webhook = crd["spec"]["conversion"]["webhook"]
        self._name = crd["metadata"]["name"]
        self._kind = crd["spec"]["names"]["kind"]
        self._config: Object = webhook["clientConfig"]
        versions = webhook.get("conversionReviewVersions") or ["v1"]
        self._review_version = next((v for v in versions if v in REVIEW_VERSIONS), "v1")
        self._client = client

    async def convert(self, objects: list[Object], api_version: str) -> list[Object]:
        """Return the objects in a version, in order; those already in it as they are.

        Raises:
          StatusError: 500, the webhook failed or answered nonsense.
        """
        others = [obj for obj in objects if obj.get("apiVersion") != api_version]
        if not others:
            return objects
        batches = [others[i:i + BATCH] for i in range(0, len(others), BATCH)]
        converted = iter([obj for part in await asyncio.gather(*[self._call(batch, api_version) for batch in batches]) for obj in part])
        return [obj if obj.get("apiVersion") == api_version else next(converted) for obj in objects]

    def _failed(self, objects: list[Object], api_version: str, why: str) -> errors.StatusError:
        source = objects[0].get("apiVersion")
        return errors.StatusError(500, "", f"conversion webhook for {source}, Kind={self._kind} failed: {why}")

    async def _call(self, objects: list[Object], api_version: str) -> list[Object]:
        uid = new_uid()
        review = {
            "kind": "ConversionReview", "apiVersion": f"apiextensions.k8s.io/{self._review_version}",
            "request": {"uid": uid, "desiredAPIVersion": api_version, "objects": objects},
        }
        try:
            body = await self._client.post(self._config, orjson.dumps(review), timeout_seconds=TIMEOUT_SECONDS)
        except CallFailed as error:
            raise self._failed(objects, api_version, str(error)) from error
        try:
            answer = orjson.loads(body)
            response = answer["response"]
            if response.get("uid") != uid:
                raise ValueError(f"expected response.uid={uid}, got {response.get('uid')}")
            result = response.get("result") or {}
            if result.get("status") != "Success":
                message = result.get("message") or "response.result.status is not 'Success'"
                raise self._failed(objects, api_version, message)
            converted: list[Object] = response.get("convertedObjects") or []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._failed(objects, api_version, f"invalid response: {error}") from error
        if len(converted) != len(objects):
            raise self._failed(objects, api_version, f"expected {len(objects)} converted objects, got {len(converted)}")
        return [self._checked(old, new, api_version) for old, new in zip(objects, converted, strict=True)]

    def _checked(self, old: Object, new: Object, api_version: str) -> Object:
        """A webhook may change everything but identity; of metadata only labels and annotations are taken."""
        if new.get("apiVersion") != api_version:
            raise self._failed([old], api_version, f"expected converted object with version {api_version}, got {new.get('apiVersion')}")
        if new.get("kind") != old.get("kind"):
            raise self._failed([old], api_version, f"expected kind {old.get('kind')}, got {new.get('kind')}")
        mine, theirs = old["metadata"], new.get("metadata") or {}
        for key in IDENTITY:
            if (mine.get(key) or "") != (theirs.get(key) or ""):
                raise self._failed([old], api_version, f"must have the same {key}: {mine.get(key) or ''} != {theirs.get(key) or ''}")
        metadata = dict(mine)
        for key in ("labels", "annotations"):
            if theirs.get(key):
                metadata[key] = theirs[key]
            else:
                metadata.pop(key, None)
        return {**new, "metadata": metadata}
