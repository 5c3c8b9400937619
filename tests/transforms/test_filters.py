"""The columnar rules against the same rules written plainly, one detection at a time."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vesl.transforms import filters
from vesl.transforms.filters import VERDICTS, SelectRule, judge
from vesl.transforms.records import DETECTION, step_schema

TYPE = pa.list_(DETECTION)
NAN = math.nan

Row = Sequence[dict[str, Any] | None] | None


def is_box(box: Any) -> bool:
    return box is not None and all(0 <= v <= 1 for v in box) and box[0] < box[2] and box[1] < box[3]


def overlap(a: Any, b: Any) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter: float = max(0.0, across) * max(0.0, down)
    union: float = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    share: float = inter / union
    return share


def alone(found: dict[str, Any] | None, width: float, height: float, rule: SelectRule) -> str | None:
    if found is None or not is_box(found["box"]):
        return "invalid_box"
    if found["phrase"] is None or found["phrase"] < 0:
        return "invalid_phrase"
    if found["score"] is None or not math.isfinite(found["score"]):
        return "invalid_score"
    if not found["score"] > float(np.float32(rule.score)):
        return "low_score"
    x0, y0, x1, y1 = found["box"]
    share = (x1 - x0) * (y1 - y0)
    if min((x1 - x0) * width, (y1 - y0) * height) < rule.min_side_px or share < rule.min_area:
        return "small"
    return "large" if share > rule.max_area else None


def plain_judge(row: Row, width: float | None, height: float | None, rule: SelectRule) -> list[str] | None:
    if row is None:
        return None
    verdicts = [alone(found, width or 0, height or 0, rule) for found in row]
    found: list[dict[str, Any]] = [d or {} for d in row]

    def best() -> list[int]:
        left = [i for i, verdict in enumerate(verdicts) if verdict is None]
        return sorted(left, key=lambda i: (-found[i]["score"], found[i]["phrase"], i))

    def suppress(verdict: str, rivals: Any) -> None:
        kept: list[int] = []
        for i in best():
            if any(rivals(found[i], found[j]) for j in kept):
                verdicts[i] = verdict
            else:
                kept.append(i)

    if rule.best_phrase_per_box:
        suppress("other_phrase", lambda a, b: a["box"] == b["box"])
    if (limit := rule.phrase_nms_iou) is not None:
        suppress("duplicate_in_phrase", lambda a, b: a["phrase"] == b["phrase"] and overlap(a["box"], b["box"]) > limit)
    if (limit_all := rule.nms_iou) is not None:
        suppress("duplicate_box", lambda a, b: overlap(a["box"], b["box"]) > limit_all)
    for i in best()[rule.max_regions :]:
        verdicts[i] = "over_limit"
    return [verdict or "kept" for verdict in verdicts]


def column(rows: Sequence[Row]) -> pa.ListArray:
    return pa.array(rows, TYPE)


def det(box: Any, phrase: Any = 0, score: Any = 0.5) -> dict[str, Any]:
    return {"box": box, "phrase": phrase, "score": score}


def verdicts(row: Row, rule: SelectRule = SelectRule(), size: int = 100) -> list[str]:  # noqa: B008  (frozen)
    (found,) = judge(column([row]), pa.array([size]), pa.array([size]), rule).to_pylist()
    return found  # type: ignore[no-any-return]


COORDINATE = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.75, 1.0])
BOX = st.one_of(
    st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE).map(
        lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])]
    ),
    st.sampled_from([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [0.1, 0.1, 0.9, 0.95], [0.1, 0.1, 0.9, 0.9]]).map(
        lambda b: [float(np.float32(v)) for v in b]
    ),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, -0.5, NAN, math.inf]), min_size=4, max_size=4),
)
SCORE = st.sampled_from([0.1, 0.100001, 0.2, 0.3, 0.3, 0.9, 1.5, 0.0, -0.0, -1.0, NAN, math.inf, None]).map(
    lambda v: v if v is None else float(np.float32(v))
)
FOUND = st.builds(det, st.none() | BOX, st.sampled_from([0, 1, 2, 3, 32767, -1, None]), SCORE)
GOOD = st.builds(det, BOX, st.integers(0, 3), SCORE)
ROW = st.one_of(st.none(), st.lists(GOOD, max_size=14), st.lists(st.none() | FOUND, max_size=5))
SIZE = st.sampled_from([1, 7, 100, None])
RULE = st.builds(
    SelectRule,
    score=st.sampled_from([0.1, 0.0, 0.3]),
    best_phrase_per_box=st.booleans(),
    nms_iou=st.sampled_from([None, 0.0, 0.5, 0.7, 1.0]),
    phrase_nms_iou=st.sampled_from([None, 0.0, 0.5, 0.7]),
    min_side_px=st.sampled_from([0, 3, 25]),
    min_area=st.sampled_from([0.0, 0.25]),
    max_area=st.sampled_from([1.0, 0.5]),
    max_regions=st.sampled_from([100, 3, 1, 0]),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(ROW, SIZE, SIZE), max_size=8), RULE, st.sampled_from([1, 2, 2048]), st.data())
def test_columnar_rules_are_the_plain_rules(rows: Any, rule: SelectRule, chunk: int, data: st.DataObject) -> None:
    found, widths, heights = ([row[i] for row in rows] for i in range(3))
    columns = (column(found), pa.array(widths, pa.int32()), pa.array(heights, pa.int32()))
    expected = [plain_judge(row, width, height, rule) for row, width, height in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "_ROWS", chunk)
        judged = judge(columns[0], columns[1], columns[2], rule)
    judged.validate(full=True)
    assert judged.type == step_schema("select").field("verdicts").type
    assert judged.to_pylist() == expected
    start = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(start, len(rows)))
    cut = [one.slice(start, end - start) for one in columns]
    part = judge(cut[0], cut[1], cut[2], rule)  # any cut of the rows gives the same
    assert part.to_pylist() == expected[start:end]


def test_each_verdict_has_a_meaning_and_a_case() -> None:
    whole = [0.0, 0.0, 1.0, 1.0]
    seen = set()
    cases: list[tuple[Row, SelectRule, list[str]]] = [
        ([det(whole)], SelectRule(), ["kept"]),
        ([det(whole, 0, 0.1), det(whole, 0, 0.2)], SelectRule(), ["low_score", "kept"]),  # 0.1 is not above 0.1
        (
            [det(None), det([0, 0, NAN, 1]), det([0.5, 0, 0.5, 1]), det([0, 0, 1.01, 1]), None],
            SelectRule(),
            ["invalid_box"] * 5,
        ),
        ([det(whole, None), det(whole, -1)], SelectRule(), ["invalid_phrase"] * 2),
        ([det(whole, 0, None), det(whole, 0, NAN), det(whole, 0, math.inf)], SelectRule(), ["invalid_score"] * 3),
        ([det([0, 0, 0.5, 0.25]), det(whole)], SelectRule(min_side_px=26), ["small", "kept"]),
        ([det([0, 0, 0.5, 0.25]), det(whole)], SelectRule(min_side_px=25, max_area=0.5), ["kept", "large"]),
        ([det([0, 0, 0.5, 0.25])], SelectRule(min_area=0.2), ["small"]),
        (
            [det(whole, 2, 0.5), det(whole, 0, 0.3), det(whole, 1, 0.5)],
            SelectRule(),
            ["other_phrase", "other_phrase", "kept"],
        ),
        ([det(whole, 2, 0.5), det(whole, 0, 0.3)], SelectRule(best_phrase_per_box=False), ["kept", "kept"]),
        ([det(whole, 2, 0.5), det([-0.0, 0, 1, 1], 0, 0.3)], SelectRule(), ["kept", "other_phrase"]),  # one zero
        (
            [det(whole, 0, 0.9), det([0, 0, 1, 0.75], 1, 0.8), det([0, 0, 0.75, 1], 0, 0.7)],
            SelectRule(phrase_nms_iou=0.7),
            ["kept", "kept", "duplicate_in_phrase"],
        ),
        (
            [det(whole, 0, 0.9), det([0, 0, 1, 0.75], 1, 0.8), det([0, 0, 0.75, 1], 0, 0.7)],
            SelectRule(nms_iou=0.7),
            ["kept", "duplicate_box", "duplicate_box"],
        ),
        ([det(whole), det([0, 0, 0.5, 1])], SelectRule(nms_iou=0.5), ["kept", "kept"]),  # at the limit stays
        (
            [
                det([0, 0, 0.5, 1], 1, 0.5),
                det(whole, 0, 0.5),
                det([0, 0, 0.25, 1], 0, 0.5),
                det([0, 0, 0.75, 1], 0, 0.9),
            ],
            SelectRule(max_regions=2),
            ["over_limit", "kept", "over_limit", "kept"],
        ),
    ]
    for row, rule, expected in cases:
        assert verdicts(row, rule) == expected
        seen |= set(expected)
    assert seen == set(VERDICTS)
    assert all(VERDICTS.values())


def test_what_a_rule_rejected_plays_no_part_later() -> None:
    best_is_large = [det([0, 0, 1, 1], 0, 0.9), det([0, 0, 0.75, 1], 0, 0.5)]
    assert verdicts(best_is_large, SelectRule(max_area=0.9, nms_iou=0.5, max_regions=1)) == ["large", "kept"]


def test_null_empty_and_no_rows() -> None:
    sizes = pa.array([10, None, 10], pa.int32())
    judged = judge(column([None, [], [det([0, 0, 1, 1])]]), sizes, sizes, SelectRule())
    assert judged.to_pylist() == [None, [], ["kept"]]
    none = pa.array([], pa.int32())
    assert judge(column([]), none, none, SelectRule(nms_iou=0.5, phrase_nms_iou=0.5)).to_pylist() == []
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 1, 2]), column([[det([0, 0, 1, 1])] * 2]).values, mask=pa.array([True, False])
    )
    assert judge(hidden, sizes[:2], sizes[:2], SelectRule()).to_pylist() == [None, ["kept"]]  # values under a null list
    structs = column([[det([0, 0, 1, 1]), det([0, 0, 1, 0.5])]]).values
    masked = pa.StructArray.from_arrays(structs.flatten(), fields=list(DETECTION), mask=pa.array([True, False]))
    hidden = pa.ListArray.from_arrays(pa.array([0, 2]), masked)  # values under a null member
    assert judge(hidden, sizes[:1], sizes[:1], SelectRule()).to_pylist() == [["invalid_box", "kept"]]
    with pytest.raises(ValueError, match="3 rows of detections, 2 widths"):
        judge(column([[], [], []]), sizes[:2], sizes, SelectRule())


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
@example(0.0, -0.0)
@example(-1.0, -2.0)
def test_ranking_orders_all_finite_scores(a: float, b: float) -> None:
    scores, phrases = np.array([a, b], np.float32), np.array([1, 0], np.int16)
    order = filters._ranking(np.zeros(2, np.intp), scores, phrases)
    assert order.tolist() == ([0, 1] if a > b else [1, 0])  # equal: the lower phrase


def test_a_large_column_does_not_depend_on_its_cuts() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 30, 5000)
    n = int(lengths.sum())
    corners = np.sort(rng.integers(0, 9, (n, 2, 2)) / 8, axis=1).reshape(n, 4).astype(np.float32)
    values = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(corners.reshape(-1)), type=DETECTION.field("box").type),
            pa.array(rng.integers(0, 4, n), pa.int16()),
            pa.array((rng.integers(0, 20, n) / 20).astype(np.float32)),
        ],
        fields=list(DETECTION),
    )
    found = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)
    sizes = pa.array(rng.integers(1, 900, 5000), pa.int32())
    rule = SelectRule(nms_iou=0.6, phrase_nms_iou=0.3, min_side_px=8, max_regions=6)
    judged = judge(found, sizes, sizes, rule)
    assert set(judged.values.unique().to_pylist()) == set(VERDICTS) - {"invalid_phrase", "invalid_score", "large"}
    cuts = [0, 1, 700, 701, 4100, 5000]
    parts = [judge(found[a:b], sizes[a:b], sizes[a:b], rule) for a, b in pairwise(cuts)]
    assert pa.concat_arrays(parts).equals(judged)
    some = slice(1990, 2110)  # across a seam of the rows judged at a time
    plain = [
        plain_judge(row, w, w, rule) for row, w in zip(found[some].to_pylist(), sizes[some].to_pylist(), strict=True)
    ]
    assert judged[some].to_pylist() == plain


@pytest.mark.parametrize(
    "bad", [{"score": NAN}, {"nms_iou": 50}, {"max_regions": -1}, {"min_area": 1.5}, {"min_side_px": -1}]
)
def test_a_rule_that_means_nothing_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be within 0"):
        replace(SelectRule(), **bad)
