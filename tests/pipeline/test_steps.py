"""The steps' own checks on what models say, and the two `select` options, on columns in this process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.world import jpeg
from vesl.models.contract import Detections, Grounder
from vesl.pipeline.steps import caption as caption_step
from vesl.pipeline.steps import ground as ground_step
from vesl.pipeline.steps.caption import Caption
from vesl.pipeline.steps.ground import Ground
from vesl.pipeline.steps.select import Select
from vesl.transforms.filters import SelectRule
from vesl.transforms.records import DETECTION, Sample

Said = list[tuple[list[float], int, float]]  # box, phrase, score
UNIT = [0.0, 0.0, 1.0, 1.0]
NAN = float("nan")


def ground(monkeypatch: pytest.MonkeyPatch, said: Said, **options: Any) -> dict[str, Any]:
    """What `ground` makes of one image for which a model says that of two phrases."""

    def grounder(images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        boxes, labels, scores = ([s[i] for s in said] for i in range(3))
        return [Detections(np.asarray(boxes, np.float32), np.asarray(labels, np.int16), np.asarray(scores, np.float32))]

    def opener(reference: str, floor: float) -> Grounder:
        return grounder

    monkeypatch.setattr(ground_step, "open_grounder", opener)
    phrases = [{"text": t, "caption": 0, "start": 0, "end": 1} for t in "ab"]
    batch = pa.table({"key": ["k"], "image": [jpeg(1)], "phrases": [phrases]})
    (row,) = Ground("tiny@1", **options).open()(batch).to_pylist()
    return dict(row)


def test_ground_orders_cuts_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    said: Said = [(UNIT, 1, 0.5), (UNIT, 0, 0.1), (UNIT, 0, 0.5), (UNIT, 1, 0.9), (UNIT, 0, 0.25)]
    row = ground(monkeypatch, said, score_floor=0.25)
    assert [(d["score"], d["phrase"]) for d in row["detections"][1:]] == [(0.5, 0), (0.5, 1), (0.25, 0)]
    assert row["truncated"] is False  # what is below the floor is not missing
    row = ground(monkeypatch, said, score_floor=0.25, max_detections=3)
    assert [d["phrase"] for d in row["detections"]] == [1, 0, 1]
    assert row["truncated"] is True
    assert ground(monkeypatch, [])["detections"] == []


@pytest.mark.parametrize(
    "said",
    [(UNIT, 2, 0.5), (UNIT, -1, 0.5), (UNIT, 0, NAN), ([0, 0, NAN, 1], 0, 0.5), ([0, 0, float("inf"), 1], 0, 0.5)],
)
def test_ground_takes_no_nonsense(monkeypatch: pytest.MonkeyPatch, said: tuple[list[float], int, float]) -> None:
    with pytest.raises(ValueError, match="the grounder"):
        ground(monkeypatch, [said])


def test_captions_are_cleaned_on_both_sides_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def captioner(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        seen.extend(alt_texts)
        return [["a\x00 <b>ball</b>", " \t "], [" \n"]]

    monkeypatch.setattr(caption_step, "open_captioner", lambda reference: captioner)
    batch = pa.table({"key": ["k", "l"], "image": [jpeg(1)] * 2, "alt_text": ["<i>x</i>\x07", None]})
    rows = Caption("tiny@1").open()(batch).to_pylist()
    assert seen == ["x", ""]
    assert rows[0]["captions"] == [{"text": "a ball", "model": "tiny@1"}]
    assert (rows[1]["outcome"], rows[1]["reason"], rows[1]["captions"]) == ("rejected", "empty_caption", None)


def test_select_rejects_images_without_regions_if_asked() -> None:
    found = [[{"box": UNIT, "phrase": 0, "score": 0.9}], [{"box": UNIT, "phrase": 0, "score": 0.01}], []]
    columns = {"key": ["a", "b", "c"], "width": [9] * 3, "height": [9] * 3}
    batch = pa.table(columns).append_column("detections", pa.array(found, pa.list_(DETECTION)))
    kept = Select(SelectRule()).open()(batch).to_pylist()
    assert [(row["outcome"], row["verdicts"]) for row in kept] == [
        ("kept", ["kept"]),
        ("kept", ["low_score"]),
        ("kept", []),
    ]
    rows = Select(SelectRule(), empty="reject").open()(batch).to_pylist()
    assert [(row["outcome"], row["reason"], row["verdicts"]) for row in rows] == [
        ("kept", None, ["kept"]), ("rejected", "no_regions", None), ("rejected", "no_regions", None),
    ]  # fmt: skip


def test_a_sample_has_its_regions_in_falling_score() -> None:
    detections = [{"box": UNIT, "phrase": i % 2, "score": score} for i, score in enumerate((0.2, 0.9, 0.5, 0.9))]
    row = {
        "key": "k", "url": "u", "sha256": "s", "width": 1, "height": 1, "alt_text": None, "select": "f",
        "captions": [{"text": "ab", "model": "m@1"}],
        "phrases": [{"text": t, "caption": 0, "start": i, "end": i + 1} for i, t in enumerate("ab")],
        "detections": detections, "verdicts": ["kept", "kept", "low_score", "kept"],
    }  # fmt: skip
    sample = Sample.from_row(row)
    assert [(region.score, region.phrase) for region in sample.regions] == [(0.9, "b"), (0.9, "b"), (0.2, "a")]
