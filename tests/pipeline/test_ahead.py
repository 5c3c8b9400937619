"""Functions in two moments: what is prepared ahead, by whom, and whose fault it is."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from tests.pipeline.test_work import DOWNLOAD, KEYS, job_for
from vesl.models.contract import ModelError
from vesl.pipeline import work
from vesl.pipeline.stage import Function, InTwo, Step, answer
from vesl.pipeline.store import Store
from vesl.pipeline.work import Attempt, run_part
from vesl.transforms.options import operational
from vesl.transforms.records import ADDS


@dataclass(frozen=True)
class Prepared:
    """A caption step that notes who did what when."""

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["caption"]
    reads: ClassVar[tuple[str, ...]] = ("alt_text", "image")
    opens_model: ClassVar[bool] = False

    prepare: Callable[[list[str]], Any] = operational(str)  # noqa: RUF009
    finish: Callable[[list[str], Any], None] = operational(lambda keys, made: None)  # noqa: RUF009

    def open(self) -> Function:
        def finish(batch: pa.Table, made: Any) -> pa.Table:
            self.finish(batch["key"].to_pylist(), made)
            rows = [dict.fromkeys(self.emits.names, None) for _ in range(len(batch))]
            return answer(batch, self.name, rows, self.emits)

        return InTwo(lambda batch: self.prepare(batch["key"].to_pylist()), finish)


def run(tmp_path: Any, stage: Prepared, threads: int = 2, attempt: Attempt | None = None) -> dict[str, Any]:
    store = Store(str(tmp_path))
    step = Step(stage, DOWNLOAD.fingerprint)
    job = replace(job_for(store, DOWNLOAD, step), threads={"caption": threads}, batch={"download": 2, "caption": 1})
    run_part(job, 0, 0, lambda stage: stage.open(), Attempt())
    counts = run_part(job, 1, 0, lambda stage: stage.open(), attempt or Attempt())[0]["counts"]
    assert isinstance(counts, dict)
    return counts


def test_batches_are_prepared_while_the_model_is_busy(tmp_path: Any) -> None:
    preparing: set[str] = set()
    ahead: list[int] = []
    caller = threading.get_ident()

    def prepare(keys: list[str]) -> str:
        assert threading.get_ident() != caller
        preparing.update(keys)
        return keys[0]

    def finish(keys: list[str], made: Any) -> None:
        assert made == keys[0]
        time.sleep(0.05)
        ahead.append(len(preparing))

    counts = run(tmp_path, Prepared(prepare, finish))
    assert counts["kept"] == len(ahead) > 4
    assert ahead[0] > 2  # with the first batch still at work
    assert max(ahead[i] - i for i in range(len(ahead))) <= 5  # and never more than a few


def test_a_row_that_cannot_be_prepared_costs_one_row(tmp_path: Any) -> None:
    def prepare(keys: list[str]) -> None:
        if KEYS[3] in keys:
            raise ValueError("a picture that is none")

    counts = run(tmp_path, Prepared(prepare))
    assert counts["failed"] == {"error": 1}
    assert counts["kept"] > 1


def test_a_model_that_cannot_go_on_ends_the_step(tmp_path: Any) -> None:
    def prepare(keys: list[str]) -> None:
        raise ModelError("the server is gone")

    with pytest.raises(ModelError, match="the server is gone"):
        run(tmp_path, Prepared(prepare))


def test_a_row_that_is_tried_alone_is_prepared_alone(tmp_path: Any) -> None:
    told: list[str | None] = []
    seen: list[tuple[list[str], str | None]] = []
    stage = Prepared(lambda keys: seen.append((keys, told[-1])))
    run(tmp_path, stage, attempt=Attempt(alone=True, on_key=told.append))
    assert len(seen) > 4
    assert all(keys == [key] for keys, key in seen)


def test_of_two_parts_the_batches_of_the_first_are_prepared_first() -> None:
    """By the same threads: the model needs them first, and all the CPU time there is goes to them."""
    order: list[str] = []
    most, at_work, lock = 0, 0, threading.Lock()

    def prepare(batch: pa.Table) -> None:
        nonlocal most, at_work
        with lock:
            order.append(batch["key"][0].as_py()[0])
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        with lock:
            at_work -= 1

    function = InTwo(prepare, lambda batch, made: batch)
    stage: Any = SimpleNamespace(reads=())
    waiting: list[Iterator[Any]] = []

    def ahead(part: str, on_read: Callable[[], None]) -> Iterator[Any]:
        rows = pa.table({"key": [f"{part}{i}" for i in range(6)]})
        return work._ahead(Store("memory://"), None, rows, stage, 1, function, 2, on_read)

    def begin() -> None:
        waiting.append(ahead("b", lambda: None))
        next(waiting[0])

    other = threading.Thread(target=begin)
    for _, made in ahead("a", other.start):
        made.result()
    other.join(10)
    assert order[:6] == ["a"] * 6
    assert most == 2
    for _, made in waiting[0]:
        made.result()
    assert order == ["a"] * 6 + ["b"] * 6
