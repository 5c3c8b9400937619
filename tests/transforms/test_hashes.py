"""Perceptual hashes of real photographs and their copies, and that the search by masks misses nothing."""

import io
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from tests.photos import photo
from vesl.transforms import hashes
from vesl.transforms.hashes import BITS, MAX_DISTANCE, MOST_BANDS, bands, masks
from vesl.transforms.images import ImageRule, Resize, decode, normalise

FROZEN = -4528338991674003976  # of the first of these photographs
PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def phash(jpeg: bytes) -> int | None:
    return hashes.phash(decode(jpeg))


def distance(a: int | None, b: int | None) -> int:
    bits = hashes.distance(a, b)
    assert bits is not None
    return bits


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


def test_distances_of_signed_numbers() -> None:
    for a, b, bits in ((0, -1, 64), (-1, -1, 0), (1 << 62, -1 << 63, 2), (-1, (1 << 63) - 1, 1), (5, 6, 2)):
        assert hashes.distance(a, b) == hashes.distance(b, a) == bits
    assert hashes.distance(None, 1) is hashes.distance(1, None) is hashes.distance(None, None) is None


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda i: jpeg(i, 40), 2),
        (lambda i: jpeg(i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS)), 4),
        (lambda i: jpeg(i.resize((i.width // 3, i.height // 3), Image.Resampling.NEAREST), 75), 4),
        (lambda i: jpeg(i.resize((i.width, round(i.height * 0.8)))), 4),
        (lambda i: jpeg(i.convert("L").convert("RGB")), 4),
        (lambda i: jpeg(ImageEnhance.Brightness(i).enhance(0.7)), 4),
        (lambda i: jpeg(cropped(i, 0.005)), 4),
    ],
    ids=["quality 40", "half the size", "a third, badly", "squeezed", "gray", "darker", "half a per cent cut off"],
)
@pytest.mark.parametrize("place", PHOTOS)
def test_a_copy_is_near(place: str, change: Callable[[Image.Image], bytes], most: int) -> None:
    image = photo(place)
    assert distance(phash(jpeg(image)), phash(change(image))) <= most


def test_other_photographs_are_far() -> None:
    hashes = [phash(jpeg(photo(place))) for place in PHOTOS]
    assert min(distance(a, b) for a, b in itertools.combinations(hashes, 2)) >= 16
    mirrored = [phash(jpeg(photo(place).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) for place in PHOTOS]
    assert min(distance(a, b) for a, b in zip(hashes, mirrored, strict=True)) >= 16


@pytest.mark.parametrize("place", PHOTOS)
def test_a_stored_image_has_the_hash_of_its_bytes(place: str) -> None:
    """Kept, or scaled and encoded: whoever hashes what is stored finds the same, but for a bit that changes sides."""
    image = photo(place)
    kept = normalise(jpeg(image), ImageRule(Resize(mode="none")))
    assert kept.phash == phash(kept.jpeg) == phash(jpeg(image))
    for rule in (ImageRule(Resize(300)), ImageRule(Resize(300, "pad")), ImageRule(Resize(300, "crop"))):
        stored = normalise(jpeg(image), rule)
        again = normalise(stored.jpeg, rule)
        assert again.jpeg == stored.jpeg
        assert again.phash == phash(stored.jpeg)
        assert distance(stored.phash, again.phash) <= 2
    assert distance(normalise(jpeg(image.resize((2000, 2000))), ImageRule(Resize(300))).phash, kept.phash) <= 4


def test_pictures_without_structure_have_none() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    for image in (Image.new("RGB", (64, 64), "white"), Image.new("RGB", (300, 200), (12, 200, 99))):
        assert phash(jpeg(image)) is None
    spot = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(spot).point((7, 7), "black")
    assert phash(jpeg(spot)) is None
    assert phash(jpeg(Image.fromarray(noise).convert("RGB"))) is not None
    ImageDraw.Draw(spot).rectangle((100, 50, 160, 90), "black")
    assert phash(jpeg(spot)) is not None


def test_the_hash_is_frozen() -> None:
    """Hashes lie in stores, so another definition is another version of the download step."""
    assert distance(phash(jpeg(photo(PHOTOS[0]))), FROZEN) <= 2  # Pillow's encoder and decoder may change


@pytest.mark.parametrize("most", range(1, MAX_DISTANCE + 1))
def test_masks_miss_nothing(most: int) -> None:
    chance = random.Random(most)
    tried = {bands(count, most) for count in (10, 10**5, 10**7, 2 * 10**9)}
    tried |= {bands(10**7, most, m) for m in tried}
    assert most in tried
    assert len(tried) > 2
    for m in tried:
        found = masks(m, most)
        assert len(set(found)) == len(found) <= 3000
        assert m <= MOST_BANDS
        for _ in range(30):
            a = chance.getrandbits(BITS)
            b = a
            for bit in chance.sample(range(BITS), most):
                b ^= 1 << bit
            assert any((a ^ b) & mask & (1 << BITS) - 1 == 0 for mask in found)


def test_what_was_not_enough_gets_finer_masks_and_at_last_all_pairs() -> None:
    ladder = [0]
    while ladder[-1] != 4:
        ladder.append(bands(10**7, 4, ladder[-1]))
    assert ladder[1:-1] == sorted(set(ladder[1:-1]))
    assert len(ladder) >= 4


def test_more_hashes_get_masks_of_more_bits() -> None:
    bits = [min(mask.bit_count() for mask in masks(bands(count, 4), 4)) for count in (10**5, 10**7, 2 * 10**9)]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]
