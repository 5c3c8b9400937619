"""Runs that share a store: each part is done once, by whoever is there; what a dead run held is taken over."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.world import ROOT, World, without_time
from vesl.models.contract import PlainCaptioner
from vesl.pipeline import journal, leases
from vesl.pipeline.leases import LeasedError, Waiting, give_back, lease
from vesl.pipeline.store import Store, to_json, wip

TABLE = "caption/0123456789ab/part-00003.parquet"
MADE = ("download", "caption", "phrases", "ground", "select", "pack")


def jittering() -> PlainCaptioner:
    """Slow, and never equally slow; notes in $ASKED which process was asked for what."""

    def caption(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        time.sleep(random.uniform(0.0, 2 * float(os.environ.get("JITTER_S", "0"))))
        with open(os.environ["ASKED"], "a", encoding="utf-8") as file:
            file.writelines(f"{os.getppid()} {text}\n" for text in alt_texts)
        return [[text] for text in alt_texts]

    return caption


@pytest.fixture
def slow(world: World) -> World:
    world.list_urls("a", world.images(24))
    world.document["dataset"]["rows_per_part"] = 2
    world.document["steps"]["caption"]["model"] = "tests.pipeline.test_leases:jittering@1"
    world.document["engine"] = {"workers": 1}
    world.write()
    return world


def start(world: World, asked: Path, jitter_s: float) -> "subprocess.Popen[str]":
    env = world.env({"ASKED": str(asked), "JITTER_S": str(jitter_s)})
    return subprocess.Popen(
        world.command("run"), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def leftovers(world: World) -> list[str]:
    return [str(path) for path in Path(world.store).rglob("*") if path.name.endswith((".wip", ".tmp"))]


@pytest.mark.parametrize("kind", ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ray", "beam"))])
def test_two_runs_share_the_work(slow: World, tmp_path: Path, kind: str) -> None:
    alone, shared = tmp_path / "alone.txt", tmp_path / "shared.txt"
    assert start(slow, alone, 0).wait(120) == 0
    want = without_time(slow.contents(*MADE))
    os.rename(slow.store, f"{slow.store}-alone")
    slow.document["engine"]["kind"] = kind
    slow.write()
    slow.bare = kind != "ray"
    runs = [start(slow, shared, 0.3) for _ in range(2)]
    said = [run.communicate(timeout=200)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert without_time(slow.contents(*MADE)) == want
    assert leftovers(slow) == []
    asked = [line.split(" ", 1) for line in shared.read_text().splitlines()]
    assert len(asked) <= 24 + 2  # one part may be given up by a lease that ends as the other looks
    assert len({text for _, text in asked}) == 24
    shares = Counter(run for run, _ in asked)
    assert len(shares) == 2
    assert min(shares.values()) >= 6


def test_what_a_killed_run_held_is_done_at_once_by_another_on_this_machine(slow: World, tmp_path: Path) -> None:
    asked = tmp_path / "asked.txt"
    asked.touch()
    killed = start(slow, asked, 1)
    while len(asked.read_text().splitlines()) < 4:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    time.sleep(1)  # its worker follows
    begun = time.monotonic()
    assert start(slow, asked, 0).wait(100) == 0
    assert time.monotonic() - begun < leases.SILENT_S
    assert leftovers(slow) == []


def foreign(store: Store, number: int = 0, beats: int = 0) -> None:
    """A lease of a run on another machine."""
    sign = {"run": "other", "machine": "another", "pid": 1, "beats": beats}
    store.replace(f"{wip(TABLE)}/lease-{number:05d}", to_json(sign))


def held(store: Store, run: str) -> bool:
    try:
        with lease(store, TABLE, run):
            return True
    except LeasedError:
        return False


def test_a_lease_keeps_other_runs_out_and_leaves_nothing(store: Store) -> None:
    with lease(store, TABLE, "one"):
        assert not held(store, "two")
        assert store.names("caption/0123456789ab") == ["part-00003.wip"]
        with lease(store, TABLE, "one"):  # an attempt of the same run, so the one before is dead
            assert not held(store, "two")
    assert held(store, "two")
    assert store.names("caption/0123456789ab") == []


def test_a_part_that_is_published_keeps_no_lease_however_late_a_beat(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_BEAT_S", 0.05)
    with lease(store, TABLE, "one"):
        time.sleep(0.3)
        assert b'"beats"' in store.read(f"{wip(TABLE)}/lease-00000")
        store.create(TABLE, b"published")
        time.sleep(0.3)
    assert store.names("caption/0123456789ab") == ["part-00003.parquet"]


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    process = subprocess.Popen(["true"])
    process.wait()
    sign = leases._sign("other") | {"pid": process.pid}
    store.replace(f"{wip(TABLE)}/lease-00000", to_json(sign))
    assert held(store, "mine")
    store.replace(f"{wip(TABLE)}/lease-00000", to_json(sign | {"machine": "another"}))
    assert not held(store, "mine")


def test_a_process_of_an_earlier_start_of_this_machine_is_not_taken_for_alive() -> None:
    mine = journal.sign()
    record = {"state": "running", "updated": time.time() - 3000, **mine, "pid": os.getppid()}
    assert journal.alive(record)
    assert not journal.alive(record | {"machine": "an earlier start of it"})  # another process has its number now
    assert journal.alive(record | {"machine": "an earlier start of it", "updated": time.time() - 5})
    del record["machine"]  # as an earlier version wrote it
    assert journal.alive(record)
    assert not journal.alive(record | {"host": "elsewhere"})


def test_a_lease_that_is_silent_for_long_is_taken_over_by_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT_S", 0.4)
    monkeypatch.setattr(leases, "POLL_S", 0.0)
    foreign(store)
    watchers = [Waiting[str](store, "mine"), Waiting[str](store, "third")]
    for watcher in watchers:
        watcher.add(TABLE, "task")
    for beats in range(1, 4):  # it counts, however slow its clock is
        assert [watcher.free() for watcher in watchers] == [[], []]
        time.sleep(0.2)
        foreign(store, beats=beats)
    assert [watcher.free() for watcher in watchers] == [[], []]
    time.sleep(0.5)
    assert [watcher.free() for watcher in watchers] == [["task"], []]
    assert (len(watchers[0]), len(watchers[1])) == (0, 1)
    assert not held(store, "third")
    assert held(store, "mine")
    assert watchers[1].free() == ["task"]  # as it ended


def test_a_lease_tells_how_many_attempts_of_its_run_died(store: Store) -> None:
    def died(number: int, run: str, **more: Any) -> None:
        store.create(f"{wip(TABLE)}/lease-{number:05d}", to_json(leases._sign(run) | {"pid": 2**22 + 1} | more))

    def fault() -> int:
        try:
            with lease(store, TABLE, "one") as held:
                deaths = held.deaths
                raise OSError
        except OSError:
            return deaths

    assert fault() == 0
    assert store.names(wip(TABLE)) == []
    for number, run in enumerate(["two", "one", "one"]):
        died(number, run)
    died(3, "one", claimed=True)  # by the driver, from a run that is silent: nobody was at work
    assert fault() == 2
    assert fault() == 2  # what ended without a death is over, and hides none
    assert store.names(wip(TABLE)) == ["lease-00000", "lease-00001", "lease-00002"]
    with lease(store, TABLE, "three") as held:
        assert held.deaths == 0
    assert store.names(wip(TABLE)) == []


def test_a_fault_while_deaths_are_counted_is_no_death(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create(f"{wip(TABLE)}/lease-00000", to_json(leases._sign("one")))
    read, faults = leases._read, iter([False, True])  # the first to know whose it is

    def fault(*arguments: Any) -> dict[str, Any]:
        if next(faults, False):
            raise OSError("away")
        return read(*arguments)

    monkeypatch.setattr(leases, "_read", fault)
    with pytest.raises(OSError, match="away"), lease(store, TABLE, "one"):
        pass
    assert store.names(wip(TABLE)) == ["lease-00000"]


def test_what_a_run_still_has_at_its_end_is_given_back(store: Store) -> None:
    store.create(f"{wip(TABLE)}/lease-00000", to_json(leases._sign("mine")))
    store.create(f"{wip(TABLE)}/00000000-00000002.parquet", b"saved work")
    other = TABLE.replace("3.parquet", "4.parquet")
    store.create(f"{wip(other)}/lease-00000", to_json(leases._sign("other")))
    taken = TABLE.replace("3.parquet", "5.parquet")
    for number, run in enumerate(("third", "mine", "other")):
        store.create(f"{wip(taken)}/lease-{number:05d}", to_json(leases._sign(run)))
    claimed = leases._sign("mine") | {"claimed": True}  # by the driver: nobody has begun
    store.create(f"{wip(TABLE.replace('3.parquet', '6.parquet'))}/lease-00000", to_json(claimed))
    fell = give_back(store, ["caption/0123456789ab", "no/such"], "mine")
    assert [(table, signed["run"], signed["pid"]) for table, signed in fell] == [
        (TABLE, "mine", os.getpid()),
        (taken, "mine", os.getpid()),
    ]
    assert store.names(wip(taken)) == ["lease-00000", "lease-00001", "lease-00002"]  # the other run's to end
    assert store.names(wip(TABLE)) == ["00000000-00000002.parquet"]
    assert store.names(wip(other)) == ["lease-00000"]


def test_a_half_written_lease_is_no_reason_to_fail(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.replace(f"{wip(TABLE)}/lease-00000", b"")
    assert not held(store, "mine")
