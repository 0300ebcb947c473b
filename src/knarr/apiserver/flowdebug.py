"""/debug/api_priority_and_fairness/: tables of levels, queues and requests, for people.

Source: apiserver util/flowcontrol/apf_controller_debug.go.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from knarr.apiserver.flowlevels import PriorityLevel
from knarr.apiserver.flowqueues import ESTIMATED_SECONDS, Queue

if TYPE_CHECKING:
    from knarr.apiserver.flow import Seat

PATH = "/debug/api_priority_and_fairness/"
LEVEL_COLUMNS = (
    "PriorityLevelName", "ActiveQueues", "IsIdle", "IsQuiescing", "WaitingRequests", "ExecutingRequests", "DispatchedRequests", "RejectedRequests",
    "TimedoutRequests", "CancelledRequests",
)  # fmt: skip
QUEUE_COLUMNS = (
    "PriorityLevelName", "Index", "PendingRequests", "ExecutingRequests", "SeatsInUse", "NextDispatchR", "InitialSeatsSum", "MaxSeatsSum",
    "TotalWorkSum",
)  # fmt: skip
REQUEST_COLUMNS = (
    "PriorityLevelName", "FlowSchemaName", "QueueIndex", "RequestIndexInQueue", "FlowDistingsher", "ArriveTime", "InitialSeats", "FinalSeats",
    "AdditionalLatency", "StartTime",
)  # fmt: skip
DETAIL_COLUMNS = ("UserName", "Verb", "APIPath", "Namespace", "Name", "APIVersion", "Resource", "SubResource")


def table(rows: Iterable[Sequence[object]]) -> bytes:
    """Columns with a comma behind each but the last, padded to the widest of theirs."""
    texts = [[f"{cell}," for cell in row[:-1]] + [str(row[-1])] for row in rows]
    widths = [max(max(len(row[index]) for row in texts) + 1, 8) for index in range(len(texts[0]) - 1)]
    lines = ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + row[-1] for row in texts]
    return ("\n".join(lines) + "\n").encode()


def _flag(value: bool) -> str:
    return "true" if value else "false"


def levels(found: Sequence[PriorityLevel], leaving: frozenset[str]) -> bytes:
    """One line for each level; `leaving` are those that are configured no more."""
    rows: list[Sequence[object]] = [LEVEL_COLUMNS]
    for level in sorted(found, key=lambda one: one.name):
        idle = not level.inside and not level.waiting
        rows.append((
            level.name, sum(1 for _ in _active(level)), _flag(idle), _flag(level.name in leaving), level.waiting, level.inside, level.dispatched,
            level.rejected, level.timed_out, level.cancelled,
        ))  # fmt: skip
    return table(rows)


def queues(found: Sequence[PriorityLevel]) -> bytes:
    """One line for each queue; all requests take one seat each."""
    rows: list[Sequence[object]] = [QUEUE_COLUMNS]
    for level in found:
        for queue in level.set.queues if level.set is not None else ():
            count, running = len(queue.waiting), queue.running
            rows.append((
                level.name, queue.index, count, running, running, f"{queue.next_dispatch:.8f}ss", count, count, f"{count * ESTIMATED_SECONDS:.8f}ss",
            ))  # fmt: skip
    return table(rows)


def _active(level: PriorityLevel) -> Iterator[Queue]:
    return (queue for queue in (level.set.queues if level.set is not None else ()) if queue.waiting or queue.running)


def requests(found: Sequence[PriorityLevel], *, details: bool) -> bytes:
    """One line for each request that waits or runs."""
    rows: list[Sequence[object]] = [(*REQUEST_COLUMNS, *DETAIL_COLUMNS) if details else REQUEST_COLUMNS]
    for level in found:
        places: dict[int, int] = {}
        for seat in sorted(level.present, key=lambda one: one.arrived):
            queue = seat.waits_in.index if seat.waits_in is not None else -1
            place = -1
            if queue >= 0:
                place = places[queue] = places.get(queue, -1) + 1
            rows.append(_request(level, seat, queue, place, details=details))
    return table(rows)


def _request(level: PriorityLevel, seat: Seat, queue: int, place: int, *, details: bool) -> Sequence[object]:
    schema, _, distinguisher = seat.classified.flow.partition("/")
    row = (
        level.name, schema, queue, place, distinguisher, _moment(seat.arrived), 1, 0, "0s",
        _moment(seat.started) if seat.started else "0001-01-01T00:00:00Z",
    )  # fmt: skip
    if not details:
        return row
    asked = seat.attributes
    version = f"{asked.group}/{asked.version}" if asked.group else asked.version
    return (*row, asked.user.name, asked.verb, seat.path, asked.namespace, asked.name, version, asked.resource, asked.subresource)


def _moment(seconds: float) -> str:
    """A time of the loop's clock as RFC 3339."""
    wall = time.time() - time.monotonic() + seconds
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall)) + f".{int(wall % 1 * 1e9):09d}Z"
