"""Scores of two detectors, or of one under two sets of phrases, are not comparable: a threshold belongs to one."""

from pathlib import Path

import pytest

from tests.pipeline.test_recipe import GOOD, read
from tests.world import World
from vesl.pipeline.plan import chain
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_SCORES = [
    "steps.ground.model=google/owlv2-base-patch16-ensemble@" + COMMIT,
    "steps.ground.model=tests.standins:grounder@1",
    "steps.ground.image_px=448",
    "steps.ground.template='a photo of a {}'",
    "steps.ground.dtype=bfloat16",
    "steps.phrases.rule.kind=owl-st",
    "steps.phrases.rule.max_phrases=5",
    "steps.caption.prompts=[Briefly.]",
]


def names(folder: Path, *overrides: str) -> dict[str, str]:
    recipe = read(folder, GOOD, *overrides)
    return {step.name: step.fingerprint for step in chain(recipe, Store(str(folder / "store")))}


@pytest.mark.parametrize("other", OTHER_SCORES)
def test_what_was_decided_on_other_scores_is_never_taken_over(tmp_path: Path, other: str) -> None:
    before, after = names(tmp_path), names(tmp_path, other)
    assert all(before[step] != after[step] for step in ("ground", "select", "pack"))


@pytest.mark.parametrize("other", OTHER_SCORES)
def test_a_threshold_is_refused_for_other_scores(tmp_path: Path, other: str) -> None:
    ground = names(tmp_path)["ground"]
    chosen = f"steps.select.scores_of={ground}"
    assert names(tmp_path, chosen) == names(tmp_path)  # it only checks
    assert names(tmp_path, chosen, "steps.select.rule.score=0.3")["ground"] == ground
    with pytest.raises(RecipeError, match=f"scores_of: its thresholds were chosen on the scores of {ground}, but"):
        names(tmp_path, chosen, other)
    names(tmp_path, other)  # who says nothing is asked nothing


def test_the_command_says_so_in_one_line(world: World) -> None:
    world.document["steps"]["select"] = {"scores_of": "0123456789ab"}
    world.write()
    done = world.run("plan")
    assert done.returncode == 2
    assert "steps.select.scores_of" in done.stderr
    assert "Traceback" not in done.stderr
