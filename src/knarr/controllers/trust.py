"""Certificates for pods, and what they trust: old PodCertificateRequests are deleted, the API server's authority is published.

Both kinds are off by default in 1.35, and so are the gates of these controllers (PodCertificateRequest, ClusterTrustBundle); they have informers of
their own, since the kinds need not be served.

Source: pkg/controller/certificates/{cleaner/pcrcleaner.go,clustertrustbundlepublisher/publisher.go}.
"""

from __future__ import annotations

import hashlib

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CLUSTER_TRUST_BUNDLES, POD_CERTIFICATE_REQUESTS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.informer import Informers
from knarr.controllers.context import Context
from knarr.controllers.podutil import created_at

_KEPT_SECONDS = 15 * 60.0
_SERVING_SIGNER = "kubernetes.io/kube-apiserver-serving"


class PodCertificateRequestCleaner:
    """Deletes requests a quarter of an hour after they were made: whoever asked has his certificate by then, or asks anew."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._informers = Informers(ctx.client)
        self._requests = self._informers.get(POD_CERTIFICATE_REQUESTS)
        self.controller = Controller("podcertificaterequest-cleaner-controller", self._reconcile, workers=1)
        self._requests.add_handler(lambda obj: self.controller.queue.add(meta.key(obj)))

    async def run(self) -> None:
        await _run(self._informers, self.controller)

    async def _reconcile(self, key: str) -> Result | None:
        namespace, _, name = key.partition("/")
        request = self._requests.get(namespace, name)
        if request is None:
            return None
        left = created_at(request) + _KEPT_SECONDS - clock.now()
        if left > 0:
            return Result(left)
        try:
            await self._client.delete(POD_CERTIFICATE_REQUESTS, name, namespace, uid=request["metadata"]["uid"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
        return None


class ServingTrustPublisher:
    """Keeps one ClusterTrustBundle with the authority of the API server's own certificate, named by its content, and no other of that signer."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._bundle = (ctx.config.root_ca or b"").decode()
        digest = hashlib.sha256(self._bundle.encode()).hexdigest()[:24]
        self._name = f"{_SERVING_SIGNER.replace('/', ':')}:{digest}"
        self._informers = Informers(ctx.client)
        self._bundles = self._informers.get(CLUSTER_TRUST_BUNDLES, field_selector=f"spec.signerName={_SERVING_SIGNER}")
        self.controller = Controller("kube-apiserver-serving-clustertrustbundle-publisher-controller", self._reconcile, workers=1)
        self._bundles.add_handler(self._changed, lambda _, new: self._changed(new), self._changed)

    def _changed(self, bundle: Object) -> None:
        self.controller.queue.add(_SERVING_SIGNER)

    async def run(self) -> None:
        if self._bundle:
            self.controller.queue.add(_SERVING_SIGNER)
            await _run(self._informers, self.controller)

    async def _reconcile(self, key: str) -> None:
        current = self._bundles.get(None, self._name)
        if current is None:
            spec = {"signerName": _SERVING_SIGNER, "trustBundle": self._bundle}
            made = {"apiVersion": CLUSTER_TRUST_BUNDLES.api_version, "kind": "ClusterTrustBundle", "metadata": {"name": self._name}, "spec": spec}
            try:
                await self._client.create(CLUSTER_TRUST_BUNDLES, made)
            except StatusError as error:
                if not errors.is_already_exists(error):
                    raise
        elif current["spec"].get("trustBundle") != self._bundle:
            await self._client.update(CLUSTER_TRUST_BUNDLES, {**current, "spec": {**current["spec"], "trustBundle": self._bundle}})
        for other in list(self._bundles):
            if other["metadata"]["name"] != self._name:
                try:
                    await self._client.delete(CLUSTER_TRUST_BUNDLES, other["metadata"]["name"])
                except StatusError as error:
                    if not errors.is_not_found(error):
                        raise


async def _run(informers: Informers, controller: Controller) -> None:
    try:
        await informers.start()
        await informers.wait_synced()
        await controller.run()
    finally:
        await informers.close()
