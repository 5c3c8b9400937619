"""A step as Ray's operator: what runs on an actor, and what it leaves in the store in case that it dies."""

import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Condition, Lock, Semaphore
from typing import Any

import pyarrow as pa

from ...models.contract import ModelError
from ..leases import Held, LeasedError, lease
from ..stage import Function, Stage
from ..store import Store, wip
from ..work import Attempt, Job, found_done, run_part
from . import Engine, Event, local
from .worker import HANGS, Clock, Turn, Watch, in_turn

_DEATHS = 2  # of a part's worker; then the part runs in a subprocess of one
_GIVE_UP = 8  # deaths: it is not the part's rows that kill
_FAULTS = 3  # exceptions of a part (a store that is away, a full disk) before it is given up
_BACKOFF_S = 1.0
_BEGINS_S = 10.0  # a block needs less to reach its actor; one that does not come was done before the actor died

# {"part": its number, "state": "" (goes on), or why it does not: "lost", "leased" (to another run), "elsewhere" (as it
# hung on this node), "model" or "version", "said": JSON of [kind, step, text] each}
Row = dict[str, Any]


@functools.cache
def version() -> str:
    """Of vesl, as it is installed in this process: its number and a digest of its code, as a number has many states."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[2]
    paths = [path for name in ("models", "pipeline", "transforms") for path in (root / name).rglob("*.py")]
    for path in sorted(path for path in paths if path.stem.isidentifier()):  # no editor's, which cannot be imported
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return f"{importlib.metadata.version('vesl')}+{digest.hexdigest()[:12]}"


class Reading:
    """How far an actor has read its blocks: the driver waits for the end of one before it hands over the next."""

    def __init__(self) -> None:
        self._read: dict[int, bool] = {}  # by the number of Ray's task
        self._changed = Condition()

    def tell(self, task: int, read: bool) -> None:
        """Say that a block has begun, or that the last of its rows are on their way to the model."""
        with self._changed:
            if task in self._read or not read:  # not where the driver was told before the end
                self._read[task] = read
            self._changed.notify_all()

    def wait(self, task: int) -> None:
        """Return once a block is read."""
        with self._changed:
            self._changed.wait_for(lambda: task in self._read, _BEGINS_S)
            self._changed.wait_for(lambda: self._read.get(task, True))
            self._read.pop(task, None)


READING = Reading()  # of this actor


def _node() -> str:
    """Ray's name of the node that this process is on; empty where it is not Ray's."""
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else ""


class Operator:
    """One step on an actor. What goes wrong with a part travels on in its row; no exception ends the pipeline.

    Where a step opens a model, the next part is read and prepared while the model is at the last rows of one, so that
    it does not wait at the border of the two. So an actor is given another block as soon as it has read one, not
    before, as it may yet be slow while others idle; the parts of one block are done in two threads, of which one waits
    at the gate until the other has read its part. A part that killed a worker before has the actor to itself.
    """

    def __init__(self, job: Job, index: int, version: str, engine: Engine, stay: frozenset[str] = frozenset()) -> None:
        self._job, self._index, self._wanted = replace(job, run=""), index, version  # the leases are taken here
        self._step, self._engine = job.steps[index], engine
        self._node, self._stay = _node(), stay  # the nodes on which a part that hung is tried again
        self._function: Function | None = None
        self._opening = 0.0
        self._places, self._gate, self._turn, self._clock = Semaphore(2), Lock(), Turn(), Clock()
        self._watch, self._leases = Watch(engine, self._turn), set[str]()
        self._run, self._hang = job.run, f"hung-{job.run.rpartition('/')[2]}-"  # how a note's name begins
        self._unread: dict[int, tuple[int, set[int]]] = {}  # by part: Ray's task, and all such parts of its block
        self._end = ""  # "model" or "version": no part can be done here
        gc.freeze()  # what was imported stays: it need not be looked through for garbage again and again

    def __call__(self, block: pa.Table) -> pa.Table:
        """Do the step for the parts of a block, which is told of in the same rows."""
        rows = block.to_pylist()
        if not self._step.stage.opens_model:
            rows = [self._row(row) for row in rows]
        else:
            self._begin({row["part"] for row in rows})
            with ThreadPoolExecutor(2) as pool:
                rows = list(pool.map(self._row, rows))
        return pa.Table.from_pylist(rows, schema=block.schema)

    def _begin(self, parts: set[int]) -> None:
        from ray.data._internal.execution.interfaces import TaskContext

        context = TaskContext.get_current()
        assert context is not None
        READING.tell(context.task_idx, False)
        for part in parts:
            self._unread[part] = context.task_idx, parts

    def _was_read(self, part: int) -> None:
        """Tell that a block is read, where this was the last of its parts."""
        if block := self._unread.pop(part, None):
            task, left = block
            left.discard(part)
            if not left:
                READING.tell(task, True)

    def _row(self, row: Row) -> Row:
        if row["state"] or self._end:
            self._was_read(row["part"])
            return row | {"state": row["state"] or self._end}
        said: list[tuple[str, str, str]] = []
        try:
            state = self._carry(row["part"], lambda kind, text: said.append((kind, self._step.name, text)))
        finally:
            self._was_read(row["part"])
        self._end = state if state in ("model", "version") else self._end
        return {"part": row["part"], "state": state, "said": json.dumps([*json.loads(row["said"]), *said])}

    def _carry(self, part: int, say: Callable[[str, str], None]) -> str:
        """Try the part until it is done or given up; the row's new state."""
        if (there := version()) != self._wanted:
            say("version", f"{platform.node()} has vesl {there}, the driver {self._wanted}: install the same on both")
            return "version"
        for left in range(_FAULTS - 1, -1, -1):
            try:
                with self._places:
                    return self._attempt(part, say)
            except LeasedError:
                say("leased", self._step.table(part))
                return "leased"
            except ModelError as error:
                say("model", str(error))
                return "model"
            except Exception as error:  # noqa: BLE001  (a fault of a part, not of the run)
                at = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}:{at.lineno})"
                say("retry" if left else "lost", text)
            if left:
                time.sleep(_BACKOFF_S * 3 ** (_FAULTS - 1 - left))
        return "lost"

    def _attempt(self, part: int, say: Callable[[str, str], None]) -> str:
        """Do the part, unless it is done or to be given up; the row's new state."""
        store, table = self._job.store, self._step.table(part)
        if footer := found_done(store, self._job, self._index, part):
            say("done", json.dumps([False, footer]))
            return ""
        gate = ExitStack()
        gate.enter_context(self._gate)
        with gate, closing(self._turn), self._lease(store, table) as held:
            if end := self._before(store, wip(table), held.deaths, say):
                return end
            if held.deaths >= _DEATHS:
                return self._alone(part, say)
            counts: list[int] = []

            def on_rows(rows: int) -> None:
                counts.append(rows)
                self._watch.hear()

            def on_read() -> None:
                self._turn.take()
                if not held.deaths:
                    gate.close()
                    self._was_read(part)

            attempt = Attempt(on_rows=on_rows, on_key=lambda key: self._turn.close(), on_read=on_read)
            begun = time.monotonic()
            with self._watch.over(lambda why: self._hung(store, wip(table), why)):
                try:
                    footer, fresh = run_part(self._job, self._index, part, self._open, attempt)
                except SystemExit:  # a library's: it ends the worker, with the lease as it is
                    traceback.print_exc()
                    os._exit(1)
            opening, self._opening = self._opening, 0.0
            if opening:
                say("open", f"{opening:.3f} 0")
            if fresh:
                count(footer)
                say("spent", f"{self._clock.since(begun) - opening:.3f} {sum(counts[1:])}")
            say("done", json.dumps([fresh, footer]))
            return ""

    def _before(self, store: Store, folder: str, deaths: int, say: Callable[[str, str], None]) -> str:
        """Tell what became of earlier attempts; the row's new state where there is to be none here."""
        if hangs := store.names(folder, self._hang):
            why, node = json.loads(store.read(f"{folder}/{hangs[-1]}"))
            if len(hangs) < HANGS and node == self._node and node not in self._stay:
                say("elsewhere", node)
                return "elsewhere"
            say("retry", why)  # also before the end: the attempt that could have said so hung too
            if len(hangs) >= HANGS:
                say("lost", f"{why}, {len(hangs)} times")
                return "lost"
        if deaths:
            say("retry" if deaths < _GIVE_UP else "lost", f"the worker died, {deaths} times in this run")
        return "lost" if deaths >= _GIVE_UP else ""

    @contextmanager
    def _lease(self, store: Store, table: str) -> Iterator[Held]:
        """Hold the part's lease; where there was one before, only in its turn, so that no other part's death counts."""
        if store.names(wip(table), "lease-"):
            self._turn.take()
        with lease(store, table, self._run) as held:
            self._leases.add(held.name)
            try:
                yield held
            finally:
                self._leases.discard(held.name)

    def _hung(self, store: Store, folder: str, why: str) -> None:
        """Before this process is ended for a part that hangs: that is the fault of no other, and no death."""
        store.claim(f"{folder}/{self._hang}{time.time_ns()}", json.dumps([why, self._node]).encode())
        for name in list(self._leases):
            store.remove(name)

    def _open(self, stage: Stage) -> Function:
        if self._function is None:
            begun = time.monotonic()
            self._function = in_turn(stage.open(), self._turn)
            self._opening = time.monotonic() - begun if stage.opens_model else 0.0
        return self._function

    def _alone(self, part: int, say: Callable[[str, str], None]) -> str:
        """Do the part in a subprocess, which finds the rows that kill; they fail as `crashed`."""
        self._function = None  # the subprocess opens its own model, maybe on the same accelerator
        gc.collect()
        state = ""

        def listen(event: Event) -> None:
            nonlocal state
            if event.kind in ("retry", "lost"):
                say(event.kind, event.text)
            if event.kind == "lost":
                state = "lost"
            if event.kind == "done" and event.step == self._step.name:
                if event.fresh:
                    count(event.footer)
                say("done", json.dumps([event.fresh, event.footer]))

        local.run(
            replace(self._job, steps=self._job.steps[: self._index + 1]),
            [part],
            replace(self._engine, workers=1),
            listen,
        )
        return state


@functools.lru_cache(1)
def _metric() -> Any:
    from ray.util.metrics import Counter

    return Counter("vesl_rows", "Rows through a step, by outcome and reason", ("step", "outcome", "reason"))


def count(footer: dict[str, Any]) -> None:
    """Add a part's outcomes to Ray's metric `vesl_rows`, by step, outcome and reason."""
    counts = footer["counts"]
    found = [("kept", "", counts["kept"])]
    found += [(outcome, reason, n) for outcome in ("rejected", "failed") for reason, n in counts[outcome].items()]
    for outcome, reason, n in found:
        if n:
            _metric().inc(n, {"step": footer["step"], "outcome": outcome, "reason": reason})
