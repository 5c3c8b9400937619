"""One part through one step, in this process: what is saved, taken over, refused and cleaned up."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pyarrow as pa
import pytest

from tests.world import jpeg
from vesl.models.contract import ModelError
from vesl.pipeline import work
from vesl.pipeline.guard import guarded
from vesl.pipeline.stage import ByRow, Function, Step, answer
from vesl.pipeline.steps.download import Download, ImageTar
from vesl.pipeline.store import Store, encode_table
from vesl.pipeline.work import Attempt, Job, StaleError, incoming, run_part
from vesl.transforms.outcomes import Drop
from vesl.transforms.records import ADDS, INPUT

ROWS = 12
KEYS = [f"{i:024x}" for i in range(ROWS)]
TABLE = "part-00000.parquet"


@dataclass(frozen=True)
class Drawn(Download):
    """The download step with pictures of its own: no network, the same tar."""

    def open(self) -> Function:
        def draw(batch: pa.Table) -> pa.Table:
            results: list[dict[str, object] | Drop] = []
            for url in batch["url"].to_pylist():
                row = dict.fromkeys(self.emits.names) | {"image": jpeg(int(url))}
                results.append(Drop("empty") if url == "5" else row)
            return answer(batch, self.name, results, self.emits)

        return draw


@dataclass(frozen=True)
class Said:
    """The caption step without a model."""

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["caption"]
    reads: ClassVar[tuple[str, ...]] = ("alt_text", "image")
    opens_model: ClassVar[bool] = False

    says: str = ""

    def open(self) -> Function:
        def say(batch: pa.Table) -> pa.Table:
            assert all(image.startswith(b"\xff\xd8") for image in batch["image"].to_pylist())
            texts = [f"{text}{self.says}" for text in batch["alt_text"].to_pylist()]
            rows = [{"captions": [{"text": t, "model": "x@1"}], "caption_notes": []} for t in texts]
            return answer(batch, self.name, rows, self.emits)

        return say


DOWNLOAD = Step(Drawn(), "input")
CAPTION = Step(Said(), DOWNLOAD.fingerprint)


def job_for(store: Store, *steps: Step, save_every_s: float = 60.0, alt: str = "alt") -> Job:
    rows = {"key": KEYS, "url": [str(i) for i in range(ROWS)], "alt_text": [f"{alt} {i}" for i in range(ROWS)]}
    table = pa.table({**rows, "source": ["a"] * ROWS, "row": range(ROWS)}, schema=INPUT)
    store.create(f"input/x/{TABLE}", encode_table(table, {"rows": ROWS}))
    batch = {step.name: 2 for step in steps}
    return Job(store.url, {}, steps, (f"input/x/{TABLE}",), batch, {}, save_every_s)


def interrupted_after(batches: int, stage: Drawn | Said, asked: list[str]) -> Function:
    function, calls = stage.open(), 0

    def call(batch: pa.Table) -> pa.Table:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise KeyboardInterrupt  # passes the guard, as the death of the process does
        asked.extend(batch["key"].to_pylist())
        return function(batch)

    return call


@pytest.fixture
def folder(tmp_path: object) -> Callable[[str], Store]:
    return lambda name: Store(f"{tmp_path}/{name}")


@pytest.mark.parametrize(("piece_bytes", "pieces"), [(1, 4), (1 << 30, 2)])
def test_what_was_saved_is_not_done_again(
    folder: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch, piece_bytes: int, pieces: int
) -> None:
    whole, store = folder("whole"), folder("store")
    run_part(job_for(whole, DOWNLOAD), 0, 0, lambda stage: stage.open(), Attempt())
    monkeypatch.setattr(work, "_PIECE_BYTES", piece_bytes)
    job, asked = job_for(store, DOWNLOAD, save_every_s=0), []
    for batches in (2, 1, 9):  # each time twice as long a prefix is taken over from pieces of several attempts
        with pytest.raises(KeyboardInterrupt) if batches < 9 else nullcontext():
            run_part(job, 0, 0, lambda stage, n=batches: interrupted_after(n, Drawn(), asked), Attempt())
        if batches == 2:
            assert len(store.names(f"{DOWNLOAD.folder}/part-00000.wip", "0000")) == pieces
    assert asked == KEYS
    assert store.names(DOWNLOAD.folder) == whole.names(DOWNLOAD.folder)  # the tar's name is its content's hash
    for name in whole.names(DOWNLOAD.folder):
        assert store.read(f"{DOWNLOAD.folder}/{name}") == whole.read(f"{DOWNLOAD.folder}/{name}")


@dataclass(frozen=True)
class Apart(Drawn):
    """The same, row by row: those in `late` are not done before all others are."""

    late: int = 0  # every so many, if any
    ever: bool = True  # whether they are done at all

    def open(self) -> Function:
        draw, waiting = super().open(), list[Future[None]]()

        def begin(row: dict[str, str]) -> Future[None]:
            future: Future[None] = Future()
            ASKED.append(row["key"])
            if self.late and int(row["url"]) % self.late == 0:
                waiting.append(future)
            else:
                future.set_result(None)
            if self.ever and row["key"] == KEYS[-1]:
                for each in reversed(waiting):
                    each.set_result(None)
            return future

        return ByRow(begin, lambda batch, begun: draw(batch))


ASKED: list[str] = []


def test_rows_that_are_done_before_earlier_ones_are_saved_and_not_asked_for_again(
    folder: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_GATHER_S", 0.0)
    whole, store = folder("whole"), folder("store")
    run_part(job_for(whole, DOWNLOAD), 0, 0, lambda stage: stage.open(), Attempt())
    job, done = replace(job_for(store, DOWNLOAD, save_every_s=0), threads={"download": 4}), list[int]()

    def until_eight(rows: int) -> None:
        done.append(rows)
        if sum(done) >= 8:
            raise KeyboardInterrupt

    ASKED.clear()
    with pytest.raises(KeyboardInterrupt):
        run_part(job, 0, 0, lambda stage: Apart(late=3, ever=False).open(), Attempt(on_rows=until_eight))
    assert ASKED == KEYS
    ASKED.clear()
    reads: list[None] = []
    run_part(job, 0, 0, lambda stage: Apart().open(), Attempt(on_read=lambda: reads.append(None)))
    assert KEYS[::3] == ASKED
    assert reads == [None]
    ASKED.clear()
    other = folder("other")  # in another order, and never killed
    run_part(
        replace(job_for(other, DOWNLOAD), threads={"download": 4}), 0, 0, lambda s: Apart(late=2).open(), Attempt()
    )
    for made in (store, other):
        assert made.names(DOWNLOAD.folder) == whole.names(DOWNLOAD.folder)  # the tar's name is its content's hash
        for name in whole.names(DOWNLOAD.folder):
            assert made.read(f"{DOWNLOAD.folder}/{name}") == whole.read(f"{DOWNLOAD.folder}/{name}")


@pytest.mark.parametrize(("every_s", "moments"), [(60.0, [1.0, 52.0]), (10.0, [1.0, 12.0, 23.0, 34.0, 45.0, 56.0])])
def test_saving_takes_a_small_share_of_the_time(
    folder: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch, every_s: float, moments: list[float]
) -> None:
    """A second of saving is followed by 50 without, but by no more than the recipe allows."""
    store, now, saved = folder("store"), [0.0], list[float]()
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: now[0]))
    job = job_for(store, Step(Said(), "input"), save_every_s=every_s)
    saver = work.Saver(store, job, job.steps[0], 0, incoming(store, job, 0, 0, ("alt_text",)), None)

    def save() -> None:
        saved.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(saver, "_save", save)
    for second in range(60):
        now[0] = max(now[0], second)
        saver.add(answer(pa.table({"key": pa.array([], pa.string())}), "caption", [], ADDS["caption"]))
    assert saved == moments


def test_what_was_saved_for_other_rows_is_not_taken_over(folder: Callable[[str], Store]) -> None:
    store = folder("store")
    step = Step(Drawn(), "input")
    job = job_for(store, step, save_every_s=0)
    with pytest.raises(KeyboardInterrupt):
        run_part(job, 0, 0, lambda stage: interrupted_after(2, Drawn(), []), Attempt())
    store.remove(job.inputs[0])
    asked: list[str] = []
    job_for(store, step, alt="changed")
    run_part(job, 0, 0, lambda stage: interrupted_after(99, Drawn(), asked), Attempt())
    assert asked == KEYS


def test_tables_that_do_not_fit_are_refused(folder: Callable[[str], Store]) -> None:
    store = folder("store")
    job = job_for(store, DOWNLOAD, CAPTION)
    footer, _ = run_part(job, 0, 0, lambda stage: stage.open(), Attempt())
    name = DOWNLOAD.table(0)
    table = store.read_table(name)
    assert len(incoming(store, job, 1, 0, ("alt_text", "image")).rows) == ROWS - 1
    store.replace(name, encode_table(table, {**footer, "parent": "0" * 64}))
    with pytest.raises(StaleError, match="another table"):
        incoming(store, job, 1, 0, ("alt_text", "image"))
    store.replace(name, encode_table(table.slice(1), footer))
    with pytest.raises(StaleError, match="rows"):
        incoming(store, job, 1, 0, ("alt_text", "image"))


def test_what_other_attempts_left_of_a_finished_part_is_removed(folder: Callable[[str], Store]) -> None:
    store = folder("store")
    job = job_for(store, DOWNLOAD)
    for name in ("part-00000.0123456789abcdef.tar", "part-00001.0123456789abcdef.tar"):
        store.create(f"{DOWNLOAD.folder}/{name}", b"of an attempt that was killed")
    store.create(f"{DOWNLOAD.folder}/part-00000.wip/files", b"")  # by which the next one knows
    footer, fresh = run_part(job, 0, 0, lambda stage: stage.open(), Attempt())
    left = [TABLE, footer["tar"]["name"], "part-00001.0123456789abcdef.tar"]
    assert fresh
    assert store.names(DOWNLOAD.folder) == sorted(left)
    store.create(f"{DOWNLOAD.folder}/part-00000.wip/00000000-00000002.parquet", b"of a slower attempt")
    assert run_part(job, 0, 0, lambda stage: stage.open(), Attempt()) == (footer, False)
    assert store.names(DOWNLOAD.folder) == sorted(left)


def test_a_part_costs_the_same_however_many_there_are(
    folder: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = folder("store")
    job, listed, names = job_for(store, DOWNLOAD), [], Store.names
    monkeypatch.setattr(Store, "names", lambda *a: (listed.append(a[1]), names(*a))[1])
    for fresh in (True, False):
        assert run_part(job, 0, 0, lambda stage: stage.open(), Attempt())[1] == fresh
    assert f"{DOWNLOAD.folder}/part-00000.wip" in listed
    assert DOWNLOAD.folder not in listed


def test_only_tables_with_wanted_columns_are_read(folder: Callable[[str], Store]) -> None:
    store = folder("store")
    job = job_for(store, DOWNLOAD, CAPTION)
    footer, _ = run_part(job, 0, 0, lambda stage: stage.open(), Attempt())
    store.remove(job.inputs[0])
    given = incoming(store, job, 1, 0, ("image", "tar"))
    assert given.parent == footer["content"]
    assert given.rows.column_names == ["key", "offset", "size", "tar"]
    assert len(given.rows) == ROWS - 1
    with pytest.raises(FileNotFoundError):
        incoming(store, job, 1, 0, ("alt_text", "image"))


def test_a_fault_leaves_no_scratch_file(folder: Callable[[str], Store]) -> None:
    store = folder("store")
    with pytest.raises(KeyboardInterrupt) as caught:  # held, so that it is not the garbage collector that cleans up
        run_part(job_for(store, DOWNLOAD), 0, 0, lambda stage: interrupted_after(1, Drawn(), []), Attempt())
    assert store.names(f"{DOWNLOAD.folder}/part-00000.wip") == ["files"]
    assert caught.value


@dataclass(frozen=True)
class Forgetful(Drawn):
    """Its files take a row less than they are given."""

    def sink(self, store: Store, folder: str, part: int) -> ImageTar:
        tar = super().sink(store, folder, part)
        add = tar.add
        tar.add = lambda batch: add(batch.slice(1))  # type: ignore[method-assign]
        return tar


def test_a_part_with_a_row_that_has_no_outcome_is_not_published(folder: Callable[[str], Store]) -> None:
    store, step = folder("store"), Step(Forgetful(), "input")
    with pytest.raises(ValueError, match="not every row that came in has an outcome"):
        run_part(job_for(store, step), 0, 0, lambda stage: stage.open(), Attempt())
    assert not store.exists(step.table(0))


def test_an_adopted_result_is_never_made(folder: Callable[[str], Store]) -> None:
    store = folder("store")
    adopted = Step(Drawn(), "input", adopted="0123456789ab")
    with pytest.raises(StaleError, match="adopted result download/0123456789ab has no part-00000"):
        run_part(job_for(store, adopted), 0, 0, lambda stage: stage.open(), Attempt())


BATCH = pa.table({"key": ["a", "b", "c"], "alt_text": ["1", "2", "3"]})


def test_the_guard_lets_a_broken_model_through() -> None:
    def broken(batch: pa.Table) -> pa.Table:
        raise ModelError("no weights")

    with pytest.raises(ModelError):
        guarded(broken, BATCH, "caption", ADDS["caption"])


def test_the_guard_fails_rows_by_their_own_error() -> None:
    def hostile(batch: pa.Table) -> pa.Table:
        keys = batch["key"].to_pylist()
        if "b" in keys:
            raise MemoryError
        if "c" in keys:
            raise ValueError("two\nlines and half a pair \ud800 " + "x" * 1000)
        return answer(batch, "caption", [{"captions": [], "caption_notes": []}] * len(batch), ADDS["caption"])

    rows = guarded(hostile, BATCH, "caption", ADDS["caption"]).to_pylist()
    assert [(row["key"], row["outcome"], row["reason"]) for row in rows] == [
        ("a", "kept", None), ("b", "failed", "out_of_memory"), ("c", "failed", "error"),
    ]  # fmt: skip
    assert rows[2]["detail"].startswith("ValueError: two lines and half a pair ? xxx")
    assert len(rows[2]["detail"]) == 500


def test_the_guard_takes_no_answer_for_other_rows() -> None:
    def muddled(batch: pa.Table) -> pa.Table:
        found = answer(batch, "caption", [{"captions": [], "caption_notes": []}] * len(batch), ADDS["caption"])
        return found.take(list(range(len(found)))[::-1])

    rows = guarded(muddled, BATCH, "caption", ADDS["caption"])
    assert rows["key"].to_pylist() == ["a", "b", "c"]
    assert "did not answer" in guarded(lambda b: muddled(BATCH), BATCH, "caption", ADDS["caption"])["detail"][0].as_py()
