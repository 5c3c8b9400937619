"""img2dataset 1.47 itself, where it is installed: what it writes as a source, and as the one that fetches."""

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.photos import photo
from tests.pipeline.test_archives import AUTO, LAYOUTS, download, record, write
from tests.pipeline.test_ingest import rows, take
from tests.pipeline.test_recipe import GOOD, fingerprints, read
from tests.webserver import Peer, WebServer, status
from tests.world import ROOT, World, jpeg
from vesl.models.contract import ModelError
from vesl.pipeline.fetch import FetchRule
from vesl.pipeline.peer import reason_of_text
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.respect import RespectRule
from vesl.pipeline.steps.download import Download
from vesl.pipeline.store import Store
from vesl.transforms import urls
from vesl.transforms.images import ImageRule, normalise

INSTALLED = importlib.util.find_spec("img2dataset") is not None
peer = pytest.mark.skipif(not INSTALLED, reason="img2dataset is not installed")
PHOTOS = ("skimage/data/astronaut.png", "skimage/data/coffee.png", "sklearn/datasets/images/china.jpg")
LOOPBACK = FetchRule(allow_networks=("127.0.0.0/8",), read_timeout_s=2)
_SCRIPT = """
import sys
from img2dataset import download
if __name__ == "__main__":
    folder, layout = sys.argv[1:]
    download(url_list=f"{folder}/list.parquet", input_format="parquet", url_col="u", caption_col="c", image_size=256,
        output_format=layout, output_folder=f"{folder}/{layout}", resize_mode="keep_ratio", number_sample_per_shard=4,
        processes_count=1, thread_count=1, compute_hash="sha256", enable_wandb=False)
"""


def served(server: WebServer) -> list[tuple[str, str | None]]:
    """URLs of photographs and of two that are none, with captions."""
    found = []
    for i in range(6):
        data = io.BytesIO()
        photo(PHOTOS[i % len(PHOTOS)]).resize((400 + 10 * i, 300)).save(data, "JPEG", quality=90)
        found.append((server.add(f"/{i}.jpg", data.getvalue()), f"photo {i} é" if i else None))
    found[2:2] = [(server.add("/gone.jpg", status(404)), "gone"), (server.add("/page.jpg", b"<html>"), "a page")]
    return found


@peer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_writes_is_a_source_and_what_the_tests_write_for_it(
    tmp_path: Path, server: WebServer, layout: str
) -> None:
    given = served(server)
    pq.write_table(pa.table({"u": [u for u, _ in given], "c": [c for _, c in given]}), tmp_path / "list.parquet")
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), layout]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    real = tmp_path / layout
    hits = server.hits.total()

    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(real / "*"), **AUTO)
    assert record(dataset) == {"rows": 8, "kept": 6, "no_image": 2, "parts": 2}
    taken, found = rows(store, dataset), download(store, dataset)
    assert server.hits.total() == hits
    good = {urls.key(url): caption for url, caption in given if "page" not in url and "gone" not in url}
    assert {row["key"]: row["alt_text"] for row in taken} == good
    assert [(row["outcome"], row["height"]) for row in found] == [("kept", 256)] * 6

    # The same images, written by the tests' own hand: the same shape of everything, and the same result.
    by_url = {
        row["url"]: (row["alt_text"], row["image"]) for row, f in zip(taken, found, strict=True) for row in [row | f]
    }
    for shard in range(2):
        name = f"{shard:05d}"
        order = pq.read_table(real / f"{name}.parquet")["url"].to_pylist()
        mine = [(url, *by_url.get(url, (None, None))) for url in order]
        write(tmp_path / "mine", layout, mine, shard)
        schemas = [pq.read_schema(folder / f"{name}.parquet") for folder in (real, tmp_path / "mine")]
        assert schemas[0].equals(schemas[1])
        assert (tmp_path / "mine" / f"{name}_stats.json").exists() == (real / f"{name}_stats.json").exists()
        if layout == "webdataset":
            shapes = []
            for folder in (real, tmp_path / "mine"):
                with tarfile.open(folder / f"{name}.tar") as tar:
                    shapes.append([(m.name.partition(".")[2], m.type, m.mode, list(m.pax_headers)) for m in tar])
            assert shapes[0] == shapes[1]
    other = Store(str(tmp_path / "other"))
    again = take(other, str(tmp_path / "mine" / "*"), **AUTO)
    assert record(again) == record(dataset)
    assert [row["key"] for row in rows(other, again)] == [row["key"] for row in taken]
    assert [row["sha256"] for row in download(other, again)] == [row["sha256"] for row in found]


def fetched(urls_: list[str], **options: Any) -> list[dict[str, Any]]:
    stage = Download(backend="img2dataset", **{"fetch": LOOPBACK, **options})
    table = pa.table({"key": [f"{i:024d}" for i in range(len(urls_))], "url": urls_})
    found: list[dict[str, Any]] = stage.open()(table).to_pylist()
    return found


@peer
def test_it_fetches_and_the_rest_is_ours(server: WebServer) -> None:
    def slow(connection: Peer) -> None:
        connection.head(Content_Length=10)
        connection.wait(5)

    def short(connection: Peer) -> None:
        connection.head(Content_Length=5000)
        connection.send(b"x" * 100)

    def tagged(connection: Peer) -> None:
        connection.head(X_Robots_Tag="noai", Content_Length=len(jpeg(1)))
        connection.send(jpeg(1))

    def loop(connection: Peer) -> None:
        connection.head(302, Location="/loop", Content_Length=0)

    for path, handler in {"/slow": slow, "/short": short, "/tagged": tagged, "/loop": loop}.items():
        server.add(path, handler)
    answers = {f"/{code}": status(code) for code in (404, 410, 429, 500, 503)}
    for path, answer in {**answers, "/ok": jpeg(1), "/page": b"<html>", "/none": b"", "/big": bytes(300_000)}.items():
        server.add(path, answer)
    expected = {
        "/ok": None, "/404": "http_4xx", "/410": "http_4xx", "/429": "http_429", "/500": "http_5xx", "/503": "http_5xx",
        "/page": "not_an_image", "/none": "empty", "/big": "too_large", "/slow": "read_timeout",
        "/short": "bad_response", "/tagged": "opted_out", "/loop": "redirect_loop",
    }  # fmt: skip
    others = {
        "ftp://a.example/": "bad_scheme", "file:///etc/passwd": "bad_scheme", "no url": "bad_url",
        "http://127.0.0.1:9/": "connect_refused", server.url.replace("http", "https"): "tls_error",
        "http://10.0.0.1/": "blocked_address", "http://[::1]/": "blocked_address",
    }  # fmt: skip
    asked = {**{server.url + path: reason for path, reason in expected.items()}, **others}
    found = fetched(list(asked), fetch=FetchRule(allow_networks=("127.0.0.0/8",), read_timeout_s=1, max_bytes=200_000))
    assert {url: row["reason"] for url, row in zip(asked, found, strict=True)} == asked
    (unknown,) = fetched(["http://no-such-host.invalid/"])
    assert unknown["reason"] in ("dns_not_found", "dns_timeout")  # as this machine's resolver has it
    stored = normalise(jpeg(1), ImageRule())
    assert (found[0]["image"], found[0]["phash"]) == (stored.jpeg, stored.phash)
    assert (found[0]["final_url"], found[0]["http"]) == (None, None)


@peer
def test_addresses_and_domains_are_looked_at_before(server: WebServer) -> None:
    url = server.add("/1.jpg", jpeg(1))
    (row,) = fetched([url], fetch=FetchRule())
    assert row["reason"] == "blocked_address"
    (row,) = fetched([url.replace("127.0.0.1", "localhost")], fetch=FetchRule())
    assert row["reason"] == "blocked_address"
    (row,) = fetched([url.replace("127.0.0.1", "localhost")], respect=RespectRule(blocked_domains=("localhost",)))
    assert row["reason"] == "blocked_domain"
    assert not server.hits


@peer
def test_a_whole_run(world: World) -> None:
    world.document["steps"]["download"]["backend"] = "img2dataset"
    world.write()
    world.list_urls("a", world.images(4))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = world.run("run", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


def test_the_backend_is_part_of_the_identity(tmp_path: Path) -> None:
    before = fingerprints(read(tmp_path, GOOD))
    assert fingerprints(read(tmp_path, GOOD, "steps.download.backend=vesl")) == before
    assert fingerprints(read(tmp_path, GOOD, "steps.download.backend=img2dataset"))["download"] != before["download"]
    with pytest.raises(RecipeError, match=r"steps.download.backend: img2dataset cannot obey respect.robots_txt"):
        read(tmp_path, GOOD, "steps.download.backend=img2dataset", "steps.download.respect.robots_txt=true")


@pytest.mark.skipif(INSTALLED, reason="img2dataset is installed")
def test_where_it_is_not_installed_one_line_says_so() -> None:
    with pytest.raises(ModelError, match=r"steps.download.backend: img2dataset .* pip install 'vesl\[img2dataset\]'"):
        Download(backend="img2dataset").open()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_4xx"),
        ("HTTP Error 429: Too Many Requests", "http_429"),
        ("HTTP Error 503: Service Unavailable", "http_5xx"),
        ("HTTP Error 304: Not Modified", "http_other"),
        (
            "HTTP Error 302: ... would lead to an infinite loop.\nThe last 30x error message was:\nFound",
            "redirect_loop",
        ),
        ("<urlopen error [Errno -2] Name or service not known>", "dns_not_found"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns_timeout"),
        ("<urlopen error [Errno 111] Connection refused>", "connect_refused"),
        ("[Errno 104] Connection reset by peer", "connect_refused"),
        ("<urlopen error timed out>", "connect_timeout"),
        ("The read operation timed out", "read_timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: x>", "tls_error"),
        ("IncompleteRead(100 bytes read, 4900 more expected)", "bad_response"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted_out"),
        ("<urlopen error unknown url type: gopher>", "bad_scheme"),
        ("nonnumeric port: 'x'", "bad_url"),
        ("", "bad_response"),
    ],
)
def test_what_it_says_becomes_a_reason(said: str, reason: str) -> None:
    assert reason_of_text(said).reason == reason
