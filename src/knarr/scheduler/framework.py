"""The framework: extension points, their answers, and the profile that runs the plugins.

Upstream's points with one difference: filters and scores answer for many nodes at once. A
filter gets the rows still in the running and gives None ("all pass") or a `Rejection` for the
rows that fail; a score gives one number per row. An expected "no" is an answer, never an
exception; PluginError is a fault of this cycle and sends the pod to the error back-off.

Callers: `algorithm`, `preemption`, `scheduler`, `why`. Source: kube-scheduler framework interface.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Ints, Rows
from knarr.scheduler.events import ClusterEvent
from knarr.scheduler.nodes import NodeTable
from knarr.scheduler.podinfo import Pod, PodInfo, PodShape

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle

MAXIMUM_SCORE = 100


class PluginError(Exception):
    """A plugin could not decide: the pod is tried again after a back-off."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A "no" that holds for the pod as a whole (pre-filter, reserve, permit, pre-enqueue).

    `unresolvable` means that removing pods would not help; `pending` that the pod waits for
    something that will come by itself (it skips the back-off then).
    """

    plugin: str
    reason: str
    unresolvable: bool = True
    pending: bool = False


class Rejection:
    """A "no" for some rows.

    `parts` are (reason, mask) pairs, mask over `rows`, or None for all of them: a row's reasons
    are those whose mask is true there. `unresolvable` likewise, one answer or a mask.
    """

    __slots__ = ("parts", "plugin", "rows", "unresolvable")

    def __init__(self, plugin: str, rows: Rows, parts: list[tuple[str, Bools | None]], unresolvable: bool | Bools) -> None:
        self.plugin = plugin
        self.rows = rows
        self.parts = parts
        self.unresolvable = unresolvable

    def reasons(self, index: int) -> list[str]:
        """Give the reasons of rows[index]."""
        return [reason for reason, mask in self.parts if mask is None or mask[index]]

    def count_into(self, histogram: dict[str, int]) -> None:
        for reason, mask in self.parts:
            number = len(self.rows) if mask is None else int(np.count_nonzero(mask))
            if number:
                histogram[reason] = histogram.get(reason, 0) + number

    def resolvable_rows(self) -> Rows:
        """Rows where removing pods may help."""
        if isinstance(self.unresolvable, bool):
            return self.rows[:0] if self.unresolvable else self.rows
        return self.rows[~self.unresolvable]


@dataclass(slots=True)
class Diagnosis:
    """Why a pod found no node, in one cycle.

    `considered` limits the nodes that were looked at (None: all of them); the others then have
    `absent_reason`. `pre_filter` is set when the pod was refused before any node was looked at.
    """

    rejections: list[Rejection] = field(default_factory=list)
    pre_filter: Refusal | None = None
    considered: Rows | None = None
    absent_reason: str = ""
    extender_reasons: dict[int, tuple[str, bool]] = field(default_factory=dict)
    plugins: set[str] = field(default_factory=set)
    pending_plugins: set[str] = field(default_factory=set)
    post_filter_message: str = ""
    nodes: int = 0
    cycle: Cycle | None = None
    """What the plugins worked out, for their post_filter."""

    def add(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)
        self.plugins.add(rejection.plugin)

    def histogram(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for rejection in self.rejections:
            rejection.count_into(counts)
        for reason, _ in self.extender_reasons.values():
            counts[reason] = counts.get(reason, 0) + 1
        if self.considered is not None and self.absent_reason and len(self.considered) < self.nodes:
            counts[self.absent_reason] = counts.get(self.absent_reason, 0) + self.nodes - len(self.considered)
        return counts

    def message(self) -> str:
        """Put the refusal into upstream's words: "0/3 nodes are available: 1 Insufficient cpu, ..."."""
        text = f"0/{self.nodes} nodes are available:"
        if self.pre_filter is not None and self.pre_filter.reason:
            text += f" {self.pre_filter.reason}."
        elif self.pre_filter is None:
            lines = sorted(f"{number} {reason}" for reason, number in self.histogram().items())
            if lines:
                text += f" {', '.join(lines)}."
        if self.post_filter_message:
            text += f" {self.post_filter_message}"
        return text

    def per_node(self, table: NodeTable) -> dict[str, list[str]]:
        """Give the reasons by node name; nodes without an own entry are left out."""
        result: dict[str, list[str]] = {}
        for rejection in self.rejections:
            for index, row in enumerate(rejection.rows.tolist()):
                info = table.infos[row]
                if info is not None:
                    result.setdefault(info.name, []).extend(rejection.reasons(index))
        for row, (reason, _) in self.extender_reasons.items():
            info = table.infos[row]
            if info is not None:
                result.setdefault(info.name, []).append(reason)
        return result


class Cycle:
    """What plugins work out once per scheduling cycle and hand to their later points."""

    __slots__ = ("data", "pod", "skipped_filters", "table")

    def __init__(self, table: NodeTable, pod: PodInfo) -> None:
        self.table = table
        self.pod = pod
        self.data: dict[str, Any] = {}
        self.skipped_filters: set[str] = set()

    @property
    def shape(self) -> PodShape:
        return self.pod.shape


SKIP = object()
"""Answer of pre_filter: this plugin's filter has nothing to say about the pod."""

Hint = Callable[[PodInfo, Pod | None, Pod | None], bool]
"""(waiting pod, old object, new object) -> may the pod be schedulable now."""


class Plugin:
    """Base of all plugins: does nothing at any point. Subclasses override the points they serve.

    `follows_pods` marks filters whose answer depends on the pods placed on nodes other than by
    requests alone; preemption asks them again for each simulation.
    """

    name = ""
    has_filter = False
    has_score = False
    follows_pods = False
    normalizes = False

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        self.handle = handle

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        """Cluster events that may make a pod schedulable that this plugin refused; None: always worth a try."""
        return ()

    def pre_enqueue(self, pod: PodInfo) -> Refusal | None:
        """Keep a pod out of the active queue for now."""
        return None

    def pre_filter(self, cycle: Cycle) -> Any:
        """Prepare the cycle. None, SKIP, a Refusal, or a frozenset of the only node names worth a look."""
        return None

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        """None when all rows pass, otherwise (mask of the rows that pass, the rejection of the others)."""
        return None

    def post_filter(self, cycle: Cycle) -> str:
        """No node was found: do what may help later; gives what to tell about it. (Preemption is run apart from this.)"""
        return ""

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        """Raw scores of feasible rows; None when the plugin makes no difference between them."""
        return None

    def normalize(self, cycle: Cycle, rows: Rows, scores: npt.NDArray[Any]) -> Ints:
        """Bring raw scores to 0..100."""
        return scores

    def reserve(self, cycle: Cycle, node_name: str) -> Refusal | None:
        return None

    def unreserve(self, cycle: Cycle, node_name: str) -> None:
        """Undo reserve; also called when reserve never ran."""

    def permit(self, cycle: Cycle, node_name: str) -> Refusal | None:
        return None

    def pre_bind_skips(self, cycle: Cycle, node_name: str) -> bool:
        """Whether pre_bind has nothing to do: then no task is needed for it."""
        return True

    async def pre_bind(self, cycle: Cycle, node_name: str) -> None:
        """Do what must be done before the binding.

        Raises:
          PluginError: the pod is to be scheduled anew.
        """


def reject(plugin: Plugin, rows: Rows, ok: Bools, reason: str, *, unresolvable: bool) -> tuple[Bools, Rejection] | None:
    """Turn a mask of passing rows into a filter's answer."""
    if ok.all():
        return None
    return ok, Rejection(plugin.name, rows[~ok], [(reason, None)], unresolvable)


def normalize_by_maximum(scores: npt.NDArray[Any], *, reverse: bool = False) -> Ints:
    """Scale scores so that the highest becomes 100 (or, reversed, 0).

    Source: plugins/helper DefaultNormalizeScore.
    """
    highest = int(scores.max()) if scores.size else 0
    if highest == 0:
        return np.full(scores.shape, MAXIMUM_SCORE if reverse else 0, dtype=np.int64)
    scaled: Ints = scores.astype(np.int64) * MAXIMUM_SCORE // highest
    return MAXIMUM_SCORE - scaled if reverse else scaled


class Profile:
    """The plugins of one scheduler name, in order, with the weights of the scores.

    Those named by `everywhere` (None: all) act at all points but where they, or "*", are disabled; those enabled at a point act there.
    Source: framework/runtime/framework.go (expandMultiPointPlugins).
    """

    def __init__(
        self,
        name: str,
        plugins: Sequence[Plugin],
        *,
        everywhere: Collection[str] | None = None,
        enabled_points: Mapping[str, Collection[str]] | None = None,
        disabled_points: Mapping[str, Collection[str]] | None = None,
        weights: dict[str, int],
        percentage_of_nodes_to_score: int | None = None,
    ) -> None:
        self.name = name
        self.plugins = tuple(plugins)
        self.percentage_of_nodes_to_score = percentage_of_nodes_to_score
        self.weights = weights
        on, off = enabled_points or {}, disabled_points or {}

        def acts(name: str, point: str) -> bool:
            if name in on.get(point, ()):
                return True
            left_out = off.get(point, ())
            return (everywhere is None or name in everywhere) and name not in left_out and "*" not in left_out

        def at(point: str, method: str) -> tuple[Plugin, ...]:
            base = getattr(Plugin, method)
            return tuple(p for p in plugins if getattr(type(p), method) is not base and acts(p.name, point))

        self.pre_enqueue = at("preEnqueue", "pre_enqueue")
        self.pre_filters = at("preFilter", "pre_filter")
        self.filters = at("filter", "filter")
        self.scores = tuple(p for p in at("score", "score") if weights.get(p.name, 1))
        self.post_filters = at("postFilter", "post_filter")
        self.reserves = at("reserve", "reserve")
        self.permits = at("permit", "permit")
        self.pre_binds = at("preBind", "pre_bind")
        self.post_filter_enabled = any(p.name == "DefaultPreemption" for p in plugins) and acts("DefaultPreemption", "postFilter")

    def plugin(self, name: str) -> Plugin | None:
        return next((p for p in self.plugins if p.name == name), None)

    def run_pre_filters(self, cycle: Cycle, diagnosis: Diagnosis) -> frozenset[str] | None:
        """Prepare the cycle; fills `diagnosis.pre_filter` on a refusal.

        Returns:
          The only node names worth a look, or None for all.
        """
        names: frozenset[str] | None = None
        narrowing: list[str] = []
        for plugin in self.pre_filters:
            answer = plugin.pre_filter(cycle)
            if answer is None:
                continue
            if answer is SKIP:
                cycle.skipped_filters.add(plugin.name)
            elif isinstance(answer, Refusal):
                diagnosis.pre_filter = answer
                (diagnosis.pending_plugins if answer.pending else diagnosis.plugins).add(plugin.name)
                return None
            else:
                narrowing.append(plugin.name)
                names = answer if names is None else names & answer
                if not names:
                    reason = "node(s) didn't satisfy plugin(s) [" + " ".join(narrowing) + "] simultaneously"
                    if len(narrowing) == 1:
                        reason = f"node(s) didn't satisfy plugin {narrowing[0]}"
                    diagnosis.pre_filter = Refusal(plugin.name, reason)
                    diagnosis.plugins.update(narrowing)
                    return None
        if names is not None:
            diagnosis.plugins.update(narrowing)
            diagnosis.absent_reason = "node(s) didn't satisfy plugin(s) [" + " ".join(sorted(narrowing)) + "]"
        return names

    def run_filters(self, cycle: Cycle, rows: Rows, diagnosis: Diagnosis | None) -> Rows:
        """Give the rows that pass all filters; each failing row is reported by the first filter it fails."""
        skipped = cycle.skipped_filters
        for plugin in self.filters:
            if plugin.name in skipped:
                continue
            answer = plugin.filter(cycle, rows)
            if answer is not None:
                rows = rows[answer[0]]
                if diagnosis is not None:
                    diagnosis.add(answer[1])
                if not rows.size:
                    break
        return rows

    def reserve(self, cycle: Cycle, node_name: str) -> Refusal | None:
        """Reserve with all plugins and ask for their permission; the caller undoes it after a refusal or a PluginError."""
        for plugin in self.reserves:
            if (refusal := plugin.reserve(cycle, node_name)) is not None:
                return refusal
        for plugin in self.permits:
            if (refusal := plugin.permit(cycle, node_name)) is not None:
                return refusal
        return None

    def run_scores(self, cycle: Cycle, rows: Rows) -> Ints:
        """Give the weighted sum of all scores per row."""
        total = np.zeros(rows.shape, dtype=np.int64)
        for plugin in self.scores:
            scores = plugin.score(cycle, rows)
            if scores is None:
                continue
            if plugin.normalizes:
                scores = plugin.normalize(cycle, rows, scores)
            weight = self.weights.get(plugin.name, 1)
            total += scores * weight if weight != 1 else scores
        return total
