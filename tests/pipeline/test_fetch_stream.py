"""Batches that stream: no straggler holds up the rest, memory stays bounded, nothing is left of what is given up."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests import webserver as web
from tests.pipeline.test_fetch import LOOPBACK, keep
from tests.webserver import WebServer
from vesl.pipeline.fetch import Fetcher, FetchRule
from vesl.pipeline.request import Fetched

RULE = FetchRule(allow_networks=LOOPBACK, host_concurrency=None)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


@pytest.fixture
def fetchers() -> Iterator[Callable[..., Fetcher[int]]]:
    opened: list[Fetcher[int]] = []

    def make(rule: FetchRule = RULE, use: Callable[[Fetched], int] = lambda fetched: len(fetched.body)) -> Fetcher[int]:
        opened.append(Fetcher(rule, use, lambda size: size))
        return opened[-1]

    yield make
    for fetcher in opened:
        fetcher.close()


def test_a_straggler_holds_up_its_own_batch_only(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    fetcher = fetchers()
    release = threading.Event()
    slow = server.add("/slow", lambda peer: (release.wait(8), web.body(b"x")(peer)))
    first = fetcher.submit([slow, server.add("/0", b"x")])
    for n in range(1, 5):
        assert fetcher.submit([server.add(f"/{n}", b"x" * n)]).result() == [n]
    release.set()
    assert first.result() == [1, 1]


def test_a_thousand_are_in_flight(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    barrier = threading.Barrier(1000)
    urls = [server.add(f"/{n}", lambda peer: (barrier.wait(60), web.body(b"x")(peer))) for n in range(1000)]
    fetcher = fetchers(replace(RULE, connect_timeout_s=60, read_timeout_s=60, total_timeout_s=60))
    batches = [fetcher.submit(urls[at : at + 100]) for at in range(0, 1000, 100)]
    assert [batch.result() for batch in batches] == [[1] * 100] * 10  # none was answered before all had asked


def test_bodies_in_memory_are_bounded(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    size = 1_000_000
    urls = [server.add(f"/{n}", bytes(size)) for n in range(150)]
    fetcher = fetchers(replace(RULE, buffer_mib=8, read_timeout_s=60, total_timeout_s=60))
    batches = [fetcher.submit(urls[at : at + 10]) for at in range(0, 150, 10)]
    most = 0
    for _ in range(150):  # nobody takes the results, each of which weighs as much as its body
        most = max(most, fetcher._memory.held)
        time.sleep(0.01)
    assert [batch.result() for batch in batches] == [[size] * 10] * 15
    assert 8_000_000 < most <= (8 << 20) + 11 * size  # and the first batch, which nothing holds up


def test_a_body_that_is_read_counts_without_its_connection(
    server: WebServer, fetchers: Callable[..., Fetcher[int]]
) -> None:
    held: list[int] = []

    def use(fetched: Fetched) -> int:
        held.append(fetcher._memory.held)
        return 0

    fetcher = fetchers(RULE, use)
    assert fetcher.submit([server.add("/", bytes(300_000))]).result() == [0]
    assert held == [300_000]


def test_a_batch_that_nobody_wants_is_given_up(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
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

    batch = fetcher.submit([server.add("/slow", slow), server.add("/big", bytes(3_000_000))])
    while sum(server.hits.values()) < 2:
        time.sleep(0.01)
    del batch
    gc.collect()
    assert ended.wait(5)
    assert fetcher.submit([server.add("/next", b"x")]).result() == [1]
    time.sleep(0.1)
    assert fetcher._memory.held == 0


def test_over_the_limit_the_first_batch_goes_on(server: WebServer, fetchers: Callable[..., Fetcher[int]]) -> None:
    fetcher = fetchers(replace(RULE, buffer_mib=1))
    late = [server.add("/late", web.late(bytes(3_000_000), 0.5))]
    first = fetcher.submit(late)
    rest = [fetcher.submit([server.add(f"/{n}", bytes(700_000))]) for n in range(6)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(first.result).result(10) == [3_000_000]
    assert [batch.result() for batch in rest] == [[700_000]] * 6


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
    results = fetchers(replace(RULE, retries=1)).submit(urls).result()
    assert [getattr(r, "reason", r) for r in results] == [1, 1, "http_5xx", "http_4xx"]
    assert [server.hits[path] for path in ("/once", "/reset", "/twice", "/gone")] == [2, 2, 2, 1]


def test_an_error_of_weighing_is_the_row_s(server: WebServer) -> None:
    fetcher = Fetcher(RULE, keep, lambda fetched: 1 // 0)
    (result,) = fetcher.submit([server.add("/", b"x")]).result()
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

        first = fetcher.submit([server.add("/first", late_redirect), server.add("/full", bytes(1_200_000))])
        rest = [fetcher.submit([other.add(f"/{n}", bytes(900_000))]) for n in range(4)]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(first.result).result(20) == [1, 1_200_000]
        assert [batch.result() for batch in rest] == [[900_000]] * 4
