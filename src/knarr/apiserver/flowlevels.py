"""Seats of the priority levels: taking one, waiting for one in a queue (flowqueues.py), and lending what a level does not use.

Every ADJUSTMENT_SECONDS each level's limit is worked out anew between what it keeps in any case and what it may borrow at most, in
proportion to the demand of the last while. Owner: FlowControl. Bound: the queues of each level; full means 429 with Retry-After.

Source: apiserver util/flowcontrol (apf_controller.go updateBorrowing, conc_alloc.go, fairqueuing/queueset); KEP-1040.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from knarr.api import errors
from knarr.api.types import Object
from knarr.apiserver.flowqueues import Queue, QueueSet

if TYPE_CHECKING:
    from knarr.apiserver.flow import Seat

QUEUE_WAIT_SECONDS = 15.0
ADJUSTMENT_SECONDS = 10.0
SMOOTHING = 0.977
FULL = "too many requests, please try again later"
LEAST_TARGET = 0.001


class Demand:
    """How many seats a level could have used over time: average, spread, peak; and smoothed, which falls slower than it grows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seats = 0
        self._since = self._at = clock()
        self._sum = self._squares = 0.0
        self._peak = 0
        self.average = self.deviation = self.smoothed = 0.0
        self.high_watermark = 0

    def change(self, step: int) -> None:
        now, seats = self._clock(), self._seats
        elapsed = now - self._at
        self._sum += seats * elapsed
        self._squares += seats * seats * elapsed
        self._at = now
        self._seats = seats = seats + step
        if seats > self._peak:
            self._peak = seats

    def close_period(self) -> None:
        """Work out the figures of the time since the last call."""
        self.change(0)
        elapsed = self._at - self._since
        self.average = self._sum / elapsed if elapsed > 0 else float(self._seats)
        mean_square = self._squares / elapsed if elapsed > 0 else float(self._seats * self._seats)
        self.deviation = math.sqrt(max(0.0, mean_square - self.average * self.average))
        self.high_watermark = self._peak
        envelope = self.average + self.deviation
        self.smoothed = max(envelope, SMOOTHING * self.smoothed + (1 - SMOOTHING) * envelope)
        self._since, self._sum, self._squares, self._peak = self._at, 0.0, 0.0, self._seats


class Place:
    """What a request has while it runs."""

    __slots__ = ("queue", "since")

    def __init__(self, queue: Queue | None, since: float) -> None:
        self.queue = queue
        self.since = since


class PriorityLevel:
    """Seats, and the queues before them."""

    def __init__(self, name: str, clock: Callable[[], float] | None = None) -> None:
        self.name = name
        self.uid = ""
        self.exempt = False
        self.seats = 0
        """The limit for now."""
        self.nominal = self.least = self.most = 0
        """The limit as configured, what is left of it when all is lent that may be, and what it becomes with all that may be borrowed."""
        self.target = 0.0
        """What it was to have at the last adjustment, if others did not want it."""
        self.inside = 0
        self.rejected = self.dispatched = self.timed_out = self.cancelled = 0
        self._clock = clock or asyncio.get_running_loop().time
        self.demand = Demand(self._clock)
        self.present: set[Seat] = set()
        """Requests that wait or run."""
        self.queuing = False
        """Whether who finds no seat may wait for one."""
        self.set: QueueSet | None = None

    @property
    def waiting(self) -> int:
        return self.set.waiting if self.set is not None else 0

    def configure(self, obj: Object, total_seats: int, total_shares: int) -> None:
        """Take the settings of a PriorityLevelConfiguration; the limit for now becomes the nominal one when that changes."""
        spec = obj.get("spec") or {}
        self.uid = obj["metadata"].get("uid") or ""
        self.exempt = spec.get("type") == "Exempt"
        own = spec.get("exempt" if self.exempt else "limited") or {}
        nominal = math.ceil(total_seats * shares_of(obj) / max(1, total_shares))
        least = nominal - round(nominal * (own.get("lendablePercent") or 0) / 100)
        borrows = own.get("borrowingLimitPercent")
        most = nominal + (total_seats if borrows is None else round(nominal * borrows / 100))
        if (nominal, least, most) != (self.nominal, self.least, self.most):
            self.nominal, self.least, self.most = nominal, least, most
            self.seats = nominal if self.exempt else max(1, nominal)
        response = own.get("limitResponse") or {}
        queuing = response.get("queuing") or {}
        self.queuing = not self.exempt and response.get("type") == "Queue"
        if self.queuing:
            settings = (queuing.get("queues") or 64, queuing.get("handSize") or 8, queuing.get("queueLengthLimit") or 50)
            if self.set is None:
                self.set = QueueSet(self._clock, *settings)
            else:
                self.set.configure(*settings)
        self.limit_to(self.seats)

    def limit_to(self, seats: int) -> None:
        """Change the limit for now; those who wait get what is free."""
        self.seats = seats
        if self.set is not None:
            self.set.seats = seats
        self._dispatch()

    def enter_nowait(self, flow: str) -> Place | None:
        """Take a seat if one is free."""
        found = self.set
        if not self.exempt and (self.inside >= self.seats or (found is not None and found.waiting)):
            return None
        self.inside += 1
        self.dispatched += 1
        self.demand.change(1)
        if found is None or not self.queuing:
            return Place(None, 0.0)
        queue = found.pick(flow)
        found.run(queue)
        return Place(queue, self._clock())

    async def enter(self, flow: str, queued: Callable[[Queue], None] | None = None) -> Place:
        """Take a seat, waiting for it if need be.

        Args:
          flow: "schema/distinguisher".
          queued: called with the queue that the request has been put into.

        Raises:
          StatusError: 429.
        """
        place = self.enter_nowait(flow)
        if place is not None:
            return place
        found = self.set
        queue = found.pick(flow) if found is not None and self.queuing else None
        if found is None or queue is None or len(queue.waiting) >= found.length:
            self.rejected += 1
            raise errors.too_many_requests(FULL, 1)
        waiter = found.wait(queue, asyncio.get_running_loop().create_future())
        if queued is not None:
            queued(queue)
        self.demand.change(1)
        try:
            async with asyncio.timeout(QUEUE_WAIT_SECONDS):
                await waiter.future
        except BaseException as error:
            if waiter.future.done() and not waiter.future.cancelled():
                self.leave(Place(queue, self._clock()))
            else:
                if not waiter.gone:
                    found.forget(waiter)
                self.demand.change(-1)
            if isinstance(error, TimeoutError):
                self.rejected += 1
                self.timed_out += 1
                raise errors.too_many_requests(FULL, 1) from None
            self.cancelled += 1
            raise
        return Place(queue, self._clock())

    def leave(self, place: Place) -> None:
        """Give a seat back; it goes to whose turn it is."""
        self.inside -= 1
        self.demand.change(-1)
        if place.queue is not None and self.set is not None:
            self.set.finish(place.queue, self._clock() - place.since)
        self._dispatch()

    def _dispatch(self) -> None:
        found = self.set
        while found is not None and found.waiting and self.inside < self.seats:
            waiter = found.next()
            if waiter.future.cancelled():
                # In this very moment; he does not know of it yet.
                waiter.gone = True
                found.finish(waiter.queue, 0.0)
                continue
            self.inside += 1
            self.dispatched += 1
            waiter.future.set_result(None)


def shares_of(obj: Object) -> int:
    """The nominal shares of a PriorityLevelConfiguration, with their defaults."""
    spec = obj.get("spec") or {}
    exempt = spec.get("type") == "Exempt"
    shares = (spec.get("exempt" if exempt else "limited") or {}).get("nominalConcurrencyShares")
    return (0 if exempt else 30) if shares is None else int(shares)


# -- lending -------------------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What one level must have at least, may have at most, and would like: lower <= target, lower <= upper."""

    lower: float
    upper: float
    target: float


def adjust(levels: Sequence[PriorityLevel]) -> float:
    """Share the seats of all levels anew, by their demand since the last call; returns the fair share of the targets, 0 if there is none."""
    for level in levels:
        level.demand.close_period()
    limited = [level for level in levels if not level.exempt]
    total = sum(level.nominal for level in levels)
    left = total
    for level in levels:
        if level.exempt:
            level.seats = max(level.least, level.demand.high_watermark)
            left -= level.seats
    wanted = {level.name: max(level.least, min(level.nominal, level.demand.high_watermark)) for level in limited}
    least, enough = sum(level.least for level in limited), sum(wanted.values())
    fair = 0.0
    if left <= least:
        limits = [float(level.least) for level in limited]
    elif left <= enough:
        part = (left - least) / (enough - least)
        limits = [level.least + (wanted[level.name] - level.least) * part for level in limited]
    else:
        claims = [Claim(wanted[level.name], level.most, max(wanted[level.name], level.demand.smoothed)) for level in limited]
        limits, fair = share_out(total, claims)
    for level in limited:
        level.target = max(wanted[level.name], level.demand.smoothed)
    for level, limit in zip(limited, limits, strict=True):
        level.limit_to(max(1, round(limit)))
    return fair


def share_out(total: float, claims: Sequence[Claim]) -> tuple[list[float], float]:
    """Give each claim the same proportion of its target, within its bounds, such that all add up to the total.

    Returns:
      (amounts, proportion). Where the bounds do not allow the total, the nearest that they do allow.
    """
    targets = [max(claim.target, LEAST_TARGET) for claim in claims]

    def given(proportion: float) -> list[float]:
        return [min(claim.upper, max(claim.lower, proportion * target)) for claim, target in zip(claims, targets, strict=True)]

    # The sum grows with the proportion, in straight lines between the places where a claim meets one of its bounds.
    bends = sorted({bound / target for claim, target in zip(claims, targets, strict=True) for bound in (claim.lower, claim.upper)})
    before = 0.0
    for bend in bends:
        if sum(given(bend)) >= total:
            low, high = sum(given(before)), sum(given(bend))
            proportion = bend if high == low else before + (bend - before) * (total - low) / (high - low)
            return given(proportion), proportion
        before = bend
    return given(before), before
