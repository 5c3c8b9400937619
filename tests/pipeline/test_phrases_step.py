"""The phrases step for each kind of phrase, on columns in this process, and what a recipe says of it."""

from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from tests.pipeline.test_recipe import GOOD, fingerprints, read
from vesl.models.tagger import open_tagger
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.steps import phrases as step
from vesl.pipeline.steps.phrases import Phrases
from vesl.transforms.phrases import Kind, PhraseRule

CAPTIONS = ["A dog with two red balls\nLove of cats", "a dog with two red balls; photo"]
EXPECTED = {
    "paper": ["A dog", "red balls", "Love", "cats"],
    "owl-st": [
        *("A dog", "A dog with", "A dog with two", "A dog with two red", "A dog with two red balls"),
        *("dog", "dog with", "dog with two", "dog with two red", "dog with two red balls"),
        *("with two red", "with two red balls", "two red", "two red balls", "red", "red balls", "balls"),
        *("Love", "Love of", "Love of cats", "of cats", "cats"),
    ],
    "grit": ["A dog with two red balls", "cats"],
    "fg-clip": ["A dog", "two red balls", "Love", "cats"],
}


def batch(*captions: str) -> pa.Table:
    return pa.table({"key": ["k"], "captions": [[{"text": text, "model": "m@1"} for text in captions]]})


@pytest.mark.parametrize("kind", get_args(Kind))
def test_each_kind_on_two_captions(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    opened: list[bool] = []

    def spy(reference: str, parse: bool = False) -> Any:
        opened.append(parse)
        return open_tagger(reference, parse)

    monkeypatch.setattr(step, "open_tagger", spy)
    stage = Phrases(rule=PhraseRule(kind=kind))
    (row,) = stage.open()(batch(*CAPTIONS)).to_pylist()
    assert opened == {"paper": [False], "owl-st": []}.get(kind, [True])
    assert stage.opens_model == bool(opened)
    assert [phrase["text"] for phrase in row["phrases"]] == EXPECTED[kind]
    for phrase in row["phrases"]:
        assert phrase["text"] == CAPTIONS[phrase["caption"]][phrase["start"] : phrase["end"]]
    (row,) = Phrases(rule=PhraseRule(kind=kind, max_chars=9, max_phrases=1)).open()(batch(*CAPTIONS)).to_pylist()
    assert [(phrase["text"], phrase["end"]) for phrase in row["phrases"]] == [("A dog", 5)]
    (row,) = stage.open()(batch()).to_pylist()
    assert (row["outcome"], row["phrases"]) == ("kept", [])


def test_a_recipe_names_the_kind(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD, "steps.phrases.rule.kind=grit")
    assert recipe.steps.phrases.rule == PhraseRule(kind="grit", max_phrases=300)
    assert read(tmp_path, GOOD, "steps.phrases.rule={kind: owl-st, max_phrases: 7}").steps.phrases.rule.max_phrases == 7
    with pytest.raises(RecipeError, match=r"steps\.phrases\.rule\.kind: 'glip' is not one of paper, owl-st, grit"):
        read(tmp_path, GOOD, "steps.phrases.rule.kind=glip")
    with pytest.raises(RecipeError, match=r"steps\.phrases\.rule\.max_phrases must not be negative"):
        read(tmp_path, GOOD, "steps.phrases.rule.max_phrases=-1")


def test_each_kind_is_a_result_of_its_own_and_a_default_written_out_is_none(tmp_path: Path) -> None:
    def phrases(*overrides: str) -> str:
        return fingerprints(read(tmp_path, GOOD, *overrides))["phrases"]

    each = [phrases(f"steps.phrases.rule.kind={kind}") for kind in get_args(Kind)]
    assert len(set(each)) == len(each)
    assert phrases() == each[0] == phrases("steps.phrases.rule.max_phrases=20")
    assert each[0] == phrases("steps.phrases.rule.max_phrases=null")
    assert each[1] == phrases("steps.phrases.rule={kind: owl-st, max_phrases: 300}")
    assert each[1] != phrases("steps.phrases.rule={kind: owl-st, max_phrases: 20}")
