"""What a worker tells of its parts, and who is to blame where two of them meet."""

import multiprocessing as mp
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from tests.pipeline.test_work import DOWNLOAD, TABLE, Drawn, interrupted_after, job_for
from vesl.pipeline.engines import Engine, Event, follow, local, worker
from vesl.pipeline.engines.worker import Clock, Task, Turn, in_turn
from vesl.pipeline.progress import Tally
from vesl.pipeline.stage import InTwo
from vesl.pipeline.store import Store, StoreFault
from vesl.pipeline.work import Attempt, Job, run_part


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Two parts of twelve rows for one step, in batches of two; what is done is saved at once."""
    store = Store(str(tmp_path))
    job = job_for(store, DOWNLOAD, save_every_s=0)
    store.create("input/x/part-00001.parquet", store.read(f"input/x/{TABLE}"))
    return replace(job, inputs=(*job.inputs, "input/x/part-00001.parquet"), threads={"download": 1})


def done(job: Job) -> Any:
    """Do the first part as a worker does; what it tells last."""
    told: list[Any] = []
    worker._try(job, Task(0, 0), {}, {}, Clock(), lambda *message: told.append(message))
    return told[-1]


def test_a_part_that_is_resumed_tells_how_much_of_it_was_done_now(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_part(job, 0, 0, lambda stage: interrupted_after(4, Drawn(), []), Attempt())
    kind, (seconds, rows, (footer, fresh)) = done(job)
    assert (kind, rows, footer["rows"], fresh) == ("done", 4, 12, True)
    assert seconds > 0
    kind, (_, rows, (_, fresh)) = done(job)
    assert (kind, rows, fresh) == ("done", 0, False)


def test_of_two_parts_at_a_time_no_second_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(monotonic=lambda: now.at, at=0.0)
    monkeypatch.setattr(worker, "time", now)
    clock, took = Clock(), []
    for begun, ended in ((100.0, 110.0), (107.0, 120.0), (118.0, 121.0), (200.0, 203.0)):
        now.at = ended
        took.append(clock.since(begun))
    assert took == [10, 10, 1, 3]


def test_of_two_parts_the_one_that_began_first_has_the_model_first(job: Job) -> None:
    """Even where it is prepared more slowly: else it would be the one that is blamed if the other hangs."""
    draw, order, asked, began = Drawn().open(), list[int](), list[bool](), threading.Event()
    job = replace(job, batch={"download": 12})

    def prepare(batch: pa.Table) -> int:
        asked.append(True)
        place = len(asked)
        time.sleep(1.0 if place == 1 else 0.0)
        return place

    def finish(batch: pa.Table, prepared: int) -> pa.Table:
        order.append(prepared)
        return draw(batch)

    turns, turn = dict[str, Turn](), Turn()
    turns[DOWNLOAD.folder] = turn
    functions: dict[str, Any] = {DOWNLOAD.folder: in_turn(InTwo(prepare, finish), turn)}

    def tell(kind: str, value: Any = None) -> None:
        if kind == "read":
            began.set()

    def work(part: int) -> None:
        worker._try(job, Task(0, part), functions, turns, Clock(), tell)

    first = threading.Thread(target=work, args=(0,))
    first.start()
    assert began.wait(10)
    work(1)
    first.join(10)
    assert order == [1, 2]


def ended_by_a_library(job: Job, pipe: Any, output: Any) -> None:
    def end(*arguments: Any) -> None:
        sys.exit("some library has had enough")

    worker._try = end  # type: ignore[assignment]
    worker.live(job, pipe, output, os.environ.copy())


@pytest.mark.parametrize("thread", [0, 1])
def test_whichever_thread_a_library_ends_the_worker_is_dead(job: Job, thread: int) -> None:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    output, standard = context.Pipe(duplex=False)
    process = context.Process(target=ended_by_a_library, args=(job, theirs, standard), daemon=True)
    process.start()
    try:
        ours.send((thread, Task(0, 0)))
        process.join(30)
        assert process.exitcode == 1  # else its part would be waited for until it is over a limit
        standard.close()
        said = b""
        with suppress(OSError):
            while data := os.read(output.fileno(), 1 << 16):
                said += data
        assert local.last_words(said) == ": SystemExit: some library has had enough"
    finally:
        process.kill()
        process.join()


def test_a_worker_that_the_driver_has_not_heard_yet_is_not_taken_for_one_that_hangs() -> None:
    ours, theirs = mp.Pipe()
    ended: list[bool] = []
    process: Any = SimpleNamespace(kill=lambda: ended.append(True))
    busy = local._Worker(process, ours, ours, tasks={0: Task(0, 0, begun=time.monotonic() - 100)})
    engine = Engine(silence_limit_s=50)
    theirs.send((0, "rows", 5))  # while the driver waited for a slow store
    assert local._end_if_hung(busy, engine) == 0
    assert not ended
    ours.recv()
    local._end_if_hung(busy, engine)
    assert ended


def test_what_is_saved_of_a_part_is_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_SAVED_EVERY_S", 0.0)
    monkeypatch.setattr(follow, "_REST", 0)
    tally, seen, going = Tally(["download"], 24), list[int](), iter([True, True, True, False])
    run_part(job, 0, 0, lambda stage: stage.open(), Attempt())

    def running() -> bool:
        if sum(1 for event in events if event.kind == "saved") < 4:
            with suppress(KeyboardInterrupt):
                run_part(job, 0, 1, lambda stage: interrupted_after(1, Drawn(), []), Attempt())
        seen.append(tally.done("download"))
        return next(going)

    events: list[Event] = []
    follow.follow(job, (0, 1), running, lambda event: (events.append(event), tally.take(event)), 0.0)
    assert [(e.kind, e.part, e.rows) for e in events][:3] == [("saved", 1, 2), ("done", 0, 0), ("saved", 1, 4)]
    assert seen == [0, 14, 16, 18]
    assert tally.done("download") == 20


def test_many_parts_are_told_in_portions_also_where_the_store_goes_away(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_AT_ONCE", 3)
    first = job.store.read(f"input/x/{TABLE}")
    job = replace(job, inputs=tuple(f"input/x/part-{part:05d}.parquet" for part in range(8)))
    for part in range(8):
        job.store.create(job.inputs[part], first)
        run_part(job, 0, part, lambda stage: stage.open(), Attempt())
    events, told, read, faults = list[Event](), list[int](), Store.footer, iter([True])

    def footer(store: Store, name: str) -> dict[str, Any] | None:
        if name.endswith("4.parquet") and next(faults, False):
            raise StoreFault("away")
        return read(store, name)

    def running() -> bool:
        told.append(len(events))
        return len(told) < 3

    monkeypatch.setattr(Store, "footer", footer)
    follow.follow(job, range(8), running, events.append, 0.0)
    assert [event.part for event in events] == list(range(8))
    assert {(event.kind, event.fresh) for event in events} == {("done", False)}
    assert told[:3] == [0, 3, 4]  # of the second portion one was read
