"""The optional step between ground and select, in whole runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.world import World
from vesl.models.contract import Detections
from vesl.pipeline.recipe import RecipeError


def scorer() -> Any:
    """Agrees by the left edge; has not looked at scores below a half."""

    def score(images: Sequence[Image.Image], phrases: Any, claims: Sequence[Detections]) -> list[Any]:
        assert all(len(own) > claim.phrases.max(initial=-1) for own, claim in zip(phrases, claims, strict=True))
        return [np.where(claim.scores < 0.5, np.float32(np.nan), claim.boxes[:, 0]) for claim in claims]

    return score


def mute() -> Any:
    return lambda images, phrases, claims: [np.zeros(1, np.float32) for _ in claims]


OURS = "tests.pipeline.test_score_step:scorer@1"


@pytest.fixture(autouse=True)
def scored(world: World) -> None:
    world.document["steps"]["score"] = {"model": OURS}
    world.write()
    world.list_urls("a", world.images(7, captions={3: ""}))


def tables(world: World, step: str) -> list[dict[str, Any]]:
    folders = sorted((Path(world.store) / step).glob("*/part-*.parquet"))
    return [row for path in folders for row in pq.read_table(path).to_pylist()]


def test_every_detection_has_a_score_or_none(world: World) -> None:
    done = world.run("run")
    assert done.returncode == 0, done.stderr
    grounded, scored = tables(world, "ground"), tables(world, "score")
    assert len(scored) == 6
    pairs = 0
    for before, after in zip(grounded, scored, strict=True):
        assert before["key"] == after["key"]
        assert after["outcome"] == "kept"
        want = [d["box"][0] if d["score"] >= 0.5 else None for d in before["detections"]]
        assert after["agreement"] == pytest.approx(want)
        pairs += len(want)
    assert pairs > 20
    assert any(value is None for row in scored for value in row["agreement"])
    plan = world.run("plan")
    assert "score" in plan.stdout
    assert OURS in plan.stdout


def test_a_scorer_that_does_not_answer_for_all_fails_the_rows(world: World) -> None:
    done = world.run("run", "--set", "steps.score.model=tests.pipeline.test_score_step:mute@1")
    assert done.returncode == 3
    assert "score" in done.stderr
    assert {row["reason"] for row in tables(world, "score")} == {"error"}


def test_select_decides_by_the_agreement(world: World) -> None:
    assert world.run("run", "--set", "steps.select.rule.min_agreement=0.2").returncode == 0
    judged = 0
    for ground, score, select in zip(*(tables(world, name) for name in ("ground", "score", "select")), strict=True):
        rows = zip(ground["detections"], score["agreement"], select["verdicts"], strict=True)
        for detection, agreement, verdict in rows:
            if detection["score"] > 0.3:
                assert (verdict == "low_agreement") == (agreement is None or agreement < 0.2)
                judged += verdict == "low_agreement"
    assert judged > 3
    alone = world.run("plan", "--set", "steps.select.rule.min_agreement=0.2", "--set", "steps.score=null")
    assert alone.returncode == 2
    assert "needs the step `score`" in alone.stderr


def test_another_scorer_changes_select_and_not_ground(world: World) -> None:
    assert world.run("run", "--until", "score").returncode == 0
    before = world.files("ground")
    assert world.run("run", "--set", "steps.score.above=0.2").returncode == 0
    assert world.files("ground") == before
    assert len(list((Path(world.store) / "score").iterdir())) == 2


def test_a_recipe_without_the_step_has_the_chain_it_had(world: World) -> None:
    del world.document["steps"]["score"]
    world.write()
    done = world.run("run", "--until", "score")
    assert done.returncode == 2
    assert "score" in done.stderr
    assert "Traceback" not in done.stderr
    assert world.run("run").returncode == 0
    assert not (Path(world.store) / "score").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"model": "clip"}, "not pinned"), ({"above": 2.0}, "0..1"), ({"margin": -1.0}, "margin"), ({"x": 1}, "x")],
)
def test_mistakes_are_named(world: World, change: dict[str, Any], says: str) -> None:
    world.document["steps"]["score"] |= change
    world.write()
    with pytest.raises(RecipeError, match=says):
        world.load()
