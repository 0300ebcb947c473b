"""The kernel's copy of the proxy table: what is in it, and changing it in transactions.

Role: used by `service_proxy` from its worker thread (blocking). Remembers every element it wrote, who contributed it,
and applies differences.
Invariants: memory equals kernel after every call; a refused transaction changes neither. A key claimed by two Services
is held by the first; the second gets it when the first lets go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from knarr.network.netlink import NETLINK_NETFILTER, NetlinkSocket, attributes, cstring
from knarr.network.netns import open_netlink
from knarr.network.nftables import (
    Element,
    ElementBatch,
    StateMismatch,
    delete_table,
    encode_element,
    read_elements,
    run_script,
    table_exists,
)
from knarr.network.proxy.chains import Pick, add_learn_chain, add_learning, add_pick_chain, learn_name, skeleton, version_chain
from knarr.network.proxy.model import ElementKey, Rendered

_GETCHAIN = (10 << 8) | 4
_INET_HEADER = b"\x01\x00\x00\x00"
EMPTY = Rendered()
_RANGES = ("allowed4", "allowed6")


class ProxyTable:
    """One inet table. Not for use by two threads at once."""

    def __init__(self, name: str, pod_cidrs: Sequence[str], *, node_port_addresses: Sequence[str] = (), netns: str | None = None) -> None:
        self.name = name
        self._pod_cidrs = list(pod_cidrs)
        self._node_port_addresses = list(node_port_addresses)
        self._netns = netns
        self._netlink: NetlinkSocket | None = None
        self._chains: set[str] = set()
        self._owners: dict[ElementKey, str] = {}
        self._shared: dict[ElementKey, int] = {}
        self._waiting: dict[ElementKey, list[str]] = {}
        self.rendered: dict[str, Rendered] = {}
        """What each Service contributes, by "namespace/name", as asked for (collisions included)."""

    def socket(self) -> NetlinkSocket:
        """The netfilter socket in the node's namespace."""
        if self._netlink is None:
            self._netlink = open_netlink(self._netns, NETLINK_NETFILTER)
        return self._netlink

    def load(self, rendered: Mapping[str, Rendered]) -> dict[str, Exception]:
        """Make the table hold exactly this, whatever it held before; see `change` for the result.

        A table left by a former process with the same skeleton is kept, and its content replaced in one transaction, so that
        connections never see a gap.
        """
        keep = self._fitting()
        if not keep:
            run_script(skeleton(self.name, self._pod_cidrs, self._node_port_addresses), self._netns)
            completion = ElementBatch(self.name)
            add_learning(completion, self.name)
            completion.commit(self.socket())
        self._chains = self._read_chains()
        self._owners, self._shared, self._waiting, self.rendered = {}, {}, {}, {}
        batch = ElementBatch(self.name)
        if keep:
            for set_name in _SETS:
                batch.flush(set_name)
        return self._apply(dict(rendered), batch)

    def change(self, rendered: Mapping[str, Rendered]) -> dict[str, Exception]:
        """Replace what some Services contribute.

        Returns:
          Services that the kernel refused, with its words; they contribute nothing now. All others are in place.

        Raises:
          StateMismatch: the table is not as we left it; call `load`.
        """
        return self._apply(dict(rendered), ElementBatch(self.name))

    def _fitting(self) -> bool:
        if not table_exists(self.socket(), self.name):
            return False
        return version_chain(self._pod_cidrs) in self._read_chains() and not self._node_port_addresses

    def _read_chains(self) -> set[str]:
        found = set()
        for answer in self.socket().dump(_GETCHAIN, _INET_HEADER, "listing chains"):
            fields = dict(attributes(answer, 4))
            if cstring(fields[1]) == self.name:
                found.add(cstring(fields[3]))
        return found

    def _apply(self, wanted: dict[str, Rendered], batch: ElementBatch) -> dict[str, Exception]:
        try:
            self._commit(wanted, batch)
            return {}
        except StateMismatch:
            raise
        except Exception as error:
            if len(wanted) <= 1 and not batch.started_flushed:
                failed: dict[str, Exception] = {key: error for key in wanted}
                # A Service that cannot be written must not keep its former elements either: they are out of date.
                self._commit({key: EMPTY for key in wanted}, ElementBatch(self.name))
                return failed
        # Something in the batch was refused; halves find the culprit, and everybody else gets in.
        failures: dict[str, Exception] = {}
        if batch.started_flushed:
            self._commit({}, batch.only_flushes())
        keys = list(wanted)
        middle = max(1, len(keys) // 2)
        for part in (keys[:middle], keys[middle:]):
            if part:
                failures.update(self._apply({key: wanted[key] for key in part}, ElementBatch(self.name)))
        return failures

    def _commit(self, wanted: dict[str, Rendered], batch: ElementBatch) -> None:
        plan = _Plan(self)
        for key, rendered in wanted.items():
            plan.replace(key, rendered)
        plan.settle_waiting()
        new_chains = [pick for pick in plan.picks if pick.name not in self._chains]
        for pick in _ordered(new_chains):
            add_pick_chain(batch, self.name, pick)
        new_memories = [memory for memory in plan.memories if learn_name(*memory) not in self._chains]
        for memory in new_memories:
            add_learn_chain(batch, self.name, *memory)
        plan.write(batch)
        batch.commit(self.socket())
        self._chains.update(pick.name for pick in new_chains)
        self._chains.update(learn_name(*memory) for memory in new_memories)
        plan.remember()

    def rendered_keys(self) -> Collection[ElementKey]:
        """All elements that belong to some Service."""
        return self._owners.keys()

    def elements(self, set_name: str) -> list[tuple[bytes, bytes]]:
        """Read a set or map back from the kernel."""
        return read_elements(self.socket(), self.name, set_name)

    def delete_elements(self, set_name: str, keys: Iterable[bytes]) -> None:
        """Delete elements of a dynamic map one by one; what has expired meanwhile is fine."""
        for key in keys:
            batch = ElementBatch(self.name)
            batch.delete(set_name, [Element(key)])
            try:
                batch.commit(self.socket())
            except StateMismatch:
                continue

    def remove(self) -> None:
        """Delete the table."""
        delete_table(self.name, self._netns)
        self._owners, self._shared, self._waiting, self.rendered, self._chains = {}, {}, {}, {}, set()

    def close(self) -> None:
        """Close the socket; the table goes on working."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None


_SETS = [
    f"{name}{version}"
    for version in (4, 6)
    for name in (
        "service", "port", "endpoint", "local", "port_endpoint", "port_local", "cluster_ip", "hairpin", "limited", "allowed", "affinity", "sticky", "port_sticky",
    )
]  # fmt: skip


def _ordered(picks: Iterable[Pick]) -> list[Pick]:
    # Chains with a local part jump to the plain ones, so those must exist before.
    return sorted(picks, key=lambda pick: (pick.local is not None, pick.name))


class _Plan:
    """One transaction being put together: differences against the table's memory, not yet remembered."""

    def __init__(self, table: ProxyTable) -> None:
        self._table = table
        self._owners = table._owners
        self._removed: dict[ElementKey, bytes] = {}
        self._added: dict[ElementKey, bytes] = {}
        self._owner_changes: dict[ElementKey, str | None] = {}
        self._shared_changes: dict[ElementKey, int] = {}
        self._waiting_changes: dict[ElementKey, list[str]] = {}
        self._replaced: dict[str, Rendered] = {}
        self.picks: set[Pick] = set()
        self.memories: set[tuple[int, int]] = set()

    def _owner(self, key: ElementKey) -> str | None:
        if key in self._owner_changes:
            return self._owner_changes[key]
        return self._owners.get(key)

    def replace(self, service: str, new: Rendered) -> None:
        old = self._table.rendered.get(service, EMPTY)
        self._replaced[service] = new
        self.picks |= new.picks
        self.memories |= new.memories
        for key, data in old.elements.items():
            if new.elements.get(key) != data and self._owner(key) == service:
                self._removed[key] = data
                self._owner_changes[key] = None
        before, owners, changes, added = old.elements, self._owners, self._owner_changes, self._added
        for key, data in new.elements.items():
            if key not in owners and key not in changes:
                changes[key] = service
                added[key] = data
            elif before.get(key) != data or owners.get(key) != service:
                self._claim(service, key, data)
        for key in old.shared - new.shared:
            self._shared_changes[key] = self._shared_changes.get(key, 0) - 1
        for key in new.shared - old.shared:
            self._shared_changes[key] = self._shared_changes.get(key, 0) + 1

    def _claim(self, service: str, key: ElementKey, data: bytes) -> None:
        owner = self._owner(key)
        if owner is None or owner == service:
            self._owner_changes[key] = service
            self._added[key] = data
            return
        waiting = self._waiting_changes.setdefault(key, list(self._table._waiting.get(key, ())))
        if service not in waiting:
            waiting.append(service)

    def settle_waiting(self) -> None:
        """Give keys that were let go to those who wait for them."""
        if not self._table._waiting and not self._waiting_changes:
            return
        for key in [key for key, owner in self._owner_changes.items() if owner is None]:
            waiting = self._waiting_changes.get(key, self._table._waiting.get(key))
            for service in waiting or ():
                rendered = self._replaced.get(service) or self._table.rendered.get(service, EMPTY)
                data = rendered.elements.get(key)
                if data is not None:
                    self._owner_changes[key] = service
                    self._added[key] = data
                    self.picks |= rendered.picks
                    self.memories |= rendered.memories
                    break

    def write(self, batch: ElementBatch) -> None:
        removed: dict[str, list[Element]] = {}
        added: dict[str, list[bytes]] = {}
        for key in self._removed:
            removed.setdefault(key[0], []).append(_element(key, b""))
        for key, data in self._added.items():
            name, raw = key
            if (encoded := added.get(name)) is None:
                encoded = added[name] = []
            encoded.append(_element(key, data).encode() if name in _RANGES else encode_element(raw, data))
        for key, difference in self._shared_changes.items():
            before = self._table._shared.get(key, 0)
            if before == 0 and before + difference > 0:
                added.setdefault(key[0], []).append(encode_element(key[1]))
            elif before > 0 and before + difference == 0:
                removed.setdefault(key[0], []).append(Element(key[1]))
        for set_name, elements in removed.items():
            batch.delete(set_name, elements)
        for set_name, encoded in added.items():
            batch.add_encoded(set_name, encoded)

    def remember(self) -> None:
        table = self._table
        for key, owner in self._owner_changes.items():
            if owner is None:
                table._owners.pop(key, None)
            else:
                table._owners[key] = owner
        for key, difference in self._shared_changes.items():
            count = table._shared.get(key, 0) + difference
            if count:
                table._shared[key] = count
            else:
                table._shared.pop(key, None)
        table._waiting.update(self._waiting_changes)
        for service, rendered in self._replaced.items():
            if rendered.elements or rendered.shared:
                table.rendered[service] = rendered
            else:
                table.rendered.pop(service, None)


def _element(key: ElementKey, data: bytes) -> Element:
    name, raw = key
    if name in _RANGES:
        half = len(raw) // 2
        return Element(raw[:half], data, raw[half:])
    return Element(raw, data)
