"""The rules of the select step, one small function each: which of the detections that it sees it rejects.

Every rule takes `Found`, arrays over the detections of some images, and its own numbers, and returns bool [n], true
where it rejects. The rules that compare detections expect them image by image and best first (`ranking`). Nothing here
loops over rows in Python, and nothing looks beyond a detection's image.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .boxes import nms_sorted, valid
from .found import Bools, Float64, Found, Int64, numbers


def _among(texts: pa.StringArray, listed: Sequence[str]) -> Bools:
    found: Bools = np.asarray(pc.is_in(texts, pa.array(listed, pa.string())), np.bool_)
    return found


def stopped(found: Found, phrases: Sequence[str], heads: Sequence[str]) -> Bools:
    """Which phrases, bool [phrases], are on a stop list, or their head nouns."""
    no = np.zeros(len(found.texts), np.bool_)
    return (_among(found.normal, phrases) if phrases else no) | (_among(found.heads, heads) if heads else no)


# Rules on one detection.


def invalid_box(found: Found) -> Bools:
    """No box within the image."""
    x0, y0, x1, y1 = found.boxes.T
    inside: Bools = valid(found.boxes) & (x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1)
    return ~inside


def invalid_phrase(found: Found, read: bool) -> Bools:
    """No phrase; `read` tells whether the images' phrases are there, so that it can be seen that one is not."""
    return found.rows < 0 if read else found.phrases < 0


def stop_phrase(found: Found, phrases: Sequence[str], heads: Sequence[str]) -> Bools:
    """The phrase or its head noun is on a list (normalised)."""
    return found.of_phrase(stopped(found, phrases, heads), False)


def low_score(found: Found, score: float, by_words: Sequence[float], by_head: Mapping[str, float]) -> Bools:
    """Not above the threshold of the phrase's head noun; or else of its number of words; or else `score`. In float32"""
    if not by_words and not by_head:
        return ~(found.scores > np.float32(score))
    limits = np.full(len(found.texts), score, np.float32)
    if by_words:
        limits = np.asarray(by_words, np.float32)[np.minimum(found.words, len(by_words)) - 1]
    if by_head:
        place = numbers(pc.index_in(found.heads, pa.array(list(by_head), pa.string())), np.int64, -1)
        limits = np.where(place >= 0, np.fromiter(by_head.values(), np.float32)[place], limits)
    return ~(found.scores > found.of_phrase(limits, score))


def low_agreement(found: Found, least: float) -> Bools:
    """What the second model says is less, or nothing."""
    return ~(found.agreement >= np.float32(least))


def small(found: Found, side_px: float, area: float) -> Bools:
    """A side is shorter, or the area a smaller share of the image."""
    width, height = found.extent
    with np.errstate(all="ignore"):
        return (np.minimum(*found.extent_px) < side_px) | (width * height < area)


def large(found: Found, area: float) -> Bools:
    """The area is a larger share of the image."""
    width, height = found.extent
    with np.errstate(all="ignore"):
        return width * height > area


def whole_image(found: Found, share: float) -> Bools:
    """Both sides reach that share of the image's."""
    width, height = found.extent
    return (width >= share) & (height >= share)


def bad_aspect(found: Found, limit: float) -> Bools:
    """The longer side, in pixels, is more than `limit` times the shorter."""
    width, height = found.extent_px
    with np.errstate(all="ignore"):
        return np.maximum(width, height) > limit * np.minimum(width, height)


def at_border(found: Found, margin_px: float) -> Bools:
    """No more than `margin_px` pixels between the box and the image's border, on one side at least."""
    x0, y0, x1, y1 = found.boxes.T.astype(np.float64)
    across, down = found.widths[found.images], found.heights[found.images]
    with np.errstate(all="ignore"):
        near: Bools = np.minimum(np.minimum(x0, 1 - x1) * across, np.minimum(y0, 1 - y1) * down) <= margin_px
    return near


# Rules on captions and images.


def grounded_share(found: Found, grounds: Bools, counts: Bools, groups: Int64) -> Float64:
    """Of each phrase's group (int64 [phrases], not negative) the share of phrases that have a detection, [phrases].

    grounds: bool [n], which detections count as having found their phrase. counts: bool [phrases], which phrases count
    at all. NaN where a group has none that counts.
    """
    there = np.zeros(len(found.texts), np.bool_)
    rows = found.rows[grounds]
    there[rows[rows >= 0]] = True
    with np.errstate(all="ignore"):
        return (np.bincount(groups, there & counts) / np.bincount(groups, counts))[groups]


def ungrounded_caption(found: Found, grounds: Bools, counts: Bools, least: float) -> Bools:
    """The phrase's caption has a smaller share of grounded phrases: see `grounded_share`."""
    _, groups = np.unique(found.owners << 16 | found.captions & 0xFFFF, return_inverse=True)
    return found.of_phrase(grounded_share(found, grounds, counts, groups.astype(np.int64)) < least, False)


# Rules that compare the detections of an image: image by image, best first.


def ranking(found: Found) -> npt.NDArray[np.intp]:
    """The order image by image, best first: higher score, then lower phrase index, then as it was.

    One sort of 64 bits (image 16, score 32, phrase 16) instead of three. Scores are finite, phrases not negative,
    images fewer than 2**16. A float's bits rise with it where it is positive and fall where not.
    """
    bits = (-found.scores + np.float32(0)).view(np.int32)  # + 0: one zero instead of two
    rising = np.where(bits < 0, ~bits, bits ^ np.int32(-(2**31))).view(np.uint32)
    image, phrase = found.images.astype(np.uint64), found.phrases.astype(np.uint64)
    return np.argsort(image << np.uint64(48) | rising.astype(np.uint64) << np.uint64(16) | phrase, kind="stable")


def other_phrase(found: Found, limit: int) -> Bools:
    """As many better phrases have the very same box."""
    halves = (found.boxes + np.float32(0)).view(np.uint64)  # pairs of coordinates by their bits; + 0: one zero
    order = np.lexsort((halves[:, 1], halves[:, 0], found.images))
    halves, images = halves[order], found.images[order]
    fresh = np.ones(len(found), np.bool_)
    fresh[1:] = (halves[1:] != halves[:-1]).any(axis=1) | (images[1:] != images[:-1])
    rejected = np.empty(len(found), np.bool_)
    rejected[order] = ~fresh if limit == 1 else _places(fresh) >= limit
    return rejected


def duplicate_in_phrase(found: Found, iou: float) -> Bools:
    """It overlaps a better box of the same phrase by more, which itself stays."""
    order, fresh = _by_phrase(found)
    rejected = np.empty(len(found), np.bool_)
    rejected[order] = ~nms_sorted(found.boxes[order], _borders(fresh), iou)
    return rejected


def duplicate_box(found: Found, iou: float) -> Bools:
    """It overlaps a better box by more, which itself stays."""
    return ~nms_sorted(found.boxes, _borders(_fresh(found.images)), iou)


def over_per_phrase(found: Found, limit: int) -> Bools:
    """As many better ones have the same phrase."""
    order, fresh = _by_phrase(found)
    rejected = np.empty(len(found), np.bool_)
    rejected[order] = _places(fresh) >= limit
    return rejected


def over_phrases(found: Found, limit: int) -> Bools:
    """As many phrases of the image have a better best detection than its phrase has."""
    order, fresh = _by_phrase(found)
    best = np.zeros(len(found), np.bool_)  # of each phrase, where it stands in the ranking
    best[order[fresh]] = True
    before: Int64 = np.cumsum(best) - best  # of better phrases
    images = _borders(_fresh(found.images))
    before -= before[images[:-1]].repeat(np.diff(images))
    rejected = np.empty(len(found), np.bool_)
    rejected[order] = before[order[fresh]].repeat(np.diff(_borders(fresh))) >= limit
    return rejected


def over_limit(found: Found, limit: int) -> Bools:
    """As many better ones are in the image."""
    return _places(_fresh(found.images)) >= limit


def _by_phrase(found: Found) -> tuple[npt.NDArray[np.intp], Bools]:
    """The order by image and phrase, the ranking kept; and where in it a new phrase begins, bool [n]."""
    pairs = found.images << 16 | found.phrases
    order = np.argsort(pairs, kind="stable")
    return order, _fresh(pairs[order])


def _fresh(segment: npt.NDArray[Any]) -> Bools:
    """Where runs of equal values begin, bool [n]."""
    fresh = np.ones(len(segment), np.bool_)
    fresh[1:] = segment[1:] != segment[:-1]
    return fresh


def _borders(fresh: Bools) -> npt.NDArray[np.intp]:
    """Where runs begin, and the end: [runs + 1]."""
    return np.append(np.flatnonzero(fresh), len(fresh))


def _places(fresh: Bools) -> npt.NDArray[np.intp]:
    """How far each stands from the beginning of its run: [n]."""
    borders = _borders(fresh)
    return np.arange(len(fresh)) - borders[:-1].repeat(np.diff(borders))
