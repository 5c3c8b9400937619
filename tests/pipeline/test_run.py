"""Whole runs of the real command, over real HTTP, with light models."""

import glob
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset

from tests.world import World, jpeg
from vesl.pipeline.engines import Event, local
from vesl.pipeline.ingest import ingest
from vesl.pipeline.plan import make_plan
from vesl.pipeline.progress import Tally
from vesl.pipeline.store import Store
from vesl.transforms import shards, urls
from vesl.transforms.records import Sample


def shard_samples(world: World, select: str | None = None) -> list[dict[str, Any]]:
    """Read the shards with the public library alone."""
    paths = sorted(glob.glob(f"{world.store}/pack/*/shard-*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("pil"))
    return [s for s in samples if select is None or s["json"]["select"] == select]


def test_shards_hold_the_whole_contract(world: World) -> None:
    world.list_urls("a", world.images(12))
    done = world.run("run")
    assert done.returncode == 0, done.stderr
    samples = shard_samples(world)
    assert len(samples) == 12
    assert any(len(s["json"]["regions"]) > 1 for s in samples)
    for sample in samples:
        document = sample["json"]
        assert list(document) == [
            "key", "url", "sha256", "width", "height", "alt_text", "captions", "regions", "select",
        ]  # fmt: skip
        assert document["key"] == sample["__key__"]
        assert sample["jpg"].size == (document["width"], document["height"])
        assert document["captions"] == [{"text": document["alt_text"], "model": "alt_text@1"}]
        scores = [region["score"] for region in document["regions"]]
        assert scores == sorted(scores, reverse=True)
        for region in document["regions"]:
            x0, y0, x1, y1 = region["box"]
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            start, end = region["span"]
            assert document["captions"][region["caption"]]["text"][start:end] == region["phrase"]
            assert region["score"] > 0.3
        assert isinstance(shards.decode(json.dumps(document).encode()), Sample)
    index = json.loads(next(Path(world.store).glob("pack/*/index.json")).read_text())
    assert index["complete"] is True
    assert (index["samples"], index["regions"]) == (12, sum(len(s["json"]["regions"]) for s in samples))
    assert {s["name"]: s["bytes"] for s in index["shards"]} == {
        path.name: path.stat().st_size for path in Path(world.store).glob("pack/*/shard-*.tar")
    }
    assert [step["step"] for step in index["chain"]] == ["download", "caption", "phrases", "ground", "select", "pack"]


def test_running_again_does_nothing_and_a_changed_filter_only_decides_anew(world: World) -> None:
    world.list_urls("a", world.images(12))
    assert world.run("run").returncode == 0
    before = world.files()
    assert world.run("run").returncode == 0
    assert world.files() == before

    changed = world.run("run", "--set", "steps.select.rule.score=0.6")
    assert changed.returncode == 0
    new = {name for name in world.files() if name not in before}
    assert {name.split("/")[0] for name in new} == {"select", "pack", "runs"}
    assert {name: stamp for name, stamp in world.files().items() if name in before} == before  # old shards stay
    assert not [event for event in world.events() if event["kind"] == "open"]
    old, selected = (len(shard_samples(world)), {s["json"]["select"] for s in shard_samples(world)})
    assert (old, len(selected)) == (24, 2)


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("steps.caption.model=tests.standins:captioner@1", {"caption", "phrases", "ground", "select", "pack"}),
        ("steps.download.fetch.total_timeout_s=55", set()),
        ("engine.workers=1", set()),
        ("steps.pack.max_shard_bytes=9000", {"pack"}),
    ],
)
def test_what_an_option_redoes(world: World, override: str, redone: set[str]) -> None:
    world.list_urls("a", world.images(6))
    assert world.run("run").returncode == 0
    before = world.files()
    assert world.run("run", "--set", override).returncode == 0
    after = world.files()
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after if name not in before} - {"runs"} == redone


def test_small_shards_hold_the_same_samples(world: World) -> None:
    world.list_urls("a", world.images(10))
    assert world.run("run", "--set", "steps.pack.max_shard_bytes=9000").returncode == 0
    paths = sorted(Path(world.store).glob("pack/*/shard-*.tar"))
    assert len(paths) > 2
    assert len(shard_samples(world)) == 10


def test_an_appended_list_adds_parts_and_redoes_none(world: World) -> None:
    rows = world.images(7)
    world.list_urls("a", rows)
    assert world.run("run").returncode == 0
    before = world.files()
    world.list_urls("b", [*world.images(3, first=100), rows[0]])
    assert world.run("run").returncode == 0
    after = world.files()
    rewritten = {name for name in before if after[name] != before[name]}
    assert {Path(name).name for name in rewritten} == {"dataset.json", "index.json"}
    assert len(shard_samples(world)) == 10
    assert world.server.hits["/0.jpg"] == 1


def test_only_some_parts(world: World) -> None:
    world.list_urls("a", world.images(15))
    assert world.run("run", "--set", "dataset.only_parts=0,2").returncode == 0
    plan = make_plan(world.load())
    assert plan.done["pack"].keys() == {0, 2}
    assert json.loads(next(Path(world.store).glob("pack/*/index.json")).read_text())["complete"] is False
    assert world.run("run").returncode == 0
    assert json.loads(next(Path(world.store).glob("pack/*/index.json")).read_text())["complete"] is True


def test_until(world: World) -> None:
    world.list_urls("a", world.images(5))
    assert world.run("run", "--until", "caption").returncode == 0
    plan = make_plan(world.load())
    assert {name for name, parts in plan.done.items() if parts} == {"download", "caption"}


def test_bytes_do_not_depend_on_workers_or_batches(world: World, tmp_path: Path) -> None:
    world.list_urls("a", world.images(17))
    assert world.run("run").returncode == 0
    want = world.contents("caption", "phrases", "ground", "select", "pack")
    assert len(want) > 20
    for workers, batch in ((1, 1), (4, 3)):
        for step in ("caption", "phrases", "ground", "select", "pack"):
            shutil.rmtree(Path(world.store) / step)
        options = [f"engine.{step}.batch={batch}" for step in ("caption", "phrases", "ground", "select", "pack")]
        flags = [word for option in [*options, f"engine.workers={workers}"] for word in ("--set", option)]
        done = world.run("run", *flags)
        assert done.returncode == 0, done.stderr
        assert world.contents("caption", "phrases", "ground", "select", "pack") == want


def test_a_store_in_a_bucket(tmp_path: Path, world: World, s3_options: dict[str, Any]) -> None:
    world.list_urls("a", world.images(8))
    assert world.run("run").returncode == 0
    local = {name: data for name, data in world.contents("pack").items() if name.endswith(".tar")}
    world.document |= {"store": f"s3://bucket/{tmp_path.name}", "storage_options": s3_options}
    world.write()
    done = world.run("run")
    assert done.returncode == 0, done.stderr
    plan = make_plan(world.load())
    there = {f"{plan.steps[-1].folder}/{n}": n for n in plan.store.names(plan.steps[-1].folder, "shard-")}
    assert {name: plan.store.read(name) for name in there} == local
    assert s3_options["secret"] not in "".join(
        plan.store.read(path.removeprefix(plan.store.root + "/")).decode("latin-1")
        for path in plan.store.fs.find(plan.store.root)
    )
    again = world.run("run")
    assert again.returncode == 0
    assert world.run("report").returncode == 0
    shown = world.run("show", "--image", str(tmp_path / "sheet.png"))
    assert shown.returncode == 0, shown.stderr


def test_adopting_an_earlier_result(world: World) -> None:
    world.list_urls("a", world.images(6))
    assert world.run("run").returncode == 0
    earlier = {step.name: step.fingerprint for step in make_plan(world.load()).steps}
    before = world.files()
    use = [
        "--set",
        "steps.caption.model=tests.standins:captioner@1",
        "--set",
        f"steps.caption.use={earlier['caption']}",
    ]
    assert world.run("run", *use).returncode == 0
    plan = make_plan(world.load(*use[1::2]))
    assert plan.steps[1].fingerprint == earlier["caption"]
    assert {name for name in world.files() if name not in before and not name.startswith("runs")} == set()
    index = json.loads(next(Path(world.store).glob("pack/*/index.json")).read_text())
    assert [step["adopted"] for step in index["chain"]] == [True, True, False, False, False, False]
    wrong = world.run("plan", "--set", "steps.caption.use=0123456789ab")
    assert wrong.returncode == 2
    assert f"there is: {earlier['caption']}" in wrong.stderr


def test_trouble_in_a_model_costs_the_sample_only(world: World) -> None:
    captions = {3: "please raise", 7: "silence", 8: "", 9: "exhaust me", 12: "raise again"}
    world.list_urls("a", world.images(15, captions=captions))
    world.document["dataset"]["rows_per_part"] = 15
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["limits"] = {"failed_fraction": 0.5}
    world.write()
    done = world.run("run")
    assert done.returncode == 0, done.stderr
    count = Tally.of(make_plan(world.load())).counts["caption"]
    assert (count.rows, count.kept) == (15, 12)
    assert count.failed == {"error": 2}
    assert count.rejected == {"empty_caption": 1}


def test_a_row_that_kills_its_worker_fails_as_crashed(world: World) -> None:
    world.list_urls("a", world.images(12, captions={4: "kill", 9: "kill too"}))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["limits"] = {"failed_fraction": 0.5}
    world.write()
    done = world.run("run")
    assert done.returncode == 0, done.stderr
    tally = Tally.of(make_plan(world.load()))
    assert tally.counts["caption"].failed == {"crashed": 2}
    assert tally.counts["pack"].kept == 10
    assert "the worker died (exit code -9: some library: assertion failed)" in done.stderr


def test_a_grounder_that_answers_nonsense(world: World) -> None:
    world.list_urls("a", world.images(5))
    world.document["steps"]["ground"]["model"] = "tests.standins:broken_grounder@1"
    world.write()
    done = world.run("run")
    assert done.returncode == 3
    assert "ground: 5 of 5 rows failed (error 5), over limits.failed_fraction = 0.05" in done.stderr


def test_a_model_that_cannot_be_opened_is_one_line(world: World) -> None:
    world.list_urls("a", world.images(5))
    done = world.run("run", "--set", "steps.caption.model=no.such.module:model@1")
    assert done.returncode == 1
    assert "No module named 'no'" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_links_dead(world: World) -> None:
    world.list_urls("a", [(f"{world.server.url}/none-{i}.jpg", "gone") for i in range(4)])
    done = world.run("run")
    assert done.returncode == 3
    assert "download: 4 of 4 rows failed (http_4xx 4)" in done.stderr
    assert world.run("run", "--set", "limits.download_failed_fraction=1").returncode == 0
    assert world.run("report").returncode == 0


def test_what_was_made_from_a_table_that_is_gone_is_made_again(world: World) -> None:
    world.list_urls("a", world.images(9))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    assert world.run("run").returncode == 0
    before = world.files()
    (table,) = Path(world.store).glob("caption/*/part-00000.parquet")
    table.unlink()
    assert world.run("run", env={"STANDIN_SAYS": " and a tall lamp"}).returncode == 0  # a model is not always the same
    captions = {s["__key__"]: s["json"]["captions"][0]["text"] for s in shard_samples(world)}
    redone = pq.read_table(table)["key"].to_pylist()
    assert {key for key, text in captions.items() if text.endswith("lamp")} == set(redone)
    after = world.files()
    assert {name for name in before if "part-00001" in name and after[name] != before[name]} == set()
    assert not [name for name in after if ".wip" in name]


def test_report_counts_every_row(world: World) -> None:
    world.list_urls("a", [*world.images(4), (f"{world.server.url}/none.jpg", "x"), ("ftp://x/y", "y"), ("", None)])
    assert world.run("run", "--set", "limits.download_failed_fraction=1").returncode == 0
    shown = world.run("report").stdout
    for text in ("no_url", "http_4xx", "bad_scheme", "a scheme other than http and https", "regions an image"):
        assert text in shown
    tally = Tally.of(make_plan(world.load()))
    assert tally.counts["download"].rows == 6
    previous: int | None = None
    for count in tally.counts.values():
        assert count.rows == count.kept + count.dropped
        assert previous is None or count.rows == previous
        previous = count.kept


def test_a_parent_that_was_made_again_undoes_its_children(world: World) -> None:
    world.list_urls("a", world.images(5))
    assert world.run("run").returncode == 0
    world.server.add("/0.jpg", jpeg(99))  # the web has changed
    (table,) = Path(world.store).glob("download/*/part-00000.parquet")
    table.unlink()
    assert world.run("run", "--until", "download").returncode == 0
    plan = make_plan(world.load())
    assert [len(plan.done[step.name]) for step in plan.steps] == [1, 0, 0, 0, 0, 0]
    assert world.run("run").returncode == 0
    assert make_plan(world.load()).todo() == ()
    assert len(list(Path(world.store).glob("download/*/*.tar"))) == 1


def test_too_many_failures_are_told_every_time(world: World) -> None:
    world.list_urls("a", world.images(4, captions=dict.fromkeys(range(4), "please raise")))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    assert [world.run("run").returncode for _ in range(2)] == [3, 3]
    index = json.loads(next(Path(world.store).glob("pack/*/index.json")).read_text())
    assert (index["complete"], index["samples"], index["shards"]) == (True, 0, [])


def test_litter_of_killed_runs_is_swept(world: World) -> None:
    world.list_urls("a", world.images(5))
    assert world.run("run").returncode == 0
    plan = make_plan(world.load())
    root = Path(world.store)
    [run] = (root / "runs").iterdir()
    litter = ["dataset.wip/x.tmp", f"runs/{run.name}/run.wip/x.tmp"]
    for name in (*litter, *(f"{step.folder}/part-00000.wip/x.tmp" for step in plan.steps)):
        (root / name).parent.mkdir()
        (root / name).write_bytes(b"half")
    (root / plan.steps[-1].folder / "index.wip").mkdir()
    orphan = root / plan.steps[0].folder / "part-00000.0123456789abcdef.tar"
    orphan.write_bytes(b"lost")
    stray = root / plan.steps[-1].folder / "shard-00000-007.tar"
    stray.write_bytes(b"of a parent that is gone")
    world.list_urls("b", world.images(1, first=50))
    (root / plan.steps[-1].table(0)).unlink()
    assert world.run("run").returncode == 0
    assert not list(root.rglob("*.wip"))
    assert not orphan.exists()
    assert not stray.exists()


def test_a_store_with_a_difficult_name(tmp_path: Path, world: World, s3_options: dict[str, Any]) -> None:
    world.list_urls("a", world.images(5))
    for store in (str(tmp_path / "it's [1] *?é% 20"), f"s3://bucket/{tmp_path.name}/w eb[1]%20é"):
        world.document |= {"store": store, "storage_options": s3_options}
        world.write()
        done = world.run("run")
        assert done.returncode == 0, done.stderr
        assert make_plan(world.load()).todo() == ()
        assert "5 images" in world.run("report").stdout


def test_a_death_is_blamed_on_the_row_that_was_tried_last(world: World) -> None:
    """The driver may be busy while a worker names a row and dies at once."""
    recipe = world.load("engine.workers=1")
    world.list_urls("a", world.images(6, captions={3: "kill"}))
    ingest(Store(world.store), "world", recipe.dataset.source, "url", "alt", 10)
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    plan = make_plan(world.load("engine.workers=1"))

    def slow(event: Event) -> None:
        time.sleep(0.3)

    local.run(plan.job(), plan.parts, plan.recipe.engine, slow)
    caption = plan.steps[1]
    rows = Store(world.store).read_table(caption.table(0)).to_pylist()
    assert [row["key"] for row in rows if row["reason"] == "crashed"] == [urls.key(f"{world.server.url}/3.jpg")]
