"""The shipped recipes: they load, plan, and mean what the papers say; the commits of models are asked of the user."""

from pathlib import Path

import pytest

from tests.world import ROOT
from vesl.pipeline import cli
from vesl.pipeline.plan import chain
from vesl.pipeline.recipe import Recipe, RecipeError, load
from vesl.pipeline.store import Store

FOLDER = ROOT / "deploy/recipes"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CAPTION = f"steps.caption.model=Qwen/Qwen2.5-VL-7B-Instruct@{COMMIT}"
GROUND = {
    "paper": f"steps.ground.model=google/owlv2-large-patch14-ensemble@{COMMIT}",
    "owl-st": f"steps.ground.model=google/owlvit-large-patch14@{COMMIT}",
    "grit": f"steps.ground.model=IDEA-Research/grounding-dino-base@{COMMIT}",
    "fg-clip": f"steps.ground.model=google/owlv2-large-patch14-ensemble@{COMMIT}",
}
CAPTIONED = {"paper", "fg-clip"}


def sets(name: str) -> list[str]:
    return [GROUND[name], *([CAPTION] if name in CAPTIONED else [])]


def preset(name: str) -> Recipe:
    return load(str(FOLDER / f"{name}.yaml"), sets(name))


@pytest.mark.parametrize("name", GROUND)
def test_a_preset_asks_for_the_commits_of_its_models(name: str) -> None:
    path = str(FOLDER / f"{name}.yaml")
    for given in sets(name):  # each of them is needed
        with pytest.raises(RecipeError) as caught:
            load(path, [other for other in sets(name) if other != given])
        key, model = given.removesuffix(f"@{COMMIT}").split("=")
        assert f"{key}: '{model}@COMMIT': a model of the hub is pinned by a commit, 40 hex digits" in str(caught.value)
    preset(name)


@pytest.mark.parametrize("name", GROUND)
def test_a_preset_plans(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--set={text}" for text in (*sets(name), f"store={tmp_path}/store")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(FOLDER / f"{name}.yaml"), *options])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for step in ("download", "caption", "phrases", "ground", "select", "pack"):
        assert step in said
    assert not (tmp_path / "store").exists()


def test_presets_are_what_the_papers_say() -> None:
    paper, owl_st, grit, fg_clip = (preset(name).steps for name in GROUND)
    assert (paper.phrases.rule.kind, paper.phrases.rule.limit, paper.ground.image_px) == ("paper", 20, 448)
    assert (owl_st.phrases.rule.kind, owl_st.phrases.rule.limit, owl_st.phrases.opens_model) == ("owl-st", 300, False)
    assert (grit.phrases.rule.kind, fg_clip.phrases.rule.kind) == ("grit", "fg-clip")
    assert [steps.caption.opens_model for steps in (paper, owl_st, grit, fg_clip)] == [True, False, False, True]
    assert [steps.select.rule.score for steps in (paper, owl_st, grit, fg_clip)] == [0.1, 0.1, 0.65, 0.4]
    assert [steps.select.rule.nms_iou for steps in (paper, owl_st, grit, fg_clip)] == [None, None, 0.5, 0.5]
    assert [steps.select.image.min_best_score for steps in (paper, owl_st, grit, fg_clip)] == [None, 0.3, None, None]
    assert [steps.select.empty for steps in (paper, owl_st, grit, fg_clip)] == ["keep", "keep", "reject", "keep"]


def test_presets_share_what_they_have_in_common(tmp_path: Path) -> None:
    """A caption or download is paid once: two presets on one store part where they differ."""
    store = Store(str(tmp_path))
    names = {name: [step.fingerprint for step in chain(preset(name), store)] for name in GROUND}
    assert len({steps[0] for steps in names.values()}) == 1
    assert names["paper"][1] == names["fg-clip"][1] != names["grit"][1] == names["owl-st"][1]
    assert len({steps[2] for steps in names.values()}) == 4


def test_the_demo_needs_nothing() -> None:
    load(str(FOLDER / "demo.yaml"))
