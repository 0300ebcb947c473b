"""The node table: all nodes and the pods on them, as columns. The scheduler's cache and snapshot in one.

Scheduling runs in one thread between awaits, so the table needs no copy per cycle: nothing
changes under a running cycle. Event handlers and the binding path write here; plugins read
columns and may simulate (`place`, `displace`) if they undo it before they return.

Invariants: `requested[:, row]` is the sum of the requests of `infos[row].pods`; columns of
unused rows are zero and `valid` is False there. `static_version` moves when labels, taints,
names or schedulability of any node change; `resource_version` only with allocatable.

Source: pkg/scheduler/backend/cache (cache, node tree, snapshot).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Codes, Ints, LabelColumns, Rows, grown_ints
from knarr.scheduler.counters import PodCounters, TermGroups
from knarr.scheduler.podinfo import HostPort, PodInfo, normalized_image
from knarr.scheduler.resources import amounts
from knarr.scheduler.terms import Taint, taints

Node = dict[str, Any]

CPU, MEMORY, STORAGE = 0, 1, 2
_FIRST_RESOURCES = ("cpu", "memory", "ephemeral-storage")


class NodeInfo:
    """One node: its object, row and pods by uid. `node` is None while only its pods are known."""

    __slots__ = ("images", "name", "node", "pods", "ports", "row", "zone")

    def __init__(self, name: str, row: int) -> None:
        self.name = name
        self.row = row
        self.node: Node | None = None
        self.pods: dict[str, PodInfo] = {}
        self.ports: dict[HostPort, int] = {}
        self.images: dict[str, int] = {}
        self.zone = ""

    def ports_conflict(self, wanted: tuple[HostPort, ...]) -> bool:
        for address, protocol, port in wanted:
            for used_address, used_protocol, used_port in self.ports:
                if port == used_port and protocol == used_protocol:
                    if address == used_address or address == "0.0.0.0" or used_address == "0.0.0.0":
                        return True
        return False


def zone_key(labels: dict[str, str]) -> str:
    """Give the key by which nodes take turns: region and zone."""
    region = labels.get("topology.kubernetes.io/region") or labels.get("failure-domain.beta.kubernetes.io/region") or ""
    zone = labels.get("topology.kubernetes.io/zone") or labels.get("failure-domain.beta.kubernetes.io/zone") or ""
    return f"{region}:\x00:{zone}" if region or zone else ""


class NodeTable:
    """See the module. All row arguments are indexes into the columns."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.rows: dict[str, int] = {}
        self.infos: list[NodeInfo | None] = [None] * capacity
        self._free = list(range(capacity - 1, -1, -1))
        self.resources: dict[str, int] = {name: i for i, name in enumerate(_FIRST_RESOURCES)}
        self.allocatable: Ints = np.zeros((4, capacity), dtype=np.int64)
        self.requested: Ints = np.zeros((4, capacity), dtype=np.int64)
        self.nonzero: Ints = np.zeros((2, capacity), dtype=np.int64)
        self.pods_allowed: Ints = np.zeros(capacity, dtype=np.int64)
        self.pods_count: Ints = np.zeros(capacity, dtype=np.int64)
        self.valid: Bools = np.zeros(capacity, dtype=np.bool_)
        self.unschedulable: Bools = np.zeros(capacity, dtype=np.bool_)
        self.taint_codes: Codes = np.zeros(capacity, dtype=np.int32)
        self.taint_sets: list[tuple[Taint, ...]] = [()]
        self._taint_numbers: dict[tuple[Taint, ...], int] = {(): 0}
        self.labels = LabelColumns()
        self.labels.grow(capacity)
        self.counters = PodCounters()
        self.counters.grow(capacity)
        self.term_groups = TermGroups()
        self.term_groups.grow(capacity)
        self.image_rows: dict[str, dict[int, int]] = {}
        self.claim_uses: dict[tuple[str, str], int] = {}
        self.port_rows: set[int] = set()
        self.disk_rows: dict[int, int] = {}
        self.static_version = 0
        self.resource_version = 0
        self.images_version = 0
        self.pods_version = 0
        self._zones: dict[str, dict[str, None]] = {}
        self._order: Rows | None = None

    # Nodes.

    def __len__(self) -> int:
        return int(self.order.size)

    def get(self, name: str) -> NodeInfo | None:
        """Give a node that exists as an object."""
        row = self.rows.get(name)
        info = self.infos[row] if row is not None else None
        return info if info is not None and info.node is not None else None

    def info(self, row: int) -> NodeInfo:
        info = self.infos[row]
        assert info is not None
        return info

    def name(self, row: int) -> str:
        return self.info(row).name

    @property
    def order(self) -> Rows:
        """Rows of all existing nodes, zones taking turns."""
        if self._order is None:
            queues = [list(names) for names in self._zones.values()]
            result: list[int] = []
            for turn in range(max(map(len, queues), default=0)):
                result.extend(self.rows[names[turn]] for names in queues if turn < len(names))
            self._order = np.array(result, dtype=np.intp)
        return self._order

    def set_node(self, node: Node) -> NodeInfo:
        """Add a node or take its newer object."""
        name = node["metadata"]["name"]
        info = self._row_info(name)
        row, old = info.row, info.node
        info.node = node
        labels = node["metadata"].get("labels") or {}
        status = node.get("status") or {}
        if old is None or (old["metadata"].get("labels") or {}) != labels:
            self.labels.set(row, name, labels)
            self._set_zone(info, zone_key(labels), old is None)
            self.static_version += 1
        if old is None or old.get("spec") != node.get("spec"):
            self._set_spec(row, node)
        old_status = (old or {}).get("status") or {}
        if old is None or old_status.get("allocatable") != status.get("allocatable"):
            self._set_allocatable(row, status.get("allocatable") or {})
        if old is None or old_status.get("images") != status.get("images"):
            self._set_images(info, status.get("images") or ())
        self.valid[row] = True
        return info

    def remove_node(self, name: str) -> None:
        """Forget the node's object; its row stays until its last pod has left."""
        row = self.rows.get(name)
        if row is None:
            return
        info = self.info(row)
        if info.node is None:
            return
        self.labels.clear(row)
        names = self._zones[info.zone]
        del names[name]
        if not names:
            del self._zones[info.zone]
        self._order = None
        self._set_images(info, ())
        info.node = None
        self.valid[row] = self.unschedulable[row] = False
        self.taint_codes[row] = 0
        self.allocatable[:, row] = 0
        self.pods_allowed[row] = 0
        self.static_version += 1
        self._release(info)

    def _row_info(self, name: str) -> NodeInfo:
        row = self.rows.get(name)
        if row is None:
            if not self._free:
                self._grow(self.capacity * 2)
            row = self.rows[name] = self._free.pop()
            self.infos[row] = NodeInfo(name, row)
        return self.info(row)

    def _release(self, info: NodeInfo) -> None:
        if info.node is None and not info.pods:
            del self.rows[info.name]
            self.infos[info.row] = None
            self._free.append(info.row)

    def _grow(self, capacity: int) -> None:
        old = self.capacity
        self.capacity = capacity
        self.infos.extend([None] * (capacity - old))
        self._free.extend(range(capacity - 1, old - 1, -1))
        self.allocatable, self.requested = grown_ints(self.allocatable, capacity), grown_ints(self.requested, capacity)
        self.nonzero = grown_ints(self.nonzero, capacity)
        self.pods_allowed, self.pods_count = grown_ints(self.pods_allowed, capacity), grown_ints(self.pods_count, capacity)
        self.valid = np.concatenate([self.valid, np.zeros(capacity - old, dtype=np.bool_)])
        self.unschedulable = np.concatenate([self.unschedulable, np.zeros(capacity - old, dtype=np.bool_)])
        self.taint_codes = np.concatenate([self.taint_codes, np.zeros(capacity - old, dtype=np.int32)])
        self.labels.grow(capacity)
        self.counters.grow(capacity)
        self.term_groups.grow(capacity)
        self.static_version += 1
        self.images_version += 1

    def _set_zone(self, info: NodeInfo, zone: str, is_new: bool) -> None:
        if not is_new:
            if zone == info.zone:
                return
            names = self._zones[info.zone]
            del names[info.name]
            if not names:
                del self._zones[info.zone]
        info.zone = zone
        self._zones.setdefault(zone, {})[info.name] = None
        self._order = None

    def _set_spec(self, row: int, node: Node) -> None:
        unschedulable = bool((node.get("spec") or {}).get("unschedulable"))
        taint_set = taints(node)
        code = self._taint_numbers.get(taint_set)
        if code is None:
            code = self._taint_numbers[taint_set] = len(self.taint_sets)
            self.taint_sets.append(taint_set)
        if self.unschedulable[row] != unschedulable or self.taint_codes[row] != code:
            self.static_version += 1
        self.unschedulable[row] = unschedulable
        self.taint_codes[row] = code

    def resource(self, name: str) -> int:
        """Give the index of a resource's row in `allocatable` and `requested`; made on first use."""
        index = self.resources.get(name)
        if index is None:
            index = self.resources[name] = len(self.resources)
            if index >= len(self.allocatable):
                more = np.zeros((len(self.allocatable), self.capacity), dtype=np.int64)
                self.allocatable = np.concatenate([self.allocatable, more])
                self.requested = np.concatenate([self.requested, more])
        return index

    def _set_allocatable(self, row: int, allocatable: dict[str, Any]) -> None:
        self.allocatable[:, row] = 0
        for name, value in amounts(allocatable).items():
            if name == "pods":
                self.pods_allowed[row] = value
            else:
                index = self.resource(name)
                self.allocatable[index, row] = value
        if "pods" not in allocatable:
            self.pods_allowed[row] = 0
        self.resource_version += 1

    def _set_images(self, info: NodeInfo, images: Any) -> None:
        fresh = {normalized_image(name): image.get("sizeBytes") or 0 for image in images for name in image.get("names") or ()}
        if fresh == info.images:
            return
        for name in info.images:
            rows = self.image_rows.get(name)
            if rows is not None:
                rows.pop(info.row, None)
                if not rows:
                    del self.image_rows[name]
        for name, size in fresh.items():
            self.image_rows.setdefault(name, {})[info.row] = size
        info.images = fresh
        self.images_version += 1

    # Pods.

    def add_pod(self, pod: PodInfo, node_name: str) -> None:
        """Put a pod on a node, known or not yet known."""
        info = self._row_info(node_name)
        pod.node_name = node_name
        self.place(pod, info)

    def remove_pod(self, pod: PodInfo) -> None:
        if pod.row < 0:
            return
        info = self.info(pod.row)
        self.displace(pod, info)
        self._release(info)

    def place(self, pod: PodInfo, info: NodeInfo) -> None:
        """Count a pod in. Also used for simulation, undone by `displace`."""
        row, shape = info.row, pod.shape
        pod.row = row
        info.pods[pod.uid] = pod
        for name, value in shape.request_items:
            index = self.resources.get(name)
            if index is None:
                index = self.resource(name)
            self.requested[index, row] += value
        self.nonzero[0, row] += shape.nonzero_cpu
        self.nonzero[1, row] += shape.nonzero_memory
        self.pods_count[row] += 1
        self.pods_version += 1
        self.counters.add(pod, row)
        if shape.affinity_terms:
            self.term_groups.add(shape, row, 1)
        if shape.host_ports or pod.claims or pod.disks:
            self._count_rare(pod, info, 1)

    def displace(self, pod: PodInfo, info: NodeInfo) -> None:
        """Count a pod out; the node's row stays."""
        row, shape = info.row, pod.shape
        pod.row = -1
        del info.pods[pod.uid]
        for name, value in shape.request_items:
            self.requested[self.resources[name], row] -= value
        self.nonzero[0, row] -= shape.nonzero_cpu
        self.nonzero[1, row] -= shape.nonzero_memory
        self.pods_count[row] -= 1
        self.pods_version += 1
        self.counters.remove(pod, row)
        if shape.affinity_terms:
            self.term_groups.add(shape, row, -1)
        if shape.host_ports or pod.claims or pod.disks:
            self._count_rare(pod, info, -1)

    def _count_rare(self, pod: PodInfo, info: NodeInfo, number: int) -> None:
        """Host ports, claims and disks: few pods have them, so they are dicts and not columns."""
        for port in pod.shape.host_ports:
            info.ports[port] = info.ports.get(port, 0) + number
            if not info.ports[port]:
                del info.ports[port]
        if info.ports:
            self.port_rows.add(info.row)
        else:
            self.port_rows.discard(info.row)
        for claim, _ in pod.claims:
            key = (pod.namespace, claim)
            self.claim_uses[key] = self.claim_uses.get(key, 0) + number
            if not self.claim_uses[key]:
                del self.claim_uses[key]
        if pod.disks:
            self.disk_rows[info.row] = self.disk_rows.get(info.row, 0) + number
            if not self.disk_rows[info.row]:
                del self.disk_rows[info.row]

    def rows_of(self, names: Any) -> Rows:
        """Rows of those of the named nodes that exist."""
        return np.array([info.row for name in names if (info := self.get(name)) is not None], dtype=np.intp)

    def distinct_taints(self) -> npt.NDArray[np.int32]:
        return np.unique(self.taint_codes[self.order])
