"""Faults of parts, limits, adopted results, events and time, by the real command."""

import hashlib
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq

from tests.world import World
from vesl.pipeline.plan import make_plan


def index(world: World) -> dict[str, object]:
    (path,) = Path(world.store).glob("pack/*/index.json")
    return dict(json.loads(path.read_text()))


def test_a_part_that_cannot_be_done_is_given_up_and_the_others_go_on(world: World) -> None:
    world.list_urls("a", world.images(10))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    assert world.run("run", "--until", "download").returncode == 0
    (tar,) = Path(world.store).glob("download/*/part-00000.*.tar")
    tar.rename(tar.with_suffix(".away"))
    done = world.run("run")
    assert done.returncode == 1
    assert done.stderr.count("caption part 0: FileNotFoundError") == 3
    assert done.stderr.count("; trying again") == 2
    assert done.stderr.count("given up; run again") == 1
    assert make_plan(world.load()).done["pack"].keys() == {1}
    assert index(world)["complete"] is False
    tar.with_suffix(".away").rename(tar)
    assert world.run("run").returncode == 0
    assert index(world)["complete"] is True


def test_a_model_that_kills_its_worker_when_opened_is_given_up(world: World) -> None:
    world.list_urls("a", world.images(2))
    world.document["steps"]["caption"]["model"] = "os:abort@1"
    world.write()
    done = world.run("run")
    assert done.returncode == 1
    assert done.stderr.count("the worker died") == 3
    assert "given up" in done.stderr


def test_a_step_has_no_more_workers_than_the_recipe_says(world: World, tmp_path: Path) -> None:
    world.list_urls("a", world.images(10))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["engine"] = {"workers": 2, "caption": {"workers": 1, "batch": 1}}
    world.write()
    said = tmp_path / "said.txt"
    assert world.run("run", env={"STANDIN_WAIT_S": "0.1", "STANDIN_LOG": str(said)}).returncode == 0
    part_of = {}
    for table in sorted(Path(world.store).glob("input/*/part-*.parquet")):
        part_of |= dict.fromkeys(pq.read_table(table)["alt_text"].to_pylist(), table.name)
    parts = [part_of[text] for text in said.read_text().splitlines()]
    assert len(parts) == 10
    assert parts == sorted(parts) or parts == sorted(parts, reverse=True)  # one part after the other


def test_models_that_open_are_told_once_per_worker(world: World) -> None:
    world.list_urls("a", world.images(15))
    world.document["engine"] = {"workers": 1}
    world.write()
    assert world.run("run").returncode == 0
    opened = [event["step"] for event in world.events() if event["kind"] == "open"]
    assert sorted(opened) == ["ground", "phrases"]


def test_a_run_ends_early_over_a_limit(world: World) -> None:
    dead = [(f"{world.server.url}/none-{i}.jpg", "gone") for i in range(600)]
    world.list_urls("a", dead)
    world.document["dataset"]["rows_per_part"] = 60
    world.document["engine"] = {"workers": 1}
    world.write()
    done = world.run("run")
    assert done.returncode == 3
    assert "download: 120 of 120 rows failed" in done.stderr  # not judged by its first 60 rows, nor only at the end
    assert "ended: OverLimitError" in world.run("status").stdout


def test_of_an_adopted_result_the_parts_that_it_has_are_used(world: World) -> None:
    world.list_urls("a", world.images(5))
    assert world.run("run").returncode == 0
    fingerprint = make_plan(world.load()).steps[1].fingerprint
    inputs = json.loads((Path(world.store) / f"caption/{fingerprint}/step.json").read_text())
    world.list_urls("b", world.images(3, first=50))
    use = ["steps.caption.model=tests.standins:captioner@1", f"steps.caption.use={fingerprint}"]
    done = world.run("run", "--set", use[0], "--set", use[1], "--set", "steps.select.rule.score=0.4")
    assert done.returncode == 0, done.stderr
    plan = make_plan(world.load(*use, "steps.select.rule.score=0.4"))
    assert plan.done["pack"].keys() == {0}
    document = json.loads((Path(world.store) / plan.steps[-1].folder / "index.json").read_text())
    assert document["complete"] is False
    assert document["chain"][1] == {**inputs, "fingerprint": fingerprint, "adopted": True}  # as made, not as asked for


def test_the_index_cites_the_shards_bytes(world: World) -> None:
    world.list_urls("a", world.images(8))
    assert world.run("run", "--set", "steps.pack.max_shard_bytes=9000").returncode == 0
    (path,) = Path(world.store).glob("pack/*/index.json")
    shards = json.loads(path.read_text())["shards"]
    assert [shard["name"] for shard in shards] == sorted(file.name for file in path.parent.glob("shard-*"))
    positions = pq.read_table(next(path.parent.glob("part-00000.parquet"))).to_pylist()
    for shard in shards:
        data = (path.parent / shard["name"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        with tarfile.open(path.parent / shard["name"]) as tar:
            *_, image, text = tar.getmembers()
        assert image.offset + image.size + text.size <= 9000 or shard["samples"] == 1
        inside = [row["position"] for row in positions if row["shard"] == shard["name"]]
        assert inside in ([], list(range(shard["samples"])))


def test_a_part_packed_again_leaves_no_shard_of_before(world: World) -> None:
    world.list_urls("a", world.images(5))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["steps"]["pack"] = {"max_shard_bytes": 9000}
    world.write()
    long = {"STANDIN_SAYS": "".join(f" and lamp {i}" for i in range(300))}
    assert world.run("run", env=long).returncode == 0
    (table,) = Path(world.store).glob("caption/*/part-00000.parquet")
    table.unlink()
    assert world.run("run").returncode == 0
    (path,) = Path(world.store).glob("pack/*/index.json")
    cited = [shard["name"] for shard in json.loads(path.read_text())["shards"]]
    assert cited == sorted(file.name for file in path.parent.glob("shard-*"))
