"""What `vesl plan` says of cost: its arithmetic, and that a sample leaves nothing behind."""

import io
import json
import math
import random
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests import standins
from tests.world import World
from vesl.pipeline.cost import Cost, Measured, costs, from_runs, long_parts, measure, seconds_per_image, student
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.tables import print_plan


@pytest.mark.parametrize(
    ("degrees", "want"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)]
)
def test_quantiles_of_student(degrees: int, want: float) -> None:
    assert student(degrees) == pytest.approx(want, rel=0.01)


def test_the_interval_holds_the_true_speed_in_95_of_100_samples() -> None:
    chance, hits = random.Random(1), 0
    for _ in range(1000):
        units = [(n, n * 0.02 * chance.lognormvariate(0, 0.3)) for n in [chance.choice([500, 1000])] * 8]
        pace = seconds_per_image(units)
        assert pace is not None
        hits += pace.low < 0.02 * math.exp(0.045) < pace.high
    assert 920 <= hits <= 980


def test_what_one_unit_or_none_tells() -> None:
    assert seconds_per_image([]) is None
    assert seconds_per_image([(0, 1.0)]) is None
    pace = seconds_per_image([(10, 5.0)])
    assert pace is not None
    assert (pace.low, pace.mean, pace.high) == (0.5, 0.5, 0.5)


def steps_of(plan: Plan, **shares: float) -> dict[str, Measured]:
    """Each step takes 0.1 s an image, in two parts that differ a little, and keeps that share."""
    units = [(1000, 99.0), (1000, 101.0)]
    kept = {step.name: round(1000 * shares.get(step.name, 1.0)) for step in plan.steps}
    return {name: Measured(units=list(units), rows=1000, kept=keep, bytes=5000) for name, keep in kept.items()}


def test_later_steps_pay_for_what_earlier_ones_kept(world: World) -> None:
    world.list_urls("a", world.images(12))
    world.document["prices"] = {"cpu_hour": 2, "gpu_hour": 10, "storage_gb_month": 0.5, "unit": "USD"}
    world.document["engine"] = {"workers": 1, "caption": {"gpus": 0.5, "cpus": 4}}
    world.write()
    assert world.run("run", "--until", "download", "--set", "dataset.only_parts=0").returncode == 0
    plan = make_plan(world.load())
    found = costs(plan, steps_of(plan, download=0.5, caption=0.8), 36e6)
    assert found["download"].images == 36e6
    assert found["download"].hours.mean == pytest.approx(1000)
    assert found["caption"].hours.mean == pytest.approx(500)
    assert found["caption"].hours.low < 500 < found["caption"].hours.high
    assert found["caption"].gpu_hours.mean == pytest.approx(250)
    assert found["caption"].money.mean == pytest.approx(500 * 4 * 2 + 250 * 10 + 18e6 * 5 / 1e9 * 0.5)
    assert found["phrases"].images == pytest.approx(36e6 * 0.4)
    assert sum(found.values(), Cost()).bytes == pytest.approx(5 * 36e6 * (1 + 0.5 + 4 * 0.4))
    typed = make_plan(world.load("engine.caption={accelerator: L4}"))
    assert costs(typed, steps_of(typed, download=0.5, caption=0.8), 36e6)["caption"].gpu_hours.mean == pytest.approx(
        500
    )
    missing = costs(plan, steps_of(plan, download=0.5, caption=0.8), None)
    assert missing["download"].images == 8  # the first part, of 4 rows, is done and kept them all
    assert missing["caption"].images == pytest.approx(4 + 0.5 * 8)
    assert missing["phrases"].images == pytest.approx(0.8 * 8)


def test_a_part_that_takes_long_is_warned_of(world: World) -> None:
    world.list_urls("a", world.images(12))
    assert world.run("run", "--until", "download").returncode == 0
    plan = make_plan(world.load())
    slow = steps_of(plan, download=0.5)
    slow["caption"].units = [(10, 4000.0), (10, 4000.0)]
    (found,) = long_parts(plan, slow)
    assert found == ("caption", pytest.approx(800), 2)  # 4 rows a part, of which 2 are captioned, at 400 s
    print_plan(plan, slow, Console(file=(told := io.StringIO()), width=300))
    assert "warning: a part of caption takes one worker about 13 minutes" in told.getvalue()
    assert "dataset.rows_per_part: 2 would take about 5" in told.getvalue()
    print_plan(plan, steps_of(plan, download=0.5), Console(file=(told := io.StringIO()), width=300))
    assert "warning" not in told.getvalue()


def test_a_sample_is_timed_and_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    world.list_urls("a", world.images(20))
    assert world.run("run", "--until", "download").returncode == 0
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["steps"]["dedup"] = {}
    world.document["engine"] = {"workers": 1, "caption": {"batch": 4}}
    world.document["prices"] = {"cpu_hour": 1.0, "unit": "EUR", "images": 2_000_000_000}
    world.write()
    before, temporary = world.files(), tmp_path / "tmp"
    temporary.mkdir()
    hits = world.server.hits.copy()
    done = world.run("plan", "--sample", "12", env={"STANDIN_WAIT_S": "0.05", "TMPDIR": str(temporary)})
    assert done.returncode == 0, done.stderr
    assert "a sample of 12 rows goes through dedup, caption, phrases, ground, select, pack" in done.stderr
    assert world.files() == before
    assert not list(temporary.iterdir())
    assert world.server.hits == hits  # what is downloaded is taken from the store
    lines = [line.split() for line in done.stdout.splitlines()]
    (caption,) = (words for words in lines if words[:1] == ["caption"] and "batches" in words)
    assert 8 < float(caption[1]) < 20.5  # 0.05 s an image, and what it costs to decode it
    assert "2,000,000,000 images" in done.stdout
    assert "money EUR" in done.stdout
    plan = make_plan(world.load())
    timed = measure(plan, 12, lambda line: None)
    assert [timed[step.name].rows for step in plan.steps[1:]] == [12] * 6
    assert timed["pack"].bytes > 12 * 1000  # shards, with their pictures


def test_a_sample_downloads_what_is_missing_and_obeys_takedowns(world: World, tmp_path: Path) -> None:
    rows = world.images(10)
    world.list_urls("a", rows)
    assert world.run("run", "--until", "download", "--set", "dataset.only_parts=0").returncode == 0
    (tmp_path / "list.txt").write_text("\n".join(url for url, _ in rows[:9]) + "\n")
    assert world.run("takedown", str(tmp_path / "list.txt")).returncode == 0
    for part in Path(world.store).glob("download/*/part-*"):
        part.unlink()
    before, hits = world.files(), dict(world.server.hits)
    timed = measure(make_plan(world.load()), 10, lambda line: None)
    assert world.files() == before
    assert (timed["download"].rows, timed["download"].kept, timed["caption"].rows) == (10, 1, 1)
    assert sum(world.server.hits.values()) == sum(hits.values()) + 1


def test_loading_a_model_is_no_work_also_where_rows_are_taken_down(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = world.images(10)
    world.list_urls("a", rows)
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    assert world.run("run", "--until", "download").returncode == 0
    (tmp_path / "list.txt").write_text(f"{rows[0][0]}\n")
    assert world.run("takedown", str(tmp_path / "list.txt")).returncode == 0
    captioner = standins.captioner
    monkeypatch.setattr(standins, "captioner", lambda: (time.sleep(1), captioner())[1])
    timed = measure(make_plan(world.load()), 10, lambda line: None)["caption"]
    assert (timed.rows, timed.kept) == (10, 9)
    assert timed.opening == [pytest.approx(1, abs=0.5)]
    assert sum(seconds for _, seconds in timed.units) < 0.5
    assert sum(rows for rows, _ in timed.units) == 9


def test_the_runs_so_far_are_read_by_fingerprint(world: World) -> None:
    world.list_urls("a", world.images(15))
    assert world.run("run").returncode == 0
    plan = make_plan(world.load())
    found = from_runs(plan)
    assert [rows for rows, _ in found["caption"].units] == [5, 5, 5]
    files = sum(path.stat().st_size for path in Path(world.store).glob("pack/*/[ps]*-*"))
    assert found["pack"].bytes == files
    assert len(found["ground"].opening) in (1, 2)
    other = make_plan(world.load("steps.caption.model=tests.standins:captioner@1"))
    assert [name for name, one in from_runs(other).items() if one.units] == ["download"]
    shown = world.run("plan").stdout
    assert "3 parts" in shown
    assert "the whole data set" in shown
    (record,) = Path(world.store).glob("runs/*/run.json")
    document = json.loads(record.read_text())
    assert document["steps"]["pack"] == plan.steps[-1].fingerprint


def test_a_speed_is_of_what_a_worker_did_on_any_engine(world: World) -> None:
    world.list_urls("a", world.images(15))
    assert world.run("run", "--until", "caption").returncode == 0
    plan = make_plan(world.load())
    (old,) = plan.store.names("runs")
    steps = {"steps": {"caption": plan.steps[1].fingerprint}}
    plan.store.write_json(f"runs/{old}/run.json", {"steps": {}})
    plan.store.write_json("runs/29990101-000000-there/run.json", steps)
    common = {"at": 1.0, "step": "caption"}
    events = [
        common | {"kind": "open", "part": 0, "seconds": 7.0},
        common | {"kind": "done", "part": 0, "seconds": 0.0, "rows": 0, "fresh": True},  # as the store tells it
        common | {"kind": "spent", "part": 0, "seconds": 10.0, "rows": 5},
        common | {"kind": "done", "part": 1, "seconds": 4.0, "rows": 2, "fresh": True},  # three rows were saved before
        common | {"kind": "done", "part": 2, "seconds": 0.1, "rows": 0, "fresh": False},
        common | {"kind": "spent", "part": 0, "seconds": 1.0, "rows": 9, "step": "download"},  # of another download
    ]
    plan.store.write_json("runs/29990101-000000-there/events-00000.json", events)
    found = from_runs(plan)
    assert (found["caption"].units, found["caption"].opening) == ([(5, 10.0), (2, 4.0)], [7.0])
    assert found["download"].units == []


def test_what_an_adopted_result_does_not_have_costs_nothing(world: World) -> None:
    world.list_urls("a", world.images(15))
    assert world.run("run", "--until", "caption", "--set", "dataset.only_parts=0-1").returncode == 0
    caption = make_plan(world.load()).steps[1].fingerprint
    plan = make_plan(world.load(f"steps.caption.use={caption}"))
    assert plan.without() == (2,)
    missing = costs(plan, steps_of(plan), None)
    assert [missing[step].images for step in ("download", "caption", "phrases", "pack")] == [0, 0, 10, 10]


def test_mistakes(world: World) -> None:
    with pytest.raises(RecipeError, match="nothing is ingested yet"):
        measure(make_plan(world.load()), 10, print)
    for arguments, says in (
        (("--sample", "0"), "--sample 0: is not a positive number"),
        (("--set", "prices.gpu_hour=-1"), "prices.gpu_hour: -1.0 is negative"),
        (("--set", "prices.gpu=1"), "prices.gpu: unknown key; did you mean 'gpu_hour'?"),
    ):
        done = world.run("plan", *arguments)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
