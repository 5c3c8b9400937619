"""Every row of a hostile list ends in exactly one place, with the right reason, and the sums agree."""

import io
import struct
import zlib
from collections import Counter
from typing import Any

import pytest
from PIL import Image

from tests import webserver as web
from tests.world import World, jpeg
from vesl.pipeline.plan import make_plan
from vesl.pipeline.progress import Tally
from vesl.pipeline.show import find
from vesl.transforms import urls


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (160, 100), "red"), "JPEG", exif=exif)


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


RGB = Image.new("RGB", (120, 90), (200, 30, 40))
FRAMES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
GOOD: dict[str, bytes] = {
    "plain.jpg": jpeg(1),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "grey.jpg": encoded(RGB.convert("L"), "JPEG"),
    "rotated.jpg": rotated(),
    "sixteen.png": encoded(Image.new("I;16", (64, 64), 30_000), "PNG"),
    "palette.png": encoded(RGB.convert("P"), "PNG"),
    "alpha.png": encoded(RGB.convert("RGBA"), "PNG"),
    "one-bit.png": encoded(RGB.convert("1"), "PNG"),
    "animated.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated.webp": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "picture.bmp": encoded(RGB, "BMP"),
    "large.jpg": jpeg(2, (2000, 1500)),
}
TRUNCATED = jpeg(3)[:900]
FLIPPED = bytearray(encoded(RGB, "PNG"))
FLIPPED[60] ^= 0xFF

# path -> (what the server does, reason); each becomes one row
BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "gone.jpg": (web.status(404), "http_4xx"),
    "forbidden.jpg": (web.status(403), "http_4xx"),
    "busy.jpg": (web.status(429), "http_429"),
    "broken.jpg": (web.status(503), "http_5xx"),
    "teapot.jpg": (web.body(b"", code=204), "http_other"),
    "empty.jpg": (b"", "empty"),
    "page.jpg": (b"<!doctype html><p>hello", "not_an_image"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    "scan.tif": (encoded(RGB, "TIFF"), "not_an_image"),
    "truncated.jpg": (TRUNCATED, "decode_error"),
    "flipped.png": (bytes(FLIPPED), "decode_error"),
    "pixel.gif": (encoded(Image.new("RGB", (1, 1)), "GIF"), "too_small"),
    "banner.png": (encoded(Image.new("RGB", (2000, 40)), "PNG"), "bad_aspect"),
    "huge.png": (huge_png(), "too_many_pixels"),
    "endless.jpg": (web.endless, "too_large"),
    "bomb.jpg": (web.gzip_bomb(50_000_000), "too_large"),
    "drip.jpg": (web.slow(jpeg(1), 0.3), "too_slow"),
    "silent.jpg": (web.silent, "read_timeout"),
    "hung.jpg": (web.hang_up, "bad_response"),
    "garbage.jpg": (web.raw(b"\x00\x01 what is HTTP\r\n\r\n"), "bad_response"),
    "short.jpg": (web.body(b"half", Content_Length=4000), "bad_response"),
    "loop.jpg": (web.redirect("/loop.jpg"), "redirect_loop"),
    "inside.jpg": (web.redirect("http://10.0.0.1/secret.jpg"), "blocked_address"),
    "file.jpg": (web.redirect("file:///etc/passwd"), "bad_scheme"),
}
# URL -> reason; no server needed
BAD_URLS = {
    "ftp://a.example/x.jpg": "bad_scheme",
    "data:image/png;base64,AAAA": "bad_scheme",
    "javascript:alert(1)": "bad_scheme",
    "no scheme at all": "bad_url",
    "http://": "bad_url",
    "http://exa mple/x.jpg": "bad_url",
    "http://[::1/x.jpg": "bad_url",
    "http://169.254.169.254/latest/meta-data": "blocked_address",
    "http://[::ffff:10.0.0.1]/x.jpg": "blocked_address",
    "http://0/x.jpg": "blocked_address",
    "http://does-not-exist.invalid/x.jpg": "dns_",  # not found, or no resolver here
    "http://\x00\ufffe/x": "bad_url",
    "https://" + "a" * 5000 + ".example/": "",  # any reason will do
}
CAPTIONS = {
    "empty": "",
    "blank": " \t\n ",
    "long": "a red ball on the table " * 420,
    "emoji": "😀🏳️‍🌈👩‍👩‍👧",
    "scripts": "一只猫在桌子上 кошка على الطاولة",
    "controls": "a\x00 red\x1b[31m ball\x7f \u202e\u2066 on\u200b the table",
    "markup": "<b>a red ball</b> [bold]on[/bold] {the} table %s",
    "normal": "a red ball and two green boxes",
}
EMPTY_CAPTIONS = {"empty", "blank"}


@pytest.fixture
def hostile(world: World) -> World:
    rows: list[tuple[str, str | None]] = []
    for name, data in GOOD.items():
        rows.append((world.server.add(f"/{name}", data), "a red ball on the table"))
    for name, (answer, _) in BAD_ANSWERS.items():
        rows.append((world.server.add(f"/{name}", answer), "nothing good"))
    rows += [(url, "a bad address") for url in BAD_URLS]
    rows += [
        (world.server.add(f"/caption-{name}.jpg", jpeg(50 + i)), text)
        for i, (name, text) in enumerate(CAPTIONS.items())
    ]
    rows += [(world.server.add("/moved.jpg", web.redirect("/plain.jpg")), "a red ball, moved")]
    rows += [(world.server.url + "/plain.jpg#again", "a duplicate"), ("", "no URL"), ("  ", None)]
    world.list_urls("a", rows)
    world.document["dataset"]["rows_per_part"] = 20
    world.document["steps"]["download"]["fetch"] |= {
        "read_timeout_s": 2, "connect_timeout_s": 2, "total_timeout_s": 4, "max_bytes": 2_000_000,
    }  # fmt: skip
    world.document["limits"] = {"download_failed_fraction": 1.0}
    world.write()
    assert len(rows) >= 60
    return world


def test_every_row_is_accounted_for(hostile: World) -> None:
    done = hostile.run("run")
    assert done.returncode == 0, done.stderr
    plan = make_plan(hostile.load())
    assert plan.dataset is not None
    (record,) = plan.dataset["ingests"]
    total = len(GOOD) + len(BAD_ANSWERS) + len(BAD_URLS) + len(CAPTIONS) + 4
    assert record["rows"] == total
    assert (record["duplicate_url"], record["no_url"], record["malformed"]) == (1, 2, 0)

    tally = Tally.of(plan)
    rows = record["kept"]
    for step, count in tally.counts.items():
        assert count.rows == rows == count.kept + count.dropped, step
        rows = count.kept
    assert rows == len(GOOD) + len(CAPTIONS) - len(EMPTY_CAPTIONS) + 1
    assert tally.counts["caption"].rejected == {"empty_caption": 2}

    expected = {f"{hostile.server.url}/{name}": reason for name, (_, reason) in BAD_ANSWERS.items()} | BAD_URLS
    found = {h["key"]: h["steps"]["download"] for h in find(plan, [urls.key(url) for url in expected])}
    for url, reason in expected.items():
        outcome, why, _, _ = found[urls.key(url)]
        assert outcome != "kept"
        assert why.startswith(reason), (url, why)
    reasons = Counter(why for _, why, _, _ in found.values())
    count = tally.counts["download"]
    assert reasons == count.rejected + count.failed


def test_captions_of_every_kind_reach_the_shards(hostile: World) -> None:
    assert hostile.run("run").returncode == 0
    plan = make_plan(hostile.load())
    for name, text in CAPTIONS.items():
        (history,) = find(plan, [urls.key(f"{hostile.server.url}/caption-{name}.jpg")])
        if name in EMPTY_CAPTIONS:
            assert history["steps"]["caption"][1] == "empty_caption"
            continue
        (caption,) = history["captions"]
        assert caption["text"] == caption["text"].strip()
        assert not set(caption["text"]) & {"\x00", "\x1b", "\n", "\x7f"}
        for phrase in history["phrases"]:
            assert caption["text"][phrase["start"] : phrase["end"]] == phrase["text"]
        assert history["steps"]["pack"][0] == "kept"
        if name in ("long", "markup", "normal"):
            assert "a red ball" in [phrase["text"] for phrase in history["phrases"]], text
