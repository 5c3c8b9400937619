"""One part through one step, on whatever machine: read what came in, run the guarded stage, save, publish.

Every engine calls `run_part`; nothing else in the project computes a result. Rows go through in their stored order, so
that what is unfinished is always a prefix of the part: it is saved now and then, and any later attempt goes on from it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..models.contract import ModelError
from ..transforms.outcomes import Drop
from ..transforms.records import ADDS, INPUT, INPUT_MORE, step_schema
from .guard import guarded
from .leases import lease
from .stage import Function, InTwo, Place, Placed, Sink, Stage, Step, WithFiles, answer, part_name
from .store import Store, encode_table, wip
from .takedown import NAMED_BY, obeyed, obeying

_AHEAD = 2  # batches read while the model is busy
_PIECE_BYTES = 8 << 20  # of blobs in one saved piece; encoding takes a few times as much memory


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know, on any machine."""

    store_url: str
    storage_options: Mapping[str, Any]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]  # the input table of every part
    batch: Mapping[str, int]
    threads: Mapping[str, int]  # that prepare batches ahead, by step
    save_every_s: float
    workers: Mapping[str, int] = field(default_factory=dict)  # that share a step's parts, at most; known to the engine
    run: str = ""  # whose leases keep other runs from a part; none are taken where it has no name

    def open_store(self) -> Store:
        """Open the store on this worker."""
        return Store(self.store_url, self.storage_options)


class StaleError(Exception):
    """Two tables of one part do not belong together; the part must be done again from the earlier one."""


@dataclass(frozen=True)
class Incoming:
    """The rows that a step receives of one part, and the content hash of the table that they come from."""

    rows: pa.Table
    parent: str
    tar: str | None


def incoming(store: Store, job: Job, index: int, part: int, wanted: tuple[str, ...]) -> Incoming:
    """Join the wanted columns of all earlier steps for the rows that reached step `index`.

    A step's table has the rows that its parent kept, in the same order: so joining is filtering, checked by key. Raises
    FileNotFoundError where an earlier step is not done, StaleError where tables do not fit.
    """
    columns = [name for name in wanted if name not in ("image", "select")]
    columns += ["offset", "size"] if "image" in wanted else []
    mine = [f for f in (*INPUT, *INPUT_MORE) if f.name in columns]
    rows, footer = store.read_whole(job.inputs[part], ["key", *(f.name for f in mine)])
    for f in mine:
        if f.name not in rows.column_names:  # of those that only some input tables have
            rows = rows.append_column(f, pa.nulls(len(rows), f.type))
    tar = None
    for step in job.steps[:index]:
        name = step.table(part)
        own = [c for c in ADDS[step.name].names if c in columns]
        parent = footer["content"]
        table, footer = store.read_whole(name, ["key", "outcome", *own])
        if footer["parent"] != parent:
            raise StaleError(f"{name} was made from another table than {parent[:12]}")
        if not table["key"].equals(rows["key"]):
            raise StaleError(f"{name} does not have its parent's rows")
        for column in own:
            rows = rows.append_column(table.field(column), table[column])
        rows = rows.filter(pc.equal(table["outcome"], "kept"))
        if step.name == "download":
            tar = f"{step.folder}/{footer['tar']['name']}"
            if "tar" in wanted:
                rows = rows.append_column("tar", pa.repeat(pa.scalar(tar), len(rows)))
        if step.name == "select" and "select" in wanted:
            rows = rows.append_column("select", pa.repeat(pa.scalar(step.fingerprint), len(rows)))
    return Incoming(rows.combine_chunks(), footer["content"], tar)


def _require(store: Store, name: str) -> dict[str, Any]:
    footer = store.footer(name)
    if footer is None:
        raise FileNotFoundError(name)
    return footer


def finished(store: Store, job: Job, index: int, part: int) -> dict[str, Any] | None:
    """The footer of a part's table if it was made from the parent table that is there now, else None."""
    footer = store.footer(job.steps[index].table(part))
    if footer is None:
        return None
    parent = _require(store, job.steps[index - 1].table(part) if index else job.inputs[part])
    return footer if footer["parent"] == parent["content"] else None


@dataclass
class Attempt:
    """How one attempt goes about a part. `alone` names each row before it is tried, to find the one that kills."""

    culprits: frozenset[str] = frozenset()  # keys that killed a worker when they were tried alone
    alone: bool = False
    on_rows: Callable[[int], None] = lambda rows: None  # at first those that were saved before, if only 0
    on_key: Callable[[str | None], None] = lambda key: None
    on_read: Callable[[], None] = lambda: None  # the last rows are read and on their way to the model


def run_part(
    job: Job, index: int, part: int, opener: Callable[[Stage], Function], attempt: Attempt
) -> tuple[dict[str, Any], bool]:
    """Do step `index` for one part unless it is done; return its footer and whether there was anything to do.

    `opener` gives the stage's function, and is not called where no row is left. Raises StaleError for a part that an
    adopted result does not have, LeasedError for one that another run is at work on.
    """
    store, step = job.open_store(), job.steps[index]
    if footer := finished(store, job, index, part):
        _tidy(store, step, part, footer)
        return footer, False
    if step.adopted:
        raise StaleError(f"the adopted result {step.folder} has no {part_name(part)} for these inputs")
    if step.name == "dedup":  # decided over all parts at once, in the driver
        raise StaleError(f"{step.table(part)} is gone, or was made from another table; run again")
    with lease(store, step.table(part), job.run):
        # Another run may have published between the look and the lease.
        if job.run and (footer := finished(store, job, index, part)):
            return footer, False
        return _do(store, job, index, part, opener, attempt), True


def _do(
    store: Store, job: Job, index: int, part: int, opener: Callable[[Stage], Function], attempt: Attempt
) -> dict[str, Any]:
    """Do what is left of step `index` for one part, and publish it; return its footer."""
    step = job.steps[index]
    stage = step.stage
    if isinstance(stage, Placed):
        stage = stage.at(Place(store, job.workers.get(step.name, 1)))
    takedown = obeyed(store)
    given = incoming(store, job, index, part, (*stage.reads, *(NAMED_BY if takedown else ())))
    sink = stage.sink(store, step.folder, part) if isinstance(stage, WithFiles) else None
    saver = Saver(store, job, step, part, given, sink)
    try:
        saver.resume()
        attempt.on_rows(saver.done)
        function = _open(opener, stage) if saver.done < len(given.rows) else None
        if function and takedown:
            function = obeying(function, stage, takedown)
        size = 1 if attempt.alone else job.batch[step.name]
        # A row that is tried alone is also prepared alone, so that the right one is blamed where preparing kills.
        early = function if isinstance(function, InTwo) and not attempt.alone else None
        threads = job.threads.get(step.name, 1)
        for batch, prepared in _ahead(store, given, stage, (saver.done, size), early, threads, attempt.on_read):
            assert function is not None
            result = _attempt(function, batch, stage, attempt, prepared)
            saver.add(sink.add(result) if sink else result)
            attempt.on_rows(len(batch))
        attempt.on_key(None)  # a death from here on is no row's fault
        footer = step_footer(step, part, given, saver.table(), sink.close() if sink else {})
    except BaseException:
        if sink:
            sink.abort()
        raise
    return _publish(store, step, part, given.parent, saver.table(), footer)


def _open(opener: Callable[[Stage], Function], stage: Stage) -> Function:
    try:
        return opener(stage)
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises, no part is to blame for it
        text = " ".join(str(error).split())
        raise ModelError(f"{stage.name}: the model cannot be opened: {type(error).__name__}: {text}") from error


def _attempt(
    function: Function, batch: pa.Table, stage: Stage, attempt: Attempt, prepared: Future[Any] | None
) -> pa.Table:
    key = batch["key"][0].as_py()
    if attempt.alone and key in attempt.culprits:
        return answer(batch, stage.name, [Drop("crashed", "killed its worker when it was tried alone")], stage.emits)
    if attempt.alone:
        attempt.on_key(key)
    return guarded(function, batch, stage.name, stage.emits, prepared)


def _ahead(
    store: Store,
    given: Incoming,
    stage: Stage,
    span: tuple[int, int],
    early: InTwo | None,
    threads: int,
    on_read: Callable[[], None],
) -> Iterator[tuple[pa.Table, Future[Any] | None]]:
    """The batches from row `start` on, of `size` rows, with their images, while the batch before is at work.

    One thread reads; `threads` more prepare what was read, for a function `early` that works in two moments; once these
    have the last batch, `on_read` is called.
    """
    start, size = span

    def read(first: int) -> pa.Table:
        batch = given.rows.slice(first, size)
        if "image" not in stage.reads:
            return batch
        offsets, sizes = batch["offset"].to_pylist(), batch["size"].to_pylist()
        assert given.tar is not None
        images = store.read_ranges(given.tar, [(o, o + s) for o, s in zip(offsets, sizes, strict=True)])
        return batch.append_column("image", pa.array(images, pa.binary()))

    def prepare(reading: Future[pa.Table]) -> Any:
        assert early is not None
        return early.prepare(reading.result())

    ahead = threads + 1 if early else _AHEAD
    pending: deque[tuple[Future[pa.Table], Future[Any] | None]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads) as preparer:
        try:
            for first in range(start, len(given.rows), size):
                reading = reader.submit(read, first)
                pending.append((reading, preparer.submit(prepare, reading) if early else None))
                if early and first + size >= len(given.rows):  # not later: an engine may be at all that waits, at once
                    on_read()
                if len(pending) > ahead:
                    batch, prepared = pending.popleft()
                    yield batch.result(), prepared
            for batch, prepared in pending:
                yield batch.result(), prepared
        finally:
            preparer.shutdown(cancel_futures=True)
            reader.shutdown(cancel_futures=True)


def step_footer(step: Step, part: int, given: Incoming, table: pa.Table, files: dict[str, Any]) -> dict[str, Any]:
    """What a part's table says of itself. Raises ValueError unless every incoming row has an outcome, in order."""
    if not table["key"].combine_chunks().equals(given.rows["key"].combine_chunks()):
        raise ValueError(f"{step.table(part)}: not every row that came in has an outcome")
    head = {"step": step.name, "fingerprint": step.fingerprint, "part": part, "parent": given.parent}
    return {**head, "rows": len(table), "counts": counted(table), **files}


def counted(table: pa.Table) -> dict[str, Any]:
    """The rows of a step's table by outcome and reason, as its footer has them."""
    counts: dict[str, Any] = {"kept": 0, "rejected": {}, "failed": {}}
    for row in table.group_by(["outcome", "reason"], use_threads=False).aggregate([([], "count_all")]).to_pylist():
        if row["outcome"] == "kept":
            counts["kept"] = row["count_all"]
        else:
            counts[row["outcome"]][row["reason"]] = row["count_all"]
    return counts


def _publish(
    store: Store, step: Step, part: int, parent: str, table: pa.Table, footer: dict[str, Any]
) -> dict[str, Any]:
    """Create the part's Parquet file, the mark that it is done; where another attempt was first, its result counts."""
    name, data = step.table(part), encode_table(table, footer)
    if not store.create(name, data):
        there = _require(store, name)
        if there["parent"] != parent:  # left from a parent that is gone: the one case where a table is replaced
            store.replace(name, data)
    published = _require(store, name)
    _tidy(store, step, part, published)
    return published


def _tidy(store: Store, step: Step, part: int, footer: dict[str, Any]) -> None:
    """Remove what attempts at a finished part left that lost or were killed: their wip, and tars that nothing cites."""
    store.sweep(step.table(part))
    if isinstance(step.stage, WithFiles):
        mine = {name for name in store.names(step.folder, step.stage.prefix(part)) if name.endswith(".tar")}
        for orphan in sorted(mine - step.stage.cited(footer)):
            store.remove(f"{step.folder}/{orphan}")


def piece(name: str) -> tuple[int, int] | None:
    """The rows, from first to before last, of a saved piece by its name; None for other files in a wip folder."""
    with suppress(ValueError):
        start, end = map(int, name.removesuffix(".parquet").split("-"))
        return start, end
    return None


class Saver:
    """The outcomes of one attempt, in order, saved about every `save_every_s` into the part's wip folder.

    A piece is named by its rows, `00000128-00000256.parquet`; pieces of several attempts may overlap, any chain of them
    from row 0 is good.
    """

    def __init__(self, store: Store, job: Job, step: Step, part: int, given: Incoming, sink: Sink | None) -> None:
        self._store, self._given, self._sink = store, given, sink
        self._folder = wip(step.table(part))
        self._schema = step_schema(step.name)
        self._every_s, self._last = job.save_every_s, time.monotonic()
        self._tables: list[pa.Table] = []
        self._saved = 0
        self.done = 0

    def resume(self) -> None:
        """Take over what earlier attempts at the same incoming rows saved."""
        spans: dict[int, int] = {}
        for start, end in filter(None, map(piece, self._store.names(self._folder))):
            spans[start] = max(end, spans.get(start, 0))
        while self.done in spans:
            name = f"{self._folder}/{self.done:08d}-{spans[self.done]:08d}.parquet"
            footer = self._store.footer(name)
            if footer is None or footer["parent"] != self._given.parent:
                break
            rows = self._store.read_table(name)
            self.add(self._sink.add(rows) if self._sink else rows)
            self._saved = self.done

    def add(self, rows: pa.Table) -> None:
        """Take the outcomes of the next rows."""
        self._tables.append(rows.select(self._schema.names).cast(self._schema))
        self.done += len(rows)
        if time.monotonic() - self._last >= self._every_s and self.done < len(self._given.rows):
            self._save()
            self._last = time.monotonic()

    def table(self) -> pa.Table:
        """All outcomes so far."""
        return pa.concat_tables(self._tables) if self._tables else self._schema.empty_table()

    def _save(self) -> None:
        rows = self.table().slice(self._saved)
        size = len(rows)
        if self._sink and "size" in rows.column_names:
            per_row = (pc.sum(rows["size"]).as_py() or 0) // len(rows) + 1
            size = max(1, _PIECE_BYTES // per_row)
        for start in range(0, len(rows), size):
            piece = rows.slice(start, size)
            whole = self._sink.blobs(piece) if self._sink else piece
            if whole is None:
                return
            name = f"{self._folder}/{self._saved:08d}-{self._saved + len(piece):08d}.parquet"
            self._store.create(name, encode_table(whole, {"parent": self._given.parent}))
            self._saved += len(piece)
            del whole
            pa.default_memory_pool().release_unused()  # else the pieces' buffers add up
