"""Politeness: when which host may be asked again. The limits are a budget of the whole run, divided by its workers.

Parts are cut by hash, so every popular host is in every part, and every worker asks it: `workers` of them at most, each
of which takes its share of the budget without talking to the others.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from ..transforms.outcomes import Drop, reason_of
from .connect import IDLE_MOST_S

_LINGER_S = 0.02  # after a connection, before the next: a busy server learns of the end later than we do
_PAUSE_S, _PAUSE_MOST_S = 1.0, 60.0  # where a host does not say how long it wants to be left alone; doubled each time
_JUDGED_FROM = 100  # rows
_OURS = (  # reason, its usual share of the rows at most, where to look
    ("dns_timeout", 0.05, "the resolver (too slow for so many names: run a caching one on each machine)"),
    ("dns_not_found", 0.4, "the resolver (does `getent hosts example.org` answer on the workers?)"),
    ("connect_timeout", 0.25, "the way out (firewall, NAT table, too many connections: lower fetch.concurrency)"),
    ("connect_refused", 0.25, "the way out (a firewall or proxy that refuses connections)"),
)
_THEN = {
    True: "`vesl run RECIPE --retry failed`",
    False: "download the list into another store (--retry failed leaves alone what counts as gone for good)",
}
_KNOWN = 10_000  # hosts before those with nothing to remember are forgotten


@dataclass
class _Host:
    places: asyncio.Semaphore
    origins: set[str] = field(default_factory=set)  # schemes and ports that were asked for
    users: int = 0  # rows that wait or are served
    idle_until: float = 0.0  # connections may lie open that nobody uses
    next_s: float = 0.0  # the rate allows no request before
    quiet_s: float = 0.0  # it asked for no request before
    refusals: int = 0  # in a row
    last: Drop | None = None  # the latest of them


@dataclass
class Hosts:
    """The turns of one worker, on one event loop.

    `concurrency` connections and `rate_per_s` requests per host are for all `workers` together; None is no limit. Where
    there are more workers than connections, each uses one for its share of the time: after a request of 1 s, with 8
    connections for 32 workers, it leaves the host alone for 3 s. So the limit holds at every moment where it is at
    least the number of workers, and else on average. `close_idle` closes the connections to a host that were kept.
    """

    concurrency: int | None
    rate_per_s: float | None
    patience_s: float
    workers: int = 1
    close_idle: Callable[[str], None] = lambda name: None
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _many: int = 0

    @asynccontextmanager
    async def turn(self, name: str, origin: str = "") -> AsyncIterator[Callable[[], bool]]:
        """Wait until the host may be asked at that origin, and hold a place there meanwhile.

        Yields what tells whether another row asks the host too: then the connection is worth keeping, and is this
        worker's alone to keep. Where some rows go to http and some to https, those of the ones would be idle beside
        those of the others. Raises Drop with the reason of the host's latest refusal where it asked to be left alone
        for more than `patience_s`.
        """
        loop = asyncio.get_running_loop()
        share = self.concurrency / self.workers if self.concurrency else float("inf")
        host, keep = self._host(name, int(max(1, min(share, 1 << 30)))), False

        def awaited() -> bool:
            nonlocal keep
            keep = host.users > 1 and len(host.origins) == 1 and (self.concurrency or self.workers) >= self.workers
            return keep

        host.users += 1
        host.origins.add(origin)
        try:
            await host.places.acquire()
            start, hold_s = loop.time(), 0.0
            try:
                if self._close_idle(name, host):
                    await asyncio.sleep(_LINGER_S)
                await self._until_allowed(host)
                start = loop.time()
                yield awaited
                hold_s = _LINGER_S if self.concurrency else 0.0
            finally:
                host.idle_until = loop.time() + IDLE_MOST_S if keep else host.idle_until
                self._close_idle(name, host)
                hold_s = max(hold_s, (loop.time() - start) * (1 / share - 1))
                if hold_s:
                    loop.call_later(hold_s, host.places.release)
                else:
                    host.places.release()
        finally:
            host.users -= 1

    def _close_idle(self, name: str, host: _Host) -> bool:
        """Where connections were kept before the host's second origin was known; whether there may have been any."""
        if late := len(host.origins) > 1 and host.idle_until > asyncio.get_running_loop().time():
            self.close_idle(name)
            host.idle_until = 0.0
        return late

    def refused(self, name: str, drop: Drop, asked_s: float | None) -> None:
        """The host answered that it is too much: leave it alone for `asked_s`, or ever longer where it does not say."""
        host, now = self._hosts[name], asyncio.get_running_loop().time()
        host.last = drop
        if now >= host.quiet_s:  # else it is the answer to a request that was under way when the pause began
            pause = min(_PAUSE_MOST_S, _PAUSE_S * 2**host.refusals) * random.uniform(1, 1.25)  # noqa: S311
            host.refusals += 1
            asked_s = max(asked_s or 0.0, pause)
        host.quiet_s = max(host.quiet_s, now + (asked_s or 0.0))

    def answered(self, name: str) -> None:
        """The host is well again."""
        self._hosts[name].refusals = 0

    async def _until_allowed(self, host: _Host) -> None:
        loop = asyncio.get_running_loop()
        while (wait_s := host.quiet_s - loop.time()) > 0:
            if wait_s > self.patience_s:
                assert host.last is not None
                raise Drop(host.last.reason, f"{host.last.detail}; the host wants to be left alone for {wait_s:.0f} s")
            await asyncio.sleep(wait_s)
        if self.rate_per_s:
            at = max(host.next_s, loop.time())
            host.next_s = at + self.workers / self.rate_per_s
            await asyncio.sleep(at - loop.time())

    def _host(self, name: str, places: int) -> _Host:
        if name not in self._hosts:
            if len(self._hosts) >= max(_KNOWN, self._many):
                now = asyncio.get_running_loop().time()
                kept = {n: h for n, h in self._hosts.items() if h.users or max(h.next_s, h.quiet_s, h.idle_until) > now}
                self._hosts, self._many = kept, 2 * len(kept)  # many may be quiet for long: not to be sifted each time
            self._hosts[name] = _Host(asyncio.Semaphore(places))
        return self._hosts[name]


def network_hint(rows: int, failed: Mapping[str, int]) -> str | None:
    """A line for the person who runs it, where more of the rows failed in one way than a dead web explains, or None.

    Old lists of links lose a tenth or two of their names, and some hosts never answer; a resolver that says nothing,
    or a network that connects to nothing, is on our side.
    """
    for reason, share, cause in _OURS:
        if rows >= _JUDGED_FROM and (count := failed.get(reason, 0)) > share * rows:
            return (
                f"download: {count:,} of {rows:,} rows ended as {reason}, more than a dead web explains: "
                f"look at {cause} first, then {_THEN[reason_of('download', reason).transient]}"
            )
    return None


def retry_after(value: str, now: datetime | None = None) -> float | None:
    """Read a Retry-After header: seconds, or an HTTP date. None where it is neither; never negative."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:12]), 10**9))
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())
