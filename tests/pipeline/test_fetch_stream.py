"""URLs that stream: no straggler holds up the rest, memory stays bounded, nothing is left of what is given up."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests import webserver as web
from tests.pipeline.test_fetch import LOOPBACK, fetched
from tests.webserver import WebServer
from vesl.pipeline.fetch import Fetcher, FetchRule, Made, take_all
from vesl.pipeline.request import Fetched

RULE = FetchRule(allow_networks=LOOPBACK, host_concurrency=None)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


@pytest.fixture
def fetchers() -> Iterator[Callable[..., Fetcher[int]]]:
    opened: list[Fetcher[int]] = []

    def make(rule: FetchRule = RULE) -> Fetcher[int]:
        opened.append(Fetcher(rule, lambda size: size))
        return opened[-1]

    yield make
    for fetcher in opened:
        fetcher.close()


def size(fetched: Fetched) -> int:
    return len(fetched.body)


def submit(fetcher: Fetcher[int], urls: Sequence[str]) -> list[Future[Made[int]]]:
    return [fetcher.submit(url, size) for url in urls]


def test_a_straggler_holds_up_no_other(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    fetcher = fetchers()
    release = threading.Event()
    slow = server.add("/slow", lambda peer: (release.wait(8), web.body(b"x")(peer)))
    first = submit(fetcher, [slow, server.add("/0", b"xx")])
    assert take_all(submit(fetcher, [server.add(f"/{n}", b"x" * n) for n in range(1, 5)])) == [1, 2, 3, 4]
    assert first[1].result().take() == 2
    assert not first[0].done()
    release.set()
    assert first[0].result().take() == 1


def test_a_thousand_are_in_flight(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    barrier = threading.Barrier(1000)
    urls = [server.add(f"/{n}", lambda peer: (barrier.wait(60), web.body(b"x")(peer))) for n in range(1000)]
    fetcher = fetchers(replace(RULE, connect_timeout_s=60, read_timeout_s=60, total_timeout_s=60))
    assert take_all(submit(fetcher, urls)) == [1] * 1000  # none was answered before all had asked


def test_bodies_and_results_in_memory_are_bounded(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    large = 1_000_000
    fetcher = fetchers(replace(RULE, buffer_mib=8, read_timeout_s=60, total_timeout_s=60))
    futures = submit(fetcher, [server.add(f"/{n}", bytes(large)) for n in range(60)])
    most = 0
    for _ in range(150):  # nobody takes the results, each of which weighs as much as its body
        most = max(most, fetcher._memory.held)
        time.sleep(0.01)
    assert take_all(futures) == [large] * 60
    assert 7_000_000 < most <= (8 << 20) + large
    assert held(fetcher) == 0


def held(fetcher: Fetcher[int]) -> int:
    """Bytes that stay, once the loop has done what it was told to."""
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), fetcher._loop).result()
    return fetcher._memory.held


def test_results_that_nobody_takes_any_more_are_forgotten(
    server: WebServer, fetchers: Callable[..., Fetcher[int]]
) -> None:
    fetcher = fetchers(replace(RULE, buffer_mib=1))
    futures = submit(fetcher, [server.add("/big", bytes(3_000_000))])
    futures[0].result()
    assert held(fetcher) == 3_000_000
    futures.clear()
    gc.collect()
    assert held(fetcher) == 0


def test_a_body_that_is_read_counts_without_its_connection(
    server: WebServer, fetchers: Callable[..., Fetcher[int]]
) -> None:
    counted: list[int] = []

    def use(fetched: Fetched) -> int:
        counted.append(fetcher._memory.held)
        return 0

    fetcher = fetchers(RULE)
    assert fetcher.submit(server.add("/", bytes(300_000)), use).result().take() == 0
    assert counted == [300_000]


def test_what_nobody_wants_is_given_up(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    fetcher = fetchers(replace(RULE, buffer_mib=1))
    ended = threading.Event()

    def slow(peer: web.Peer) -> None:
        peer.head(Content_Length=10)
        try:
            while True:
                peer.send(b"")
                peer.connection.settimeout(5)
                if not peer.connection.recv(1):
                    break
        finally:
            ended.set()

    futures = submit(fetcher, [server.add("/slow", slow), server.add("/big", bytes(3_000_000))])
    while sum(server.hits.values()) < 2:
        time.sleep(0.01)
    for future in futures:
        future.cancel()
    assert ended.wait(5)
    futures.clear()
    assert take_all(submit(fetcher, [server.add("/next", b"x")])) == [1]
    assert held(fetcher) == 0


def test_over_the_limit_the_first_goes_on(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    fetcher = fetchers(replace(RULE, buffer_mib=1))
    urls = [server.add("/late", web.late(bytes(3_000_000), 0.5))]
    urls += [server.add(f"/{n}", bytes(700_000)) for n in range(6)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(take_all, submit(fetcher, urls)).result(10) == [3_000_000] + [700_000] * 6


def test_what_may_pass_is_tried_again(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    def fail(times: int, failure: web.Handler) -> web.Handler:
        asked: list[int] = []
        return lambda peer: (asked.append(1), (failure if len(asked) <= times else web.body(b"x"))(peer))[1]

    urls = [
        server.add("/once", fail(1, web.status(500))),
        server.add("/reset", fail(1, web.reset)),
        server.add("/twice", fail(2, web.status(502))),
        server.add("/gone", fail(1, web.status(404))),
    ]
    results = take_all(submit(fetchers(replace(RULE, retries=1)), urls))
    assert [getattr(r, "reason", r) for r in results] == [1, 1, "http_5xx", "http_4xx"]
    assert [server.hits[path] for path in ("/once", "/reset", "/twice", "/gone")] == [2, 2, 2, 1]


def test_an_error_of_weighing_is_the_row_s(server: WebServer) -> None:
    fetcher = Fetcher[Fetched](RULE, lambda fetched: 1 // 0)
    (result,) = fetched(fetcher, [server.add("/", b"x")])
    fetcher.close()
    assert isinstance(result, ZeroDivisionError)


def test_rows_that_wait_for_memory_cannot_lock_out_the_first(
    server: WebServer, fetchers: Callable[..., Fetcher[int]]
) -> None:
    """The first row is sent on to a host whose only turn is held by a row that waits for memory."""
    with WebServer("127.0.0.2") as other:
        rule = FetchRule(allow_networks=("127.0.0.0/8",), host_concurrency=1, concurrency=3, buffer_mib=1)
        fetcher = fetchers(rule)

        def late_redirect(peer: web.Peer) -> None:
            peer.wait(0.4)
            web.redirect(other.add("/target", b"x"))(peer)

        urls = [server.add("/first", late_redirect), server.add("/full", bytes(1_200_000))]
        urls += [other.add(f"/{n}", bytes(900_000)) for n in range(4)]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(take_all, submit(fetcher, urls)).result(20) == [1, 1_200_000] + [900_000] * 4
