"""The kubelet: wires the services of a node and keeps them running. Constructed by the cluster's node process and by tests.

Loops and their bounds: one informer each for this node's pods, Services, RuntimeClasses and the Node itself; one reader of the
runtime's events; a task per pod, per probe, per referenced object; timers for Lease, node status, eviction and garbage.
State is what the runtime and the disk hold: a kubelet that starts finds its pods again and goes on.
Source: pkg/kubelet/kubelet.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Coroutine, Iterable, Sequence
from typing import cast

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import NODES, PODS, RUNTIME_CLASSES, SERVICES
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.kubelet import admission, allocatable, certificates, machine, podutil
from knarr.kubelet.affinity.manager import Affinity
from knarr.kubelet.cgroups import Cgroups
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.credentials import providerconfig, records
from knarr.kubelet.credentials.provider import Providers
from knarr.kubelet.credentials.records import PullRecords
from knarr.kubelet.eviction import Eviction
from knarr.kubelet.garbage import GarbageCollector
from knarr.kubelet.images import ImageManager
from knarr.kubelet.meters import Metered, Meters
from knarr.kubelet.node import Node
from knarr.kubelet.node_status import NodeReporter
from knarr.kubelet.objects import ReferencedObjects
from knarr.kubelet.plugins.devices import DeviceManager
from knarr.kubelet.plugins.dra import DynamicResources
from knarr.kubelet.plugins.watcher import PluginWatcher
from knarr.kubelet.pods import PodWorkers
from knarr.kubelet.probes.manager import Probes
from knarr.kubelet.resize import Resizes
from knarr.kubelet.server.server import KubeletServer
from knarr.kubelet.shutdown import NodeShutdown
from knarr.kubelet.static_pods import StaticPods
from knarr.kubelet.status_manager import StatusManager
from knarr.kubelet.tokens import Tokens
from knarr.kubelet.userns import UserNamespaces
from knarr.kubelet.volumes import wellknown
from knarr.kubelet.volumes.claims import Claims
from knarr.kubelet.volumes.csi import CSIVolumes
from knarr.kubelet.volumes.growth import Growth
from knarr.kubelet.volumes.manager import Volumes
from knarr.kubelet.volumes.payloads import PayloadContext
from knarr.runtime.cri import ImageService, RuntimeFault, RuntimeService

log = get_logger(__name__)

_RETRY_SECONDS = 1.0
_QOS_SECONDS = 0.5
_RETIRE_SECONDS = 30.0
"""What requests under way may still take when the client certificate changed."""


async def _retire(client: Client) -> None:
    await asyncio.sleep(_RETIRE_SECONDS)
    await client.close_retired()


class Kubelet:
    """One node's agent; `await run()` until cancelled. Containers live on without it."""

    def __init__(self, client: Client, runtime: RuntimeService, images: ImageService, config: KubeletConfig) -> None:
        """Wire everything; nothing is started and no I/O is done but making folders and sharing the root."""
        self.config = config
        self.client = client
        self.meters = Meters()
        self.started_at = clock.now()
        self.meters.gauges["kubelet_node_startup_pre_kubelet_duration_seconds"] = self.started_at - machine.booted_at()
        runtime = cast("RuntimeService", Metered(runtime, self.meters))
        images = cast("ImageService", Metered(images, self.meters))
        self.runtime = runtime
        os.makedirs(config.root_dir, 0o755, exist_ok=True)
        fresh = config.share_root and wellknown.share(config.root_dir)
        for folder in (config.root_dir, config.pods_dir, config.logs_dir, *(os.path.join(config.root_dir, n) for n in ("seccomp", "plugins"))):
            os.makedirs(folder, 0o755, exist_ok=True)
        self.tasks = Tasks()
        self.informers = Informers(client)
        self._recorder = EventRecorder(client, "kubelet", config.node_name)
        self.capacity = machine.measure(config)
        self._pods = self.informers.get(PODS, field_selector=f"spec.nodeName={config.node_name}")
        self._services = self.informers.get(SERVICES)
        self._node = self.informers.get(NODES, field_selector=f"metadata.name={config.node_name}")
        self._classes = self.informers.get(RUNTIME_CLASSES)
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._sandbox_uids: dict[str, str] = {}
        self.ready = asyncio.Event()
        """Set when pods are being handled."""
        self.credential_providers: Providers | None = None
        self.node = self._wire(runtime, images)
        if fresh:
            self.csi.start_over()
        self.workers = PodWorkers(self.node, self._admit)
        self.static_pods = StaticPods(self.node, self.workers)
        self.eviction = Eviction(
            self.node,
            self.workers,
            lambda: self.reporter.changed(),
            lambda kind, reason, text: self._record(self.reporter.reference(), kind, reason, text),
        )
        self.reporter = NodeReporter(config, client, runtime, images, self._record, self.capacity, self.eviction.pressure)
        self.reporter.live = lambda: self._node.get(None, config.node_name)
        self._node.add_handler(self.reporter.node_changed, lambda _old, new: self.reporter.node_changed(new))
        self.garbage = GarbageCollector(self.node, self.workers, self.reporter.reference)
        self.eviction.reclaim = self.garbage.free_unused
        self.shutdown = NodeShutdown(self.node, self.workers, self.reporter)
        self.server = KubeletServer(self)
        self.rotated_clients = [client]
        """Clients that use this node's client certificate and get the next one when it is rotated."""
        self._tls: ssl.SSLContext | None = None

    def _wire(self, runtime: RuntimeService, images: ImageService) -> Node:
        config, client = self.config, self.client
        objects = ReferencedObjects(client, lambda uids: self.workers.objects_changed(uids))
        tokens = Tokens(client)
        verify = records.policy(config.image_verification_policy, config.image_verification_allowlist)
        if config.credential_provider_config:
            providers = providerconfig.load(config.credential_provider_config, config.credential_provider_bin_dir)
            self.credential_providers = Providers(providers, config.credential_provider_bin_dir, client, tokens)
        image_manager = ImageManager(
            images,
            PullRecords(os.path.join(config.root_dir, "image_manager"), verify),
            parallel=config.max_parallel_image_pulls,
            initial_seconds=config.image_back_off_initial_seconds,
            maximum_seconds=config.image_back_off_max_seconds,
            credentials_file=config.registry_credentials_file,
            providers=self.credential_providers,
        )

        def payload_context(ips: Sequence[str]) -> PayloadContext:
            return PayloadContext(client, objects, tokens, ips, config.host_ips, self.capacity.allocatable)

        def event(pod: Object, kind: str, reason: str, message: str) -> None:
            self._record(pod, kind, reason, message)

        def container_event(pod: Object, name: str, kind: str, reason: str, message: str) -> None:
            self._record(pod, kind, reason, message, field_path=podutil.field_path(pod, name))

        self.csi = CSIVolumes(config, client, tokens, Growth(client, event))
        self.devices = DeviceManager(config.device_plugins_dir or os.path.join(config.root_dir, "device-plugins"), self._devices_changed)
        self.dynamic = DynamicResources(
            config.root_dir, client, config.node_name, lambda: [worker.uid for worker in self.workers.workers()]
        )
        self.plugins = PluginWatcher(
            config.plugins_dir or os.path.join(config.root_dir, "plugins_registry"),
            {"CSIPlugin": self.csi, "DevicePlugin": self.devices, "DRAPlugin": self.dynamic},
            config.root_dir,
        )
        affinity = Affinity(config, runtime, meters=self.meters, devices=self.devices)
        claims = Claims(client, self.csi, config.root_dir)
        volumes = Volumes(config, payload_context, claims, image_manager, event, lambda: self.capacity.memory_allocatable_bytes)
        probes = Probes(runtime, container_event, lambda uid: self.workers.wake(uid), lambda: config.host_ips[0])
        node = Node(
            config=config,
            client=client,
            runtime=runtime,
            image_service=images,
            images=image_manager,
            status=StatusManager(client, self._api_pod, self.meters.observe),
            volumes=volumes,
            probes=probes,
            cgroups=Cgroups(config, unlimited=affinity.exclusive),
            objects=objects,
            tokens=tokens,
            userns=UserNamespaces(config.pods_dir),
            record=self._record,
            forget_events=self._recorder.forget,
            services=self._services_for,
            wait_services=self._services.wait_synced,
            runtime_class=lambda name: self._classes.get(None, name),
            capacity=self.capacity,
            tasks=self.tasks,
            devices=self.devices,
            affinity=affinity,
            dynamic=self.dynamic,
            meters=self.meters,
        )
        node.resize = Resizes(node)
        return node

    def _record(
        self, obj: Object, kind: str, reason: str, message: str, field_path: str = "", annotations: dict[str, str] | None = None
    ) -> None:
        self._recorder.event(obj, kind, reason, message, field_path=field_path, annotations=annotations)

    def _services_for(self, namespace: str) -> Iterable[Object]:
        found = self._services.list(namespace)
        if namespace != "default":
            api = self._services.get("default", "kubernetes")
            if api is not None:
                return [*found, api]
        return found

    def _devices_changed(self) -> None:
        for name, (total, healthy) in self.devices.capacity().items():
            self.capacity.capacity[name], self.capacity.allocatable[name] = str(total), str(healthy)
        self.reporter.changed()

    def _api_pod(self, pod: Object) -> Object | None:
        """The API's copy of a pod; a static pod's is its mirror."""
        found = self._pods.get(pod["metadata"].get("namespace"), pod["metadata"]["name"])
        if found is None:
            return None
        if podutil.is_static(pod):
            return found if podutil.is_mirror(found) else None
        return found if podutil.uid(found) == podutil.uid(pod) else None

    def api_pods(self) -> list[Object]:
        """The pods of this node as the API server has them."""
        return self._pods.list()

    def node_object(self) -> Object | None:
        return self._node.get(None, self.config.node_name) or self.reporter.node

    def _admit(self, pod: Object, others: Iterable[Object]) -> tuple[str, str] | None:
        refusal = self.shutdown.admit(pod) or self.eviction.admit(pod)
        refusal = refusal or admission.admit(
            pod,
            others,
            allocatable=self.capacity.allocatable,
            node=self.node_object(),
            allowed_unsafe_sysctls=self.config.allowed_unsafe_sysctls,
        )
        return refusal or self.node.affinity.admit(pod)

    async def run(self) -> None:
        """Work until cancelled. Pods go on running afterwards."""
        self._recorder.event(self.reporter.reference(), "Normal", "Starting", "Starting kubelet.")
        if self.config.cgroups_per_qos:
            limits = allocatable.enforce(self.config, self.node.cgroups, self.capacity.capacity, self._record, self.reporter.reference())
            self.tasks.spawn(limits, "node-allocatable")
        try:
            async with asyncio.TaskGroup() as group:
                await self._start_server()
                for name, loop in (
                    ("runtime-events", self._run_events()),
                    ("node-lease", self.reporter.run_lease()),
                    ("node-status", self.reporter.run_status()),
                    ("eviction", self.eviction.run()),
                    ("garbage", self.garbage.run()),
                    ("shutdown", self.shutdown.run()),
                    ("plugins", self.plugins.run()),
                    ("devices", self.devices.run()),
                    ("affinity", self.node.affinity.run()),
                    ("qos-groups", self._run_qos()),
                    ("volume-growth", self.csi.growth.run()),
                    ("dynamic-resources", self.dynamic.run(self.ready)),
                    ("pods", self._run_pods()),
                    *self._certificate_loops(),
                ):
                    group.create_task(loop, name=f"kubelet-{name}")
        finally:
            await self._close()

    async def _run_qos(self) -> None:
        """Give the Burstable group the CPU share of its pods, a moment after the last of a burst of changes. Eternal."""
        while self.config.cgroups_per_qos:
            await self.node.pods_changed.wait()
            await asyncio.sleep(_QOS_SECONDS)
            self.node.pods_changed.clear()
            self.node.cgroups.update_qos(self.workers.active_pods())
        await asyncio.Event().wait()

    async def _start_server(self) -> None:
        config = self.config
        if not config.serving_cert or (config.server_tls_bootstrap and certificates.load(config.serving_cert) is None):
            return
        self._tls = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.serving_cert, config.serving_key)
        context.set_alpn_protocols(["http/1.1"])
        if config.client_ca:
            context.load_verify_locations(config.client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
        await self.server.listen(config.bind_address, config.port, context)

    def _certificate_loops(self) -> list[tuple[str, Coroutine[None, None, None]]]:
        """What keeps this node's certificates fresh, as far as configured."""
        config, loops = self.config, []
        if config.rotate_certificates:
            template = certificates.Template(config.node_name)
            loops.append(("client-certificate", certificates.Rotation(self.client, config.client_cert_file, lambda: template, self.client_renewed).run()))
        if config.server_tls_bootstrap:
            serving = certificates.Rotation(self.client, config.serving_cert, self._serving_template, self._use_serving)
            self._node.add_handler(lambda _: serving.changed(), lambda _old, _new: serving.changed())
            loops.append(("serving-certificate", serving.run()))
        return loops

    def _serving_template(self) -> certificates.Template | None:
        node = self._node.get(None, self.config.node_name)
        if node is None:
            return None
        addresses = (node.get("status") or {}).get("addresses") or []
        names = tuple(a["address"] for a in addresses if a["type"] in ("Hostname", "InternalDNS", "ExternalDNS"))
        ips = tuple(a["address"] for a in addresses if a["type"] in ("InternalIP", "ExternalIP"))
        return certificates.Template(self.config.node_name, dns=names, ips=ips) if ips else None

    def _use_serving(self, certificate: bytes, key: bytes) -> None:
        if self._tls is not None:
            self.serving_renewed()
        else:
            self.tasks.spawn(self._start_server(), "serve")

    def serving_renewed(self) -> None:
        """The files of the serving certificate have become others: new connections get it, those that exist go on."""
        if self._tls is not None:
            self._tls.load_cert_chain(self.config.serving_cert, self.config.serving_key)

    def client_renewed(self, certificate: bytes, key: bytes) -> None:
        """There is another client certificate of this node (PEM)."""
        for client in self.rotated_clients:
            client.use_certificate(certificate, key)
            self.tasks.spawn(_retire(client), "retire-connections")

    def host_changed(self) -> None:
        """The node has other addresses (`current_ips`), and perhaps another serving certificate for them: use and tell them."""
        self.serving_renewed()
        self.network_changed()

    def network_changed(self) -> None:
        """The pod network came, or is another: the node's condition follows, and pods that wait for it go on at once."""
        self.reporter.changed()
        for worker in self.workers.workers():
            self.workers.wake(worker.uid)

    async def _run_pods(self) -> None:
        before = clock.now()
        await self.reporter.register()
        registered = clock.now()
        self.tasks.spawn(self.csi.announce(), "csi-node")
        self._node.add_handler(on_update=lambda _, node: self.reporter.seen(node))
        self._node.add_handler(on_update=self.csi.node_changed)
        self._pods.add_handler(self._on_add, self._on_update, self._on_delete)
        await self.informers.start()
        await self._pods.wait_synced()
        self.node.affinity.keep(podutil.uid(pod) for pod in self._pods.list())
        await self.static_pods.start()
        await self._settle_pulls()
        await self.workers.adopt_orphans()
        await self.garbage.remove_leftovers()
        self.ready.set()
        self.reporter.changed()
        for name, seconds in (
            ("pre_registration_", before - self.started_at),
            ("registration_", registered - before),
            ("post_registration_", clock.now() - registered),
            ("", clock.now() - self.started_at),
        ):
            self.meters.gauges[f"kubelet_node_startup_{name}duration_seconds"] = seconds
        await self.static_pods.run()

    async def _settle_pulls(self) -> None:
        """Learn how the pulls ended that a kubelet before this one began."""
        pulls = self.node.images.records
        while pulls.unsettled:
            try:
                pulls.settle(await self.node.image_service.list_images())
                break
            except RuntimeFault as e:
                log.warning("images not listed", error=str(e))
                await asyncio.sleep(_RETRY_SECONDS)

    def _on_add(self, pod: Object) -> None:
        if podutil.is_mirror(pod):
            self.static_pods.mirror_changed(pod)
        else:
            self.workers.add(pod)

    def _on_update(self, old: Object, pod: Object) -> None:
        if podutil.uid(old) != podutil.uid(pod):
            self._on_delete(old)
            self._on_add(pod)
        elif podutil.is_mirror(pod):
            self.static_pods.mirror_changed(pod)
        else:
            self.workers.update(pod)

    def _on_delete(self, pod: Object) -> None:
        if podutil.is_mirror(pod):
            self.static_pods.mirror_deleted(pod)
        else:
            self.workers.delete(pod)

    async def _run_events(self) -> None:
        """Take ends of containers to their pods' workers; after a gap everybody looks for himself. Eternal."""
        while True:
            try:
                async for event in self.runtime.events():
                    if event.type not in ("STOPPED", "DELETED"):
                        continue
                    for follower in self._followers.get(event.container_id, ()):
                        follower.set()
                    uid = await self._uid_of_sandbox(event.sandbox_id)
                    if uid and event.type == "STOPPED":
                        self.workers.wake(uid)
                    elif event.type == "DELETED" and event.container_id == event.sandbox_id:
                        self._sandbox_uids.pop(event.sandbox_id, None)
            except RuntimeFault as e:
                log.warning("runtime events ended", error=str(e))
                await asyncio.sleep(_RETRY_SECONDS)
            for worker in self.workers.workers():
                worker.wake()

    async def _uid_of_sandbox(self, sandbox_id: str) -> str:
        uid = self._sandbox_uids.get(sandbox_id)
        if uid is None:
            try:
                uid = (await self.runtime.pod_sandbox_status(sandbox_id)).metadata.uid
            except RuntimeFault:
                return ""
            self._sandbox_uids[sandbox_id] = uid
        return uid

    @contextlib.contextmanager
    def container_changes(self, container_id: str):  # type: ignore[no-untyped-def]
        """An Event that is set whenever the container may have ended; for followers of its log."""
        event = asyncio.Event()
        self._followers.setdefault(container_id, set()).add(event)
        try:
            yield event
        finally:
            followers = self._followers[container_id]
            followers.discard(event)
            if not followers:
                del self._followers[container_id]

    async def _close(self) -> None:
        await self.server.close()
        # No more news first: nothing may ask for new work of what is ending.
        await self.informers.close()
        await self.tasks.close()
        await self.node.probes.close()
        await self.node.status.close()
        await self.node.objects.close()
        await self.csi.close()
        if self.credential_providers is not None:
            await self.credential_providers.close()
        await self._recorder.close()
