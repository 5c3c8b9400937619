"""Boxes against arithmetic in plain Python, one pair at a time."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vesl.transforms import boxes as B  # noqa: N812
from vesl.transforms.boxes import (
    area,
    clip,
    from_padded,
    from_pixels,
    iou,
    nms,
    nms_ragged,
    to_padded,
    to_pixels,
    valid,
)

# A coarse grid makes equal boxes, equal scores and IoUs exactly at the threshold common.
GRID = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
WILD = st.one_of(GRID, st.floats(width=32))
DTYPES = st.sampled_from([np.float32, np.float64])


def box_arrays(elements: Any, rows: Any = 12) -> Any:
    shape = st.tuples(st.integers(0, rows), st.just(4))
    return DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, shape, elements=elements))


def is_box(box: Any) -> bool:
    return all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]


def plain_iou(a: Any, b: Any) -> float:
    a, b = [float(v) for v in a], [float(v) for v in b]
    if not (is_box(a) and is_box(b)):
        return 0.0
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if 0 < union < math.inf else 0.0


def plain_nms(boxes: Any, scores: Any, threshold: float, groups: Any) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i] if scores[i] == scores[i] else math.inf):
        rivals = [j for j in kept if groups is None or groups[i] == groups[j]]
        if (
            is_box(boxes[i])
            and scores[i] == scores[i]
            and all(plain_iou(boxes[i], boxes[j]) <= threshold for j in rivals)
        ):
            kept.append(i)
    return kept


def test_known_overlaps() -> None:
    a = np.array([[0, 0, 2, 2], [1, 1, 3, 3]], np.float32)
    b = np.array([[0, 0, 2, 2], [2, 0, 4, 2], [1, 0, 2, 1], [0, 0, 4, 4]], np.float32)
    np.testing.assert_array_equal(iou(a, b), [[1, 0, 1 / 4, 1 / 4], [1 / 7, 1 / 7, 0, 1 / 4]])
    np.testing.assert_array_equal(area(b), [4, 4, 1, 16])
    assert iou(a, b).dtype == area(a).dtype == np.float64


def test_what_is_no_box() -> None:
    nan, inf = math.nan, math.inf
    boxes = np.array(
        [
            [0, 0, 1, 1],
            [nan, 0, 1, 1],
            [0, 0, inf, 1],
            [-inf, 0, 1, 1],
            [1, 0, 0, 1],
            [0, 1, 1, 0],
            [0, 0, 0, 1],
            [0, 0, 1, nan],
        ]
    )
    assert valid(boxes).tolist() == [True] + [False] * 7
    assert area(boxes).tolist() == [1.0] + [0.0] * 7
    assert iou(boxes, boxes).sum() == 1.0
    assert nms(boxes, np.arange(8.0), 0.5).tolist() == [0]
    assert valid(np.zeros((0, 4))).tolist() == []


def test_clip() -> None:
    boxes = np.array([[-1, 0.5, 2, 0.75], [1.5, 0, 2, 1], [math.nan, -math.inf, math.inf, 0.5]], np.float32)
    np.testing.assert_array_equal(
        clip(boxes), np.array([[0, 0.5, 1, 0.75], [1, 0, 1, 1], [math.nan, 0, 1, 0.5]], np.float32)
    )
    assert clip(boxes).dtype == np.float32
    np.testing.assert_array_equal(clip(np.array([[-5.0, -5, 900, 900]]), 640, 480), [[0, 0, 640, 480]])
    assert valid(clip(boxes)).tolist() == [True, False, False]


@given(box_arrays(WILD), box_arrays(WILD))
def test_iou_and_area_of_any_numbers(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
    found = iou(a, b)
    assert found.shape == (len(a), len(b))
    assert found.tolist() == [[plain_iou(x, y) for y in b] for x in a]
    assert valid(a).tolist() == [is_box(box) for box in a]
    assert area(a).tolist() == [
        (float(x[2]) - float(x[0])) * (float(x[3]) - float(x[1])) if is_box(x) else 0.0 for x in a
    ]


@given(box_arrays(GRID), st.data(), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]))
def test_nms_is_the_greedy_one(boxes: npt.NDArray[Any], data: st.DataObject, threshold: float) -> None:
    n = len(boxes)
    scores = data.draw(
        hnp.arrays(np.float32, n, elements=st.sampled_from([0.1, 0.2, 0.2, 0.9, -1.0, math.nan, math.inf]))
    )
    groups = data.draw(st.none() | hnp.arrays(np.int16, n, elements=st.integers(-1, 2)))
    kept = nms(boxes, scores, threshold, groups)
    assert kept.tolist() == plain_nms(boxes, scores, threshold, groups)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([0, 1, 2, 3, 17, 40]), max_size=8),
    st.sampled_from([3, 64, 16_384]),
)
def test_many_images_at_once_are_each_alone(seed: int, lengths: list[int], block: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    n = int(offsets[-1])
    boxes = rng.integers(0, 7, (n, 4)).astype(np.float32)  # many are reversed
    scores = (rng.integers(0, 5, n) / 4).astype(np.float32)
    groups = rng.integers(0, 3, n).astype(np.int16)
    for chosen in (None, groups):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(B, "_BLOCK", block)
            keep = nms_ragged(boxes, scores, offsets, chosen, 0.3)
        assert keep.shape == (n,)
        for start, end in pairwise(offsets.tolist()):
            one = None if chosen is None else chosen[start:end]
            expected = plain_nms(boxes[start:end], scores[start:end], 0.3, one)
            assert np.flatnonzero(keep[start:end]).tolist() == sorted(expected)


def test_equal_scores_keep_the_first_and_a_suppressed_box_suppresses_nothing() -> None:
    same = np.array([[0, 0, 1, 1]] * 3, np.float32)
    assert nms(same, np.array([0.5, 0.5, 0.5], np.float32), 0.5).tolist() == [0]
    chain = np.array([[0, 0, 4, 1], [1, 0, 5, 1], [2, 0, 6, 1]], np.float32)  # neighbours 0.6, ends 1/3
    assert nms(chain, np.array([0.9, 0.8, 0.7], np.float32), 0.5).tolist() == [0, 2]
    assert nms(chain, np.array([0.7, 0.9, 0.8], np.float32), 0.6).tolist() == [1, 2, 0]  # at the threshold stays
    assert nms(same, np.array([0.1, 0.3, 0.2]), 0.5, np.array([0, 1, 0])).tolist() == [1, 2]
    assert nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), 0.5).tolist() == []


def test_pixels_and_padded_square() -> None:
    box = np.array([[0.25, 0.5, 0.75, 1.0]], np.float32)
    np.testing.assert_array_equal(to_pixels(box, 640, 480), [[160, 240, 480, 480]])
    np.testing.assert_array_equal(from_pixels(np.array([[160.0, 240, 480, 480]]), 640, 480), box)
    np.testing.assert_array_equal(to_padded(box, 640, 480), [[0.25, 0.375, 0.75, 0.75]])  # padding at the bottom
    np.testing.assert_array_equal(to_padded(box, 240, 480), [[0.125, 0.5, 0.375, 1.0]])  # padding at the right
    np.testing.assert_array_equal(to_padded(box, 7, 7), box)
    sizes = np.array([[640, 480], [480, 640]])
    both = to_padded(np.repeat(box, 2, axis=0), sizes[:, 0], sizes[:, 1])
    np.testing.assert_array_equal(both, [[0.25, 0.375, 0.75, 0.75], [0.1875, 0.5, 0.5625, 1.0]])
    assert both.dtype == np.float32
    in_padding = from_padded(np.array([[0.1, 0.8, 0.9, 0.95], [0.1, 0.5, 0.9, 0.95]]), 640, 480)
    assert valid(clip(in_padding)).tolist() == [False, True]


@given(box_arrays(st.floats(0, 1, width=32)), st.integers(1, 65_000), st.integers(1, 65_000))
def test_there_and_back(boxes: npt.NDArray[Any], width: int, height: int) -> None:
    for there, back in ((to_pixels, from_pixels), (to_padded, from_padded)):
        np.testing.assert_allclose(back(there(boxes, width, height), width, height), boxes, rtol=1e-5, atol=1e-30)
        assert there(boxes, width, height).dtype == boxes.dtype
    assert (to_padded(boxes, width, height) <= 1).all()


@given(box_arrays(WILD), st.integers(1, 9), st.integers(1, 9))
def test_conversions_take_any_numbers(boxes: npt.NDArray[Any], width: int, height: int) -> None:
    for convert in (to_pixels, from_pixels, to_padded, from_padded):
        assert convert(boxes, width, height).shape == boxes.shape
    assert ((clip(boxes) >= 0) | np.isnan(boxes)).all()
