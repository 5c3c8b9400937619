"""A step's operator on Ray, without Ray: what its leases say of deaths, what it counts, which code it is."""

import json
import multiprocessing as mp
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from tests.pipeline.test_work import DOWNLOAD, Drawn, job_for
from vesl.pipeline import leases
from vesl.pipeline.engines import Engine, ray_steps, worker
from vesl.pipeline.engines.ray_steps import Operator, Reading, version
from vesl.pipeline.stage import Function
from vesl.pipeline.store import Store, to_json, wip
from vesl.pipeline.work import Job

BLOCK = pa.table({"part": [0], "state": [""], "said": ["[]"]})


class Exits(Drawn):
    def open(self) -> Function:
        def function(batch: pa.Table) -> pa.Table:
            sys.exit("some library has had enough")

        return function


def carry(job: Job) -> None:
    Operator(job, 0, version(), Engine(kind="ray"))(BLOCK)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return replace(job_for(Store(str(tmp_path)), DOWNLOAD), run="mine")


def test_a_library_that_exits_leaves_the_lease_as_a_death(job: Job) -> None:
    ending = replace(job, steps=(replace(DOWNLOAD, stage=Exits()),))
    for deaths in (1, 2):
        process = mp.get_context("spawn").Process(target=carry, args=(ending,))
        process.start()
        process.join(60)
        assert process.exitcode == 1
        assert len(job.store.names(wip(job.steps[0].table(0)), "lease-")) == deaths


def test_a_part_that_waits_for_its_turn_is_not_charged_with_the_death_of_another(job: Job) -> None:
    table = job.steps[0].table(0)
    job.store.create(f"{wip(table)}/lease-00000", to_json(leases._sign("mine")))
    operator = Operator(job, 0, version(), Engine(kind="ray"))
    operator._turn.take()  # another part is with the model
    waiting = threading.Thread(target=operator, args=(BLOCK,))
    waiting.start()
    time.sleep(0.5)
    assert job.store.names(wip(table), "lease-") == ["lease-00000"]
    operator._turn.close()
    waiting.join(30)
    assert job.store.exists(table)
    assert not job.store.exists(wip(table))


def test_a_part_that_hung_on_a_node_goes_to_another_where_there_is_one(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, made = job.steps[0].table(0), "no batch was finished in time"

    def carried(node: str, stay: set[str], run: str = "runs/mine") -> tuple[str, list[list[str]]]:
        monkeypatch.setattr(ray_steps, "_node", lambda: node)
        operator = Operator(replace(job, run=run), 0, version(), Engine(kind="ray"), frozenset(stay))
        if run == "ended":
            operator._hung(job.store, wip(table), made)
        (row,) = operator(BLOCK).to_pylist()
        return row["state"], [said for said in json.loads(row["said"]) if said[0] in ("elsewhere", "retry", "lost")]

    assert carried("a", {"c"}, "ended") == ("elsewhere", [["elsewhere", "download", "a"]])
    assert not job.store.names(wip(table), "lease-")
    assert not job.store.exists(table)
    assert carried("a", {"a"}, "ended") == (
        "lost",
        [["retry", "download", made], ["lost", "download", f"{made}, 2 times"]],
    )
    assert carried("a", set(), "other") == ("", [])  # these are another run's hangs
    assert job.store.exists(table)


@pytest.mark.parametrize(("node", "stay"), [("a", {"a"}), ("b", set())])
def test_a_part_that_hung_is_tried_again(job: Job, monkeypatch: pytest.MonkeyPatch, node: str, stay: set[str]) -> None:
    monkeypatch.setattr(ray_steps, "_node", lambda: "a")
    Operator(job, 0, version(), Engine(kind="ray"))._hung(job.store, wip(job.steps[0].table(0)), "no batch in time")
    monkeypatch.setattr(ray_steps, "_node", lambda: node)
    (row,) = Operator(job, 0, version(), Engine(kind="ray"), frozenset(stay))(BLOCK).to_pylist()
    assert (row["state"], json.loads(row["said"])[0]) == ("", ["retry", "download", "no batch in time"])
    assert job.store.exists(job.steps[0].table(0))


def test_who_asks_whether_a_block_is_read_waits_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, answers = Reading(), list[str]()
    asking = threading.Thread(target=lambda: (reading.wait(7), answers.append("read")))
    asking.start()  # before the block is there
    for read in (False, True):
        reading.tell(6, read)
    for read in (False, True):
        time.sleep(0.2)
        assert not answers
        reading.tell(7, read)
    asking.join(5)
    assert answers == ["read"]
    reading.wait(6)
    reading.tell(6, True)
    assert reading._read == {}  # nobody will ask again
    monkeypatch.setattr(ray_steps, "_BEGINS_S", 0.1)
    reading.wait(6)  # of an actor that died since
    assert reading._read == {}


def test_a_block_is_read_when_each_of_its_parts_is_read_or_over(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    context = pytest.importorskip("ray.data._internal.execution.interfaces").TaskContext
    monkeypatch.setattr(ray_steps, "READING", reading := Reading())
    operator, seen = Operator(job, 0, version(), Engine(kind="ray")), list[bool]()
    with context.current(context(task_idx=7, op_name="MapBatches(Caption)")):
        operator._begin({0, 1, 2})
    for part in (2, 0, 0, 1):
        seen.append(reading._read[7])
        operator._was_read(part)
    assert not any(seen)
    assert reading._read == {7: True}
    assert not operator._unread


def stuck() -> None:
    """A call that lets no other thread of Python have its turn, for longer than anybody would wait."""
    worker._STUCK_S = 0.5
    with worker.Watch(Engine(silence_limit_s=1), worker.Turn()).over(lambda why: None):
        time.sleep(0.8)
        re.match(r"(a+)+$", "a" * 64 + "b")


def done_in_time() -> None:
    worker._STUCK_S = 0.5
    with worker.Watch(Engine(silence_limit_s=1), worker.Turn()).over(lambda why: None):
        time.sleep(0.8)
    time.sleep(2.5)


@pytest.mark.parametrize(("what", "code"), [(stuck, 1), (done_in_time, 0)])
def test_a_worker_that_is_stuck_in_a_call_of_c_is_ended(what: Callable[[], None], code: int) -> None:
    process = mp.get_context("spawn").Process(target=what)
    process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == code


def test_what_an_operator_does_is_counted_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[str, int]] = []
    monkeypatch.setattr(ray_steps, "count", lambda footer: counted.append((footer["step"], footer["counts"]["kept"])))
    for _ in range(2):  # the second finds it done
        carry(job)
    table = job.store.read_table(job.steps[0].table(0))
    assert counted == [("download", table["outcome"].to_pylist().count("kept"))]


def test_another_state_of_the_code_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\+[0-9a-f]{12}", version())
    for name in ("models", "pipeline/engines", "transforms", "tests"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(ray_steps, "__file__", str(tmp_path / "pipeline/engines/ray_steps.py"))

    def after(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return version.__wrapped__()

    first = after("models/clip.py", "SIDE = 224\n")
    (tmp_path / "models/.#clip.py").symlink_to("somebody@somewhere.1234")  # as Emacs locks a file
    assert after("tests/test_clip.py", "") == after("models/notes.txt", "") == first
    others = [
        after("models/clip.py", "SIDE = 336\n"),
        after("transforms/clip.py", ""),
        after("pipeline/engines/a.py", ""),
    ]
    assert len({first, *others}) == 4
