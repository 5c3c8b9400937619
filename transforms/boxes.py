"""Arithmetic on boxes: overlap, non-maximum suppression, and the ways between pixels, the image and a padded square.

A box is x0, y0, x1, y1 (left, top, right, bottom), x right, y down; arrays are float32 or float64 [n, 4]. Arithmetic is
in float64, in which the products of float32 coordinates are exact, so results do not depend on the machine's vector
unit. A box is `valid` if its coordinates are finite and x0 < x1, y0 < y1; an invalid one has area 0, overlaps nothing,
and suppression neither keeps it nor lets it suppress another. Nothing here raises on NaN, infinity or reversed corners.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
F = TypeVar("F", np.float32, np.float64)

# Pairs that one step of nms_ragged compares at a time: its handful of float64 buffers then stay in the L2 cache.
_BLOCK = 16_384


def valid(boxes: Floats) -> Bools:
    """Say of each box of [n, 4] whether it is one: finite, x0 < x1 and y0 < y1. Returns [n]."""
    ordered: Bools = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return ordered & np.isfinite(boxes).all(axis=1)


def clip(boxes: npt.NDArray[F], width: float = 1.0, height: float = 1.0) -> npt.NDArray[F]:
    """Clip [n, 4] to 0..width, 0..height. NaN stays, corners keep their order; a box outside ends with no extent."""
    limits = np.array([width, height, width, height], dtype=boxes.dtype)
    return np.clip(boxes, boxes.dtype.type(0), limits)


def area(boxes: Floats) -> Float64:
    """Area of each box of [n, 4], in the square of its unit; 0 for an invalid one. Returns float64 [n]."""
    x0, y0, x1, y1 = _columns(boxes)
    with np.errstate(all="ignore"):
        return np.where(valid(boxes), (x1 - x0) * (y1 - y0), 0.0)


def iou(a: Floats, b: Floats) -> Float64:
    """Intersection over union of all pairs of [n, 4] and [m, 4]: float64 [n, m]; 0 where either box is invalid."""
    left, right = _columns(a)[:, :, None], _columns(b)[:, None, :]
    overlap = _overlap(left, area(a)[:, None], right, area(b)[None, :])
    usable = valid(a)[:, None] & valid(b)[None, :]
    return np.where(usable & np.isfinite(overlap), overlap, 0.0)


def nms(
    boxes: Floats, scores: Floats, iou_threshold: float, groups: npt.NDArray[np.integer[Any]] | None = None
) -> npt.NDArray[np.int64]:
    """Indices of the boxes to keep, in falling score (equal scores: lower index first). See nms_ragged."""
    keep = nms_ragged(boxes, scores, np.array([0, len(boxes)]), groups, iou_threshold)
    kept = np.flatnonzero(keep)
    return kept[np.argsort(-scores[kept], kind="stable")]


def nms_ragged(
    boxes: Floats,
    scores: Floats,
    offsets: npt.NDArray[np.integer[Any]],
    groups: npt.NDArray[np.integer[Any]] | None,
    iou_threshold: float,
) -> Bools:
    """Greedy non-maximum suppression of many images at once; returns a keep mask, bool [n].

    boxes [n, 4]; scores [n]; image i owns boxes offsets[i]..offsets[i+1] (offsets [images + 1], not falling, 0 to n);
    groups [n] or None: only boxes of one image and one group compare. In falling score (equal: lower index first) a box
    is kept unless its IoU with one kept before is above the threshold; at the threshold it stays. Invalid boxes and NaN
    scores are never kept. No image's result depends on what else is in the call.
    """
    segment = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    usable = np.flatnonzero(valid(boxes) & ~np.isnan(scores))
    keys = (-scores[usable], segment[usable]) if groups is None else (-scores[usable], groups[usable], segment[usable])
    usable = usable[np.lexsort(keys)]
    segment = segment[usable]
    first = np.ones(len(usable), dtype=np.bool_)
    first[1:] = segment[1:] != segment[:-1]
    if groups is not None:
        first[1:] |= groups[usable][1:] != groups[usable][:-1]
    keep = np.zeros(len(boxes), dtype=np.bool_)
    keep[usable] = nms_sorted(boxes[usable], np.append(np.flatnonzero(first), len(usable)), iou_threshold)
    return keep


def nms_sorted(boxes: Floats, offsets: npt.NDArray[np.integer[Any]], iou_threshold: float) -> Bools:
    """nms_ragged for valid boxes [n, 4] in falling score within each segment offsets[i]..offsets[i+1].

    Segments of like length are laid side by side, rank by rank, and the loop runs over ranks: the work is that of all
    pairs within a segment, in vector instructions.
    """
    keep = np.ones(len(boxes), dtype=np.bool_)
    lengths = np.diff(offsets)
    by_length = np.argsort(-lengths, kind="stable")
    by_length = by_length[: np.count_nonzero(lengths > 1)]  # a box alone stays
    while len(by_length):
        longest = int(lengths[by_length[0]])
        block, by_length = np.split(by_length, [min(len(by_length), max(1, _BLOCK // longest))])
        rank = np.arange(longest)[:, None]
        real = rank < lengths[block]  # [rank, segment], as all that follows
        place = np.where(real, offsets[block] + rank, offsets[block])
        corners = np.ascontiguousarray(boxes[place].transpose(2, 0, 1), dtype=np.float64)
        keep[place[real]] = _suppress(corners, real.copy(), iou_threshold)[real]
    return keep


def _suppress(corners: Float64, alive: Bools, iou_threshold: float) -> Bools:
    """Clear in place, in `alive` [rank, segment], what a box alive above it covers; corners [4, rank, segment]."""
    with np.errstate(all="ignore"):
        areas = (corners[2] - corners[0]) * (corners[3] - corners[1])
    for rank in range(len(alive) - 1):
        if alive[rank].any():
            rest = slice(rank + 1, None)
            overlap = _overlap(corners[:, rank], areas[rank], corners[:, rest], areas[rest])
            alive[rest] &= ~((overlap > iou_threshold) & alive[rank])
    return alive


def _overlap(a: Float64, a_area: Float64, b: Float64, b_area: Float64) -> Float64:
    """IoU of corners [4, ...] that broadcast; NaN where the areas leave the range of float64."""
    with np.errstate(all="ignore"):
        across = np.minimum(a[2], b[2])
        across -= np.maximum(a[0], b[0])
        np.maximum(across, 0.0, out=across)
        down = np.minimum(a[3], b[3])
        down -= np.maximum(a[1], b[1])
        np.maximum(down, 0.0, out=down)
        across *= down
        union = a_area + b_area
        union -= across
        overlap: Float64 = across / union
    return overlap


def to_pixels(boxes: npt.NDArray[F], width: npt.ArrayLike, height: npt.ArrayLike) -> npt.NDArray[F]:
    """From 0..1 of an image to its pixels, edges counted (0..width, not 0..width-1). Sizes are scalars or [n]."""
    return _scale(boxes, width, height)


def from_pixels(boxes_px: npt.NDArray[F], width: npt.ArrayLike, height: npt.ArrayLike) -> npt.NDArray[F]:
    """From pixels (edges counted) to 0..1 of the image. Sizes are scalars or [n], above 0."""
    return _scale(boxes_px, 1 / np.asarray(width, np.float64), 1 / np.asarray(height, np.float64))


def to_padded(boxes: npt.NDArray[F], width: npt.ArrayLike, height: npt.ArrayLike) -> npt.NDArray[F]:
    """From 0..1 of an image to 0..1 of its padded square.

    The square has the image's long side and the image at its top left, so padding is at the right or at the bottom
    (OWLv2's convention; CLOC's trainer pads alike). Sizes are pixels of the image, scalars or [n], above 0.
    """
    side = np.maximum(width, height)
    return _scale(boxes, width / side, height / side)


def from_padded(boxes: npt.NDArray[F], width: npt.ArrayLike, height: npt.ArrayLike) -> npt.NDArray[F]:
    """From 0..1 of the padded square (see to_padded) to 0..1 of the image.

    What reaches into the padding comes out above 1: clip it; what lies in the padding alone is then no longer valid.
    """
    side = np.maximum(width, height)
    return _scale(boxes, side / np.asarray(width, np.float64), side / np.asarray(height, np.float64))


def _scale(boxes: npt.NDArray[F], across: npt.ArrayLike, down: npt.ArrayLike) -> npt.NDArray[F]:
    factors = np.stack(np.broadcast_arrays(across, down, across, down), axis=-1)
    with np.errstate(all="ignore"):
        return (boxes * factors.astype(np.float64)).astype(boxes.dtype)


def _columns(boxes: Floats) -> Float64:
    return np.ascontiguousarray(boxes.T, dtype=np.float64)
