import gzip
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from tests import webserver as web
from tests.webserver import WebServer
from vesl.pipeline.connect import is_blocked
from vesl.pipeline.fetch import Fetcher, FetchRule, fetch_all, take_all
from vesl.pipeline.request import Fetched
from vesl.transforms.outcomes import REASONS, Drop

LOOPBACK = ("127.0.0.1/32",)
QUICK = FetchRule(
    max_bytes=1_000_000, connect_timeout_s=0.5, read_timeout_s=0.5, total_timeout_s=2, allow_networks=LOOPBACK
)
BODY = bytes(range(256)) * 300


def keep(fetched: Fetched) -> Fetched:
    return fetched


def fetched(fetcher: Fetcher[Fetched], urls: Sequence[str]) -> list[Fetched | Exception]:
    """What a fetcher makes of URLs that are all submitted at once."""
    return take_all([fetcher.submit(url, keep) for url in urls])


def fetch(url: str, rule: FetchRule = QUICK) -> Fetched:
    (result,) = fetch_all([url], rule, keep)
    assert isinstance(result, Fetched), result
    return result


def reason(url: str, rule: FetchRule = QUICK) -> str:
    return drop(url, rule).reason


def drop(url: str, rule: FetchRule = QUICK) -> Drop:
    start = time.monotonic()
    (result,) = fetch_all([url], rule, keep)
    assert isinstance(result, Drop), result
    assert result.reason in REASONS["download"]
    assert time.monotonic() - start < rule.total_timeout_s + 1
    return result


@pytest.fixture(scope="module")
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


def test_a_body_comes_back_byte_for_byte(server: WebServer) -> None:
    url = server.add("/ok.jpg", BODY)
    assert fetch(url) == Fetched(BODY, url, "image/jpeg")
    request = server.requests[-1].decode().lower()
    assert "accept-encoding: identity" in request
    assert "user-agent: vesl/" in request
    assert "cookie" not in request


def test_a_url_is_sent_as_it_is_written(server: WebServer) -> None:
    path = "/a%2Fb%20c/%7Ed;x=1,2+3?q=%C3%A9&r=a+b%26|[1]"
    assert fetch(server.add(path, BODY)).body == BODY
    assert server.hits[path] == 1


def test_html_is_a_body_like_another(server: WebServer) -> None:
    fetched = fetch(server.add("/page.jpg", b"<html>", "image/jpeg"))
    assert (fetched.body, fetched.content_type) == (b"<html>", "image/jpeg")


ANSWERS = {
    "status 404": (web.status(404), "http_4xx"),
    "status 403": (web.status(403), "http_4xx"),
    "status 429": (web.status(429), "http_429"),
    "status 500": (web.status(500), "http_5xx"),
    "status 503": (web.status(503), "http_5xx"),
    "status 204": (lambda peer: peer.head(204), "http_other"),
    "status 206": (web.body(BODY, code=206), "http_other"),
    "status 304": (lambda peer: peer.head(304), "http_other"),
    "redirect to nowhere": (lambda peer: peer.head(302, Content_Length=0), "http_other"),
    "redirect to a file": (web.redirect("file:///etc/passwd"), "bad_scheme"),
    "redirect to gopher": (web.redirect("gopher://127.0.0.1/"), "bad_scheme"),
    "redirect to nonsense": (web.redirect("http://[:::/"), "bad_url"),
    "redirect to bytes": (web.redirect("http://\udcff\udcfe/"), "bad_url"),
    "redirect to a private address": (web.redirect("http://10.0.0.1/"), "blocked_address"),
    "redirect to metadata": (web.redirect("http://169.254.169.254/latest/meta-data/"), "blocked_address"),
    "redirect to metadata, as a number": (web.redirect("http://2852039166/"), "blocked_address"),
    "redirect to metadata, in IPv6": (web.redirect("http://[::ffff:169.254.169.254]/"), "blocked_address"),
    "empty": (web.body(b""), "empty"),
    "empty and chunked": (
        web.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        "empty",
    ),
    "short body": (web.body(BODY, Content_Length=len(BODY) + 1), "bad_response"),
    "chunks end early": (
        web.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
        "bad_response",
    ),
    "negative length": (web.body(BODY, Content_Length=-5), "bad_response"),
    "length that is no number": (web.body(BODY, Content_Length="many"), "bad_response"),
    "long body": (web.body(bytes(1_000_001)), "too_large"),
    "length of a terabyte": (web.silent_after_headers(10**12), "too_large"),
    "endless": (web.endless, "too_large"),
    "drip": (web.slow(BODY, 0.3), "too_slow"),
    "silent": (web.silent, "read_timeout"),
    "silent after headers": (web.silent_after_headers(1000), "read_timeout"),
    "one huge header": (
        web.raw(b"HTTP/1.1 200 OK\r\nX-Huge: " + b"x" * 1_000_000 + b"\r\n\r\n"),
        "bad_response",
    ),
    "many headers": (
        web.raw(b"HTTP/1.1 200 OK\r\n" + b"X-More: x\r\n" * 10_000 + b"\r\n"),
        "bad_response",
    ),
    "endless headers": (web.endless_headers, "bad_response"),
    "garbage": (web.raw(b"\x00\xff\x13\x37" * 100), "bad_response"),
    "another protocol": (web.raw(b"SSH-2.0-OpenSSH_9.9\r\n"), "bad_response"),
    "hang-up": (web.hang_up, "bad_response"),
    "reset": (web.reset, "connect_refused"),
    "reset in the body": (web.reset_in_body, "bad_response"),
    "gzip bomb": (web.gzip_bomb(200_000_000), "too_large"),
    "gzip cut short": (web.body(gzip.compress(BODY)[:-20], Content_Encoding="gzip"), "bad_response"),
    "gzip that is none": (web.body(BODY, Content_Encoding="gzip"), "bad_response"),
    "brotli": (web.body(BODY, Content_Encoding="br"), "bad_response"),
    "gzip twice": (web.body(BODY, Content_Encoding="gzip, gzip"), "bad_response"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_bad_answer_ends_with_its_reason_in_bounded_time(server: WebServer, case: str) -> None:
    handler, expected = ANSWERS[case]
    path = "/" + case.replace(" ", "-").replace(",", "")
    assert reason(server.add(path, handler)) == expected
    assert server.hits[path] == 1  # trying again is for others to decide


def test_the_code_is_in_the_detail(server: WebServer) -> None:
    assert drop(server.add("/410", web.status(410))).detail == "HTTP 410"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "bad_url"),
        ("/relative.jpg", "bad_url"),
        ("//host/no-scheme.jpg", "bad_url"),
        ("www.example.org/a.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http://exa mple.org/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://h:99999/", "bad_url"),
        ("http://" + "a" * 64 + ".org/", "bad_url"),
        ("http://a..b/", "bad_url"),
        ("http://\ud800/", "bad_url"),
        ("file:///etc/passwd", "bad_scheme"),
        ("ftp://example.org/a.jpg", "bad_scheme"),
        ("data:image/png;base64,AAAA", "bad_scheme"),
        ("javascript:alert(1)", "bad_scheme"),
    ],
)
def test_a_url_that_is_none(url: str, expected: str) -> None:
    assert reason(url) == expected


def test_redirects_are_followed_up_to_the_limit(server: WebServer) -> None:
    server.add("/hop/0", BODY)
    for hop in range(1, 7):
        server.add(f"/hop/{hop}", web.redirect(f"{hop - 1}", 301 + hop % 2))
    assert fetch(server.url + "/hop/5").final_url == server.url + "/hop/0"
    assert reason(server.url + "/hop/6") == "redirect_loop"
    loop = server.add("/loop", web.redirect("/loop"))
    assert reason(loop) == "redirect_loop"
    assert server.hits["/loop"] == QUICK.max_redirects + 1


def test_the_total_limit_covers_all_redirects(server: WebServer) -> None:
    def slow_hop(peer: web.Peer) -> None:
        peer.wait(0.4)
        peer.head(302, Location="/slow-hop", Content_Length=0)

    rule = FetchRule(total_timeout_s=1, read_timeout_s=0.9, max_redirects=50, allow_networks=LOOPBACK)
    assert reason(server.add("/slow-hop", slow_hop), rule) == "too_slow"


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", zlib.compress(BODY, wbits=-15)),
        ("identity", BODY),
    ],
)
def test_a_compression_nobody_asked_for_is_undone(server: WebServer, encoding: str, packed: bytes) -> None:
    assert fetch(server.add("/packed", web.body(packed, Content_Encoding=encoding))).body == BODY


def test_what_follows_the_end_of_a_compressed_body_is_left_alone(server: WebServer) -> None:
    def answer(peer: web.Peer) -> None:
        peer.head(Content_Encoding="gzip")
        peer.send(gzip.compress(BODY))
        while True:
            peer.send(bytes(0x10000))

    assert fetch(server.add("/tail", answer)).body == BODY


def test_the_limit_on_bytes_is_exact(server: WebServer) -> None:
    for name, size in (("fits", 1_000_000), ("not", 1_000_001)):
        packed = web.body(gzip.compress(bytes(size), 1), Content_Encoding="gzip")
        urls = [server.add(f"/{name}", bytes(size)), server.add(f"/{name}-packed", packed)]
        found = ["fits" if isinstance(r, Fetched) else getattr(r, "reason", r) for r in fetch_all(urls, QUICK, keep)]
        assert found == ["fits" if name == "fits" else "too_large"] * 2


def test_a_bomb_takes_little_memory(server: WebServer) -> None:
    url = server.add("/bomb", web.gzip_bomb(500_000_000))
    tracemalloc.start()
    assert reason(url) == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_crowd_of_bombs_takes_the_memory_of_one(server: WebServer) -> None:
    """What a piece inflates to is held only with leave, as are bodies that come as they are."""
    urls = [server.add(f"/{n}", web.gzip_bomb(50_000_000)) for n in range(20)]
    rule = replace(QUICK, max_bytes=10_000_000, buffer_mib=4, read_timeout_s=20, total_timeout_s=30)
    tracemalloc.start()
    assert {getattr(r, "reason", r) for r in fetch_all(urls, rule, keep)} == {"too_large"}
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()


BLOCKED = """0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.9.9.9 168.63.129.16 169.254.169.254 172.16.0.1
192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1
255.255.255.255 :: ::1 ::7f00:1 ::10.0.0.1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::10.0.0.1
64:ff9b::169.254.169.254 64:ff9b:1::8.8.8.8 100::1 2001::1 2001:0:7f00:1::1 2001:db8::1 2001:10::1 2002:7f00:1::1
2002:a00:1::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1"""
PUBLIC = "1.1.1.1 8.8.8.8 172.15.0.1 172.32.0.1 2606:4700::1111 2a00:1450:4001::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8"


def test_which_addresses_are_blocked() -> None:
    assert [address for address in BLOCKED.split() if not is_blocked(address)] == []
    assert [address for address in PUBLIC.split() if is_blocked(address)] == []
    allowed = [ip_network("127.0.0.1/32")]
    assert [is_blocked(a, allowed) for a in ("127.0.0.1", "::ffff:127.0.0.1", "127.0.0.2", "::1")] == [0, 0, 1, 1]
    assert is_blocked("64:ff9b::7f00:1", allowed)  # another machine's loopback


@pytest.fixture
def forbidden() -> Iterator[WebServer]:
    """A server at an address that the rule does not allow; it must see no connection."""
    with WebServer("127.0.0.2") as running:
        yield running
        time.sleep(0.05)
        assert running.connections == 0


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: str | list[str]) -> None:
    """Let every look-up give the next answer, and the last one from then on."""
    todo = [[answer] if isinstance(answer, str) else answer for answer in answers]
    real = socket.getaddrinfo

    def fake(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        addresses = todo.pop(0) if len(todo) > 1 else todo[0]
        return [found for address in addresses for found in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "127.2", "2130706434", "0x7f000002", "0177.0.0.2", "[::ffff:127.0.0.2]", "127.0.0.2."],
)
def test_no_spelling_of_a_blocked_address_is_connected_to(forbidden: WebServer, host: str) -> None:
    assert reason(f"http://{host}:{forbidden.port}/") == "blocked_address"


def test_no_name_of_a_blocked_address_is_connected_to(forbidden: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (["127.0.0.2"], ["127.0.0.2", "127.0.0.3"], ["::ffff:127.0.0.2", "127.0.0.2"]):
        resolve_to(monkeypatch, answer)
        assert reason(f"http://pictures.example:{forbidden.port}/") == "blocked_address"


def test_no_redirect_to_a_blocked_address_is_followed(forbidden: WebServer, server: WebServer) -> None:
    assert reason(server.add("/inward", web.redirect(forbidden.url))) == "blocked_address"
    assert server.hits["/inward"] == 1


def test_a_name_that_changes_its_address_between_look_ups(
    forbidden: WebServer, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    server.add("/rebind", web.redirect(f"http://other.example:{forbidden.port}/"))
    assert reason(f"http://pictures.example:{server.port}/rebind") == "blocked_address"
    assert server.hits["/rebind"] == 1


def test_a_name_with_one_good_address(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("/mixed", BODY)
    resolve_to(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    assert fetch(f"http://pictures.example:{server.port}/mixed").body == BODY


def test_without_allowance_loopback_is_blocked(server: WebServer) -> None:
    seen = server.connections
    assert reason(server.add("/private", BODY), FetchRule()) == "blocked_address"
    assert server.connections == seen


def test_proxies_of_the_environment_are_not_used(
    server: WebServer, forbidden: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, forbidden.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch(server.add("/direct", BODY)).body == BODY


@pytest.mark.parametrize(
    ("code", "expected"),
    [(socket.EAI_NONAME, "dns_not_found"), (socket.EAI_NODATA, "dns_not_found"), (socket.EAI_AGAIN, "dns_timeout")],
)
def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch, code: int, expected: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert reason("http://pictures.example/") == expected


def test_a_look_up_that_hangs_holds_up_nobody(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30))
    start = time.monotonic()
    urls = [f"http://{n}.example/" for n in range(30)] + [server.add("/known", BODY)]
    results = fetch_all(urls, QUICK, keep)
    assert time.monotonic() - start < 2
    assert [r.reason for r in results[:30] if isinstance(r, Drop)] == ["dns_timeout"] * 30
    assert isinstance(results[30], Fetched)
    impatient = FetchRule(total_timeout_s=0.2, allow_networks=LOOPBACK)
    assert reason("http://pictures.example/", impatient) == "too_slow"
    release.set()


def test_nobody_listens_or_nobody_answers(server: WebServer) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert reason(f"http://127.0.0.1:{bound.getsockname()[1]}/") == "connect_refused"
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:  # the queue is full, so connecting takes for ever
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        assert reason(f"http://127.0.0.1:{full.getsockname()[1]}/") == "connect_timeout"
        for sock in waiting:
            sock.close()


def test_tls_is_verified(server: WebServer, tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -out crt -days 2"
    subprocess.run(
        [*command.split(), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with WebServer(tls=context) as secure:
        assert reason(secure.add("/", BODY)) == "tls_error"
        assert secure.hits["/"] == 0
    assert reason(server.url.replace("http:", "https:")) == "tls_error"  # no TLS there at all


def test_results_come_in_order_and_use_runs_beside_the_fetches(server: WebServer) -> None:
    urls = [server.add(f"/order/{n}", web.late(b"%d" % n, 0.3 if n % 7 == 0 else 0)) for n in range(60)]
    urls[5], urls[6] = "nonsense", server.add("/order/none", web.status(404))

    def use(fetched: Fetched) -> int:
        if fetched.body == b"8":
            raise Drop("decode_error", "of my own")
        if fetched.body == b"9":
            raise ZeroDivisionError
        if fetched.body == b"10":
            raise StopIteration  # no future can hold this one
        time.sleep(0.002)
        return int(fetched.body)

    start = time.monotonic()
    results = fetch_all(urls, QUICK, use)
    assert time.monotonic() - start < 1.5
    assert [r for r in results if isinstance(r, int)] == [n for n in range(60) if n not in (5, 6, 8, 9, 10)]
    assert [getattr(results[n], "reason", None) for n in (5, 6, 8)] == ["bad_url", "http_4xx", "decode_error"]
    assert [type(results[n]) for n in (9, 10)] == [ZeroDivisionError, StopIteration]
    assert all(r.__traceback__ is None for r in results if isinstance(r, Exception))  # it would hold the body


def test_concurrency_is_bounded(server: WebServer) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def count(peer: web.Peer) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        peer.wait(0.02)
        with lock:
            now -= 1
        web.body(BODY)(peer)

    rule = FetchRule(concurrency=5, allow_networks=LOOPBACK)
    urls = [server.add(f"/crowd/{n}", count) for n in range(40)]
    assert all(isinstance(result, Fetched) for result in fetch_all(urls, rule, keep))
    assert 2 <= most <= 5


def test_bodies_that_wait_for_use_are_bounded_too(server: WebServer) -> None:
    release = threading.Event()
    urls = [server.add(f"/waiting/{n}", BODY) for n in range(40)]
    rule = FetchRule(concurrency=5, allow_networks=LOOPBACK)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fetch_all, urls, rule, lambda fetched: release.wait(10))
        time.sleep(0.3)
        fetched = sum(server.hits[f"/waiting/{n}"] for n in range(40))
        release.set()
        assert running.result() == [True] * 40
    assert fetched == 5


def test_a_look_up_that_hangs_does_not_keep_the_process() -> None:
    program = """if True:
        import socket, time
        from vesl.pipeline.fetch import *
        socket.getaddrinfo = lambda *_, **__: time.sleep(60)
        print(fetch_all(["http://pictures.example/"], FetchRule(connect_timeout_s=0.1), len)[0].reason)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "dns_timeout\n", "")


def test_nothing_to_do() -> None:
    assert fetch_all([], QUICK, keep) == []
