"""The Ingress controller: our class of Ingresses onto HAProxy.

Role: cluster runs one in the control process. It makes the IngressClass, and starts the proxy only when the first
Ingress of the class exists, so that a cluster without Ingresses pays nothing. Every change of an Ingress, Service,
EndpointSlice (headless only) or Secret rebuilds the table and applies the difference; writes of status follow.
Invariants: Ingresses of other classes are never touched. A broken Ingress, Secret or Service costs its own routes only
and is told in an event.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import ENDPOINT_SLICES, INGRESS_CLASSES, INGRESSES, SECRETS, SERVICES
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.network.ingress import certificates
from knarr.network.ingress.alternatives import settle
from knarr.network.ingress.annotations import secret_of
from knarr.network.ingress.certificates import Certificates
from knarr.network.ingress.gateway import Outcome
from knarr.network.ingress.gateways import GatewaySupport
from knarr.network.ingress.gatewayservices import Ports
from knarr.network.ingress.haproxy import PASSWORD_SOCKET, HAProxy, HAProxyError, Listen, program
from knarr.network.ingress.model import build, is_ours
from knarr.network.ingress.passwords import Passwords, read_users
from knarr.network.ingress.routes import ENDPOINTS, FIRST, Routes
from knarr.network.objects import object_key, slice_service

log = get_logger(__name__)

CONTROLLER = "knarr.dev/ingress"
_DEFAULT_CLASS = "ingressclass.kubernetes.io/is-default-class"


class IngressController:
    """See the module.

    Args:
      folder: Private folder for the proxy, on a tmpfs.
      listen: Where the proxy listens.
      status_addresses: What Ingress status shows: addresses under which the proxy is reached.
      class_name: Name of our IngressClass, and of the GatewayClass that we make where Gateways are defined.
      gateway_services: Gateways get Services of type LoadBalancer, and by them addresses of their own.
    """

    def __init__(
        self,
        client: Client,
        informers: Informers,
        *,
        folder: str | Path,
        listen: Listen | None = None,
        status_addresses: Sequence[str] = (),
        class_name: str = "knarr",
        gateway_services: bool = False,
    ) -> None:
        self._client = client
        self._informers = informers
        self._ingresses = informers.get(INGRESSES)
        self._classes = informers.get(INGRESS_CLASSES)
        self._services = informers.get(SERVICES)
        self._slices = informers.get(ENDPOINT_SLICES)
        self._slices.add_index("service", slice_service)
        self._secrets = informers.get(SECRETS)
        self._class = class_name
        self._status = [{"ip": address} for address in status_addresses]
        self._recorder = EventRecorder(client, "ingress-controller")
        self._listen = listen or Listen()
        self.proxy = HAProxy(Path(folder), self._listen, certificates.self_signed())
        self._wake = asyncio.Event()
        self._tasks = Tasks()
        self._gateways = GatewaySupport(client, informers, self._wake, self._status, class_name=class_name, own_addresses=gateway_services)
        self._started = False
        self._reported: dict[str, str] = {}
        self._by_endpoints: set[str] = set()
        """Services whose endpoints were asked for in the last table."""
        self._passwords = Passwords()
        self._folder = Path(folder)
        self.applied = 0

    async def run(self) -> None:
        """Serve until cancelled; the proxy is stopped on return."""
        for informer in (self._ingresses, self._classes, self._services, self._secrets):
            informer.add_handler(self._seen, self._changed, self._seen)
        self._slices.add_handler(self._slice_seen, lambda _old, new: self._slice_seen(new), self._slice_seen)
        self._gateways.subscribe()
        await self._informers.start()
        for informer in (self._ingresses, self._classes, self._services, self._slices, self._secrets):
            await informer.wait_synced()
        backoff = Backoff(0.2, 30.0)
        try:
            while True:
                self._wake.clear()
                try:
                    await self._ensure_class()
                    await self._gateways.prepare()
                    await self._sync()
                    backoff.reset()
                except (HAProxyError, StatusError, HTTPError, OSError) as error:
                    log.warning("ingress is not up to date, will retry", error=str(error))
                    await backoff.sleep()
                    continue
                await self._wake.wait()
                await asyncio.sleep(0)
        finally:
            self._passwords.close()
            await self._tasks.close()
            await self._recorder.close()

    def show(self, addresses: Sequence[str]) -> None:
        """The proxy is reached under other addresses from now on: statuses follow."""
        self._status[:] = [{"ip": address} for address in addresses]
        self._wake.set()

    def _seen(self, _obj: Object) -> None:
        self._wake.set()

    def _changed(self, old: Object, new: Object) -> None:
        same = all(old.get(part) == new.get(part) for part in ("spec", "data")) and old["metadata"].get("annotations") == new[
            "metadata"
        ].get("annotations")
        if not same:
            self._wake.set()

    def _slice_seen(self, obj: Object) -> None:
        for key in slice_service(obj):
            # Others are reached through their cluster IP, which follows the endpoints by itself.
            if key in self._by_endpoints:
                self._wake.set()

    async def _ensure_class(self) -> None:
        if self._classes.get(None, self._class) is not None:
            return
        wanted = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "IngressClass",
            "metadata": {"name": self._class, "labels": {"app.kubernetes.io/managed-by": "knarr"}},
            "spec": {"controller": CONTROLLER},
        }
        try:
            await self._client.create(INGRESS_CLASSES, wanted)
        except StatusError as error:
            if not errors.is_already_exists(error):
                raise

    def _ours(self) -> list[Object]:
        obj = self._classes.get(None, self._class)
        default = obj is not None and (obj["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"
        found = [ingress for ingress in self._ingresses.list() if is_ours(ingress, self._class, is_default=default)]
        return [ingress for ingress in found if not ingress["metadata"].get("deletionTimestamp")]

    async def _sync(self) -> None:
        ingresses = self._ours()
        if not ingresses and not self._gateways.gateways() and not self._started:
            await self._gateways.write_statuses(Outcome())
            return
        self._by_endpoints = set()
        routes = build(ingresses, self._addresses, self._secrets.get_key)
        self._passwords.replace(self._users(routes, ingresses))
        usable_secrets = (
            {object_key(obj): True for obj in self._secrets.list() if certificates.secret_pem(obj) is not None} if self._gateways.active else {}
        )
        outcome = self._gateways.add_routes(routes, self._addresses, usable_secrets)
        settle(routes)
        if program() is None:
            routes.problems.extend((object_key(ingress), "haproxy is not installed on this machine") for ingress in ingresses)
        shown = self._certificates(routes)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._passwords.listen(self._folder / PASSWORD_SOCKET)
        await self.proxy.apply(routes, shown)
        if not self._started:
            self._started = True
            self._tasks.spawn_eternal(self.proxy.run(), "ingress proxy")
        self.applied += 1
        self._report(routes, ingresses)
        for ingress in ingresses:
            await self._write_status(ingress)
        if self._status:
            ports = Ports(self._status[0]["ip"], self._listen.http_port, self._listen.https_port, self.proxy.stream_port())
            await self._gateways.bring_about(outcome, ports)
        await self._gateways.write_statuses(outcome)

    def _addresses(self, namespace: str, name: str, port: Mapping[str, Any]) -> list[tuple[str, int]] | str:
        service = self._services.get(namespace, name)
        if service is None:
            return f"service {namespace}/{name} does not exist"
        spec = service.get("spec") or {}
        if spec.get("type") == "ExternalName":
            return f"service {namespace}/{name} is an external name, which is not supported as a backend"
        wanted = port.get("name") or port.get("number")
        ports = spec.get("ports") or ()
        found = next((item for item in ports if port.get(FIRST) or wanted in (item.get("name"), item.get("port"))), None)
        if found is None:
            return f"service {namespace}/{name} has no port {wanted}"
        if spec.get("clusterIP") not in (None, "", "None") and not port.get(ENDPOINTS):
            return [(spec["clusterIP"], int(found["port"]))]
        self._by_endpoints.add(f"{namespace}/{name}")
        return self._endpoints(f"{namespace}/{name}", found.get("name") or "")

    def _endpoints(self, key: str, port_name: str) -> list[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        for part in self._slices.by_index("service", key):
            for port in part.get("ports") or ():
                if (port.get("name") or "") != port_name or not port.get("port"):
                    continue
                for endpoint in part.get("endpoints") or ():
                    if (endpoint.get("conditions") or {}).get("ready") is not False:
                        found.update((address, int(port["port"])) for address in endpoint.get("addresses") or ())
        return sorted(found)

    def _users(self, routes: Routes, ingresses: list[Object]) -> dict[str, dict[str, str]]:
        """The users of each Secret that an Ingress names; the proxy forgets what it knew when one changes."""
        out: dict[str, dict[str, str]] = {}
        for ingress in ingresses:
            named = secret_of(ingress)
            if named is None:
                continue
            secret = self._secrets.get_key(named[0])
            if secret is None:
                routes.problems.append((object_key(ingress), f"secret {named[0]} does not exist; nobody is let in"))
            users = read_users(secret, named[1]) if secret is not None else {}
            name = "|".join(named)
            out[name] = users
            routes.targets[f"users|{name}"] = hashlib.blake2b(repr(sorted(users.items())).encode(), digest_size=9).hexdigest()
        return out

    def _certificates(self, routes: Routes) -> Certificates:
        out, missing = certificates.collect(routes, self._secrets.get_key, self.proxy.default_pem)
        for host, key in missing:
            owners = {owner for owner in (object_key(i) for i in self._ours()) if owner.partition("/")[0] == key.partition("/")[0]}
            routes.problems.extend((owner, f"secret {key} has no usable certificate for {host}") for owner in sorted(owners)[:1])
        return out

    def _report(self, routes: Routes, ingresses: list[Object]) -> None:
        by_key: dict[str, list[str]] = {}
        for key, text in routes.problems:
            by_key.setdefault(key, []).append(text)
        for ingress in ingresses:
            key = object_key(ingress)
            message = "; ".join(dict.fromkeys(by_key.get(key, ())))
            if message and self._reported.get(key) != message:
                self._recorder.event(ingress, "Warning", "Translation", message)
            self._reported[key] = message

    async def _write_status(self, ingress: Object) -> None:
        current = ((ingress.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
        if current == self._status or not self._status:
            return
        meta = ingress["metadata"]
        try:
            patch = {"metadata": {"uid": meta["uid"]}, "status": {"loadBalancer": {"ingress": self._status}}}
            await self._client.patch(INGRESSES, meta["name"], meta["namespace"], patch, type="merge", subresource="status")
        except StatusError as error:
            if not errors.is_not_found(error) and not errors.is_conflict(error):
                raise
