"""What owners ask for: headers, files on hosts, domains."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import webserver as web
from tests.pipeline.test_fetch import QUICK, fetched
from tests.webserver import WebServer
from tests.world import World, jpeg
from vesl.pipeline.fetch import Fetcher, FetchRule
from vesl.pipeline.request import Fetched
from vesl.pipeline.respect import RespectRule, check_domain, check_headers, tdm_reserves
from vesl.pipeline.stage import Place
from vesl.pipeline.store import Store
from vesl.transforms.options import identity
from vesl.transforms.outcomes import REASONS, Drop

RULE = RespectRule()
ALL = RespectRule(robots_txt=True, tdm_file=True)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def ask(urls: list[str], respect: RespectRule, store: Store | None = None, rule: FetchRule = QUICK) -> list[Any]:
    fetcher = Fetcher[Fetched](rule, place=Place(store, 1) if store else None, respect=respect)
    results = fetched(fetcher, urls)
    fetcher.close()
    assert all(r.reason in REASONS["download"] for r in results if isinstance(r, Drop))
    return results


def reasons(results: list[Any]) -> list[str]:
    return ["kept" if isinstance(r, Fetched) else getattr(r, "reason", repr(r)) for r in results]


@pytest.mark.parametrize(
    ("tag", "objects"),
    [
        ("noai", True),
        ("NoImageAI", True),
        ("nofollow, noindex", True),
        ("none", True),
        ("all", False),
        ("nofollow", False),
        ("noaitraining", False),
        ("vesl: noai", True),
        ("VESL : noai", True),
        ("*: noai", True),
        ("googlebot: noai, noindex", False),
        ("max-image-preview: large, noai", True),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noimageindex", True),
        ("max-snippet: noai", False),
        ("nofollow, otherbot: noindex", False),
        ("", False),
    ],
)
def test_tags(tag: str, objects: bool) -> None:
    def found(*lines: str) -> bool:
        try:
            check_headers(lines, (), "vesl", RULE)
        except Drop as drop:
            return drop.reason == "opted_out"
        return False

    assert found(tag) is objects
    assert found("nofollow", tag) is objects


def test_headers_of_answers_are_obeyed_and_stored(server: WebServer) -> None:
    cases = {
        "/free": {"ETag": '"1"', "Last_Modified": "yesterday", "Date": "today", "X_Robots_Tag": "googlebot: noindex"},
        "/tag": {"X_Robots_Tag": "noimageai"},
        "/tdm": {"tdm_reservation": "1"},
        "/no-tdm": {"TDM_Reservation": "0"},
    }
    urls = [server.add(path, web.body(b"x", **headers)) for path, headers in cases.items()]
    results = ask(urls, RULE)
    assert reasons(results) == ["kept", "opted_out", "opted_out", "kept"]
    assert str(results[1]) == "opted_out: X-Robots-Tag: noimageai"
    http = results[0].http
    assert [http[name] for name in ("etag", "last_modified", "date")] == ['"1"', "yesterday", "today"]
    assert (http["x_robots_tag"], http["tdm_reservation"], http["robots_txt"]) == ("googlebot: noindex", None, None)
    assert reasons(ask(urls, replace(RULE, robots_tags=(), tdm_header=False))) == ["kept"] * 4
    assert not {"/robots.txt", "/.well-known/tdmrep.json"} & set(server.hits)


def test_an_objection_is_heard_before_the_body(server: WebServer) -> None:
    def answer(peer: web.Peer) -> None:
        peer.head(X_Robots_Tag="noai", Content_Length=1000)
        peer.wait()

    assert reasons(ask([server.add("/", answer)], RULE)) == ["opted_out"]


def test_who_asks_says_where_to_object(server: WebServer) -> None:
    (result,) = ask([server.add("/", b"x")], RULE, rule=replace(QUICK, contact="https://example.org/bot"))
    assert result.http["user_agent"].endswith("(+https://example.org/bot)")
    assert f"User-Agent: {result.http['user_agent']}".encode() in server.requests[0]
    with pytest.raises(ValueError, match="contact: cannot stand in a header"):
        FetchRule(contact="a\r\nX-Evil: 1")


ROBOTS = b"""User-agent: *
Disallow: /private/
Disallow: /*.gif$
Allow: /private/open

User-agent: vesl
Disallow: /for-others
"""


def test_robots_txt(server: WebServer, store: Store) -> None:
    server.add("/robots.txt", ROBOTS)
    urls = [server.add(path, b"x") for path in ("/for-others/1", "/private/1", "/fine")]
    results = ask(urls, ALL, store)
    assert reasons(results) == ["robots_disallowed", "kept", "kept"]  # a robot that is named obeys its own group
    assert results[1].http["robots_txt"] == "allowed"
    assert server.hits["/for-others/1"] == 0
    other = replace(QUICK, user_agent="someone/1.0 (of another name)")
    urls = [server.add(path, b"x") for path in ("/private/1", "/private/open/1", "/a.gif", "/a.gif?b", "/for-others/1")]
    expected = ["robots_disallowed", "kept", "robots_disallowed", "kept", "kept"]
    assert reasons(ask(urls, ALL, store, other)) == expected
    assert server.hits["/robots.txt"] == 1  # the second worker, and every later part, had it from the store


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (web.status(404), "kept"),
        (web.status(401), "kept"),
        (web.body(b""), "kept"),
        (web.body(b"\x00\xff<html>"), "kept"),
        (web.redirect("/robots.txt"), "kept"),
        (web.redirect("/elsewhere"), "robots_disallowed"),
        (web.redirect("http://10.0.0.1/robots.txt"), "blocked_address"),
        (web.status(500), "http_5xx"),
        (web.status(429), "http_429"),
        (web.silent, "read_timeout"),
        (web.reset, "connect_refused"),
        (web.endless, "too_large"),
    ],
)
def test_a_robots_txt_that_cannot_be_had(server: WebServer, store: Store, answer: web.Handler, expected: str) -> None:
    server.add("/robots.txt", answer)
    server.add("/elsewhere", b"User-agent: *\nDisallow: /")
    urls = [server.add("/1.jpg", b"x"), server.add("/2.jpg", b"x")]
    results = ask(urls, replace(ALL, tdm_file=False), store)
    assert reasons(results) == [expected] * 2
    assert server.hits["/robots.txt"] == (6 if expected == "kept" and server.hits["/robots.txt"] > 1 else 1)
    assert server.hits["/1.jpg"] == (expected == "kept")
    if expected not in ("kept", "robots_disallowed"):
        assert "/robots.txt: " in results[0].detail
        assert store.names("respect") == []  # another try may find it


def test_files_of_hosts_are_asked_for_again_when_they_are_old(server: WebServer, store: Store) -> None:
    server.add("/robots.txt", b"")
    url = server.add("/1.jpg", b"x")
    for _ in range(2):
        assert reasons(ask([url], replace(ALL, keep_h=1e-9), store)) == ["kept"]
    assert server.hits["/robots.txt"] == 2
    assert reasons(ask([url], ALL, store)) == ["kept"]
    assert server.hits["/robots.txt"] == 2


TDM = """[{"location": "/", "tdm-reservation": 0}, {"location": "/art/*", "tdm-reservation": 1, "tdm-policy": "x"},
    {"location": "/art/free/", "tdm-reservation": 0}, {"location": "*.png$", "tdm-reservation": "1"}, 7]"""


@pytest.mark.parametrize(
    ("path", "reserved"),
    [("/a.jpg", False), ("/art/a.jpg", True), ("/art/free/a.jpg", False), ("/a.png", True), ("/a.png?b", False)],
)
def test_tdm_file(path: str, reserved: bool) -> None:
    assert tdm_reserves(TDM, path) is reserved
    for text in ("", "{", "[]", "7", '{"location": "/"}', "[" * 100_000, '[{"location": 3, "tdm-reservation": 1}]'):
        assert not tdm_reserves(text, path)
    assert not tdm_reserves('[{"location": "/%s$", "tdm-reservation": 1}]' % ("*a" * 5000), "/" + "a" * 4000)


def test_tdm_file_of_a_host(server: WebServer, store: Store) -> None:
    server.add("/.well-known/tdmrep.json", TDM.encode())
    urls = [server.add(path, b"x") for path in ("/a.jpg", "/art/a.jpg")]
    results = ask(urls, replace(ALL, robots_txt=False), store)
    assert reasons(results) == ["kept", "opted_out"]
    assert results[1].detail == f"{server.url}/.well-known/tdmrep.json"
    assert server.hits["/art/a.jpg"] == 0


def test_domains(tmp_path: Path) -> None:
    path = tmp_path / "domains.txt"
    path.write_text("# ours\nexample.org  # all of it\n\nBÜCHER.example\n", encoding="utf-8")
    rule = RespectRule(blocked_domains=("evil.co.uk",), blocked_domains_file=str(path))
    for host in ("example.org", "a.b.example.org", "example.org.", "xn--bcher-kva.example", "img.evil.co.uk"):
        with pytest.raises(Drop, match="blocked_domain"):
            check_domain(host, rule)
    for host in ("example.com", "notexample.org", "co.uk", "org", "", "127.0.0.1"):
        check_domain(host, rule)
    before = identity(rule)
    assert "blocked" not in before
    path.write_text("example.net\n")
    assert identity(RespectRule(blocked_domains=("evil.co.uk",), blocked_domains_file=str(path))) != before
    assert pickle.loads(pickle.dumps(rule)).blocked == rule.blocked  # workers do not have the file
    with pytest.raises(ValueError, match="blocked_domains_sha256"):
        RespectRule(blocked_domains_file=str(path), blocked_domains_sha256="0" * 64)
    for wrong in ("http://example.org", "a b", "example.org/path", ""):
        with pytest.raises(ValueError, match=r"is not a domain like example\.org"):
            RespectRule(blocked_domains=(wrong,))
    with pytest.raises(ValueError, match="blocked_domains_file: /none: cannot be read"):
        RespectRule(blocked_domains_file="/none")


def test_a_redirect_into_a_blocked_domain(server: WebServer) -> None:
    url = server.add("/out", web.redirect("http://img.example.org/1.jpg"))
    assert reasons(ask([url], RespectRule(blocked_domains=("example.org",)))) == ["blocked_domain"]


def test_a_run_asks_each_host_once_and_stores_what_it_said(world: World) -> None:
    rows = world.images(20)
    world.server.add("/3.jpg", web.body(jpeg(3), X_Robots_Tag="noai"))
    world.server.add("/4.jpg", web.body(jpeg(4), ETag='"four"'))
    world.server.add("/robots.txt", b"User-agent: *\nDisallow: /7.jpg\n")
    world.list_urls("a", rows)
    world.document["steps"]["download"]["respect"] = {"robots_txt": True, "tdm_file": True}
    world.document["engine"]["workers"] = 1
    world.write()
    done = world.run("run", "--until", "download")
    assert done.returncode == 0, done.stderr
    table = [
        r for p in sorted(Path(world.store).glob("download/*/part-*.parquet")) for r in pq.read_table(p).to_pylist()
    ]
    by_reason = {row["reason"]: row["detail"] for row in table if row["outcome"] != "kept"}
    assert by_reason == {
        "opted_out": "X-Robots-Tag: noai",
        "robots_disallowed": f"{world.server.url}/robots.txt",
    }
    kept = [row["http"] for row in table if row["outcome"] == "kept"]
    assert [http["etag"] for http in kept if http["etag"]] == ['"four"']
    assert {http["robots_txt"] for http in kept} == {"allowed"}
    assert [world.server.hits[path] for path in ("/robots.txt", "/.well-known/tdmrep.json", "/7.jpg")] == [1, 1, 0]
    world.document["steps"]["download"]["respect"]["blocked_domains"] = ["not a domain"]
    world.write()
    refused = world.run("run")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "steps.download.respect.blocked_domains: 'not a domain' is not a domain like example.org" in refused.stderr
