"""gc: what no recipe names goes, and nothing that a named chain needs."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.test_takedown import inline
from tests.webserver import WebServer
from tests.world import World
from vesl.pipeline.engines import local
from vesl.pipeline.gc import command
from vesl.pipeline.plan import make_plan
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.run import run
from vesl.pipeline.store import Store, StoreError

STRICT = "steps.select.rule.score=0.6"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A store with two filters' results, and a third by reference."""
    with WebServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "run", inline)
        world = World(tmp_path_factory.mktemp("world"), server)
        world.list_urls("a", world.images(7))
        for overrides in ((), (STRICT,), ("steps.pack.images=reference",)):
            assert run(world.load(*overrides))[1]
        yield world


@pytest.fixture
def filled(template: World, tmp_path: Path) -> World:
    shutil.copytree(template.store, tmp_path / "world" / "store")
    world = World(tmp_path / "world", template.server)
    world.document["dataset"]["source"] = template.document["dataset"]["source"]
    world.write()
    return world


def folders(world: World) -> set[str]:
    return {"/".join(name.split("/")[:2]) for name in world.files() if name.count("/") == 2} - {"runs"}


def of(world: World, *overrides: str) -> set[str]:
    return {step.folder for step in make_plan(world.load(*overrides)).steps}


def another(world: World, name: str, **changes: object) -> str:
    path = world.folder / name
    path.write_text(yaml.safe_dump({"base": "recipe.yaml", **changes}))
    return str(path)


def kept(world: World) -> set[str]:
    return {name for name in folders(world) if not name.startswith(("input/", "runs/"))}


def test_without_recipes_it_lists_only(filled: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = filled.files()
    assert command(filled.store, [], remove=False) == 0
    told = capsys.readouterr().out
    assert "nothing is removed" in told
    for folder in of(filled) | of(filled, STRICT):
        assert folder in told
    with pytest.raises(RecipeError, match="name every recipe"):
        command(filled.store, [], remove=True)
    assert filled.files() == before


def test_what_no_recipe_names_goes(filled: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = filled.files()
    assert command(filled.store, [str(filled.recipe)], remove=False) == 0
    assert "could go" in capsys.readouterr().out
    assert filled.files() == before
    done = filled.run("gc", str(filled.recipe), "--remove")  # the recipe's name in the store's place
    assert done.returncode == 2
    assert filled.files() == before
    assert command(filled.store, [str(filled.recipe)], remove=True) == 0
    assert kept(filled) == of(filled)
    left = filled.files()
    assert left == {name: stamp for name, stamp in before.items() if name in left}
    other = of(filled, STRICT) | of(filled, "steps.pack.images=reference")
    gone = {name for name in before if name not in left}
    assert gone == {name for name in before if "/".join(name.split("/")[:2]) in other - of(filled)}
    assert run(filled.load())[1]


def test_what_adopted_results_and_trainings_were_made_from_stays(filled: World) -> None:
    strict, plain = make_plan(filled.load(STRICT)), make_plan(filled.load())
    reference = make_plan(filled.load("steps.pack.images=reference"))
    adopting = another(filled, "adopting.yaml", steps={"select": {"use": strict.steps[-2].fingerprint}})
    training = filled.folder / "training.yaml"
    shards = f"{filled.store}/{reference.steps[-1].folder}"
    training.write_text(yaml.safe_dump({"store": filled.store, "train": {"data": {"shards": shards}}}))
    assert command(filled.store, [str(training)], remove=False) == 0
    assert command(filled.store, [adopting, str(training)], remove=True) == 0
    chain = {step.folder for step in plain.steps[:-1]}
    assert kept(filled) == chain | {strict.steps[-2].folder, reference.steps[-1].folder, *_made(filled, adopting)}
    assert command(filled.store, [str(training)], remove=True) == 0
    assert kept(filled) == chain | {reference.steps[-1].folder}


def _made(world: World, recipe: str) -> set[str]:
    from vesl.pipeline.recipe import load

    return {step.folder for step in make_plan(load(recipe)).steps if (Path(world.store) / step.folder).exists()}


def test_leftovers_of_what_stays_go(filled: World) -> None:
    plan = make_plan(filled.load())
    folder = plan.steps[0].folder
    wrong = [
        f"{folder}/part-00000.0123456789abcdef.tar",
        f"{plan.steps[1].folder}/part-00001.wip/00000000-00000001.parquet",
    ]
    right = [
        f"{folder}/part-00007.0123456789abcdef.tar",
        f"{plan.steps[1].folder}/part-00007.wip/00000000-00000001.parquet",
    ]
    for name in wrong + right:
        (Path(filled.store) / name).parent.mkdir(exist_ok=True)
        (Path(filled.store) / name).write_bytes(b"x")
    assert command(filled.store, [str(filled.recipe)], remove=True) == 0
    assert not [name for name in wrong if name in filled.files()]
    assert [name for name in right if name in filled.files()] == right
    assert run(filled.load())[1]


@pytest.mark.parametrize("trouble", ["recipe", "store", "run", "compaction", "use", "nothing"])
def test_in_doubt_nothing_is_removed(filled: World, trouble: str, tmp_path: Path) -> None:
    recipes, url = [str(filled.recipe)], filled.store
    store = Store(filled.store)
    if trouble == "recipe":
        recipes.append(another(filled, "broken.yaml", stepz={}))
    if trouble == "store":
        recipes.append(another(filled, "elsewhere.yaml", store=str(tmp_path / "elsewhere")))
    if trouble == "use":
        recipes.append(another(filled, "adopting.yaml", steps={"caption": {"use": "0123456789ab"}}))
    if trouble == "run":
        record = {"state": "running", "host": "elsewhere", "pid": 1, "updated": time.time()}
        store.write_json("runs/x/run.json", record)
    if trouble == "compaction":
        store.write_json("takedown/compaction-00003.json", {"state": "running", "host": "x", "pid": 1, "updated": 0})
    if trouble == "nothing":
        url = str(tmp_path / "nowhere")
        recipes = []
    before = filled.files()
    with pytest.raises((RecipeError, StoreError)) as caught:
        command(url, recipes, remove=trouble != "nothing")
    assert "\n" not in str(caught.value)
    assert filled.files() == before


def test_in_a_tidy_store_no_table_is_read(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 200,000 parts that would be hours: only where there is a doubt a footer is read."""
    plan = make_plan(filled.load())
    recipes = [str(filled.recipe)]
    read: list[str] = []
    monkeypatch.setattr("vesl.pipeline.gc.chain", lambda recipe, store: plan.steps)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "footer", lambda self, name: read.append(name))
        assert command(filled.store, recipes, remove=False) == 0
    assert read == []
    folder = plan.steps[-1].folder
    (Path(filled.store) / folder / "shard-00000-009.tar").write_bytes(b"x")
    assert command(filled.store, recipes, remove=True) == 0
    assert not (Path(filled.store) / folder / "shard-00000-009.tar").exists()
    assert run(filled.load())[1]


def test_a_run_that_ends_while_gc_looks_is_seen(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it found half done may be whole now."""
    store = Store(filled.store)
    store.write_json("runs/x/run.json", {"state": "running", "host": "elsewhere", "pid": 1, "updated": time.time()})
    from vesl.pipeline import gc

    real = gc.results

    def slow(*arguments: Any) -> Any:
        found = real(*arguments)
        store.write_json("runs/x/run.json", {"state": "done", "host": "elsewhere", "pid": 1, "updated": time.time()})
        return found

    monkeypatch.setattr(gc, "results", slow)
    before = {name for name in filled.files() if not name.startswith("runs/")}
    with pytest.raises(StoreError, match="a run is at work"):
        command(filled.store, [str(filled.recipe)], remove=True)
    assert {name for name in filled.files() if not name.startswith("runs/")} == before
