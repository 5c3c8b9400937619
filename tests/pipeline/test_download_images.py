"""What the download step makes of images: options reach the stored bytes; what a list expects of them is checked."""

import hashlib
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from tests import webserver as web
from tests.photos import photo
from tests.pipeline.test_recipe import GOOD, fingerprints, read
from tests.webserver import WebServer
from tests.world import World, jpeg
from vesl.pipeline.fetch import FetchRule
from vesl.pipeline.plan import make_plan
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.steps import download as step
from vesl.pipeline.steps.download import Download
from vesl.transforms.images import ImageRule, Resize, normalise

FETCH = FetchRule(allow_networks=("127.0.0.0/8",))
ZERO = "0" * 64


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def download(urls: list[str], stage: Download, **columns: list[Any]) -> list[dict[str, Any]]:
    types = {"expected_phash": pa.int64()}
    table = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    return list(
        stage.open()(pa.table({"key": [f"{n:024x}" for n in range(len(urls))], "url": urls, **table})).to_pylist()
    )


def outcomes(rows: list[dict[str, Any]]) -> list[str]:
    return [row["reason"] or row["outcome"] for row in rows]


def test_digests_are_checked(server: WebServer) -> None:
    good, page, broken = jpeg(1), b"<html>gone</html>", jpeg(2)[:-200]
    urls = [server.add(f"/{n}", data) for n, data in enumerate([good] * 6 + [page, broken, page])]
    rows = download(
        [*urls, f"{server.url}/404"],
        Download(fetch=FETCH),
        expected_sha256=[sha256(good), ZERO, None, None, sha256(good), None, ZERO, sha256(broken), None, ZERO],
        expected_md5=[None, None, md5(good), ZERO[:32], ZERO[:32], None, None, None, ZERO[:32], None],
        expected_phash=[None] * 10,
    )
    wrong = "hash_mismatch"
    want = ["kept", wrong, "kept", wrong, wrong, "kept", wrong, "decode_error", wrong, "http_4xx"]
    assert outcomes(rows) == want
    assert {row["outcome"] for row in rows if row["reason"] == wrong} == {"rejected"}
    assert rows[1]["detail"] == f"sha256 {sha256(good)[:16]}, expected 0000000000000000"
    assert rows[3]["detail"] == f"md5 {md5(good)[:16]}, expected 0000000000000000"
    assert rows[6]["detail"] == f"sha256 {sha256(page)[:16]}, expected 0000000000000000"  # no decoder saw it
    assert all(row["drift_bits"] is None for row in rows)
    assert all((row["image"] is None) == (row["outcome"] != "kept") for row in rows)


def test_bytes_that_are_not_expected_reach_no_decoder(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(step, "normalise", lambda body, rule: (decoded.append(body), normalise(body, rule))[1])
    bodies = [jpeg(n) for n in range(4)]
    urls = [server.add(f"/{n}", data) for n, data in enumerate(bodies)]
    expected: dict[str, list[Any]] = {
        "expected_sha256": [ZERO, None, sha256(bodies[2]), None],
        "expected_md5": [None, ZERO[:32], None, None],
        "expected_phash": [0, None, None, None],
    }
    rows = download(urls, Download(fetch=FETCH), **expected)
    assert outcomes(rows) == ["hash_mismatch", "hash_mismatch", "kept", "kept"]
    assert sorted(decoded) == sorted(bodies[2:])
    decoded.clear()
    assert outcomes(download(urls, Download(fetch=FETCH, max_drift_bits=4), **expected))[:2] == ["hash_mismatch"] * 2
    assert sorted(decoded) == sorted([bodies[0], *bodies[2:]])  # what may have drifted has to be looked at


def test_the_time_of_the_answer_is_kept(server: WebServer) -> None:
    urls = [server.add("/a", jpeg(1)), server.add("/b", b"no image"), server.add("/c", web.late(jpeg(2), 0.3))]
    begun = datetime.now(UTC) - timedelta(milliseconds=1)
    first, failed, late = (row["fetched_at"] for row in download(urls, Download(fetch=FETCH)))
    assert begun <= first <= late - timedelta(seconds=0.2)
    assert late <= datetime.now(UTC)
    assert failed is None


def test_without_columns_nothing_is_expected(server: WebServer) -> None:
    url = server.add("/a", jpeg(1))
    assert outcomes(download([url], Download(fetch=FETCH))) == ["kept"]
    assert outcomes(download([url], Download(fetch=FETCH), expected_sha256=[ZERO])) == ["hash_mismatch"]
    assert outcomes(download([url], Download(fetch=FETCH), expected_md5=[None])) == ["kept"]
    assert download([], Download(fetch=FETCH)) == []


def test_what_drifted_is_kept_where_it_looks_the_same(server: WebServer) -> None:
    image, files = photo("skimage/data/astronaut.png"), []
    for quality in (92, 40):
        files.append(io.BytesIO())
        image.save(files[-1], "JPEG", quality=quality)
    original, again = (file.getvalue() for file in files)
    near = normalise(original, ImageRule()).phash
    assert near is not None
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(flat, "JPEG")
    bodies = [original, again, again, jpeg(3), flat.getvalue(), again, b"<html>", again]
    urls = [server.add(f"/{n}", data) for n, data in enumerate(bodies)]
    expected: dict[str, list[Any]] = {
        "expected_sha256": [sha256(original)] * 7 + [None],
        "expected_md5": [None] * 7 + [md5(original)],
        "expected_phash": [near, near, None, near, near, near ^ 0xFFFF, near, near],
    }
    rows = download(urls, Download(fetch=FETCH, max_drift_bits=4), **expected)
    wrong = "hash_mismatch"
    assert outcomes(rows) == ["kept", "kept", wrong, wrong, wrong, wrong, wrong, "kept"]
    assert rows[0]["drift_bits"] is None
    bits = (normalise(again, ImageRule()).phash or 0) ^ near
    assert rows[1]["drift_bits"] == rows[7]["drift_bits"] == (bits & (1 << 64) - 1).bit_count() <= 4
    assert rows[1]["source_sha256"] == sha256(again)
    assert rows[2]["detail"].endswith("; perceptual hash unknown")
    assert rows[4]["detail"].endswith("; perceptual hash unknown")
    assert rows[5]["detail"].endswith(" bits away")
    assert "not_an_image" in rows[6]["detail"]
    assert outcomes(download(urls, Download(fetch=FETCH), **expected)) == ["kept"] + [wrong] * 7


def test_from_a_list_to_the_store(server: WebServer, tmp_path: Path) -> None:
    """The columns of a list, by the real command; a list that is added later may lack what it says of a row."""
    world = World(tmp_path, server)
    world.document["dataset"] |= {"sha256_column": "sha", "md5_column": "md5", "phash_column": "near"}
    world.document["steps"]["download"] |= {"max_drift_bits": 2, "image": {"resize": {"side_px": 64, "mode": "pad"}}}
    world.write()
    near = normalise(jpeg(4), ImageRule(Resize(64, "pad"))).phash
    assert near is not None
    facts: list[dict[str, str]] = [
        {"sha": sha256(jpeg(0)).upper()},
        {"sha": ZERO},
        {"md5": md5(jpeg(2))},
        {"md5": ZERO[:32]},
        {"sha": ZERO, "near": f"{near & (1 << 64) - 1:016x}"},
        {},
    ]
    rows = [{"url": server.add(f"/{n}", jpeg(n)), "alt": "a", **fact} for n, fact in enumerate(facts)]
    (tmp_path / "lists" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = world.run("run", "--until", "download")
    assert done.returncode == 0, done.stderr
    plan = make_plan(world.load(), "download")
    found = pa.concat_tables([plan.store.read_table(plan.steps[0].table(part)) for part in plan.parts]).to_pylist()
    by_url = {row["final_url"]: row for row in found if row["outcome"] == "kept"}
    assert sorted(by_url) == [rows[n]["url"] for n in (0, 2, 4, 5)]
    assert [row["reason"] for row in found if row["outcome"] != "kept"] == ["hash_mismatch"] * 2
    assert [by_url[rows[n]["url"]]["drift_bits"] for n in (0, 4, 5)] == [None, 0, None]
    assert {(row["width"], row["height"]) for row in by_url.values()} == {(64, 64)}


def test_options_of_images_in_a_recipe(tmp_path: Path) -> None:
    before = fingerprints(read(tmp_path, GOOD))
    image = "steps.download.image."
    spelled = [fingerprints(read(tmp_path, GOOD, f"{image}{name}=300")) for name in ("max_side_px", "resize.side_px")]
    assert spelled[0] == spelled[1]
    for override in (
        *("resize.side_px=300", "resize.mode=pad", "resize.mode=none", "resize.only_if_larger=false"),
        *("quality=80", "animated=drop"),
    ):
        assert fingerprints(read(tmp_path, GOOD, image + override))["download"] != before["download"]
    assert fingerprints(read(tmp_path, GOOD, "steps.download.max_drift_bits=4"))["download"] != before["download"]
    assert fingerprints(read(tmp_path, GOOD, f"{image}resize.side_px=1024")) == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("image.resize.mode=border", "'border' is not one of keep_ratio, keep_ratio_shorter, pad, crop, none"),
        ("image.resize.side_px=8", "steps.download.image.resize.side_px: 8 is not between 16 and 65500"),
        ("image.resize.side=8", "did you mean 'side_px'?"),
        ("image.resize=512", "steps.download.image.resize: expected a block of keys, found 512"),
        ("image.max_side_px=8", "steps.download.image.max_side_px: 8 is less than 16"),
        ("image.animated=maybe", "'maybe' is not one of first_frame, drop"),
        ("max_drift_bits=64", "steps.download.max_drift_bits: 64 is not between 0 and 63"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, GOOD, f"steps.download.{override}")
    assert says in str(caught.value)


def test_one_side_said_twice(tmp_path: Path) -> None:
    image = "steps.download.image."
    with pytest.raises(RecipeError, match=r"image\.max_side_px: is another name of resize\.side_px"):
        read(tmp_path, GOOD, f"{image}max_side_px=300", f"{image}resize.side_px=200")
