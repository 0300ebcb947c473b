"""The queues of a priority level: shuffle sharding puts a flow into a few of them, fair queueing takes turns among them.

Each flow has a hand of queues, dealt from a hash of its name, and its requests go into the one with least to do: a flow that sends very much fills
its own hand and nobody else's, but for the few whose hands are all within it. Among queues the one is served whose work would be finished
first if all were served at once, at equal rates: the meter R is how far each would have got by now, a queue's own reading is where its next
request begins, moved on by an estimate when a request is taken and put right when it ends.

Here every request takes one seat. Owner: PriorityLevel (flowlevels.py).

Source: apiserver util/shufflesharding, util/flowcontrol/fairqueuing/queueset; KEP-1040.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable

ESTIMATED_SECONDS = 0.003
"""What a request is taken to last until it has ended."""
_MOST_HANDS = 4096


def deal(number: int, deck: int, hand: int) -> tuple[int, ...]:
    """Return a hand of different cards of a deck, as the number shuffles it."""
    remainders: list[int] = []
    for place in range(hand):
        number, remainder = divmod(number, deck - place)
        remainders.append(remainder)
    cards: list[int] = []
    for place, card in enumerate(remainders):
        for earlier in range(place, 0, -1):
            if card >= remainders[earlier - 1]:
                card += 1
        cards.append(card)
    return tuple(cards)


def flow_hash(schema: str, distinguisher: str) -> int:
    """Return the number that a flow's hand is dealt from."""
    return int.from_bytes(hashlib.sha256(f"{schema}\0{distinguisher}".encode()).digest()[:8], "little")


class Queue:
    """One of a level's queues."""

    __slots__ = ("index", "next_dispatch", "running", "waiting")

    def __init__(self, index: int) -> None:
        self.index = index
        self.waiting: deque[Waiter] = deque()
        self.running = 0
        self.next_dispatch = 0.0
        """Where its next request begins, in seat-seconds of the meter."""


class Waiter:
    """A request in a queue."""

    __slots__ = ("arrival", "future", "gone", "queue")

    def __init__(self, queue: Queue, arrival: float, future: asyncio.Future[None]) -> None:
        self.gone = False
        """It has left its queue without having run."""
        self.queue = queue
        self.arrival = arrival
        self.future = future


class QueueSet:
    """See the module's docstring."""

    def __init__(self, clock: Callable[[], float], count: int, hand: int, length: int) -> None:
        self._clock = clock
        self._count = self._hand = 0
        self.length = length
        """How many may wait in one queue."""
        self.queues: list[Queue] = []
        self.seats = 0
        """How many requests may run at once."""
        self.waiting = 0
        self.meter = self.dispatched_at = self.latest = 0.0
        """R now, R when a request was taken last, where that request began."""
        self._requested = 0
        self._active = 0
        """Queues in which somebody waits or runs."""
        self._at = clock()
        self._hands: dict[str, tuple[int, ...]] = {}
        self._robin = 0
        self._turns = 0
        self._busy: dict[int, Queue] = {}
        """Queues in which somebody waits, by index."""
        self.configure(count, hand, length)

    def configure(self, count: int, hand: int, length: int) -> None:
        """Take other settings; queues that are too many stay until nobody is in them."""
        self.length = length
        if (count, hand) != (self._count, self._hand):
            self._count, self._hand = count, min(hand, count)
            self._hands.clear()
            while len(self.queues) < count:
                self.queues.append(Queue(len(self.queues)))

    def pick(self, flow: str) -> Queue:
        """Return the queue for the next request of a flow "schema/distinguisher"."""
        hand = self._hands.get(flow)
        if hand is None:
            if len(self._hands) >= _MOST_HANDS:
                self._hands.clear()
            schema, _, distinguisher = flow.partition("/")
            hand = self._hands[flow] = deal(flow_hash(schema, distinguisher), self._count, self._hand)
        # Not always from the first card on, so that flows with some queues in common do not all prefer the same.
        offset = self._turns % len(hand)
        self._turns += 1
        queues = self.queues
        best = queues[hand[offset]]
        if self.waiting:
            for place in range(1, len(hand)):
                queue = queues[hand[(offset + place) % len(hand)]]
                if len(queue.waiting) < len(best.waiting):
                    best = queue
        return best

    def _advance(self) -> None:
        """Move the meter on; before anything changes."""
        now = self._clock()
        if self._active:
            self.meter += min(self._requested, self.seats) / self._active * (now - self._at)
        self._at = now

    def _arrive(self, queue: Queue) -> None:
        self._advance()
        if not queue.waiting and not queue.running:
            queue.next_dispatch = self.meter
            self._active += 1
        self._requested += 1

    def _take(self, queue: Queue) -> None:
        queue.running += 1
        self.dispatched_at, self.latest = self.meter, queue.next_dispatch
        queue.next_dispatch += ESTIMATED_SECONDS

    def run(self, queue: Queue) -> None:
        """A request comes and runs at once."""
        self._arrive(queue)
        self._take(queue)

    def wait(self, queue: Queue, future: asyncio.Future[None]) -> Waiter:
        """A request comes and waits."""
        self._arrive(queue)
        waiter = Waiter(queue, self.meter, future)
        queue.waiting.append(waiter)
        self.waiting += 1
        self._busy[queue.index] = queue
        self._bound(queue)
        return waiter

    def next(self) -> Waiter:
        """Take the request whose turn it is; there must be one. It runs from now on."""
        self._advance()
        count = len(self.queues)
        start = self._robin + 1
        # Of equals the first behind the one that was served last.
        queue = min(self._busy.values(), key=lambda one: (one.next_dispatch, (one.index - start) % count))
        self._robin = queue.index
        waiter = queue.waiting.popleft()
        self._less(queue)
        self._take(queue)
        self._bound(queue)
        return waiter

    def _less(self, queue: Queue) -> None:
        self.waiting -= 1
        if not queue.waiting:
            del self._busy[queue.index]

    def forget(self, waiter: Waiter) -> None:
        """A request goes away without having run."""
        self._advance()
        queue = waiter.queue
        queue.waiting.remove(waiter)
        self._less(queue)
        self._gone(queue)
        self._bound(queue)

    def finish(self, queue: Queue, seconds: float) -> None:
        """A request has run for so long."""
        self._advance()
        queue.running -= 1
        queue.next_dispatch -= ESTIMATED_SECONDS - seconds
        self._bound(queue)
        self._gone(queue)

    def _gone(self, queue: Queue) -> None:
        self._requested -= 1
        if queue.waiting or queue.running:
            return
        self._active -= 1
        while len(self.queues) > self._count and not self.queues[-1].waiting and not self.queues[-1].running:
            self.queues.pop()

    def _bound(self, queue: Queue) -> None:
        """Nobody begins before he came: a queue that did not use its share has not saved it."""
        if queue.waiting and queue.next_dispatch < queue.waiting[0].arrival:
            queue.next_dispatch = queue.waiting[0].arrival

    def bounds(self, discount: float = 0.0) -> tuple[float, float]:
        """Return the least and the greatest of the places where waiting queues' next requests begin, less so much for each that runs."""
        starts = [queue.next_dispatch - discount * queue.running for queue in self._busy.values()]
        return (min(starts), max(starts)) if starts else (0.0, 0.0)
