"""Perceptual hashes: 64 bits that pictures of the same thing share, and the search for those that are close.

The hash is of the picture's lowest frequencies, as in Zauner, Implementation and Benchmarking of Perceptual Image Hash
Functions (2010), section 3.2, but of the 64 lowest, on 64 x 64 pixels: a copy that was resized or compressed again
differs in a few bits, another picture in about half of them. A mirrored, turned or much cropped copy is another picture
to it.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

BITS = 64
MAX_DISTANCE = 8  # of the search; beyond it, what is near is no copy, and the masks are too many
MOST_BANDS = 16
_SIDE, _KEPT = 64, 12
_FLAT = 1.5  # levels of 255: the standard deviation that the hashed frequencies need, else they are noise
_MOST_MASKS = 3000


def _cosines() -> npt.NDArray[np.float64]:
    """The first rows of the orthonormal DCT-II."""
    k, x = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    rows = np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE)) * math.sqrt(2 / _SIDE)
    rows[0] /= math.sqrt(2)
    return np.asarray(rows)


_DCT = _cosines()
# The 64 lowest frequencies (down, across) after the mean, lowest first.
_LOWEST = sorted(itertools.product(range(_KEPT), repeat=2), key=lambda place: (sum(place), place))[1 : BITS + 1]
_DOWN, _ACROSS = np.asarray(_LOWEST).T


def phash(image: Image.Image) -> int | None:
    """The perceptual hash of RGB pixels, as a signed 64-bit integer; None for a picture with hardly any structure.

    From the highest bit on, a bit says whether the next frequency is above the median of all; brightness, contrast and
    colours do not count. `normalise` hashes what it stores, before it is encoded; decoded again, a bit may differ.
    """
    # Averages of whole pixels first: less than half of the time, and copies of other sizes are no less alike.
    gray = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=1.0).convert("L")
    waves = (_DCT @ np.asarray(gray, np.float64) @ _DCT.T)[_DOWN, _ACROSS]
    if float(np.square(waves).sum()) < (_FLAT * _SIDE) ** 2:
        return None
    low, high = np.sort(waves)[BITS // 2 - 1 : BITS // 2 + 1]  # `np.median` takes three times as long
    return int(np.packbits(waves > (low + high) / 2).view(">i8")[0])


def distance(a: int | None, b: int | None) -> int | None:
    """In how many bits two hashes differ; None where one is not known."""
    return None if a is None or b is None else ((a ^ b) & (1 << BITS) - 1).bit_count()


def bands(count: int, distance: int, above: int = 0) -> int:
    """Into how many bands to deal the bits so that a search among `count` hashes is least work; see `masks`.

    `above` is a number of bands that was not enough for these hashes. `distance` itself means one mask without bits,
    which compares all with all: the best for few hashes, and the end where nothing else is left.
    """

    def work(m: int) -> float:  # in hashes read; a candidate costs a fortieth of that, a mask as much as a million
        candidates = count * count / math.pow(2, BITS * (m - distance) / m)
        return math.comb(m, distance) * (count + 1e6 + candidates / 40)

    choice = range(max(distance, above) + 1, MOST_BANDS + 1)
    possible: list[int] = [distance, *(choice[2:] if above else choice)]
    return min((m for m in possible if math.comb(m, distance) <= _MOST_MASKS), key=work)


def masks(m: int, distance: int) -> list[int]:
    """Masks (signed 64-bit): any two hashes within `distance` bits of each other agree under at least one of them.

    The bits are dealt to m >= distance bands. At most `distance` bands of two such hashes differ, so the others agree,
    whichever they are: one mask for each choice (Manku, Jain and Das Sarma, Detecting Near-Duplicates for Web Crawling,
    WWW 2007, section 3). More bands make more masks, each with fewer candidates by chance. A band takes every m-th bit,
    so that low frequencies, which pictures share, are spread over all of them.
    """
    chosen = itertools.combinations(range(m), m - distance)
    return [_signed(sum(1 << bit for bit in range(BITS) if bit % m in some)) for some in chosen]


def _signed(bits: int) -> int:
    return bits - (1 << BITS) if bits >> (BITS - 1) else bits
