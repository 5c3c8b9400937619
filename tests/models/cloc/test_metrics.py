import numpy as np
import pytest

from vesl.models.cloc import metrics
from vesl.models.cloc.metrics import best_iou, distinct, estimate, evenly, ranks, unit


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_texts_that_differ_in_case_and_space_are_one() -> None:
    names, place = distinct(["Red  ball", "a tree", "red ball ", "RED\tBALL", "treе"])  # the last e is Cyrillic
    assert names == ["a tree", "Red  ball", "treе"]
    assert place.tolist() == [1, 0, 1, 1, 2]
    assert distinct([])[0] == []


def test_positions_lie_evenly() -> None:
    assert evenly(10, 4) == [0, 2, 5, 7]  # floor of 0, 2.5, 5, 7.5
    assert list(evenly(3, 5)) == list(evenly(3, None)) == [0, 1, 2]


def test_unit_rows() -> None:
    rows = unit([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1]])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[:2], [[0.6, 0.8], [0, 0]])
    assert np.isnan(rows[2]).all()
    assert np.isnan(rows[3, 0])


def test_ranks_by_hand() -> None:
    # Scores of query 0: 0.9, 0.5, 0.7, 0.1; correct are candidates 1 and 3: the best of them has 0.5, and two wrong
    # ones (0.9, 0.7) are ahead: rank 3. Query 1: 0, 1, 0, 0; correct is 1: rank 1.
    candidates = np.array([[0.9, 0], [0.5, 1], [0.7, 0], [0.1, 0]], np.float32)
    queries = np.eye(2, dtype=np.float32)
    assert ranks(queries, candidates, ints(1, 0, 0), ints(1, 3, 1)).tolist() == [3, 1]


def test_a_correct_candidate_ahead_of_the_best_is_never_counted() -> None:
    candidates = np.array([[0.9], [0.8], [0.7]], np.float32)
    query = np.ones((1, 1), np.float32)
    assert ranks(query, candidates, ints(0, 0), ints(0, 1)).tolist() == [1]
    assert ranks(query, candidates, ints(0, 0), ints(1, 2)).tolist() == [2]


@pytest.mark.parametrize("gap", [0, 4e-7, -4e-7])
def test_ties_count_against_the_model(gap: float) -> None:
    candidates = np.array([[0.5], [0.5 + gap], [0.5 - gap]], np.float32)
    assert ranks(np.ones((1, 1), np.float32), candidates, ints(0), ints(0)).tolist() == [3]
    apart = np.array([[0.5], [0.4999], [0.4999]], np.float32)
    assert ranks(np.ones((1, 1), np.float32), apart, ints(0), ints(0)).tolist() == [1]


@pytest.mark.parametrize("who", ["query", "right", "wrong"])
def test_nan_never_helps(who: str) -> None:
    queries, candidates = np.ones((1, 2), np.float32), np.array([[1, 1], [0, 0]], np.float32)
    {"query": queries, "right": candidates, "wrong": candidates[1:]}[who][0] = np.nan
    assert ranks(queries, candidates, ints(0), ints(0)).tolist() == [2]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, candidates = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(30, 8)))
    pairs = np.unique(np.concatenate([np.c_[:50, rng.integers(0, 30, 50)], rng.integers(0, 30, (90, 2))]), axis=0)
    scores = (queries.astype(np.float64) @ candidates.T).tolist()
    expected = []
    for q in range(50):
        right = set(pairs[pairs[:, 0] == q, 1].tolist())
        best = max(scores[q][c] for c in right)
        expected.append(1 + sum(scores[q][c] >= best for c in range(30) if c not in right))
    for block in (1, 77, 1 << 20):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert ranks(queries, candidates, *pairs.T).tolist() == expected


def test_a_query_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="without a correct"):
        ranks(np.ones((2, 1)), np.ones((2, 1)), ints(0), ints(0))


def test_overlaps_by_hand() -> None:
    predicted = np.array(
        [[0, 0, 0.5, 1], [0, 0, 1, 1], [0.5, 0.5, 0.2, 0.9], [-1, -1, 0.5, 0.5], [np.nan] * 4, [0] * 4]
    )
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.25, 1], [0.5, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 1, 1]])
    # 0: 0.5 / 1 with box 0, 0.25 / 0.5 with box 1. 1: 0.5 / 1 with box 2. 2: reversed. 3: clipped it is box 3 itself.
    found = best_iou(predicted[:5], boxes[:5], ints(0, 0, 1, 3, 4))
    np.testing.assert_array_equal(found, [0.5, 0.5, 0, 1, 0])
    np.testing.assert_array_equal(best_iou(predicted, boxes, ints(2, 5, 5, 2, 5, 5)), 0)


def test_means_by_hand() -> None:
    # Class 7: hits 1, 1, 0, 1 = 3/4; class 9: 0 of 1. Mean over scores 3/5, mean over classes 3/8.
    hits, group, image = [1, 1, 0, 1, 0], ints(7, 7, 7, 7, 9), ints(0, 0, 1, 2, 2)
    assert estimate([hits], image)[0]["value"] == pytest.approx(3 / 5)
    plain, halved = estimate([hits, np.array(hits) / 2], image, group)
    assert plain["value"] == pytest.approx(3 / 8)
    assert halved["value"] == pytest.approx(3 / 16)
    assert plain["low"] <= plain["value"] <= plain["high"]


def test_resamples_by_hand() -> None:
    # Two images, one right and one wrong: a resample has the mean 0, 1/2, 1/2 or 1, each with probability 1/4.
    only = estimate([[1, 0]], ints(4, 8))[0]
    assert (only["value"], only["low"], only["high"]) == (0.5, 0.0, 1.0)
    # As classes: a resample without one of them is the mean of the other alone, and again 0, 1/2 or 1.
    assert estimate([[1, 0]], ints(4, 8), ints(0, 1))[0] == only
    assert estimate([[1, 0, 1]], ints(3, 3, 3))[0] == {"value": 2 / 3, "low": 2 / 3, "high": 2 / 3}  # one image


def test_against_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(5)
    hits, image, group = rng.random(200), rng.integers(0, 40, 200), rng.integers(0, 7, 200)
    _, image = np.unique(image, return_inverse=True)
    n, drawn = image.max() + 1, []
    again = np.random.default_rng(3)
    for _ in range(100):
        picked = [i for chosen in again.integers(0, n, n) for i in np.flatnonzero(image == chosen)]
        drawn.append(np.mean([np.mean(hits[picked][group[picked] == g]) for g in np.unique(group[picked])]))
    found = estimate([hits], image, group, seed=3, resamples=100)[0]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert estimate([hits], image, group, seed=4, resamples=100)[0] != found


def test_intervals_cover_and_images_are_the_units() -> None:
    """Images of 20 regions that are mostly all right or all wrong: 95 % intervals of the true rate 0.5."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    image = np.repeat(np.arange(60), 20)
    for seed in range(200):
        rate = rng.choice([0.1, 0.9], 60)
        hits = rng.random(1200) < rate[image]
        one, each = estimate([hits], image, seed=seed, resamples=200)[0], np.arange(1200)
        covered += one["low"] <= 0.5 <= one["high"]
        if seed < 50:
            one = estimate([hits], each, seed=seed, resamples=200)[0]
            naive += one["low"] <= 0.5 <= one["high"]
    assert 0.90 <= covered / 200 <= 0.98
    assert naive / 50 < 0.7  # what regions as units would claim
