"""The download step against a web that means harm: all of it at once, in one process that is watched from outside.

What one hostile answer leads to is tested in test_fetch; here is what only a crowd of them shows: that memory stays
flat, that time limits hold, and that no socket is ever connected to an address that is blocked.
"""

import io
import json
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from tests import webserver as web
from tests.pipeline.test_fetch import ANSWERS
from tests.webserver import WebServer
from tests.world import World, jpeg

# Fetches the URLs of its standard input with the real step. Every connect of the process is seen by an audit hook;
# names under .example resolve to what the input says, to one answer after the other.
PROGRAM = """if True:
    import itertools, json, resource, socket, sys, threading, time
    import pyarrow as pa
    from vesl.pipeline.steps.download import Download, FetchRule
    given, connected, real = json.load(sys.stdin), set(), socket.getaddrinfo
    sys.addaudithook(lambda event, args: connected.add(args[1][0]) if event == "socket.connect" else None)
    names = {name: itertools.cycle(answers) for name, answers in given["names"].items()}
    def resolve(host, port, *rest, **more):
        if host in names:
            return [f for a in next(names[host]) for f in real(a, port, type=socket.SOCK_STREAM)]
        return real(host, port, *rest, **more)
    socket.getaddrinfo = resolve
    step = Download(fetch=FetchRule(**given["rule"]))
    function, table = step.open(), lambda urls: pa.table({"key": list(map(str, range(len(urls)))), "url": urls})
    function(table(given["first"]))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    done = function(table(given["urls"]))
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [[row["reason"] or row["outcome"], row["detail"]] for row in done.to_pylist()]
    print(json.dumps([rows, sorted(connected), seconds, (after - before) / 1024]))"""
RULE = {
    "max_bytes": 1_000_000, "connect_timeout_s": 6.0, "read_timeout_s": 2.5, "total_timeout_s": 8.0, "buffer_mib": 16,
    "allow_networks": ["127.0.0.1/32"], "host_concurrency": None,
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What became of the URLs, and what the process did meanwhile."""

    reasons: list[str]
    details: list[str | None]
    connected: set[str]
    seconds: float
    grown_mib: float


def download(urls: list[str], first: list[str], names: dict[str, list[list[str]]] | None = None, **rule: Any) -> Seen:
    """Fetch `urls` in a process of their own that has fetched `first` already."""
    given = {"urls": urls, "first": first, "names": names or {}, "rule": RULE | rule}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(given), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, connected, seconds, grown = json.loads(done.stdout)
    return Seen([row[0] for row in rows], [row[1] for row in rows], set(connected), seconds, grown)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


def bomb(encoding: str) -> web.Handler:
    """A small body that is 200 MB of zeros once decoded."""
    if encoding in ("br", "zstd"):
        codec = {"br": "brotli", "zstd": "zstd"}[encoding]
        data = pa.compress(bytes(200_000_000), codec=codec, asbytes=True)
    else:
        packer = zlib.compressobj(9, wbits={"gzip": 31, "x-gzip": 31, "deflate": 15, "bare deflate": -15}[encoding])
        data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    return web.body(data, Content_Encoding=encoding.removeprefix("bare "))


def picture(name: str, side: int) -> bytes:
    """A black square: few bytes, many pixels."""
    file = io.BytesIO()
    Image.new("1" if name == "PNG" else "L", (side, side)).save(file, name)
    return file.getvalue()


def forever(head: bytes, again: bytes) -> web.Handler:
    def answer(peer: web.Peer) -> None:
        peer.send(head)
        while True:
            peer.send(again)
            peer.wait(0.02)  # else a crowd of them holds up this server's other answers

    return answer


def drip(data: bytes) -> web.Handler:
    def answer(peer: web.Peer) -> None:
        for at in range(len(data)):
            peer.send(data[at : at + 1])
            peer.wait(0.2)

    return answer


OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MORE = {
    "deflate bomb": (bomb("deflate"), "too_large"),
    "bare deflate bomb": (bomb("bare deflate"), "too_large"),
    "x-gzip bomb": (bomb("x-gzip"), "too_large"),
    "brotli bomb": (bomb("br"), "bad_response"),  # never decoded: nobody asked for it
    "zstd bomb": (bomb("zstd"), "bad_response"),
    "pixel bomb": (web.body(picture("PNG", 12_000)), "too_many_pixels"),
    "JPEG pixel bomb": (web.body(picture("JPEG", 8_100)), "too_many_pixels"),
    "dripping headers": (drip(OK + b"X: y\r\n" * 100), "too_slow"),
    "dripping chunks": (drip(CHUNKED + b"1\r\nx\r\n" * 100), "too_slow"),
    "hints without an end": (forever(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100), "too_slow"),
    "a chunk's extension without an end": (forever(CHUNKED + b"5;x=", b"y" * 10_000), "too_slow"),
    "a chunk of all bytes there are": (web.raw(CHUNKED + b"f" * 15 + b"\r\n" + bytes(100)), "bad_response"),
    "trailers without an end": (forever(CHUNKED + b"1\r\nx\r\n0\r\n", b"X-More: y\r\n" * 100), "bad_response"),
    "redirect to a megabyte": (web.redirect("/" + "a" * 1_000_000), "bad_response"),
    "SVG": (web.body(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not_an_image"),
    "HTML": (web.body(b"<html>"), "not_an_image"),
    "half a picture": (web.body(jpeg(1)[:1500]), "decode_error"),
    "switching protocols": (web.raw(b"HTTP/1.1 101 -\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), "http_other"),
}


def test_hundreds_of_attacks_at_once_end_as_they_should_in_flat_memory(server: WebServer) -> None:
    """Each of the answers of test_fetch and of the above, 5 times."""
    cases, copies = {**ANSWERS, **MORE}, 5
    fine = [server.add(f"/fine/{n}", jpeg(n)) for n in range(30)]
    urls = [server.add(f"/{i}", handler) for i, (handler, _) in enumerate(cases.values())] * copies
    seen = download(urls, fine, user_agent="hostile/1")
    found = {name: set(seen.reasons[i :: len(cases)]) for i, name in enumerate(cases)}
    assert found == {name: {expected} for name, (_, expected) in cases.items()}
    codes = {f"HTTP {code}" for code in (403, 404, 500, 204, 206, 304)}
    assert codes <= set(seen.details)
    assert seen.connected <= {"127.0.0.1"}
    assert seen.seconds < 25
    assert seen.grown_mib < 100  # each bomb alone is 200 MB


ADDRESSES = """127.0.0.2 127.255.255.254 0.0.0.0 10.0.0.1 100.100.100.200 168.63.129.16 169.254.169.254 172.16.0.1
192.0.0.192 192.168.0.1 224.0.0.1 255.255.255.255 :: ::1 ::127.0.0.2 ::ffff:127.0.0.2 ::ffff:169.254.169.254
64:ff9b::127.0.0.2 64:ff9b::169.254.169.254 64:ff9b:1::1 2002:7f00:2:: 2002:a9fe:a9fe:: 2001:0:7f00:2::1
fd00:ec2::254 fe80::1 fec0::1 ff02::1"""
SPELLINGS = ["2130706434", "0x7f.0.0.2", "0177.0.0.2", "127.2", "127.0.0.2.", "%31%32%37.0.0.2", "①②⑦.0.0.2"]


@pytest.fixture
def forbidden() -> Iterator[int]:
    """A port on which blocked addresses of this machine listen; none of them must see a connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.2", 0)))
        port = listener.getsockname()[1]
        listeners = [listener]
        with suppress(OSError):  # no IPv6 here
            listeners.append(stack.enter_context(socket.create_server(("::1", port), family=socket.AF_INET6)))
        yield port
        time.sleep(0.05)
        for listener in listeners:
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_no_socket_is_connected_to_a_blocked_address(server: WebServer, forbidden: int) -> None:
    """Written in the URL, as the answer of a resolver, and as the target of a redirect; seen at connect() itself."""
    hosts = [f"[{a}]" if ":" in a else a for a in ADDRESSES.split()] + SPELLINGS
    direct = [f"http://{host}:{forbidden}/" for host in hosts]
    names = {f"n{i}.example": [[address]] for i, address in enumerate(ADDRESSES.split())}
    named = [f"http://{name}:{forbidden}/" for name in names]
    sent = [server.add(f"/sent/{i}", web.redirect(url)) for i, url in enumerate([*direct, *named])]
    seen = download([*direct, *named, *sent], [server.add("/fine", jpeg(1))], names)
    assert set(seen.reasons) == {"blocked_address"}
    assert seen.connected == {"127.0.0.1"}


def test_a_resolver_that_changes_its_mind_gains_nothing(server: WebServer, forbidden: int) -> None:
    """Names that are this server at one look-up and a blocked address at the next, or both in one answer."""
    fine, bad = ["127.0.0.1"], ["127.0.0.2"]
    answers = [[fine, bad], [bad, fine], [fine + bad], [bad + fine], [fine, bad + fine]]
    names = {f"n{i}.example": answers[i % len(answers)] for i in range(50)}
    for i, name in enumerate(names):  # to another port, so by another connection, and to the same one
        server.add(f"/inward/{i}", web.redirect(f"http://{name}:{forbidden}/"))
        server.add(f"/again/{i}", web.redirect("/picture"))
    server.add("/picture", jpeg(1))
    urls = [f"http://{name}:{server.port}/{way}/{i}" for i, name in enumerate(names) for way in ("inward", "again")]
    seen = download(urls, [server.url + "/picture"], names)
    assert set(seen.reasons) <= {"kept", "blocked_address", "connect_refused"}  # refused: nobody is at that port there
    assert seen.connected == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("broken", "advice"), [("dns_timeout", "a caching one on each machine"), ("connect_refused", "the way out")]
)
def test_a_run_says_when_the_network_and_not_the_web_is_broken(world: World, broken: str, advice: str) -> None:
    """From the command line, after a list of which most ends in one way."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        port = nobody.getsockname()[1]
        rows: list[tuple[str, str | None]] = [*world.images(20)]
        host = "127.0.0.1" if broken == "connect_refused" else "gone.example"
        rows += [(f"http://{host}:{port}/{n}.jpg", "") for n in range(100)]
        world.list_urls("a", rows)
        world.document["dataset"]["rows_per_part"] = 60
        world.write()
        (world.folder / "sitecustomize.py").write_text(
            "import socket\nreal = socket.getaddrinfo\n"
            "def fail(host, *rest, **more):\n"
            "    if host == 'gone.example':\n"
            "        raise socket.gaierror(socket.EAI_AGAIN, 'no answer')\n"
            "    return real(host, *rest, **more)\n"
            "socket.getaddrinfo = fail\n"
        )
        path = f"{world.folder}:{world.env()['PYTHONPATH']}"
        done = world.run("run", "--until", "download", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    (hint,) = [line for line in done.stderr.splitlines() if "more than a dead web explains" in line]
    assert hint.startswith(f"vesl: download: 100 of 120 rows ended as {broken}, ")
    assert advice in hint
    assert "vesl run RECIPE --retry failed" in hint
