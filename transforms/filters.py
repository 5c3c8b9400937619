"""Which detections become regions: the rules of the select step on Arrow columns, without a Python loop over rows.

A grounder stores every pair of a box and a phrase above a low floor; what to keep is decided here, again and again if
need be, without opening a model. Every detection gets a verdict: `kept`, or the rule that rejected it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .boxes import nms_sorted, valid

# In the order of application: a detection carries the first that applies, and what an earlier rule rejected plays no
# part in a later one. Codes are positions in this order.
VERDICTS: dict[str, str] = {
    "kept": "becomes a region",
    "invalid_box": "no box within the image: missing, not finite, outside 0..1, or without extent",
    "invalid_phrase": "the index of its phrase is missing or negative",
    "invalid_score": "the score is missing or not finite",
    "low_score": "the score is not above the threshold",
    "small": "a side has fewer pixels, or the box a smaller share of the image, than the limit",
    "large": "the box has a larger share of the image than the limit",
    "other_phrase": "the same box has a better phrase",
    "duplicate_in_phrase": "it overlaps a better box of the same phrase by more than the limit",
    "duplicate_box": "it overlaps a better box, of whatever phrase, by more than the limit",
    "over_limit": "the image has as many better regions as the limit allows",
}
_CODE = {name: np.int8(code) for code, name in enumerate(VERDICTS)}
_NAMES = pa.array(VERDICTS, pa.string())

_ROWS = 2048  # of images judged at a time: the working set stays near the caches (and below 2**16, see _ranking)

Codes = npt.NDArray[np.int8]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class SelectRule:
    """What a detection must be to become a region. The defaults are the paper's (Chen et al. 2024, CLOC, section 4).

    score: kept above it, compared as float32 (a score of 0.1 is not above 0.1).
    best_phrase_per_box: of detections with the same box, only the best is kept.
    phrase_nms_iou, nms_iou: IoU above which the better of two boxes stays alone, among boxes of one phrase and
    among all (where one box may keep several phrases, the second of them is then a duplicate too); None: off.
    min_side_px: pixels of the stored image. min_area, max_area: share of the image. max_regions: best that stay.

    Better is: higher score; where equal, lower phrase index; where equal, earlier stored.
    Raises ValueError for a value that no rule can mean.
    """

    score: float = 0.1
    best_phrase_per_box: bool = True
    nms_iou: float | None = None
    phrase_nms_iou: float | None = None
    min_side_px: float = 0.0
    min_area: float = 0.0
    max_area: float = 1.0
    max_regions: int = 100

    def __post_init__(self) -> None:
        limits = {"score": math.inf, "min_side_px": math.inf, "max_regions": math.inf}
        for name in ("score", "nms_iou", "phrase_nms_iou", "min_side_px", "min_area", "max_area", "max_regions"):
            value, limit = getattr(self, name), limits.get(name, 1.0)
            if value is not None and not 0 <= value <= limit:  # NaN too
                raise ValueError(f"{name} must be within 0..{limit:g}, not {value}")


def judge(detections: pa.ListArray, widths: pa.Array, heights: pa.Array, rule: SelectRule) -> pa.ListArray:
    """Give every detection its verdict, a key of VERDICTS: list<string>, row by row as long (or null) as
    `detections`.

    detections: list<struct<box: fixed_size_list<float32>[4], phrase: int16, score: float32>>, boxes in 0..1 of the
    image; null and empty lists, null members and slices are welcome. widths, heights: pixels of the stored images, any
    numeric type; where null, a side counts as 0 pixels. An image's verdicts depend on nothing but its own row.
    Raises ValueError where the columns differ in length.
    """
    if not len(detections) == len(widths) == len(heights):
        raise ValueError(f"{len(detections)} rows of detections, {len(widths)} widths, {len(heights)} heights")
    lengths = _numbers(pc.list_value_length(detections), np.int64, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    boxes, phrases, scores = _columns(detections.flatten())
    sizes = np.stack([_numbers(widths, np.float64, 0), _numbers(heights, np.float64, 0)], axis=1)
    codes = np.zeros(len(boxes), dtype=np.int8)
    for row in range(0, len(lengths), _ROWS):
        ends = offsets[row : row + _ROWS + 1]
        rows = slice(ends[0], ends[-1])
        image = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        codes[rows] = _judge(boxes[rows], phrases[rows], scores[rows], image, sizes[row : row + _ROWS], rule)
    verdicts = pa.DictionaryArray.from_arrays(pa.array(codes), _NAMES).cast(pa.string())
    mask = detections.is_null() if detections.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), verdicts, mask=mask)


def _judge(
    boxes: npt.NDArray[np.float32],
    phrases: npt.NDArray[np.int16],
    scores: npt.NDArray[np.float32],
    image: npt.NDArray[np.intp],
    sizes: npt.NDArray[np.float64],
    rule: SelectRule,
) -> Codes:
    """Codes int8 [n] of some images' detections; `image` [n], not falling, is the row of `sizes` [images, 2]."""
    codes = _judge_alone(boxes, phrases, scores, sizes[image], rule)
    best = np.flatnonzero(codes == 0)
    best = best[_ranking(image[best], scores[best], phrases[best])]  # survivors, by image and then best first

    def reject(verdict: str, rejected: npt.NDArray[np.bool_]) -> Indices:
        codes[best[rejected]] = _CODE[verdict]
        return best[~rejected]

    if rule.best_phrase_per_box:
        best = reject("other_phrase", _repeated(boxes[best], image[best]))
    if rule.phrase_nms_iou is not None:
        by_phrase = np.argsort(_pair(image[best], phrases[best]), kind="stable")
        grouped = best[by_phrase]
        keep = np.empty(len(best), dtype=np.bool_)
        starts = _starts(_pair(image[grouped], phrases[grouped]))
        keep[by_phrase] = nms_sorted(boxes[grouped], starts, rule.phrase_nms_iou)
        best = reject("duplicate_in_phrase", ~keep)
    if rule.nms_iou is not None:
        best = reject("duplicate_box", ~nms_sorted(boxes[best], _starts(image[best]), rule.nms_iou))
    starts = _starts(image[best])
    rank = np.arange(len(best)) - np.repeat(starts[:-1], np.diff(starts))
    reject("over_limit", rank >= rule.max_regions)
    return codes


def _judge_alone(
    boxes: npt.NDArray[np.float32],
    phrases: npt.NDArray[np.int16],
    scores: npt.NDArray[np.float32],
    sizes: npt.NDArray[np.float64],
    rule: SelectRule,
) -> Codes:
    """Apply the rules that look at one detection only; `sizes` [n, 2] are the widths and heights of the images."""
    x0, y0, x1, y1 = boxes.T.astype(np.float64)
    with np.errstate(all="ignore"):
        width, height = x1 - x0, y1 - y0
        share = width * height
        side_px = np.minimum(width * sizes[:, 0], height * sizes[:, 1])
    inside = valid(boxes) & (x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1)
    tests = {
        "invalid_box": ~inside,
        "invalid_phrase": phrases < 0,
        "invalid_score": ~np.isfinite(scores),
        "low_score": ~(scores > np.float32(rule.score)),
        "small": (side_px < rule.min_side_px) | (share < rule.min_area),
        "large": share > rule.max_area,
    }
    return np.select(list(tests.values()), [_CODE[name] for name in tests], default=_CODE["kept"])


def _ranking(image: npt.NDArray[np.intp], scores: npt.NDArray[np.float32], phrases: npt.NDArray[np.int16]) -> Indices:
    """Sort by image, then best first: one sort of 64 bits (image 16, score 32, phrase 16) instead of three.

    Scores are finite and phrases not negative. A float's bits rise with it where it is positive and fall where not.
    """
    bits = (-scores + np.float32(0)).view(np.int32)  # + 0: one zero instead of two
    rising = np.where(bits < 0, ~bits, bits ^ np.int32(-(2**31))).view(np.uint32)
    key = (
        image.astype(np.uint64) << np.uint64(48) | rising.astype(np.uint64) << np.uint64(16) | phrases.astype(np.uint64)
    )
    return np.argsort(key, kind="stable")


def _repeated(boxes: npt.NDArray[np.float32], image: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Say which boxes [n, 4] have stood before in their image."""
    halves = (boxes + np.float32(0)).view(np.uint64)  # pairs of coordinates by their bits; + 0: one zero instead of two
    order = np.lexsort((halves[:, 1], halves[:, 0], image))
    halves, image = halves[order], image[order]
    repeated = np.zeros(len(boxes), dtype=np.bool_)
    repeated[order[1:]] = (halves[1:] == halves[:-1]).all(axis=1) & (image[1:] == image[:-1])
    return repeated


def _pair(image: npt.NDArray[np.intp], phrases: npt.NDArray[np.int16]) -> npt.NDArray[np.int64]:
    return image.astype(np.int64) << 16 | phrases


def _starts(segment: npt.NDArray[Any]) -> Indices:
    """Where runs of equal values begin, and the end: [runs + 1]; [0] where there is no value."""
    return (
        np.flatnonzero(np.concatenate([[True], segment[1:] != segment[:-1], [True]]))
        if len(segment)
        else np.zeros(1, np.intp)
    )


def _columns(
    detections: pa.StructArray,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """Boxes float32 [n, 4], phrases int16 [n], scores float32 [n]; NaN, -1 and NaN where null."""
    names = [field.name for field in detections.type]
    fields = dict(zip(names, detections.flatten(), strict=True))  # unlike field(), minds the struct's nulls and offset
    box = fields["box"]
    values = _numbers(box.flatten(), np.float32, np.nan).reshape(-1, 4)  # leaves null boxes out
    if box.null_count:
        whole = np.full((len(box), 4), np.nan, dtype=np.float32)
        whole[np.asarray(box.is_valid())] = values
        values = whole
    return values, _numbers(fields["phrase"], np.int16, -1), _numbers(fields["score"], np.float32, np.nan)


def _numbers(array: pa.Array, dtype: Any, null: float) -> npt.NDArray[Any]:
    if array.null_count:
        array = pc.fill_null(array, pa.scalar(null, array.type))
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype)
