"""One part through one step, on whatever machine: read what came in, run the guarded stage, save, publish.

Every engine calls `run_part`; nothing else in the project computes a result. Rows go through in their stored order, but
where a function takes them one by one, as soon as each is done. What is done of an unfinished part is saved now and
then, and any later attempt goes on from it.
"""

import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..models.contract import ModelError
from ..transforms.outcomes import Drop
from ..transforms.records import ADDS, INPUT, INPUT_MORE, step_schema
from .guard import guarded
from .leases import lease
from .stage import ByRow, Function, InTwo, Place, Placed, Sink, Stage, Step, WithFiles, answer, part_name
from .store import Store, encode_both, encode_piece, wip
from .takedown import NAMED_BY, match, obeyed

_AHEAD = 2  # batches read while the model is busy
FILES = "files"  # in a wip folder: an attempt may have published files beside the table
_GATHER_S = 0.2  # for rows that are done one by one, to make a batch
_SAVE_S, _SAVE_SHARE = 1.0, 0.02  # between two saves, at least; of that time, what the quickest save took, at most
_PIECE_BYTES = 4 << 20  # of blobs in one saved piece; encoding takes a few times as much memory


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
    rows: float = math.inf  # of a part, on average

    @cached_property
    def store(self) -> Store:
        """The store, opened on this worker."""
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

    A step's table has the rows that its parent kept, in the same order: so joining is filtering, checked by key. What
    lies before the first wanted column is not read: the rows are those of any later table. Raises FileNotFoundError
    where an earlier step is not done, StaleError where tables do not fit.
    """
    columns = {*wanted, "offset", "size"} if {"image", "tar"} & {*wanted} else {*wanted}
    steps = [None, *job.steps[:index]]  # None: the input
    fields = [[f for f in (ADDS[s.name] if s else (*INPUT, *INPUT_MORE)) if f.name in columns] for s in steps]
    first = next((i for i, own in enumerate(fields) if own), index)
    rows, parent, tar = None, "", None
    for step, own in [*zip(steps, fields, strict=True)][first:]:
        name = step.table(part) if step else job.inputs[part]
        table, footer = store.read_whole(name, ["key", *["outcome"] * bool(step), *(f.name for f in own)])
        if rows is None:
            rows = table.select(["key"])
        elif footer["parent"] != parent:
            raise StaleError(f"{name} was made from another table than {parent[:12]}")
        elif not table["key"].equals(rows["key"]):
            raise StaleError(f"{name} does not have its parent's rows")
        parent = footer["content"]
        for f in own:
            if f.name not in table.column_names:  # of those that only some input tables have
                table = table.append_column(f, pa.nulls(len(table), f.type))
            rows = rows.append_column(table.field(f.name), table[f.name])
        if step:
            rows = rows.filter(pc.equal(table["outcome"], "kept"))
        if step and step.name == "download":
            tar = f"{step.folder}/{footer['tar']['name']}"
            if "tar" in wanted:
                rows = rows.append_column("tar", pa.repeat(pa.scalar(tar), len(rows)))
        if step and step.name == "select" and "select" in wanted:
            rows = rows.append_column("select", pa.repeat(pa.scalar(step.fingerprint), len(rows)))
    assert rows is not None
    return Incoming(rows.combine_chunks(), parent, tar)


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


def found_done(store: Store, job: Job, index: int, part: int) -> dict[str, Any] | None:
    """The same; what attempts left that did not come to publish is removed."""
    footer, step = finished(store, job, index, part), job.steps[index]
    if footer and store.exists(wip(step.table(part))):
        tidy(store, step, part, footer)
    return footer


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
    store, step = job.store, job.steps[index]
    if footer := found_done(store, job, index, part):
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
    sink, first = None, True
    if isinstance(stage, WithFiles):
        first = store.claim(f"{wip(step.table(part))}/{FILES}", uuid.uuid4().bytes)
        sink = stage.sink(store, step.folder, part)
    saver = Saver(store, job, step, part, given, sink)
    try:
        saver.resume()
        attempt.on_rows(saver.done)
        rows = saver.missing()
        if takedown:  # no function sees these
            named = match(rows, takedown)
            gone, rows = rows.filter(named), rows.filter(pc.invert(named))
            saver.add(answer(gone, stage.name, [Drop("taken_down")] * len(gone), stage.emits))
            attempt.on_rows(len(gone))
        function = _open(opener, stage) if len(rows) else None
        size = 1 if attempt.alone else job.batch[step.name]
        # A row that is tried alone is also prepared alone, so that the right one is blamed where preparing kills.
        early = function if isinstance(function, InTwo) and not attempt.alone else None
        threads = job.threads.get(step.name, 1)
        batches: Iterator[tuple[pa.Table, Future[Any] | None]]
        if isinstance(early, ByRow):
            batches = _as_they_come(rows, early, size, size * (threads + 2), attempt.on_read)
        else:
            batches = _ahead(store, given.tar, rows, stage, size, early, threads, attempt.on_read)
        for batch, prepared in batches:
            assert function is not None
            saver.add(_attempt(function, batch, stage, attempt, prepared))
            attempt.on_rows(len(batch))
        attempt.on_key(None)  # a death from here on is no row's fault
        table, files = sink.close(saver.table()) if sink else (saver.table(), {})
        footer = step_footer(step, part, given, table, files)
    except BaseException:
        if sink:
            sink.abort()
        raise
    return _publish(store, step, part, table, footer, first)


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
    tar: str | None,
    rows: pa.Table,
    stage: Stage,
    size: int,
    early: InTwo | None,
    threads: int,
    on_read: Callable[[], None],
) -> Iterator[tuple[pa.Table, Future[Any] | None]]:
    """Batches of `size` rows, with their images out of `tar`, each read while the one before is at work.

    One thread reads; `threads` more, which all parts share, prepare what was read, for a function `early` that works in
    two moments; once these have the last batch, `on_read` is called.
    """

    def read(first: int) -> pa.Table:
        batch = rows.slice(first, size)
        if "image" not in stage.reads:
            return batch
        offsets, sizes = batch["offset"].to_pylist(), batch["size"].to_pylist()
        assert tar is not None
        images = store.read_ranges(tar, [(o, o + s) for o, s in zip(offsets, sizes, strict=True)])
        return batch.append_column("image", pa.array(images, pa.binary()))

    def prepare(reading: Future[pa.Table]) -> Any:
        assert early is not None
        return early.prepare(reading.result())

    ahead = threads + 1 if early else _AHEAD
    preparers = early.preparers(threads) if early else None
    pending: deque[tuple[Future[pa.Table], Future[Any] | None]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for first in range(0, len(rows), size):
                reading = reader.submit(read, first)
                pending.append((reading, preparers.submit(prepare, reading) if preparers else None))
                if early and first + size >= len(rows):  # not later: an engine may be at all that waits, at once
                    on_read()
                if len(pending) > ahead:
                    batch, prepared = pending.popleft()
                    yield batch.result(), prepared
            while pending:
                batch, prepared = pending.popleft()
                yield batch.result(), prepared
        finally:
            for _, prepared in pending:
                if prepared:
                    prepared.cancel()
            reader.shutdown(cancel_futures=True)


def _as_they_come(
    rows: pa.Table, function: ByRow, size: int, window: int, on_read: Callable[[], None]
) -> Iterator[tuple[pa.Table, Future[Any] | None]]:
    """Batches of at most `size` rows that are done, in any order, while up to `window` others are under way.

    Once all have begun, `on_read` is called. Those under way are given up where nobody wants more.
    """
    records = (record for batch in rows.to_batches(size) for record in batch.to_pylist())
    done: SimpleQueue[Future[Any]] = SimpleQueue()
    under_way: dict[Future[Any], int] = {}
    begun = 0
    try:
        while begun < len(rows) or under_way:
            while begun < len(rows) and len(under_way) < window:
                future = function.begin(next(records))
                under_way[future] = begun
                future.add_done_callback(done.put)
                begun += 1
                if begun == len(rows):
                    on_read()
            there, until = [done.get()], time.monotonic() + _GATHER_S
            with suppress(Empty):
                while len(there) < min(size, len(under_way)):
                    there.append(done.get(timeout=max(0.0, until - time.monotonic())))
            prepared: Future[Any] = Future()
            prepared.set_result(there)
            yield rows.take([under_way.pop(future) for future in there]), prepared
    finally:
        for future in under_way:
            future.cancel()


def step_footer(step: Step, part: int, given: Incoming, table: pa.Table, files: dict[str, Any]) -> dict[str, Any]:
    """What a part's table says of itself. Raises ValueError unless every incoming row has an outcome, in order."""
    if not table["key"].combine_chunks().equals(given.rows["key"].combine_chunks()):
        raise ValueError(f"{step.table(part)}: not every row that came in has an outcome")
    head = {"step": step.name, "fingerprint": step.fingerprint, "part": part, "parent": given.parent}
    return {**head, "rows": len(table), "counts": counted(table), **files}


def counted(table: pa.Table) -> dict[str, Any]:
    """The rows of a step's table by outcome and reason, as its footer has them."""
    drops = table.select(["outcome", "reason"]).filter(pc.not_equal(table["outcome"], "kept")).to_pydict()
    counts: dict[str, Any] = {"kept": len(table) - len(drops["outcome"]), "rejected": {}, "failed": {}}
    for (outcome, reason), count in Counter(zip(drops["outcome"], drops["reason"], strict=True)).items():
        counts[outcome][reason] = count
    return counts


def _publish(
    store: Store, step: Step, part: int, table: pa.Table, footer: dict[str, Any], first: bool
) -> dict[str, Any]:
    """Create the part's Parquet file, the mark that it is done; where another attempt was first, its result counts.

    For the `first` attempt at all there is nothing else to tidy than its own wip folder.
    """
    name = step.table(part)
    data, written = encode_both(table, footer)
    settled = store.settle(name, data)
    if settled and first:
        store.sweep(name)
        return written
    if not settled and _require(store, name)["parent"] != footer["parent"]:
        store.replace(name, data)  # left from a parent that is gone: the one case where a table is replaced
    published = _require(store, name)
    tidy(store, step, part, published)
    return published


def tidy(store: Store, step: Step, part: int, footer: Mapping[str, Any]) -> None:
    """Remove what attempts at a finished part left that lost or were killed: tars that nothing cites, and their wip.

    That goes last, as without it there is nothing to tidy: so of parts that are done no folder is listed, which would
    make the time for each grow with their number.
    """
    if isinstance(step.stage, WithFiles):
        mine = {name for name in store.names(step.folder, step.stage.prefix(part)) if name.endswith(".tar")}
        for orphan in sorted(mine - step.stage.cited(footer)):
            store.remove(f"{step.folder}/{orphan}")
    store.sweep(step.table(part))


def piece(name: str) -> tuple[int, int] | None:
    """The rows, from first to before last, of a saved piece by its name; None for other files in a wip folder."""
    with suppress(ValueError):
        start, end = map(int, name.removesuffix(".parquet").split("-"))
        return start, end
    return None


class Saver:
    """The outcomes of one attempt, saved into the part's wip folder as often as that is cheap.

    That is once a second, less often where it takes long, and at least every `save_every_s`. A piece is named by how
    many rows were done before and after it, `00000128-00000256.parquet`; its rows are known by their keys, so those of
    several attempts go together, whatever rows they have.
    """

    def __init__(self, store: Store, job: Job, step: Step, part: int, given: Incoming, sink: Sink | None) -> None:
        self._store, self._given, self._sink = store, given, sink
        self._folder = wip(step.table(part))
        self._schema = step_schema(step.name)
        self._every_s, self._cost_s = job.save_every_s, math.inf
        self._next = time.monotonic() + min(self._every_s, _SAVE_S)
        self._tables: list[pa.Table] = []
        self._fresh: list[pa.Table] = []  # those of them that are not saved
        self.done = 0

    def resume(self) -> None:
        """Take over what earlier attempts at the same incoming rows saved."""
        for name in filter(piece, self._store.names(self._folder)):
            footer = self._store.footer(f"{self._folder}/{name}")
            if footer is not None and footer["parent"] == self._given.parent:
                rows = self._store.read_table(f"{self._folder}/{name}")
                self._take(rows.filter(pc.invert(pc.is_in(rows["key"], self._keys()))))
        self._fresh.clear()

    def missing(self) -> pa.Table:
        """The incoming rows that are not done."""
        rows = self._given.rows
        return rows.filter(pc.invert(pc.is_in(rows["key"], self._keys()))) if self.done else rows

    def add(self, rows: pa.Table) -> None:
        """Take the outcomes of more rows, as the step's function gives them."""
        self._take(rows)
        if time.monotonic() >= self._next and self.done < len(self._given.rows):
            begun = time.monotonic()
            self._save()
            now = time.monotonic()
            self._cost_s = min(self._cost_s, now - begun)  # of a save as such: what it writes has to be written anyway
            self._next = now + min(self._every_s, max(_SAVE_S, self._cost_s / _SAVE_SHARE))

    def table(self) -> pa.Table:
        """All outcomes so far, in the order of the incoming rows."""
        table = pa.concat_tables([self._schema.empty_table(), *self._tables])
        wanted = self._given.rows["key"]
        same = table["key"].combine_chunks().equals(wanted.combine_chunks())
        return table if same else table.take(pc.index_in(wanted, table["key"].combine_chunks()))

    def _take(self, rows: pa.Table) -> None:
        table = (self._sink.add(rows) if self._sink else rows).select(self._schema.names).cast(self._schema)
        self._tables.append(table)
        self._fresh.append(table)
        self.done += len(table)

    def _keys(self) -> pa.Array:
        return pa.concat_arrays([pa.array([], pa.string()), *(c for t in self._tables for c in t["key"].chunks)])

    def _save(self) -> None:
        rows, self._fresh = pa.concat_tables(self._fresh), []
        size, saved = len(rows), self.done - len(rows)
        if self._sink and "size" in rows.column_names:
            per_row = (pc.sum(rows["size"]).as_py() or 0) // len(rows) + 1
            size = max(1, _PIECE_BYTES // per_row)
        for start in range(0, len(rows), size):
            piece = rows.slice(start, size)
            whole = self._sink.blobs(piece) if self._sink else piece
            if whole is None:
                return
            name = f"{self._folder}/{saved:08d}-{saved + len(piece):08d}.parquet"
            self._store.create(name, encode_piece(whole, {"parent": self._given.parent}))
            saved += len(piece)
            del whole
            pa.default_memory_pool().release_unused()  # else the pieces' buffers add up
