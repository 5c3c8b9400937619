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
from vesl.transforms.filters import VERDICTS, ImageRule, SelectRule, drop_images, judge
from vesl.transforms.found import Found, head_nouns, normalised
from vesl.transforms.options import identity
from vesl.transforms.outcomes import REASONS
from vesl.transforms.records import DETECTION, PHRASE, step_schema
from vesl.transforms.rules import ranking

TYPE = pa.list_(DETECTION)
NAN = math.nan

Row = Sequence[dict[str, Any] | None] | None
Said = Sequence[dict[str, Any] | None] | None  # an image's phrases


def is_box(box: Any) -> bool:
    return box is not None and all(0 <= v <= 1 for v in box) and box[0] < box[2] and box[1] < box[3]


def overlap(a: Any, b: Any) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter: float = max(0.0, across) * max(0.0, down)
    union: float = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    share: float = inter / union
    return share


AFTER = {"of", "in", "on", "at", "by", "for", "from", "with", "without", "near", "under", "over", "behind", "beside"}


def plain_head(words: list[str]) -> str:
    ends = [i for i, word in enumerate(words) if i and word in AFTER and i + 1 < len(words)]
    return words[: ends[0]][-1] if ends else words[-1]


def plain_words(phrase: dict[str, Any] | None) -> list[str]:
    return ((phrase or {}).get("text") or "").lower().split() or [""]


def is_stopped(phrase: dict[str, Any] | None, rule: SelectRule) -> bool:
    words = plain_words(phrase)
    return " ".join(words) in rule.stop_phrases or plain_head(words) in rule.stop_heads


def threshold(phrase: dict[str, Any] | None, rule: SelectRule) -> float:
    words = plain_words(phrase)
    if plain_head(words) in rule.score_by_head:
        return rule.score_by_head[plain_head(words)]
    if rule.score_by_words:
        return rule.score_by_words[min(len(words), len(rule.score_by_words)) - 1]
    return rule.score


def alone(
    found: dict[str, Any] | None, agreed: float | None, width: float, height: float, said: Said, rule: SelectRule
) -> str | None:
    if found is None or not is_box(found["box"]):
        return "invalid_box"
    if found["phrase"] is None or found["phrase"] < 0:
        return "invalid_phrase"
    if rule.reads_phrases and found["phrase"] >= len(said or ()):
        return "invalid_phrase"
    if found["score"] is None or not math.isfinite(found["score"]):
        return "invalid_score"
    phrase = (said or ())[found["phrase"]] if rule.reads_phrases else None
    if rule.reads_phrases and is_stopped(phrase, rule):
        return "stop_phrase"
    if not found["score"] > float(np.float32(threshold(phrase, rule) if rule.reads_phrases else rule.score)):
        return "low_score"
    if rule.min_agreement is not None and not (agreed is not None and agreed >= rule.min_agreement):
        return "low_agreement"
    x0, y0, x1, y1 = found["box"]
    sides, sides_px = (x1 - x0, y1 - y0), ((x1 - x0) * width, (y1 - y0) * height)
    margin_px = min(x0 * width, y0 * height, (1 - x1) * width, (1 - y1) * height)
    share = sides[0] * sides[1]
    tests = {
        "small": min(sides_px) < rule.min_side_px or share < rule.min_area,
        "large": share > rule.max_area,
        "whole_image": rule.whole_image is not None and min(sides) >= rule.whole_image,
        "bad_aspect": rule.max_aspect is not None and max(sides_px) > rule.max_aspect * min(sides_px),
        "border": rule.border_px is not None and margin_px <= rule.border_px,
    }
    return next((verdict for verdict, rejected in tests.items() if rejected), None)


FINDS_NOTHING = {"invalid_box", "invalid_phrase", "invalid_score", "stop_phrase", "low_score", "low_agreement"}


def shares(row: Row, verdicts: Sequence[str | None], said: Said, rule: SelectRule) -> dict[Any, float]:
    """The share of grounded phrases, by caption and (None) of the image."""
    there = {d["phrase"] for d, verdict in zip(row or (), verdicts, strict=True) if d and verdict not in FINDS_NOTHING}
    counted: dict[Any, list[bool]] = {}
    for index, phrase in enumerate(said or ()):
        if not is_stopped(phrase, rule):
            for group in {"all", (phrase or {}).get("caption")}:
                counted.setdefault(group, []).append(index in there)
    return {group: sum(grounded) / len(grounded) for group, grounded in counted.items()}


def plain_judge(
    row: Row,
    width: float | None,
    height: float | None,
    rule: SelectRule,
    said: Said = None,
    agreed: Sequence[float | None] | None = None,
) -> list[str] | None:
    if row is None:
        return None
    second = agreed or [None] * len(row)
    verdicts = [alone(d, a, width or 0, height or 0, said, rule) for d, a in zip(row, second, strict=True)]
    if rule.min_grounded is not None:
        by_caption = shares(row, verdicts, said, rule)
        captions = [(phrase or {}).get("caption") for phrase in said or ()]
        for i, verdict in enumerate(verdicts):
            if verdict is None and by_caption[captions[row[i]["phrase"]]] < rule.min_grounded:  # type: ignore[index]
                verdicts[i] = "ungrounded_caption"
    plain_compare([d or {} for d in row], verdicts, rule)
    return [verdict or "kept" for verdict in verdicts]


def plain_compare(found: list[dict[str, Any]], verdicts: list[str | None], rule: SelectRule) -> None:
    def best() -> list[int]:
        left = [i for i, verdict in enumerate(verdicts) if verdict is None]
        return sorted(left, key=lambda i: (-found[i]["score"], found[i]["phrase"], i))

    def suppress(verdict: str, rivals: Any, limit: int = 1) -> None:
        kept: list[int] = []
        for i in best():
            if sum(rivals(found[i], found[j]) for j in kept) >= limit:
                verdicts[i] = verdict
            else:
                kept.append(i)

    if rule.best_phrase_per_box:
        suppress("other_phrase", lambda a, b: a["box"] == b["box"], rule.phrases_per_box)
    if (limit := rule.phrase_nms_iou) is not None:
        suppress("duplicate_in_phrase", lambda a, b: a["phrase"] == b["phrase"] and overlap(a["box"], b["box"]) > limit)
    if (limit_all := rule.nms_iou) is not None:
        suppress("duplicate_box", lambda a, b: overlap(a["box"], b["box"]) > limit_all)
    if rule.regions_per_phrase is not None:
        suppress("over_per_phrase", lambda a, b: a["phrase"] == b["phrase"], rule.regions_per_phrase)
    some = list(dict.fromkeys(found[i]["phrase"] for i in best()))[: rule.max_phrases]
    for i in best():
        if found[i]["phrase"] not in some:
            verdicts[i] = "over_phrases"
    for i in best()[rule.max_regions :]:
        verdicts[i] = "over_limit"


def plain_drop(
    row: Row, verdicts: list[str] | None, width: float | None, height: float | None, said: Said, *rule: Any
) -> str | None:
    select, image, empty = rule
    long, short = max(width or 0, height or 0), min(width or 0, height or 0)
    if image.min_side_px is not None and short < image.min_side_px:
        return "too_small"
    if image.max_aspect is not None and long > image.max_aspect * short:
        return "bad_aspect"
    if image.min_grounded is not None and shares(row, verdicts or [], said, select).get("all", 1) < image.min_grounded:
        return "ungrounded"
    kept = [d["score"] for d, verdict in zip(row or (), verdicts or (), strict=True) if d and verdict == "kept"]
    if empty and not kept:
        return "no_regions"
    if image.min_best_score is not None and not max(kept, default=-math.inf) >= np.float32(image.min_best_score):
        return "low_best_score"
    return None


def column(rows: Sequence[Row]) -> pa.ListArray:
    return pa.array(rows, TYPE)


def phrase_column(rows: Sequence[Said]) -> pa.ListArray:
    return pa.array(rows, pa.list_(PHRASE))


def phrase(text: str | None, caption: int | None = 0) -> dict[str, Any]:
    return {"text": text, "caption": caption, "start": 0, "end": 1}


def det(box: Any, phrase: Any = 0, score: Any = 0.5) -> dict[str, Any]:
    return {"box": box, "phrase": phrase, "score": score}


def verdicts(
    row: Row,
    rule: SelectRule = SelectRule(),  # noqa: B008  (frozen)
    size: int = 100,
    said: Said = None,
    agreed: Sequence[float] | None = None,
    own: Any = None,
) -> list[str]:
    phrases = None if said is None else phrase_column([said])
    agreement = None if agreed is None else pa.array([agreed], pa.list_(pa.float32()))
    sides = pa.array([size])
    (found,) = judge(column([row]), sides, sides, rule, phrases=phrases, agreement=agreement, own=own).to_pylist()
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
TEXT = st.sampled_from(
    ["a red ball", "A  Red\tBall ", "balls", "glass of water", "a man in a hat", "of", "of a man", "man in", "", None,
     "ein Ärger", "ein ÄRGER", "in  of in of", "\u3000the\u00a0ball", "a\nb c", "ball on ball on"]
)  # fmt: skip
SAID = st.none() | st.lists(st.none() | st.builds(phrase, TEXT, st.sampled_from([0, 0, 1, 2, None])), max_size=5)
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
MORE: dict[str, Any] = {  # the rules that came later, each off or on
    "score_by_words": st.sampled_from([(), (0.0,), (0.3, 0.1), (0.0, 0.2, 0.5)]),
    "score_by_head": st.sampled_from([{}, {"ball": 0.0}, {"Ball": 0.5, "man": 0, "glass": 0.25, "ärger": 0.0}]),
    "phrases_per_box": st.sampled_from([1, 2, 3]),
    "max_aspect": st.sampled_from([None, 1, 1.5]),
    "whole_image": st.sampled_from([None, 1.0, 0.8]),
    "border_px": st.sampled_from([None, 0, 10]),
    "regions_per_phrase": st.sampled_from([None, 0, 1, 2]),
    "max_phrases": st.sampled_from([None, 0, 1, 2]),
    "stop_phrases": st.sampled_from([(), ("a red  BALL",), ("", "of")]),
    "stop_heads": st.sampled_from([(), ("hat", "water"), ("Man",), ("ÄRGER", "ball")]),
    "min_agreement": st.sampled_from([None, 0.5, -1.0]),
    "min_grounded": st.sampled_from([None, 0.0, 0.5, 1.0]),
}
IMAGE = st.builds(
    ImageRule,
    min_side_px=st.sampled_from([None, 7]),
    max_aspect=st.sampled_from([None, 1, 14.5]),
    min_best_score=st.sampled_from([None, 0.3, 0.0]),
    min_grounded=st.sampled_from([None, 0.5, 1.0]),
)
AGREED = st.sampled_from([0.5, 0.25, 1.0, -2.0, NAN, None])


@st.composite
def any_rule(draw: st.DrawFn) -> SelectRule:
    """The old rules as they come, with few of the others at a time, so that most detections reach the last ones."""
    on = draw(st.lists(st.sampled_from(sorted(MORE)), max_size=4, unique=True))
    chosen: dict[str, Any] = {name: draw(MORE[name]) for name in on}
    return replace(draw(RULE), **chosen)


@settings(max_examples=400)
@given(
    st.lists(st.tuples(ROW, SIZE, SIZE, SAID), max_size=8),
    any_rule(),
    IMAGE,
    st.booleans(),
    st.sampled_from([1, 2, 2048]),
    st.data(),
)
def test_columnar_rules_are_the_plain_rules(
    rows: Any, rule: SelectRule, image: ImageRule, empty: bool, chunk: int, data: st.DataObject
) -> None:
    found, widths, heights, said = ([row[i] for row in rows] for i in range(4))
    agreed = [row and data.draw(st.lists(AGREED, min_size=len(row), max_size=len(row))) for row in found]
    given = (column(found), pa.array(widths, pa.int32()), pa.array(heights, pa.int32()))
    more = (phrase_column(said), pa.array(agreed, pa.list_(pa.float32())))

    def judged(cut: slice) -> tuple[pa.ListArray, pa.StringArray]:
        three = (given[0][cut], given[1][cut], given[2][cut])
        phrases, agreement = (one[cut] for one in more)
        phrases = phrases if rule.reads_phrases or image.min_grounded is not None else None
        verdicts = judge(*three, rule, phrases=phrases, agreement=agreement)
        reasons = drop_images(*three, verdicts, rule, image, empty=empty, phrases=phrases)
        return verdicts, reasons

    plain = replace(rule, min_grounded=rule.min_grounded or 0.0) if image.min_grounded is not None else rule
    expected = [  # (where an image rule reads the phrases, it shows that one is not there)
        plain_judge(row, width, height, plain, text, second)
        for (row, width, height, text), second in zip(rows, agreed, strict=True)
    ]
    dropped = [
        plain_drop(row, verdicts, width, height, text, rule, image, empty)
        for (row, width, height, text), verdicts in zip(rows, expected, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "_ROWS", chunk)
        verdicts, reasons = judged(slice(None))
    verdicts.validate(full=True)
    assert verdicts.type == step_schema("select").field("verdicts").type
    assert verdicts.to_pylist() == expected
    assert reasons.to_pylist() == dropped
    start = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(start, len(rows)))
    verdicts, reasons = judged(slice(start, end))  # any cut of the rows gives the same
    assert verdicts.to_pylist() == expected[start:end]
    assert reasons.to_pylist() == dropped[start:end]


WHOLE = [0.0, 0.0, 1.0, 1.0]
LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
WITH_PHRASES: list[tuple[Row, SelectRule, list[tuple[str | None, int]], list[str]]] = [
    (
        [det(LEFT, 0), det(RIGHT, 1), det(WHOLE, 2)],
        SelectRule(stop_phrases=(" THE  side",), stop_heads=("Water",)),
        [("the Side", 0), ("glass of water", 0), ("cold water", 0)],
        ["stop_phrase", "kept", "stop_phrase"],
    ),
    (
        [det(LEFT, 0), det(RIGHT, 1), det(WHOLE, 2), det(WHOLE, 3), det(WHOLE, 4)],
        SelectRule(score_by_words=(0.6, 0.4), score_by_head={"cat": 0.5}, best_phrase_per_box=False),
        [("dog", 0), ("red dog", 0), ("big red dog", 0), ("cat", 0)],
        ["low_score", "kept", "kept", "low_score", "invalid_phrase"],
    ),
    (  # one of two of caption 0 (the stopped one does not count), both of caption 1, of which one is too small
        [det(LEFT, 0), det(RIGHT, 3), det([0, 0, 0.1, 0.1], 4), det(WHOLE, 1, 0.05), det(WHOLE, 2)],
        SelectRule(min_grounded=0.6, min_side_px=20, stop_phrases=("it",)),
        [("dog", 0), ("cat", 0), ("it", 0), ("hat", 1), ("tie", 1)],
        ["ungrounded_caption", "kept", "small", "low_score", "stop_phrase"],
    ),
]


def test_each_verdict_has_a_meaning_and_a_case() -> None:
    whole = WHOLE
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
        (
            [det(whole, i, 0.9 - i / 10) for i in range(4)],
            SelectRule(phrases_per_box=3),
            ["kept", "kept", "kept", "other_phrase"],
        ),
        ([det([0, 0.5, 1, 0.75]), det([0, 0, 1, 0.5])], SelectRule(max_aspect=2), ["bad_aspect", "kept"]),
        ([det([0, 0, 0.9, 1]), det([0, 0.05, 1, 1])], SelectRule(whole_image=0.92), ["kept", "whole_image"]),
        (
            [
                det([0, 0.1, 0.5, 0.5]),
                det([0.25, 0.0625, 0.5, 0.5]),
                det([0.1, 0.1, 0.5, 0.5]),
                det([0.1, 0.1, 0.5, 1]),
            ],
            SelectRule(border_px=6.25),
            ["border", "border", "kept", "border"],
        ),
        (
            [det(LEFT, 0, 0.3), det(RIGHT, 1, 0.4), det(whole, 0, 0.5), det([0, 0, 0.5, 0.5], 2, 0.2)],
            SelectRule(regions_per_phrase=1, max_phrases=2),
            ["over_per_phrase", "kept", "kept", "over_phrases"],
        ),
    ]
    for row, rule, expected in cases:
        assert verdicts(row, rule) == expected
        seen |= set(expected)
    for row, rule, said, expected in WITH_PHRASES:
        assert verdicts(row, rule, said=[phrase(text, caption) for text, caption in said]) == expected
        seen |= set(expected)
    assert verdicts([det(WHOLE)], own=lambda found: found.scores > 0.5) == ["own_rule"]
    assert verdicts([det(WHOLE), det(WHOLE)], SelectRule(min_agreement=0.2), agreed=[0.1, 0.2]) == [
        "low_agreement",
        "kept",
    ]
    assert seen | {"own_rule", "low_agreement"} == set(VERDICTS)
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


def arrays(scores: Sequence[float], phrases: Sequence[int]) -> Found:
    n = len(scores)
    nothing, sides = np.zeros(0, np.int64), np.ones(1, np.float64)
    return Found(
        boxes=np.tile(np.array(WHOLE, np.float32), (n, 1)),
        scores=np.array(scores, np.float32),
        phrases=np.array(phrases, np.int16),
        images=np.zeros(n, np.int64),
        agreement=np.zeros(n, np.float32),
        widths=sides,
        heights=sides,
        firsts=np.zeros(2, np.int64),
        texts=pa.array([], pa.string()),
        captions=nothing,
    )


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
@example(0.0, -0.0)
@example(-1.0, -2.0)
def test_ranking_orders_all_finite_scores(a: float, b: float) -> None:
    order = ranking(arrays([a, b], [1, 0]))
    assert order.tolist() == ([0, 1] if a > b else [1, 0])  # equal: the lower phrase


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("a big red ball", "ball"),
        ("  A Glass\tof water ", "glass"),
        ("two dogs", "dogs"),
        ("a man in a hat with a dog", "man"),
        ("a dog sitting on a bench", "sitting"),  # as documented: no grammar is known
        ("of", "of"),
        ("in front", "front"),
        ("office", "office"),
        ("the top of", "of"),
        ("ÄRGER", "ärger"),
        ("", ""),
        (None, ""),
        ("a\nbig\u3000ball", "ball"),
    ],
)
def test_head_nouns(text: str | None, head: str) -> None:
    assert head_nouns(normalised(pa.array([text, "x"], pa.string()))).to_pylist() == [head, "x"]


def test_what_a_rule_of_ones_own_sees() -> None:
    seen: list[Found] = []

    def own(found: Found) -> Any:
        seen.append(found)
        return found.of_phrase(found.words, 0) > 1

    said = [[phrase("dog"), phrase("a cat", 1)], None, [phrase("red ball")]]
    rows: list[Row] = [
        [det(WHOLE, 0), det(LEFT, 1), det(LEFT, 1, 0.05)],
        [],
        [det(RIGHT, 7), det(RIGHT, 0, 0.9), None, det(RIGHT, 0, 0.4)],
    ]
    sizes = pa.array([10, 20, 30])
    judged = judge(column(rows), sizes, sizes, SelectRule(), phrases=phrase_column(said), own=own)
    assert judged.to_pylist() == [
        ["own_rule", "kept", "low_score"],
        [],
        ["invalid_phrase", "kept", "invalid_box", "other_phrase"],
    ]
    (found,) = seen
    assert found.images.tolist() == [0, 0, 2, 2]
    assert found.scores.tolist() == [0.5, 0.5, np.float32(0.9), np.float32(0.4)]
    assert found.boxes.tolist() == [WHOLE, LEFT, RIGHT, RIGHT]
    assert found.widths[found.images].tolist() == [10, 10, 30, 30]
    assert found.texts.take(pa.array(found.rows)).to_pylist() == ["dog", "a cat", "red ball", "red ball"]
    assert found.captions.tolist() == [0, 1, 0]
    for name in ("boxes", "scores", "phrases", "images", "agreement", "widths", "heights", "firsts", "captions"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(found, name)[...] = 0
    judge(column([[det(WHOLE, 0, 0.0)], []]), sizes[:2], sizes[:2], SelectRule(), own=own)
    assert len(seen) == 1  # it is not asked about nothing


def test_columns_that_do_not_fit_are_refused() -> None:
    one, two = pa.array([9]), pa.array([9, 9])
    found = column([[det(WHOLE), det(LEFT)]])
    with pytest.raises(ValueError, match="1 rows of detections, 2 heights"):
        judge(found, one, two, SelectRule())
    with pytest.raises(ValueError, match="needs the phrases"):
        judge(found, one, one, SelectRule(stop_heads=("dog",)))
    with pytest.raises(ValueError, match="needs the score step's agreement"):
        judge(found, one, one, SelectRule(min_agreement=0.1))
    with pytest.raises(ValueError, match="not every detection has its agreement"):
        judge(found, one, one, SelectRule(), agreement=pa.array([[0.5]], pa.list_(pa.float32())))
    with pytest.raises(ValueError, match="needs the phrases"):
        drop_images(found, one, one, pa.array([["kept"] * 2]), SelectRule(), ImageRule(min_grounded=0.5), empty=False)


def test_images_are_dropped_by_the_first_reason_that_applies() -> None:
    rows: list[Row] = [[det(WHOLE, 0, 0.5)], [det(WHOLE, 0, 0.2)], [], None, [det(WHOLE, 0, 0.3)], [det(WHOLE)]]
    widths, heights = pa.array([100, 100, 100, 100, 30, 5]), pa.array([100, 100, 100, None, 100, 100])
    said = phrase_column([[phrase("dog")], [phrase("dog"), phrase("it")], [phrase("dog")], [], [], []])
    rule = SelectRule(stop_phrases=("it",))
    verdicts = judge(column(rows), widths, heights, replace(rule, stop_phrases=()))

    def reasons(image: ImageRule, empty: bool = False) -> list[str | None]:
        found = drop_images(column(rows), widths, heights, verdicts, rule, image, empty=empty, phrases=said)
        return found.to_pylist()  # type: ignore[no-any-return]

    assert reasons(ImageRule()) == [None] * 6
    assert reasons(ImageRule(), empty=True) == [None, None, "no_regions", "no_regions", None, None]
    best = "low_best_score"
    assert reasons(ImageRule(min_best_score=0.3)) == [None, best, best, best, None, None]  # 0.3 is at least 0.3
    assert reasons(ImageRule(min_grounded=0.1)) == [None, None, "ungrounded", None, None, None]
    assert reasons(ImageRule(min_side_px=6, max_aspect=3)) == [None] * 3 + ["too_small", "bad_aspect", "too_small"]
    everything = ImageRule(min_side_px=6, max_aspect=3, min_best_score=0.4, min_grounded=0.1)
    assert reasons(everything, empty=True) == [None, best, "ungrounded", "too_small", "bad_aspect", "too_small"]
    told = {"too_small", "bad_aspect", "ungrounded", "no_regions", "low_best_score"}
    assert set(REASONS["select"]) == told


def test_options_that_mean_the_same_are_the_same() -> None:
    a = SelectRule(stop_phrases=("The  Dog", "cat", "the dog"), stop_heads=("B", "a"), score_by_head={" Dog": 1})
    b = SelectRule(stop_phrases=("cat", "the dog"), stop_heads=("a", "b"), score_by_head={"dog": 1.0})
    assert (
        identity(a)
        == identity(b)
        == identity(SelectRule())
        | {
            "stop_phrases": ("cat", "the dog"),
            "stop_heads": ("a", "b"),
            "score_by_head": {"dog": 1.0},
        }
    )
    assert a.score_by_head is not SelectRule().score_by_head


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
    off = {"invalid_phrase", "invalid_score", "large", "stop_phrase", "low_agreement", "whole_image", "bad_aspect"}
    off |= {"border", "ungrounded_caption", "own_rule", "over_per_phrase", "over_phrases"}
    assert set(judged.values.unique().to_pylist()) == set(VERDICTS) - off
    cuts = [0, 1, 700, 701, 4100, 5000]
    parts = [judge(found[a:b], sizes[a:b], sizes[a:b], rule) for a, b in pairwise(cuts)]
    assert pa.concat_arrays(parts).equals(judged)
    some = slice(1990, 2110)  # across a seam of the rows judged at a time
    plain = [
        plain_judge(row, w, w, rule) for row, w in zip(found[some].to_pylist(), sizes[some].to_pylist(), strict=True)
    ]
    assert judged[some].to_pylist() == plain


@pytest.mark.parametrize(
    "bad",
    [
        {"score": NAN}, {"nms_iou": 50}, {"max_regions": -1}, {"min_area": 1.5}, {"min_side_px": -1},
        {"whole_image": 2}, {"border_px": -1}, {"max_phrases": -1}, {"regions_per_phrase": -1}, {"min_grounded": 1.1},
    ],
)  # fmt: skip
def test_a_rule_that_means_nothing_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be within 0"):
        replace(SelectRule(), **bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"phrases_per_box": 0}, "phrases_per_box must be within 1..inf, not 0"),
        ({"max_aspect": 0.5}, "max_aspect must be within 1"),
        ({"min_agreement": math.inf}, "min_agreement must be finite"),
        ({"score_by_words": (0.1, -1.0)}, "score_by_words[1]: -1.0 is not a threshold"),
        ({"score_by_words": (NAN,)}, "score_by_words[0]: nan is not a threshold"),
        ({"score_by_head": {"dog": "high"}}, "score_by_head.dog: 'high' is not a threshold"),
        ({"score_by_head": {"dog": True}}, "score_by_head.dog: True is not a threshold"),
        ({"score_by_head": {False: 0.1}}, "score_by_head: False is not a text; put it in quotes"),
        ({"score_by_head": {"dog": 0.1, "Dog ": 0.2}}, "score_by_head: the same word stands twice"),
    ],
)
def test_more_rules_that_mean_nothing(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        SelectRule(**bad)
    assert says in str(caught.value)
    with pytest.raises(ValueError, match="min_grounded must be within 0"):
        ImageRule(min_grounded=2)
