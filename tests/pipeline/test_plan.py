"""The kept footers: as good as reading every table, and never believed against the listing."""

import os
import time
from pathlib import Path

import pytest

from tests.world import World
from vesl.pipeline import parts
from vesl.pipeline.parts import KEPT, look, together
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.progress import Tally
from vesl.pipeline.store import Store, encode_table
from vesl.transforms.records import INPUT


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Footers are kept of three parts and more, and listings are asked for in pieces."""
    monkeypatch.setattr(parts, "_WORTH", 3)
    monkeypatch.setattr(parts, "_LONG", 4)


def put(store: Store, part: int, rows: int, folder: str = "caption/0123456789ab") -> None:
    counts = {"kept": rows - 1, "rejected": {"taken_down": 1}, "failed": {"error": part} if part else {}}
    footer = {"part": part, "parent": "ab" * 32, "rows": rows, "counts": counts, "tar": {"bytes": 1000}}
    data = encode_table(INPUT.empty_table(), footer)
    store.replace(f"{folder}/part-{part:05d}.parquet", data)


def reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    footer = store.footer
    monkeypatch.setattr(store, "footer", lambda name: (seen.append(name), footer(name))[1])
    return seen


def test_kept_footers_are_read_once_and_again_where_a_table_changed(
    store: Store, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, numbers = "caption/0123456789ab", [0, 1, 7, 12_345, 100_000, 123_456]
    for part in numbers:
        put(store, part, 10)
    store.replace(f"{folder}/part-00001.0123.tar", b"no table")
    store.replace(f"{folder}/part-00002.parquet.wip/x", b"no table")
    seen = reads(store, monkeypatch)
    asked = [*numbers, 5, 99_999]
    found = look(store, folder, sorted(asked)).keep()
    assert list(found) == numbers
    assert len(seen) == 6
    again = look(store, folder, sorted(asked))
    assert len(seen) == 6
    assert dict(again) == dict(found)
    assert again[100_000]["counts"]["failed"] == {"error": 100_000}
    total = again.total(numbers[:3])
    assert (total["parts"], total["rows"]) == (3, 30)
    assert total["counts"] == {"kept": 27, "rejected": {"taken_down": 3}, "failed": {"error": 8}}
    assert again.total(numbers)["bytes"] == sum(store.stamps(folder, ["part-"])["size"].to_pylist()) + 6000
    late = look(store, folder, numbers)  # whose whole footers are asked for when others are kept
    put(store, 7, 11)
    store.remove(f"{folder}/part-12345.parquet")
    put(store, 12_346, 3)
    now = look(store, folder, [0, 1, 7, 12_345, 12_346, 100_000, 123_456])
    assert sorted(seen[6:]) == [f"{folder}/part-00007.parquet", f"{folder}/part-12346.parquet"]
    assert list(now) == [0, 1, 7, 12_346, 100_000, 123_456]
    assert [now[part]["rows"] for part in now] == [10, 10, 11, 3, 10, 10]
    assert list(look(store, folder, [1, 7, 100_000])) == [1, 7, 100_000]
    store.remove(f"{folder}/{KEPT}")
    look(store, folder, [0, 1, 7, 12_346]).keep()
    assert (late[1]["rows"], late[100_000]["part"]) == (10, 100_000)


@pytest.mark.parametrize("damage", [b"", b"PAR1 nonsense", encode_table(INPUT.empty_table(), {})])
def test_kept_footers_that_cannot_be_used_are_made_anew(tmp_path: Path, small: None, damage: bytes) -> None:
    store, folder = Store(str(tmp_path)), "caption/0123456789ab"
    for part in range(5):
        put(store, part, 10)
    store.replace(f"{folder}/{KEPT}", damage)
    found = look(store, folder, range(5)).keep()
    assert [found[part]["rows"] for part in range(5)] == [10] * 5
    assert look(store, folder, range(5)).fresh == 0


def test_a_table_that_is_written_again_within_one_tick_of_the_clock_is_read_again(tmp_path: Path, small: None) -> None:
    store, folder = Store(str(tmp_path)), "caption/0123456789ab"
    for part in range(3):
        put(store, part, 10)
    path = tmp_path / folder / "part-00001.parquet"
    os.utime(path, ns=(10**18, 10**18))
    look(store, folder, range(3)).keep()
    put(store, 1, 1_234_567)
    os.utime(path, ns=(10**18, 10**18))
    assert look(store, folder, range(3))[1]["rows"] == 1_234_567


def test_reasons_that_come_later_are_counted_beside_those_that_are_kept(store: Store, small: None) -> None:
    folders = {0: "input/0123456789ab", 4: "input/ba9876543210"}
    for part in range(8):
        put(store, part, 10, folders[part // 4 * 4])
    for folder in folders.values():
        look(store, folder, range(8)).keep()
    footer = {
        "part": 9,
        "parent": "0",
        "rows": 6,
        "counts": {"kept": 1, "rejected": {"tiny": 2}, "failed": {"late": 3}},
    }
    store.replace(f"{folders[4]}/part-00009.parquet", encode_table(INPUT.empty_table(), footer))
    found = together(store, {first: look(store, folder, range(10)) for first, folder in folders.items()})
    assert (list(found), found.fresh) == ([*range(8), 9], 1)
    assert found.total([3, 4, 8, 9])["counts"] == {
        "kept": 19,
        "rejected": {"taken_down": 2, "tiny": 2},
        "failed": {"error": 7, "late": 3},
    }
    for folder in folders.values():
        store.remove(f"{folder}/{KEPT}")  # the whole footers are then read from the tables
    assert [found[part]["part"] for part in found] == [*range(8), 9]


@pytest.mark.parametrize("command", ["plan", "status", "report"])
def test_a_compaction_that_is_not_at_its_end_is_told(world: World, command: str) -> None:
    world.list_urls("a", world.images(5))
    assert world.run("run", "--until", "download").returncode == 0
    store, where = Store(world.store), ("--out", str(world.folder / "report.html")) if command == "report" else ()
    journal = {"state": "running", "host": "elsewhere", "pid": 1, "lists": [], "parts": []}
    for silence, says in ((5, "a compaction is at work on elsewhere"), (9000, "a compaction was interrupted")):
        store.write_json("takedown/compaction-00001.json", journal | {"updated": time.time() - silence})
        done = world.run(command, *where)
        assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
        assert done.stderr.startswith(f"vesl: {says}")
    store.write_json("takedown/compaction-00001.json", journal | {"state": "done"})
    assert world.run(command, *where).stderr == ""


def summary(plan: Plan) -> tuple[object, ...]:
    tally = Tally.of(plan)
    return plan.rows, plan.todo(), {step: dict(footers) for step, footers in plan.done.items()}, tally.snapshot()


def test_a_plan_is_the_same_with_kept_footers_and_without(world: World, small: None) -> None:
    world.list_urls("a", [*world.images(19), (f"{world.server.url}/none.jpg", "gone")])
    world.document["steps"]["dedup"] = {}
    world.write()
    assert world.run("run").returncode == 0
    want = summary(make_plan(world.load()))
    assert summary(make_plan(world.load(), write=True)) == want
    assert len(list(Path(world.store).glob(f"*/*/{KEPT}"))) == 8
    before = world.files()
    assert summary(make_plan(world.load(), write=True)) == want
    assert world.files() == before
    (table,) = Path(world.store).glob("caption/*/part-00001.parquet")
    table.unlink()
    after = make_plan(world.load())
    assert after.todo() == (1,)
    assert after.done["pack"].keys() == {0, 2, 3}  # what was made from a table that is gone is not done


def test_a_long_run_keeps_footers_as_it_goes(world: World, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vesl.pipeline import run as running

    monkeypatch.setattr(running, "_KEEP_EVERY", 4)
    monkeypatch.setattr(running, "write_index", lambda plan: None)
    kept_by = []
    monkeypatch.setattr(running.Record, "_keep", lambda self: kept_by.append(self))
    world.list_urls("a", world.images(20))
    world.document["steps"]["ground"]["model"] = "tests.standins:grounder@1"
    world.write()
    running.run(world.load("engine.workers=1"), "caption")
    assert kept_by
