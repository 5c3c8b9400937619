"""A bound on the bytes that a stream of rows holds, that cannot bring the stream to a stand."""

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CONNECTION = 64 << 10  # bytes that a request is counted with beside its body: what is read at once


_Queue = list[tuple[int, asyncio.Future[None]]]  # a heap


class _Row:
    held = got = 0
    flying = False


class Memory:
    """Bytes of bodies and of results that wait, over all rows, on one event loop. Rows are numbered in their order.

    Over `limit`, or while rows in flight wait, no row begins but the first unfinished one; and of those in flight
    (which may hold what others need: a turn, a place) only the first goes on; and these only where no result waits, as
    taking it frees memory. So about the limit and the largest body are held at most, and there is always one that goes
    on, as long as results are taken when they are there.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._waiting = 0  # of `held`, results
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # unfinished
        self._flying: list[int] = []  # a heap; those that have landed are popped late
        self._outside: _Queue = []  # heaps of who waits
        self._inside: _Queue = []

    def enter(self, row: int) -> None:
        """A row comes; the earlier, the smaller its number."""
        self._rows[row] = _Row()

    async def begin(self, row: int) -> None:
        """Wait until the row may ask a server. It must not hold a turn or a place yet."""
        await self._hold(row, _CONNECTION - self._rows[row].held, self._outside, self._first, self._inside)

    @contextmanager
    def flight(self, row: int) -> Iterator[None]:
        """While the row holds a turn or a place."""
        state = self._rows[row]
        state.flying = True
        heapq.heappush(self._flying, row)
        try:
            yield
        finally:
            state.flying = False
            self._wake()

    async def take(self, row: int, size: int) -> float:
        """Wait until a row in flight may hold `size` more bytes of its body; return the seconds waited."""
        start, state = time.monotonic(), self._rows[row]
        state.got += size
        await self._hold(row, state.got + _CONNECTION - state.held, self._inside, self._first_flying)
        return time.monotonic() - start

    def landed(self, row: int) -> None:
        """The row's connection is closed; its body stays."""
        state = self._rows[row]
        self._give(state.held - state.got)
        state.held = state.got

    def empty(self, row: int) -> None:
        """The row begins anew."""
        state = self._rows[row]
        self._give(state.held)
        state.held = state.got = 0

    def leave(self, row: int, kept: int) -> None:
        """The row is finished; `kept` bytes are its result's, until that is `taken`."""
        self._waiting += kept
        self._give(self._rows.pop(row).held - kept)

    def taken(self, kept: int) -> None:
        """A result of so many bytes does not wait any more."""
        self._waiting -= kept
        self._give(kept)

    def _give(self, size: int) -> None:
        self.held -= size
        self._wake()

    async def _hold(
        self, row: int, size: int, queue: _Queue, first: Callable[[], int | None], before: _Queue | None = None
    ) -> None:
        if size <= 0:
            return
        while (before or self.held + size > self.limit) and row != first():
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(queue, (row, ready))
            await ready
        self.held += size
        self._rows[row].held += size
        self._wake()

    def _first(self) -> int | None:
        return None if self._waiting else next(iter(self._rows), None)

    def _first_flying(self) -> int | None:
        while self._flying and not ((state := self._rows.get(self._flying[0])) and state.flying):
            heapq.heappop(self._flying)
        return self._flying[0] if self._flying and not self._waiting else None

    def _wake(self) -> None:
        """Let the first of each queue look again."""
        for queue, first in ((self._inside, self._first_flying), (self._outside, self._first)):
            while queue and queue[0][1].done():  # cancelled
                heapq.heappop(queue)
            if queue and (self.held < self.limit or queue[0][0] == first()):
                heapq.heappop(queue)[1].set_result(None)
