"""Matching, labels that are not what they should be, and intervals that hold what they promise."""

import copy
from typing import Any

import numpy as np
import pytest

from vesl.transforms.boxes import iou
from vesl.transforms.calibration import (
    Estimate,
    Float64,
    Marks,
    choose,
    curve,
    estimate,
    match,
    parse_labels,
    per_image,
    thresholds,
)
from vesl.transforms.found import normalise
from vesl.transforms.urls import keys

DRAWS = 1000
KEY, SHA = "0123456789abcdef01234567", "ab" * 32
LABELS: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": f"train/{KEY}.jpg", "width": 200, "height": 100, "negatives": ["A  Cat"]},
        {"id": "b", "file_name": "x.png", "sha256": SHA.upper(), "width": 10, "height": 10},
        {"id": 3, "coco_url": "HTTP://example.org:80/a.jpg", "width": 10, "height": 10, "neg_category_ids": [7]},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "bbox": [20, 10, 60, 40], "phrase": "Red\tBall"},
        {"id": 2, "image_id": 1, "bbox": [0, 0, 200.4, 100], "category_id": 7},
        {"id": 3, "image_id": "b", "bbox": [1, 1, 2, 2], "attributes": {"phrase": "dogs"}, "iscrowd": 1},
    ],
    "categories": [{"id": 7, "name": "Table"}],
}


def test_labels() -> None:
    first, second, third = parse_labels(LABELS)
    assert (first.key, first.sha256) == (KEY, None)
    assert first.truths == {
        "a cat": [],
        "red ball": [pytest.approx((0.1, 0.1, 0.4, 0.5))],
        "table": [pytest.approx((0.0, 0.0, 1.0, 1.0))],  # within a pixel
    }
    assert (second.key, second.sha256, second.unsure) == (None, SHA, {"dogs"})
    assert (third.key, third.truths) == (keys(["http://example.org/a.jpg"])[1][0], {"table": []})


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ((), [], "is not a COCO document"),
        (("images",), [], "images: there are none"),
        (("images",), {}, "images: is not a list of objects"),
        (("annotations",), [1], "annotations: is not a list of objects"),
        (("images", 0, "id"), None, r"images\[0\]: needs an `id`"),
        (("images", 0, "id"), "b", r"images\[1\]: needs an `id` that no other has"),
        (("images", 0, "width"), None, r"images\[0\]: `width` is not a number of pixels"),
        (("images", 0, "height"), float("nan"), "`height` is not a number"),
        (("images", 0, "height"), True, "`height` is not a number"),
        (("images", 0, "file_name"), "cat.jpg", r"images\[0\]: has no `key`"),
        (("images", 0, "key"), "12", r"images\[0\]: `key` is not 24 hex digits"),
        (("images", 1, "key"), KEY, f"{KEY} is there 2 times"),
        (("images", 0, "negatives"), "cat", "`negatives` is not a list of phrases"),
        (("images", 2, "neg_category_ids"), [8], "`neg_category_ids` is not a list of ids"),
        (("annotations", 0, "image_id"), 9, r"annotations\[0\]: there is no image 9"),
        (("annotations", 0, "image_id"), [1], "there is no image"),
        (("annotations", 0, "phrase"), "  ", "no `phrase`"),
        (("annotations", 0, "phrase"), 7, "no `phrase`"),
        (("annotations", 1, "category_id"), 8, "no `phrase`"),
        (("annotations", 0, "bbox"), [0, 0, 10], "is not x, y, width, height"),
        (("annotations", 0, "bbox"), [0, 0, "a", 1], "is not x, y, width, height"),
        (("annotations", 0, "bbox"), [0, 0, 10, float("inf")], "is not x, y, width, height"),
        (("annotations", 0, "bbox"), [190, 0, 12, 10], "is not within its image of 200 x 100 pixels"),
        (("annotations", 0, "bbox"), [-1.5, 0, 12, 10], "is not within its image"),
        (("annotations", 0, "bbox"), [5, 5, 0, 10], "is not within its image"),
        (("annotations", 0, "bbox"), [5, 5, -3, 10], "is not within its image"),
        (("categories", 0, "name"), None, r"categories\[0\]: needs"),
    ],
)
def test_labels_that_are_none(place: tuple[Any, ...], value: Any, says: str) -> None:
    document: Any = copy.deepcopy(LABELS)
    if not place:
        document = value
    else:
        inner = document
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
    with pytest.raises(ValueError, match=says):
        parse_labels(document)


def test_labels_without_any_label() -> None:
    with pytest.raises(ValueError, match="no annotations and no negatives"):
        parse_labels({"images": [{"id": 1, "key": KEY, "width": 1, "height": 1}]})


def test_phrases_are_the_same_whatever_their_case_and_spaces() -> None:
    assert normalise(" Two \n DOGS ") == "two dogs"


def test_match_by_hand() -> None:
    truths = np.array([[0, 0, 0.4, 0.4], [0.5, 0.5, 1, 1]])
    boxes = np.array([[0, 0, 0.4, 0.3], [0, 0, 0.4, 0.4], [0.5, 0.5, 1, 1], [0.5, 0.5, 0.9, 0.7], [0, 0, 0.4, 0.4]])
    # The second is best and takes the first truth, so the first and the last find none; the fourth overlaps too little.
    assert match(boxes, np.array([0.5, 0.9, 0.1, 0.8, 0.9]), truths).tolist() == [-1, 0, 1, -1, -1]
    assert match(boxes, np.ones(5), np.zeros((0, 4))).tolist() == [-1] * 5
    assert match(np.zeros((0, 4)), np.ones(0), truths).tolist() == []
    half = np.array([[0, 0, 0.2, 0.4]])
    assert iou(half, truths)[0, 0] == 0.5
    assert match(half, np.ones(1), truths).tolist() == [0]  # at 0.5 it is a match


def test_matching_once_serves_every_threshold() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        corner = rng.random((12, 2)) * 0.5
        boxes = np.concatenate([corner, corner + 0.2 + 0.3 * rng.random((12, 2))], axis=1)
        scores, truths = rng.random(12).round(1), boxes[rng.permutation(12)[:5]] + 0.02
        whole = match(boxes, scores, truths)
        assert len(set(whole[whole >= 0])) == (whole >= 0).sum()
        for at in (0.2, 0.5, 0.8):
            above = scores > at
            assert match(boxes[above], scores[above], truths).tolist() == whole[above].tolist()


def marks(image: Any, score: Any, true: Any) -> Marks:
    n = len(score)
    return Marks(np.asarray(image), np.asarray(score, np.float32), np.asarray(true, bool), np.ones(n, int), np.ones(n))


def test_counts_above_a_threshold_are_as_select_has_them() -> None:
    found = marks([0, 0, 1, 1, 2], [0.1, 0.3, 0.3, 0.9, 0.05], [1, 0, 1, 1, 0])
    at = np.array([0.0, 0.1, 0.3])
    hits, counts = per_image(found, 4, at)
    assert counts.tolist() == [[2, 2, 1, 0], [1, 2, 0, 0], [0, 1, 0, 0]]  # a score of 0.1 is not above 0.1, in float32
    assert hits.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0]]
    truths = marks([0, 1, 1, 3], [0.1, 0.9, 0.3, -np.inf], [1] * 4)
    result = curve(found, truths, 4, at)
    np.testing.assert_allclose(result.precision.value, [3 / 5, 2 / 3, 1])
    np.testing.assert_allclose(result.recall.value, [3 / 4, 2 / 4, 1 / 4])
    assert result.detections.tolist() == [5, 3, 1]


def test_an_interval_by_hand() -> None:
    # Alone in their images and many, so that Student is the normal: Wilson's interval of 80 in 100.
    hits = np.repeat([1.0, 0.0], [8000, 2000])
    found = estimate(hits, np.ones(10_000))
    assert (found.low, found.high) == (pytest.approx(0.79205, abs=1e-4), pytest.approx(0.80773, abs=1e-4))
    # The same marks in images of 10 that are all right or all wrong: as wide as that of 1,000.
    whole = estimate(hits.reshape(-1, 10).sum(1), np.full(1000, 10.0))
    assert (whole.high - whole.low) == pytest.approx((found.high - found.low) * np.sqrt(10), rel=0.02)
    # Nothing says how dependent these are, so they count as wholly so: as 50 in 50.
    sure = estimate(np.full(50, 5.0), np.full(50, 5.0))
    assert (sure.value, sure.high) == (1.0, pytest.approx(1.0))
    assert sure.low == pytest.approx(0.925, abs=0.003)
    empty = estimate(np.zeros((2, 3)), np.zeros((2, 3)))
    assert np.isnan(empty.value).all()
    assert (empty.low.tolist(), empty.high.tolist()) == ([0, 0], [1, 1])


def draw(
    rng: np.random.Generator, images: int, p: float, alike: float, size: float, draws: int = DRAWS
) -> tuple[Float64, Float64]:
    """Hits and counts [draws, images] of detections that are right with probability p.

    `size` of them an image, on average; `alike`: their correlation within an image (beta-binomial).
    """
    counts = rng.poisson(size, (draws, images)) if size > 1 else np.ones((draws, images), int)
    rate: Any = p
    if alike >= 1:
        rate = (rng.random(counts.shape) < p).astype(float)
    elif alike:
        rate = rng.beta(p * (1 - alike) / alike, (1 - p) * (1 - alike) / alike, counts.shape)
    return rng.binomial(counts, rate).astype(np.float64), counts.astype(np.float64)


def held(found: Estimate, truth: float) -> int:
    return int(((found.low <= truth) & (truth <= found.high)).sum())


@pytest.mark.parametrize(
    ("images", "p", "alike", "size"),
    [
        (300, 0.5, 0.0, 1.0),
        (300, 0.9, 0.0, 1.0),
        (200, 0.8, 0.0, 5.0),
        (100, 0.7, 0.3, 5.0),
        (200, 0.9, 0.3, 5.0),
        (100, 0.9, 0.1, 20.0),
        (200, 0.5, 1.0, 5.0),
        (200, 0.9, 1.0, 5.0),
        (50, 0.8, 0.3, 8.0),
        (200, 0.95, 0.3, 5.0),
        (500, 0.98, 0.3, 5.0),
        (300, 0.98, 0.1, 20.0),
        (300, 0.99, 0.0, 5.0),
        (100, 0.98, 0.3, 20.0),
    ],
)
def test_the_interval_holds_the_truth_in_95_of_100_draws(images: int, p: float, alike: float, size: float) -> None:
    found = estimate(*draw(np.random.default_rng(7), images, p, alike, size))
    assert 930 <= held(found, p) <= 975


def test_of_images_whose_size_tells_how_right_they_are() -> None:
    rng = np.random.default_rng(8)
    crowded = rng.random((DRAWS, 200)) < 0.3
    counts = np.where(crowded, rng.poisson(20, crowded.shape), rng.poisson(3, crowded.shape))
    hits = rng.binomial(counts, np.where(crowded, 0.6, 0.95))
    truth = (0.3 * 20 * 0.6 + 0.7 * 3 * 0.95) / (0.3 * 20 + 0.7 * 3)
    assert 930 <= held(estimate(hits.astype(float), counts.astype(float)), truth) <= 975


def test_an_interval_that_takes_marks_for_independent_would_not() -> None:
    """What the clusters are for: the same draws, each mark as if it were alone in its image."""
    hits, counts = draw(np.random.default_rng(9), 200, 0.8, 0.5, 8.0)
    assert 930 <= held(estimate(hits, counts), 0.8) <= 975
    alone = [estimate(np.repeat([1.0, 0.0], [int(h), int(n - h)]), np.ones(int(n))) for h, n in _sums(hits, counts)]
    assert sum(bool(one.low <= 0.8 <= one.high) for one in alone) < 800


def _sums(hits: Float64, counts: Float64) -> list[tuple[float, float]]:
    return list(zip(hits.sum(1).tolist(), counts.sum(1).tolist(), strict=True))


def test_whole_curves_from_boxes_hold_the_truth() -> None:
    """Detections with boxes around truths, through the matching: precision at three thresholds is known."""
    rng, at = np.random.default_rng(10), np.array([0.0, 0.5, 0.8])
    truth = np.array([0.2, 0.2, 0.6, 0.6])
    held_at = np.zeros(3)
    for _ in range(DRAWS):
        n = 400
        score = rng.random(n)
        right = rng.random(n) < 0.5 + 0.5 * score  # above t: 0.75 + t / 4
        boxes = np.where(right[:, None], truth + 0.01, truth + 0.3)
        true = np.array([match(boxes[i : i + 1], score[i : i + 1], truth[None])[0] >= 0 for i in range(0, n, 40)])
        assert true.tolist() == right[::40].tolist()
        found = curve(marks(np.arange(n), score, right), marks([0], [-np.inf], [1]), n, at).precision
        held_at += (found.low <= 0.75 + at / 4) & (0.75 + at / 4 <= found.high)
    assert (held_at >= 930).all()
    assert (held_at <= 975).all()


@pytest.mark.parametrize("alike", [0.0, 0.3])
def test_the_chosen_threshold_keeps_its_promise(alike: float) -> None:
    """Its true precision is below the wanted one in no more than 5 of 100 draws, though it was chosen among many."""
    rng, wanted, images, each = np.random.default_rng(11), 0.9, 250, 5
    broken = chosen = 0
    image = np.repeat(np.arange(images), each)
    spent = []
    for _ in range(DRAWS):
        score = rng.random(images * each)
        # Right with probability 0.6 + 0.4 s, alike within an image: a shared uniform number in some of the images.
        shared = np.repeat(rng.random(images) < alike, each)
        luck = np.where(shared, np.repeat(rng.random(images), each), rng.random(images * each))
        found = marks(image, score, luck < 0.6 + 0.4 * score)
        at = choose(found, images, thresholds(found.score), wanted)
        if at is not None:
            chosen += 1
            spent.append(at)
            broken += 0.6 + 0.4 * (1 + at) / 2 < wanted  # the true precision above it
    assert broken <= 65
    assert chosen > 900
    assert np.median(spent) < 0.75  # 0.5 is the best that one could choose


def test_no_threshold_where_none_is_sure() -> None:
    found = marks(np.arange(30), np.linspace(0.1, 0.9, 30), np.ones(30))
    assert choose(found, 30, thresholds(found.score), 0.99) is None
    assert choose(found, 30, thresholds(found.score), 0.5) == 0.0
    assert thresholds(np.zeros(0)).tolist() == [0.0]
