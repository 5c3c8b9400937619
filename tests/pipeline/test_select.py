"""The select step in whole runs: nothing else is redone, no model is opened, and a user's own rule decides with it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.bench.select_speed import EVERYTHING, part
from tests.pipeline.test_recipe import GOOD, read
from tests.webserver import WebServer
from tests.world import ROOT, World
from vesl.models.contract import ModelError
from vesl.pipeline.guard import guarded
from vesl.pipeline.plan import make_plan
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.run import OverLimitError, run
from vesl.pipeline.stage import Step
from vesl.pipeline.steps.select import Select
from vesl.pipeline.store import encode_table
from vesl.transforms import filters
from vesl.transforms.filters import ImageRule, SelectRule
from vesl.transforms.found import Bools, Found

NO_MODELS = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        models = ("vesl.models.tiny", "vesl.models.captioners", "vesl.models.grounders", "vesl.models.scorers")
        if name.startswith(models) or name.split(".")[0] in ("torch", "transformers", "spacy", "ai_edge_litert"):
            raise ImportError(f"{name} may not be loaded")
        if name == "tests.standins":
            raise ImportError("no model may be opened")

sys.meta_path.insert(0, Refuse())
"""


def sharp(found: Found) -> Bools:
    """Keep what is no dog and lies in the left half."""
    dogs = np.asarray(found.heads.to_numpy(zero_copy_only=False) == "boxes", np.bool_)
    return (found.boxes[:, 0] < 0.5) & ~found.of_phrase(dogs, False)


def choosy(found: Found) -> Bools:
    if (found.scores > 0.8).any():
        raise RuntimeError("no box is\nthat good")
    return found.scores > 0


def short(found: Found) -> Any:
    return found.scores[:-1] > 0


def wordy(found: Found) -> Any:
    return [True] * len(found)


NOTHING = 3


def me(name: str) -> str:
    return f"tests.pipeline.test_select:{name}@1"


def verdicts(world: World, *overrides: str) -> list[str]:
    plan = make_plan(world.load(*overrides))
    step = next(step for step in plan.steps if step.name == "select")
    tables = [plan.store.read_table(step.table(part)) for part in plan.parts]
    return [verdict for row in pa.concat_tables(tables)["verdicts"].to_pylist() for verdict in row or ()]


def fingerprint(world: World, *overrides: str) -> str:
    plan = make_plan(world.load(*overrides))
    return next(step.fingerprint for step in plan.steps if step.name == "select")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world that has been run to its end."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("finished"), server)
        world.document["engine"] = {"workers": 1}
        world.write()
        world.list_urls("a", world.images(12))
        run(world.load())
        yield world


def test_a_new_rule_opens_no_model_and_redoes_nothing_else(finished: World, tmp_path: Path) -> None:
    before = finished.files()
    (tmp_path / "sitecustomize.py").write_text(NO_MODELS, encoding="utf-8")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    rule = "{score: 0.1, stop_heads: [table], score_by_words: [0.2, 0.3], max_phrases: 1, best_phrase_per_box: false}"
    sets = [f"steps.select.rule={rule}", "steps.select.image={min_best_score: 0.5}"]
    done = finished.run("run", *(f"--set={text}" for text in sets), env=env)
    assert done.returncode == 0, done.stderr
    after = finished.files()
    assert {name: after.get(name) for name in before if not name.startswith("runs/")} == {
        name: status for name, status in before.items() if not name.startswith("runs/")
    }
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"select", "pack", "runs"}
    assert {"kept", "stop_phrase", "low_score", "over_phrases"} <= set(verdicts(finished, *sets))
    opened = finished.run("run", "--set=steps.ground.score_floor=0.5", "--until=ground", env=env)
    assert opened.returncode == 1  # so that the check is one
    assert "no model may be opened" in opened.stderr


def test_a_rule_of_ones_own_decides_and_its_revision_is_identity(finished: World) -> None:
    setting = f"steps.select.own={me('sharp')}"
    run(finished.load(setting))
    found = verdicts(finished, setting)
    assert {"kept", "own_rule", "low_score"} <= set(found)
    assert found.count("kept") < verdicts(finished).count("kept")
    names = {fingerprint(finished, *sets) for sets in ((), (setting,), (setting.replace("@1", "@2"),))}
    assert len(names) == 3


def test_a_bad_rule_of_ones_own_ends_the_run_clearly(finished: World) -> None:
    for name, error, says in [
        (
            "choosy",
            OverLimitError,
            r"^select: \d+ of 12 rows failed \(error \d+\), over limits\.failed_fraction.*; such as\n  \w+: ",
        ),
        ("short", ModelError, r"^steps\.select\.own: .*test_select:short@1: answered with bool \[.*$"),
    ]:
        with pytest.raises(error, match=says):
            run(finished.load(f"steps.select.own={me(name)}"), until="select")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (me("wordy"), "test_select:wordy@1: answered with list instead of a numpy array bool [30]"),
        (me("missing"), "test_select:missing@1: module 'tests.pipeline.test_select' has no attribute 'missing'"),
        (me("NOTHING"), "test_select:NOTHING@1: is not a function"),
        ("no_such_module:rule@1", "steps.select.own: no_such_module:rule@1: No module named 'no_such_module'"),
    ],
)
def test_what_a_rule_of_ones_own_must_be(reference: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        guarded(Select(SelectRule(score=0), own=reference).open(), part(5, 6, seed=0), "select", Select.emits)
    assert says in str(caught.value)


def test_rows_that_a_rule_of_ones_own_cannot_judge_fail_alone() -> None:
    stage = Select(own=me("choosy"))
    batch = part(50, 6, seed=1)
    result = guarded(stage.open(), batch, "select", stage.emits)
    best = [max(d["score"] for d in row) for row in batch["detections"].to_pylist()]
    outcomes = result["outcome"].to_pylist()
    assert {"kept", "failed"} == set(outcomes)
    assert outcomes == ["failed" if score > 0.8 else "kept" for score in best]
    assert set(result["detail"].to_pylist()) == {None, "RuntimeError: no box is that good"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps.select.own=rules:sharp", "steps.select.own: 'rules:sharp' is not pinned; write name@revision"),
        ("steps.select.own=sharp@1", "steps.select.own: 'sharp@1' is not module:function@revision"),
        ("steps.select.rule.score_by_words=[0.1, x]", "steps.select.rule.score_by_words[1]: expected a finite number"),
        ("steps.select.rule.score_by_head={dog: x}", "steps.select.rule.score_by_head.dog: 'x' is not a threshold"),
        ("steps.select.rule.stop_head=[dog]", "steps.select.rule.stop_head: unknown key; did you mean 'stop_heads'?"),
        ("steps.select.image.min_grounded=2", "steps.select.image.min_grounded must be within 0..1, not 2"),
        ("steps.select.image=small", "steps.select.image: expected a block of keys, found 'small'"),
    ],
)
def test_mistakes_in_rules_are_one_line(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, GOOD, override)
    assert says in str(caught.value)


def test_the_table_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = part(300, 20, seed=2)
    stage = replace(EVERYTHING, own=me("sharp"), rule=replace(EVERYTHING.rule, max_regions=2))
    select = stage.open()
    whole = select(batch)
    found = {verdict for row in whole["verdicts"].to_pylist() for verdict in row or ()}
    assert {"kept", "stop_phrase", "low_score", "small", "ungrounded_caption", "own_rule", "over_limit"} <= found
    assert {"kept", "rejected"} == set(whole["outcome"].to_pylist())
    pieces = pa.concat_tables([select(batch.slice(start, 7)) for start in range(0, 300, 7)])
    assert encode_table(pieces, {}) == encode_table(whole, {})
    monkeypatch.setattr(filters, "_ROWS", 16)
    assert encode_table(select(batch), {}) == encode_table(whole, {})


def test_columns_are_read_only_where_a_rule_asks_for_them() -> None:
    few = ("width", "height", "detections")
    assert Select().reads == few
    assert Select(SelectRule(max_phrases=3, whole_image=0.9, regions_per_phrase=1)).reads == few
    for stage in (
        Select(SelectRule(stop_heads=("dog",))),
        Select(SelectRule(score_by_words=(0.1,))),
        Select(SelectRule(min_grounded=0.5)),
        Select(image=ImageRule(min_grounded=0.5)),
        Select(own=me("sharp")),
    ):
        assert stage.reads == (*few, "phrases")
    assert Select(SelectRule(min_agreement=0.1)).reads == (*few, "agreement")


def test_agreement_decides_and_needs_the_score_step() -> None:
    batch = part(5, 4, seed=3)
    stage = Select(SelectRule(score=0.0, min_agreement=0.5))
    with pytest.raises(ModelError, match="min_agreement: the recipe has no step `score`"):
        guarded(stage.open(), batch, "select", stage.emits)
    agreed = pa.array([[0.4, 0.5, None, 0.9]] * 5, pa.list_(pa.float32()))
    rows = stage.open()(batch.append_column("agreement", agreed))["verdicts"].to_pylist()
    assert [[verdict == "low_agreement" for verdict in row] for row in rows] == [[True, False, True, False]] * 5


def test_earlier_results_keep_their_fingerprints() -> None:
    """Frozen: made by the code before the options of today were there."""
    old = SelectRule(
        score=0.3, nms_iou=0.5, phrase_nms_iou=0.7, best_phrase_per_box=False, min_side_px=8, min_area=0.01,
        max_area=0.9, max_regions=7,
    )  # fmt: skip
    assert Step(Select(), "input").fingerprint == "266f59fc01b6"
    assert Step(Select(old, empty="reject"), "input").fingerprint == "68c5ad3cd9ea"
    new: list[dict[str, Any]] = [
        {"score_by_words": (0.1,)}, {"score_by_head": {"dog": 0.1}}, {"phrases_per_box": 2}, {"max_aspect": 9.0},
        {"whole_image": 1.0}, {"border_px": 0.0}, {"regions_per_phrase": 100}, {"max_phrases": 100},
        {"stop_phrases": ("a",)}, {"stop_heads": ("a",)}, {"min_agreement": 0.0}, {"min_grounded": 0.0},
    ]  # fmt: skip
    stages = [Select(SelectRule(**options)) for options in new]
    stages += [Select(own="a:b@1"), Select(image=ImageRule(min_side_px=0.0)), Select()]
    assert len({Step(stage, "input").fingerprint for stage in stages}) == len(stages)
