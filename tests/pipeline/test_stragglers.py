"""What hangs is ended: its part is tried once more by another worker, then given up, and the rest is finished."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.world import World
from vesl.models.contract import PlainCaptioner
from vesl.pipeline.plan import make_plan
from vesl.pipeline.recipe import RecipeError


def hanging() -> PlainCaptioner:
    """Hangs at `hang` in the alt text, at `once` the first time only; takes $SLOW_S for each image."""

    def caption(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        with open(os.environ["ASKED"], "a", encoding="utf-8") as file:
            file.writelines(f"{os.getpid()} {text}\n" for text in alt_texts)
        known = Path(os.environ["ASKED"] + ".once")
        if any("hang" in text for text in alt_texts) or (any("once" in t for t in alt_texts) and not known.exists()):
            known.touch()
            time.sleep(600)
        time.sleep(float(os.environ.get("SLOW_S", "0")) * len(images))
        return [[text] for text in alt_texts]

    return caption


@pytest.fixture
def hung(world: World) -> World:
    world.document["steps"]["caption"]["model"] = "tests.pipeline.test_stragglers:hanging@1"
    world.document["engine"] = {"workers": 2, "save_every_s": 1e-9, "caption": {"batch": 1}}
    return world


def test_a_part_that_hangs_is_ended_twice_then_lost_and_the_rest_is_done(hung: World, tmp_path: Path) -> None:
    hung.list_urls("a", hung.images(15, captions={4: "please hang"}))
    hung.document["engine"]["silence_limit_s"] = 8
    hung.write()
    asked = tmp_path / "asked.txt"
    begun = time.monotonic()
    done = hung.run("run", "--until", "caption", env={"ASKED": str(asked)})
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begun < 100
    (lost,) = set(range(3)) - make_plan(hung.load()).done["caption"].keys()
    why = f"caption part {lost}: no batch was finished in engine.silence_limit_s = 8, so its worker was ended"
    assert done.stderr.count(f"{why}; trying again") == 1
    assert done.stderr.count(f"{why}, 2 times; given up; run again to try once more") == 1
    assert "Traceback" not in done.stderr
    workers = [line.split(" ", 1)[0] for line in asked.read_text().splitlines() if "hang" in line]
    assert len(workers) == len(set(workers)) == 2  # another one each time
    texts = [line.split(" ", 1)[1] for line in asked.read_text().splitlines()]
    twice = sorted(text for text in set(texts) if texts.count(text) > 1)
    assert twice == ["please hang"]  # what was saved is not done again
    assert not list(Path(hung.store).rglob("lease-*"))


@pytest.mark.slow
def test_a_part_that_hangs_once_costs_nothing_but_time(hung: World, tmp_path: Path) -> None:
    hung.list_urls("a", hung.images(10, captions={4: "hm, once"}))
    hung.document["engine"]["silence_limit_s"] = 8
    hung.write()
    done = hung.run("run", "--until", "caption", env={"ASKED": str(tmp_path / "asked.txt")})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("; trying again") == 1
    assert make_plan(hung.load(), "caption").todo() == ()


@pytest.mark.slow
def test_slow_parts_that_go_on_are_left_alone_unless_a_limit_is_set(hung: World, tmp_path: Path) -> None:
    hung.list_urls("a", hung.images(12))
    hung.document["dataset"]["rows_per_part"] = 12
    hung.document["engine"] |= {"silence_limit_s": 8}
    hung.write()
    env = {"ASKED": str(tmp_path / "asked.txt"), "SLOW_S": "0.5"}
    done = hung.run("run", "--until", "caption", "--set", "engine.part_time_limit_s=4", env=env)
    assert "over engine.part_time_limit_s = 4, so its worker was ended; trying again" in done.stderr
    texts = (tmp_path / "asked.txt").read_text().splitlines()
    assert len(texts) <= 12 + 3  # the second attempt, or run, went on from what was saved
    os.rename(hung.store, f"{hung.store}-before")
    done = hung.run("run", "--until", "caption", env=env)
    assert (done.returncode, done.stderr.count("ended")) == (0, 0), done.stderr


@pytest.mark.parametrize("name", ["part_time_limit_s", "silence_limit_s"])
def test_a_limit_is_positive(world: World, name: str) -> None:
    with pytest.raises(RecipeError, match=f"engine.{name}: 0.0 is not a positive number"):
        world.load(f"engine.{name}=0")
