"""Politeness: what one host sees of a run."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from tests import webserver as web
from tests.pipeline.test_fetch import LOOPBACK, fetched, keep
from tests.webserver import WebServer
from tests.world import World, jpeg
from vesl.pipeline.fetch import Fetcher, FetchRule, fetch_all, take_all
from vesl.pipeline.hosts import Hosts, network_hint, retry_after
from vesl.pipeline.request import Fetched
from vesl.pipeline.stage import Place
from vesl.pipeline.store import Store
from vesl.transforms.outcomes import Drop

RULE = FetchRule(allow_networks=LOOPBACK)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


def outcomes(results: list[Fetched | Exception]) -> list[str]:
    return ["kept" if isinstance(r, Fetched) else getattr(r, "reason", repr(r)) for r in results]


def test_four_workers_keep_within_the_connections_of_the_run(world: World) -> None:
    rows = world.images(120)
    for url, _ in rows:
        world.server.add(url.removeprefix(world.server.url), web.late(jpeg(1), 0.05))
    world.list_urls("a", rows)
    world.document["dataset"]["rows_per_part"] = 15
    world.document["engine"]["workers"] = 4
    world.document["steps"]["download"]["fetch"]["host_concurrency"] = 8
    world.write()
    done = world.run("run", "--until", "download")
    assert done.returncode == 0, done.stderr
    assert sum(world.server.hits.values()) == 120
    assert 5 <= world.server.most <= 8


def test_a_share_below_one_connection_is_a_share_of_the_time(server: WebServer, tmp_path: Path) -> None:
    urls = [server.add(f"/{n}", web.late(b"x", 0.1)) for n in range(3)]
    fetcher = Fetcher[Fetched](replace(RULE, host_concurrency=1), place=Place(Store(str(tmp_path)), 3))
    start = time.monotonic()
    assert outcomes(fetched(fetcher, urls)) == ["kept"] * 3
    fetcher.close()
    assert server.most == 1
    assert time.monotonic() - start > 0.1 + 2 * 0.3  # each is followed by twice its own time of rest


def test_the_rate_of_a_host_is_divided_over_the_workers(server: WebServer, tmp_path: Path) -> None:
    times: list[float] = []

    def note(peer: web.Peer) -> None:
        times.append(time.monotonic())
        web.body(b"x")(peer)

    urls = [server.add(f"/{n}", note) for n in range(5)]
    fetcher = Fetcher[Fetched](replace(RULE, host_rate_per_s=20), place=Place(Store(str(tmp_path)), 2))
    assert outcomes(fetched(fetcher, urls)) == ["kept"] * 5
    fetcher.close()
    assert times[-1] - times[0] > 4 * 0.1 - 0.05


def test_one_busy_host_does_not_hold_up_another(server: WebServer) -> None:
    with WebServer("127.0.0.2") as other:
        busy = [server.add(f"/{n}", web.late(b"x", 0.3)) for n in range(6)]
        quick = [other.add(f"/{n}", b"x") for n in range(6)]
        rule = FetchRule(allow_networks=("127.0.0.0/8",), host_concurrency=1, concurrency=2)
        fetcher = Fetcher[Fetched](rule)
        slow = [fetcher.submit(url, keep) for url in busy]
        start = time.monotonic()
        assert outcomes(fetched(fetcher, quick)) == ["kept"] * 6
        assert time.monotonic() - start < 1.2
        assert outcomes(take_all(slow)) == ["kept"] * 6
        fetcher.close()


def stays(peer: web.Peer) -> None:
    """Answer one request after the other with its own path, until one asks for the connection to be closed."""
    request = b""
    while request := (peer.connection.recv(65536) if request else peer.request):
        path = request.split(b" ", 2)[1]
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(path) + path)
        if b"connection: close" in request.lower():
            return


def moves(peer: web.Peer, to: str) -> None:
    """Likewise, but send all elsewhere."""
    request = b""
    while request := (peer.connection.recv(65536) if request else peer.request):
        peer.send(b"HTTP/1.1 301 -\r\nContent-Length: 0\r\nLocation: " + to.encode() + b"\r\n\r\n")
        if b"connection: close" in request.lower():
            return


def leaves(peer: web.Peer) -> None:
    """Close the connection after an answer that does not say so, when the next request is there already."""
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
    peer.connection.recv(1)


def says_more(peer: web.Peer) -> None:
    """Send a second answer that nobody asked for."""
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx" * 2)
    peer.wait(0.3)


def test_rows_of_one_host_share_its_connections(server: WebServer) -> None:
    paths = [f"/{n}" for n in range(30)]
    rule = replace(RULE, host_concurrency=2)
    results = fetch_all([server.add(path, stays) for path in paths], rule, lambda fetched: fetched.body.decode())
    assert results == paths
    assert server.connections <= 2 + 1  # the first row knew of no other


def test_a_connection_that_nobody_waits_for_is_closed(server: WebServer, tmp_path: Path) -> None:
    fetch_all([server.add("/alone", stays)], RULE, keep)
    fetcher = Fetcher[Fetched](replace(RULE, host_concurrency=2), place=Place(Store(str(tmp_path)), 3))
    assert outcomes(fetched(fetcher, [server.add(f"/{n}", stays) for n in range(3)])) == ["kept"] * 3
    fetcher.close()
    assert server.connections == 4
    assert all(b"connection: close" in request.lower() for request in server.requests)


@pytest.mark.parametrize("rows", [5, 30])
def test_a_host_that_moves_its_rows_to_another_port_has_no_more_connections(server: WebServer, rows: int) -> None:
    """As most do to https: what is kept open to the one port counts beside what is asked at the other."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            before, there, after = server.open, other.open, server.open
            if before == after:  # else one closed here may have been counted beside one that opened there
                most[0] = max(most[0], before + there)

    def slowly(peer: web.Peer) -> None:
        peer.wait(0.1)
        stays(peer)

    with WebServer() as other:
        paths = [f"/{n}" for n in range(rows)]
        for path in paths:
            other.add(path, slowly)
        watcher = threading.Thread(target=watch)
        watcher.start()
        urls = [server.add(path, partial(moves, to=other.url + path)) for path in paths]
        results = fetch_all(urls, replace(RULE, host_concurrency=4), lambda fetched: fetched.body.decode())
        over.set()
        watcher.join()
    assert results == paths
    assert 2 <= most[0] <= 4


def test_connections_kept_before_a_second_port_was_known_are_closed(server: WebServer) -> None:
    def late(peer: web.Peer) -> None:
        peer.wait(1)
        stays(peer)

    with WebServer() as other:
        moved = server.add("/0", partial(moves, to=other.add("/0", web.late(b"x", 3))))
        fetcher = Fetcher[Fetched](replace(RULE, host_concurrency=3))
        urls = server.add("/1", late), moved, server.add("/2", late)
        rows = [fetcher.submit(url, keep) for url in urls]
        time.sleep(0.5)
        assert (server.open, other.open) == (2, 1)
        assert outcomes(take_all([rows[0], rows[2]])) == ["kept"] * 2
        assert sum(b"connection: close" in request.lower() for request in server.requests) == 1  # the first
        time.sleep(0.5)
        assert (server.open, other.open) == (0, 1)
        assert outcomes(take_all(rows[1:2])) == ["kept"]
        fetcher.close()


def test_connections_kept_are_closed_before_another_port_is_asked_a_while_later(server: WebServer) -> None:
    with WebServer() as other:
        fetcher = Fetcher[Fetched](replace(RULE, host_concurrency=4))
        urls = [server.add(f"/{n}", stays) for n in range(4)]
        assert outcomes(fetched(fetcher, urls)) == ["kept"] * 4
        assert server.open  # and nobody waits for the host
        rows = [fetcher.submit(other.add(f"/{n}", web.late(b"x", 1)), keep) for n in range(4)]
        time.sleep(0.5)
        assert (server.open, other.open) == (0, 4)
        assert outcomes(take_all(rows)) == ["kept"] * 4
        fetcher.close()


def test_a_host_with_two_ports_is_not_looked_over_for_each_request() -> None:
    closed, hosts = list[str](), Hosts(4, None, 30.0, close_idle=lambda name: closed.append(name))

    async def ask(number: int) -> None:
        async with hosts.turn("a.example", f"http {81 if number == 10 else 80}") as awaited:
            awaited()
            await asyncio.sleep(0.001)

    async def main() -> None:
        await asyncio.gather(*(ask(number) for number in range(6)))
        assert not closed
        await asyncio.gather(*(ask(number) for number in range(6, 40)))

    asyncio.run(main())
    assert 1 <= len(closed) <= 4


@pytest.mark.parametrize("end", [leaves, says_more])
def test_a_kept_connection_that_fails_costs_no_row(server: WebServer, end: web.Handler) -> None:
    urls = [server.add(f"/{n}", end if n % 2 == 0 else stays) for n in range(20)]
    results = fetch_all(urls, replace(RULE, host_concurrency=1), lambda fetched: fetched.body.decode())
    assert results[1::2] == [f"/{n}" for n in range(1, 20, 2)]
    assert all(found in ("x", f"/{n}") for n, found in enumerate(results))  # "/n": on a connection that stays
    assert "x" in results


def busy_once(seconds: object) -> web.Handler:
    """Ask for patience the first time."""
    asked: list[float] = []

    def answer(peer: web.Peer) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            peer.head(429, Retry_After=seconds, Content_Length=0)
        else:
            web.body(b"x")(peer)

    return answer


def test_a_host_that_asks_for_patience_gets_it(server: WebServer) -> None:
    urls = [server.add("/first", busy_once(1)), server.add("/second", b"x")]
    start = time.monotonic()
    assert outcomes(fetch_all(urls, replace(RULE, retries=1, host_concurrency=1), keep)) == ["kept"] * 2
    assert time.monotonic() - start > 1.0
    assert [server.hits[path] for path in ("/first", "/second")] == [2, 1]


@pytest.mark.parametrize("code", [429, 503])
def test_a_host_that_asks_for_too_much_patience_is_left_alone(server: WebServer, code: int) -> None:
    def refuse(peer: web.Peer) -> None:
        peer.head(code, Retry_After=3600, Content_Length=0)

    urls = [server.add("/first", refuse), *(server.add(f"/{n}", b"x") for n in range(5))]
    rule = replace(RULE, retries=2, host_concurrency=1)
    start = time.monotonic()
    results = fetch_all(urls, rule, keep)
    assert time.monotonic() - start < 10
    assert outcomes(results) == ["http_429" if code == 429 else "http_5xx"] * 6
    assert sum(server.hits.values()) == 1  # the others, and the retries, were never sent
    assert re.fullmatch(rf".*HTTP {code}; the host wants to be left alone for 3[56]\d\d s", str(results[1]))


def test_without_a_word_of_how_long_the_pauses_double() -> None:
    async def pauses() -> list[float]:
        hosts, found = Hosts(1, None, 30.0), []
        for _ in range(4):
            async with hosts.turn("h"):
                hosts.refused("h", Drop("http_429", "HTTP 429"), None)
                hosts.refused("h", Drop("http_429", "HTTP 429"), None)  # at the same time: one refusal
            host, now = hosts._hosts["h"], asyncio.get_running_loop().time()
            found.append(host.quiet_s - now)
            host.quiet_s = now
        return found

    lengths = asyncio.run(pauses())
    assert all(2**n * 0.95 < length < 2**n * 1.3 for n, length in enumerate(lengths))


def test_hosts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesl.pipeline.hosts._KNOWN", 10)

    async def ask() -> int:
        hosts = Hosts(8, None, 30.0)
        for n in range(100):
            async with hosts.turn(f"h{n}"):
                if n == 3:
                    hosts.refused("h3", Drop("http_429"), 20)
        assert "h3" in hosts._hosts  # it is still to be left alone
        return len(hosts._hosts)

    assert asyncio.run(ask()) <= 11


def test_many_quiet_hosts_are_not_sifted_for_each_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesl.pipeline.hosts._KNOWN", 10)

    async def ask() -> int:
        hosts, sifted = Hosts(8, None, 30.0), 0
        for n in range(1000):
            before = hosts._hosts
            async with hosts.turn(f"h{n}"):
                hosts.refused(f"h{n}", Drop("http_429"), 1e6)
            sifted += hosts._hosts is not before
        assert len(hosts._hosts) == 1000
        return sifted

    assert asyncio.run(ask()) < 10


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    values = ["7", " 0 ", "Fri, 02 Jan 2026 03:04:35 GMT", "Fri, 02 Jan 2026 03:04:00 GMT", "", "soon", "-3", "9" * 99]
    values.append(f"Fri, 02 Jan {'9' * 30} 03:04:00 GMT")
    assert [retry_after(value, now) for value in values] == [7, 0, 30, 0, None, None, None, 10**9, None]


def test_a_broken_network_is_told_from_a_dead_web() -> None:
    dead = {"dns_not_found": 250, "http_4xx": 300, "connect_timeout": 100, "dns_timeout": 20, "connect_refused": 50}
    assert network_hint(1000, dead) is None
    assert network_hint(99, {"dns_timeout": 99}) is None
    hint = network_hint(1000, dead | {"dns_timeout": 51})
    assert hint is not None
    assert hint.startswith("download: 51 of 1,000 rows ended as dns_timeout, more than a dead web explains")
    for reason in ("dns_not_found", "connect_timeout", "connect_refused"):
        assert f"ended as {reason}" in (network_hint(1000, {reason: 600}) or "")
