"""Fetch what strangers' URLs name: a stream with about a thousand requests in flight. Download calls it.

    submit -> turn at the host (hosts) -> place among those in flight -> request (request, connect) -> `use` in a thread

One event loop in a thread of its own serves all parts of a worker. Each URL has a result of its own, so that a slow one
leaves no connection idle and no other waiting, as long as more are submitted than are in flight.
"""

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from ..transforms.options import operational
from ..transforms.outcomes import Drop, reason_of
from .connect import close_idle, open_session
from .hosts import Hosts, retry_after
from .memory import Memory
from .request import Fetched, RefusedError, ask, parse, printable, reason_for
from .respect import RespectRule, Wishes, check_headers
from .stage import Place

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

T = TypeVar("T")

_SPARE_FILES = 256  # open files beside the connections: the store's, the libraries'
_FILE_BYTES, _FILE_REDIRECTS = 1 << 20, 5  # of robots.txt and its like
_RETRY_S = 1.0  # before the first retry; doubled each time


@dataclass(frozen=True)
class FetchRule:
    """Limits of a fetch. `allow_networks` (CIDR) are reachable though not public, for tests and mirrors inside.

    The limits per host are for the whole run; each of its workers takes an equal share (see `hosts`).
    Raises ValueError for what is no network, and for limits that are not positive.
    """

    max_bytes: int = 20_000_000  # of the body, after decompression
    # for the name's lookup, and again for the connection with its TLS handshake
    connect_timeout_s: float = operational(10.0)
    read_timeout_s: float = operational(10.0)  # between two reads
    total_timeout_s: float = operational(30.0)  # over all redirects, without waiting for turns
    max_redirects: int = 5
    user_agent: str = operational(f"vesl/{version('vesl')} (image data set builder)")
    contact: str | None = operational(None)  # an address or page for owners who object, added to the user agent
    allow_networks: tuple[str, ...] = ()
    concurrency: int = operational(1000)  # requests in flight in each worker
    buffer_mib: int = operational(80)  # of bodies, and of results that nobody has taken yet, in each worker
    host_concurrency: int | None = operational(64)  # connections to one host, of all workers together
    host_rate_per_s: float | None = operational(None)  # requests to one host, of all workers together
    patience_s: float = operational(30.0)  # with a host that asks to be left alone (Retry-After, or 429 and 503 alone)
    retries: int = operational(0)  # of what may pass, in this run; `--retry failed` is for later

    def __post_init__(self) -> None:
        for network in self.allow_networks:
            try:
                ip_network(network)
            except ValueError:
                raise ValueError(f"allow_networks: {network!r} is not a network like 10.0.0.0/8") from None
        positive = ("max_bytes", "connect_timeout_s", "read_timeout_s", "total_timeout_s", "concurrency", "buffer_mib")
        for name in (*positive, "host_concurrency", "host_rate_per_s"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}: {value} is not positive")
        for name in ("patience_s", "retries", "max_redirects"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        for name in ("user_agent", "contact"):
            if not (getattr(self, name) or "").isprintable():
                raise ValueError(f"{name}: cannot stand in a header")

    @property
    def agent(self) -> str:
        """The User-Agent header."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent


class Made(Generic[T]):
    """What became of a URL: what `use` returned, or an exception. Who is handed it takes it at once.

    Until then it counts as memory; one that nobody holds any more does not.
    """

    def __init__(self, value: T | Exception, free: Callable[[], None]) -> None:
        self._value = value
        self._free = weakref.finalize(self, free)
        self._free.atexit = False

    def take(self) -> T | Exception:
        """The result."""
        self._free()
        return self._value


def take_all(futures: Sequence["Future[Made[T]]"]) -> list[T | Exception]:
    """Wait for results and take each as it comes; return them in the order of the futures."""
    places, found = {future: place for place, future in enumerate(futures)}, list[Any](futures)
    for future in as_completed(places):
        found[places[future]] = future.result().take()
    return found


def fetch_all(urls: Sequence[str], rule: FetchRule, use: Callable[[Fetched], T]) -> list[T | Exception]:
    """Fetch each URL and hand it to `use` in a thread; return, in order, what `use` returned or the exception.

    A Drop names a reason of the download step; other exceptions are those of `use`, or of no known kind.
    """
    fetcher = Fetcher[T](rule)
    try:
        return take_all([fetcher.submit(url, use) for url in urls])
    finally:
        fetcher.close()


class Fetcher(Generic[T]):
    """Fetches from a thread with an event loop; to be closed.

    What was fetched is used in one of as many threads as there are cores (8 at most); `weigh` tells how many bytes of
    memory a result takes until it is taken. Without `respect`, no wish is obeyed.
    """

    def __init__(
        self,
        rule: FetchRule,
        weigh: Callable[[T], int] = lambda made: 0,
        place: Place | None = None,
        respect: RespectRule | None = None,
    ) -> None:
        self._rule, self._weigh = rule, weigh
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True).start()
        self._threads = ThreadPoolExecutor(min(8, cores()), "use")
        self._places = asyncio.Semaphore(min(rule.concurrency, _file_limit(rule.concurrency)))
        workers = place.workers if place else 1
        self._hosts = Hosts(rule.host_concurrency, rule.host_rate_per_s, rule.patience_s, workers, self._close_idle)
        self._respect, self._token = respect, re.split(r"[/\s]", rule.user_agent, maxsplit=1)[0]
        self._wishes = Wishes(respect, self._token, self._text, place.store if place else None) if respect else None
        self._memory = Memory(rule.buffer_mib << 20)
        self._rows = 0  # ever begun
        self._session = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> Any:
        rule = self._rule
        allowed = tuple(ip_network(network) for network in rule.allow_networks)
        return open_session(allowed, rule.agent, rule.connect_timeout_s, rule.read_timeout_s)

    def _close_idle(self, host: str) -> None:
        close_idle(self._session, host)

    def submit(self, url: str, use: Callable[[Fetched], T]) -> "Future[Made[T]]":
        """Begin to fetch; returns at once. `use` turns what was fetched into the result.

        Over the memory limit, rows go on in the order of their submission. Cancelling gives up.
        """
        return asyncio.run_coroutine_threadsafe(self._row(url, use), self._loop)

    def close(self) -> None:
        """Give up what is under way, and end the thread."""

        async def end() -> None:
            await self._session.close()
            rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        if not self._loop.is_closed():
            with suppress(RuntimeError):
                asyncio.run_coroutine_threadsafe(end(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _row(self, url: str, use: Callable[[Fetched], T]) -> Made[T]:
        row, kept = self._rows, 0
        self._rows += 1
        self._memory.enter(row)
        try:
            value, kept = await self._persist(row, url, use)
        finally:
            self._memory.leave(row, kept)
        return Made(value, lambda: self._taken(kept))

    def _taken(self, kept: int) -> None:
        with suppress(RuntimeError):  # the loop may be closed
            if kept:
                self._loop.call_soon_threadsafe(self._memory.taken, kept)

    async def _persist(self, row: int, url: str, use: Callable[[Fetched], T]) -> tuple[T | Exception, int]:
        """Fetch and use; what may pass is tried again. Returns the result and its weight."""
        result: T | Exception
        weight = 0
        for attempt in range(self._rule.retries + 1):
            if attempt:
                await asyncio.sleep(_RETRY_S * 2 ** (attempt - 1))
            try:
                result, weight = await self._fetch(row, url, use)
            except Exception as error:  # noqa: BLE001  (it is this URL's result; the guard of the step looks at it)
                result = error
            if isinstance(result, Exception):  # its frames would keep the body in memory
                result.__traceback__ = result.__context__ = result.__cause__ = None
            if not (isinstance(result, Drop) and reason_of("download", result.reason).transient):
                break
            self._memory.empty(row)
        return result, weight

    async def _fetch(self, row: int, url: str, use: Callable[[Fetched], T]) -> tuple[T | Exception, int]:
        def used(found: Fetched) -> tuple[T | Exception, int]:
            try:
                return (made := use(found)), self._weigh(made)
            except Exception as error:  # noqa: BLE001  (likewise; and no future can hold a StopIteration)
                return error, 0

        target, left_s = parse(url), self._rule.total_timeout_s
        for _ in range(self._rule.max_redirects + 1):
            robots = await self._wishes.check(target) if self._wishes else None
            await self._memory.begin(row)
            async with AsyncExitStack() as place:  # kept until `use` is through with the body
                flight = lambda: place.enter_context(self._memory.flight(row))  # noqa: E731
                found, left_s = await self._ask(
                    target, place, left_s, lambda size: self._memory.take(row, size), flight
                )
                if isinstance(found, Fetched):
                    self._memory.landed(row)
                    http = {**(found.http or {}), "user_agent": self._rule.agent, "robots_txt": robots}
                    return await self._loop.run_in_executor(self._threads, used, replace(found, http=http))
            target = found
        raise Drop("redirect_loop", f"more than {self._rule.max_redirects} redirects")

    async def _text(self, url: str) -> str:
        """A small file for `Wishes`."""

        async def take(size: int) -> float:
            return 0.0

        target, left_s = url, self._rule.total_timeout_s
        for _ in range(_FILE_REDIRECTS + 1):
            async with AsyncExitStack() as place:
                found, left_s = await self._ask(target, place, left_s, take)
            if isinstance(found, Fetched):
                return found.body.decode("utf-8", "replace")
            target = found
        raise Drop("redirect_loop")

    async def _ask(
        self,
        target: str,
        place: AsyncExitStack,
        left_s: float,
        take: Callable[[int], Awaitable[float]],
        flight: Callable[[], None] | None = None,
    ) -> tuple[Fetched | str, float]:
        """One request in its turn; also what is left of the time. The host is asked for before the place.

        Who has a place so has a turn, and never waits for one; the other way round, all places could wait for turns.
        Seconds that `take` waits are not the server's fault. Without `flight` it is a small file, of no row.
        """
        parts = urlsplit(target)
        host = parts.hostname or ""
        async with self._hosts.turn(host, f"{parts.scheme} {parts.port}") as awaited:
            await place.enter_async_context(self._places)
            if flight:
                flight()
            try:
                async with asyncio.timeout(left_s) as limit:

                    async def wait(size: int) -> None:
                        waited_s = await take(size)
                        limit.reschedule((limit.when() or 0.0) + waited_s)

                    most = self._rule.max_bytes if flight else _FILE_BYTES
                    found = await ask(self._session, target, most, self._may_read if flight else None, wait, awaited())
            except RefusedError as refused:
                self._hosts.refused(host, refused, retry_after(refused.after))
                raise Drop(refused.reason, refused.detail) from None
            except Drop:
                raise
            except Exception as error:
                if (reason := reason_for(error)) is None:
                    raise
                raise Drop(reason, printable(f"{type(error).__name__}: {error}")) from error
            self._hosts.answered(host)
            return found, (limit.when() or 0.0) - self._loop.time()

    def _may_read(self, headers: "CIMultiDictProxy[str]") -> None:
        if self._respect:
            tags, tdm = (headers.getall(name, ()) for name in ("X-Robots-Tag", "tdm-reservation"))
            check_headers(tags, tdm, self._token, self._respect)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _file_limit(wanted: int) -> int:
    """How many requests may be in flight; the process's limit on open files is raised as far as it takes and goes.

    Each may have left an idle connection behind.
    """
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * wanted + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, (soft - _SPARE_FILES) // 2))
