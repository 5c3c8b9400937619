"""Where pictures go when they are stored, for every format and mode; and what becomes of those that move."""

import io
import os
import struct
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.transforms.test_images import QUARTERS, chunk, encoded, exif, looks_right, picture, png, reason, survives
from vesl.transforms.images import ImageRule, Resize, StoredImage, decode, normalise
from vesl.transforms.options import identity

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
MODES = ("keep_ratio", "keep_ratio_shorter", "pad", "crop", "none")


def stored(data: bytes, **options: Any) -> StoredImage:
    return normalise(data, ImageRule(Resize(**options), min_side_px=1))


def pixels(image: StoredImage) -> Any:
    found = np.asarray(decode(image.jpeg)).astype(int)
    assert found.shape == (image.height, image.width, 3)
    return found


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("mode", "larger", "smaller", "scaled_up"),
    [
        ("keep_ratio", (64, 32), (40, 20), (64, 32)),
        ("keep_ratio_shorter", (128, 64), (40, 20), (128, 64)),
        ("pad", (64, 64), (40, 20), (64, 64)),
        ("crop", (64, 64), (40, 20), (64, 64)),
        ("none", (400, 200), (40, 20), (40, 20)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str, mode: str, larger: Any, smaller: Any, scaled_up: Any, turned: bool) -> None:
    way = -1 if turned else 1
    for size, only, expected in (((400, 200), True, larger), ((40, 20), True, smaller), ((40, 20), False, scaled_up)):
        data = encoded(picture(*size[::way]), kind, **({"lossless": True} if kind == "WEBP" else {}))
        image = stored(data, side_px=64, mode=mode, only_if_larger=only)
        assert (image.width, image.height) == expected[::way]
        assert (image.source_width, image.source_height) == size[::way]
        assert pixels(image).shape == (*expected[::-way], 3)


def test_the_measured_side_decides_what_is_larger() -> None:
    """100 x 50 is larger than 60 for the modes that measure the longer side only."""
    for mode, expected in {"keep_ratio": (60, 30), "pad": (60, 60), "crop": (100, 50)}.items():
        assert Resize(60, mode).fit(100, 50).canvas == expected  # type: ignore[arg-type]
    assert Resize(60, "keep_ratio_shorter").fit(100, 50).canvas == (100, 50)
    assert Resize(50, "crop").fit(100, 50).canvas == (100, 50)
    assert Resize(49, "crop").fit(100, 50).canvas == (49, 49)


@pytest.mark.parametrize("size", [(640, 400), (400, 640), (641, 201), (4001, 433), (65, 64), (33, 32)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_padded_picture_lies_where_fit_says(kind: str, size: tuple[int, int]) -> None:
    rule = Resize(32, "pad")
    black = Image.new("RGB", size, (10, 20, 30))
    image = stored(encoded(black, kind), side_px=32, mode="pad")
    fit = rule.fit(image.source_width, image.source_height)
    assert fit.canvas == (image.width, image.height) == (32, 32)
    expected = np.full((32, 32), 255)
    (x, y), (w, h) = fit.place, fit.size
    assert abs(2 * x + w - 32) <= 1
    assert abs(2 * y + h - 32) <= 1
    expected[y : y + h, x : x + w] = 20
    assert np.abs(pixels(image)[..., 1] - expected).max() < 60  # JPEG rings at the edge
    assert np.abs(pixels(image)[..., 1] - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(96, 47), (47, 96)])
def test_an_upright_picture_is_padded_and_cropped_as_a_turned_one(size: tuple[int, int], orientation: int) -> None:
    """The odd pixel of a border is at the same side of the upright image, however the file lies."""
    turns = [
        *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
        *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270),
    ]
    upright, turn = picture(*size), turns[orientation - 1]
    lying = upright.transpose(turn) if turn is not None else upright
    for mode in ("pad", "crop"):
        want = pixels(stored(encoded(upright, "PNG"), side_px=32, mode=mode))
        got = pixels(stored(encoded(lying, "PNG", exif=exif(orientation)), side_px=32, mode=mode))
        assert np.abs(want - got).max() <= 24
        assert np.abs(want - got).mean() < 2


@pytest.mark.parametrize("size", [(900, 300), (300, 900), (4000, 500), (301, 300)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_middle_is_cropped(kind: str, size: tuple[int, int]) -> None:
    """Three stripes along the longer side; the middle square is green, what is around it is not."""
    width, height = size
    short = min(size)
    full = Image.new("RGB", size, (230, 20, 20))
    x, y = (width - short) // 2, (height - short) // 2
    full.paste((20, 180, 20), (x, y, x + short, y + short))
    found = pixels(stored(encoded(full, kind), side_px=100, mode="crop"))
    assert found.shape == (100, 100, 3)
    assert np.abs(found[4:-4, 4:-4] - (20, 180, 20)).max() < 40


def test_a_draft_is_scaled_as_the_whole_is() -> None:
    """129 pixels are 16.1 eighths: the 17th pixel of the draft is filled up, and must not count as a whole one."""
    ramp = np.linspace(0, 255, 129).astype(np.uint8)
    data = encoded(Image.fromarray(np.broadcast_to(ramp, (64, 129))).convert("RGB"))
    found = pixels(stored(data, side_px=16))[..., 1].mean(0)
    assert np.abs(found - np.interp((np.arange(16) + 0.5) * 129 / 16 - 0.5, range(129), ramp)).max() < 4


@pytest.mark.parametrize("mode", MODES)
def test_bytes_that_fit_are_not_encoded_again(mode: str) -> None:
    for only in (True, False):
        data = encoded(picture(64, 64))
        assert stored(data, side_px=64, mode=mode, only_if_larger=only).jpeg == data
    data = encoded(picture(40, 30))
    assert stored(data, side_px=64, mode=mode).jpeg == data
    if mode != "none":
        assert stored(data, side_px=64, mode=mode, only_if_larger=False).jpeg != data


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_quarters_stay_where_they_are(kind: str, mode: str) -> None:
    image = stored(encoded(picture(512, 512), kind), side_px=64, mode=mode)
    looks_right(image, QUARTERS, within=24)


def test_what_is_scaled_up_stays_within_the_limits() -> None:
    data = encoded(picture(320, 32))
    up = {"mode": "keep_ratio_shorter", "only_if_larger": False}
    assert reason(data, ImageRule(Resize(3000, **up))) == "too_many_pixels"  # type: ignore[arg-type]
    assert reason(data, ImageRule(Resize(7000, **up), max_pixels=10**10)) == "too_many_pixels"  # type: ignore[arg-type]
    assert reason(data, ImageRule(Resize(9000, "pad", False))) == "too_many_pixels"
    long = ImageRule(Resize(mode="none"), max_aspect=1e5, min_side_px=1)
    assert reason(encoded(Image.new("L", (65_501, 2)), "PNG"), long) == "too_many_pixels"
    assert normalise(encoded(Image.new("L", (65_500, 2)), "PNG"), long).width == 65_500


def test_two_spellings_of_one_side() -> None:
    assert ImageRule(max_side_px=300) == ImageRule(Resize(300))
    assert identity(ImageRule(max_side_px=300)) == identity(ImageRule(Resize(300)))
    assert ImageRule(Resize(300, "pad"), max_side_px=300).resize == Resize(300, "pad")
    assert "max_side_px" not in identity(ImageRule())
    for options in ({"max_side_px": 300, "resize": Resize(200)}, {"max_side_px": 5}):
        with pytest.raises(ValueError, match="max_side_px: "):
            ImageRule(**options)
    for side in (15, 65_501):
        with pytest.raises(ValueError, match=f"side_px: {side} is not between"):
            Resize(side)


# What moves


def moving(kind: str, frames: int = 3) -> bytes:
    more = [picture().rotate(90 * n, expand=False) for n in range(1, frames)]
    return encoded(picture(), kind, save_all=True, append_images=more, duration=50)


DROP = ImageRule(animated="drop")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_what_moves_is_kept_by_its_first_frame_or_dropped(kind: str) -> None:
    looks_right(normalise(moving(kind), ImageRule()), within=24)
    assert reason(moving(kind), DROP) == "animated"
    assert reason(moving(kind, 2), DROP) == "animated"
    looks_right(normalise(encoded(picture(), kind), DROP), within=24)


def test_a_photograph_of_several_does_not_move() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture().rotate(180)])
    looks_right(normalise(data, DROP))


def test_animations_of_one_frame_do_not_move() -> None:
    one = chunk(b"acTL", struct.pack(">II", 1, 0))
    looks_right(normalise(png(96, 64, 8, 2, picture().tobytes(), one), DROP))
    short = chunk(b"acTL", b"\0\0\0")
    looks_right(normalise(png(96, 64, 8, 2, picture().tobytes(), short), DROP))
    still = encoded(picture(), "GIF")
    netscape = b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
    looks_right(normalise(still[:-1] + netscape + b";", DROP), within=24)
    two = moving("WEBP", 2)
    at = two.rindex(b"ANMF")
    cut = two[:4] + struct.pack("<I", at - 8) + two[8:at]
    looks_right(normalise(cut, DROP), within=24)


def test_a_gif_that_ends_behind_its_first_frame_is_whole() -> None:
    still = encoded(picture(), "GIF")[:-1]
    for tail in (b"", b"!", b"!\xfe", b"!\xfe\x09abc", b"\0", b";junk"):
        for rule in (DROP, ImageRule()):
            looks_right(normalise(still + tail, rule), within=24)
    assert reason(still + b",", DROP) == "animated"


def test_many_frames_cost_no_more_than_one() -> None:
    body = encoded(picture(), "GIF")[:-1]
    frame = body[body.index(b"\x2c\0\0\0\0") :]
    data, start = body + frame * 20_000 + b";", time.monotonic()
    assert reason(data, DROP) == "animated"
    looks_right(normalise(data, ImageRule()), within=24)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_every_mode(kind: str, mode: str) -> None:
    """Every tenth byte flipped, one at a time, and cuts: an image or a reason, never anything else."""
    rule = ImageRule(Resize(32, mode, only_if_larger=False), 1, max_pixels=200_000, animated="drop")  # type: ignore[arg-type]
    many = {"save_all": True, "append_images": [picture(48, 40).rotate(180)]} if kind in ("GIF", "WEBP", "AVIF") else {}
    for options in ({}, many):
        data = encoded(picture(48, 40), kind, **options)
        for at in {*range(0, min(len(data), 400), 3), *range(0, len(data), len(data) // 40 + 1)}:
            survives(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :], rule)
            survives(data[:at], rule)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory here")
def test_encoding_lets_other_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow holds the interpreter's lock while it encodes, but not into a file of the system; to the same bytes."""
    data, files, save = encoded(picture(700, 500), "PNG"), [], Image.Image.save

    def spy(self: Image.Image, file: Any, *args: Any, **options: Any) -> None:
        files.append(file.fileno())
        save(self, file, *args, **options)

    direct = encoded(Image.open(io.BytesIO(data)), quality=92)
    open_before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(Image.Image, "save", spy)
    assert stored(data, mode="none").jpeg == direct
    assert len(files) == 1
    assert os.listdir("/proc/self/fd") == open_before
