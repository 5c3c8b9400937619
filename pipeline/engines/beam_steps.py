"""The steps as Beam's own operators: for engine `beam`, and for pipelines of other people.

Elements are the numbers of parts. Everything here runs on the workers, or builds the pipeline that they run.
"""

# mypy: allow-untyped-calls
import json
import math
import os
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ...models.contract import ModelError
from ..leases import LeasedError
from ..stage import Function, InTwo, Stage, Step
from ..store import Store
from ..work import Attempt, Job, run_part
from . import Engine, Event, Resources
from .signs import at_work
from .worker import Clock, Turn, Watch, in_turn

NO_PART = -1  # of a note that concerns all parts
_FAULTS = 3  # exceptions of a part before it is given up


class _Shared:
    """A stage's function: opened once per worker process, and called by one thread at a time.

    Where it works in two moments, the batches of two parts are prepared ahead, so that it does not wait at the border
    of parts that come on several threads.
    """

    def __init__(self) -> None:
        self.lock, self.places, self.turn = threading.Lock(), threading.Semaphore(2), Turn()
        self.clock = Clock()
        self.function: Function | None = None

    def open(self, stage: Stage) -> bool:
        """Open it, unless it is open; whether it was opened now."""
        with self.lock:
            if self.function is not None:
                return False
            function = stage.open()
            self.function = in_turn(function, self.turn) if isinstance(function, InTwo) else self._alone(function)
            return True

    def _alone(self, function: Function) -> Function:
        def alone(batch: pa.Table) -> pa.Table:
            self.turn.take()
            try:
                return function(batch)
            finally:
                self.turn.close()

        return alone

    def use(self, until: ExitStack) -> Function:
        """The open function, for one part."""
        assert self.function is not None
        if isinstance(self.function, InTwo):
            until.enter_context(self.places)
            until.enter_context(closing(self.turn))
        return self.function


_SHARED: dict[str, _Shared] = {}
_SHARED_LOCK = threading.Lock()
_WATCHES: dict[tuple[str, float | None, float], Watch] = {}  # of this process, by step and limits


@dataclass(frozen=True)
class Notes:
    """What workers tell the driver through the store; nobody listens where there is no folder."""

    folder: str | None = None
    round: int = 0
    signs: str = ""  # a folder of the driver's machine, where workers show there that they live

    def tell(self, store: Store, event: Event) -> None:
        """Leave an event for the driver."""
        if self.folder:
            told = {name: getattr(event, name) for name in ("kind", "step", "part", "rows", "seconds", "text")}
            store.claim(f"{self.folder}/told/{time.time_ns()}-{uuid.uuid4().hex[:8]}.json", json.dumps(told).encode())

    def hung(self, store: Store, index: int, part: int, why: str) -> None:
        """Say that a part hangs, before this process is ended for it."""
        if self.folder:
            store.claim(f"{self.folder}/hung/{self.round}-{index}-{part}-{uuid.uuid4().hex[:8]}", why.encode())


@dataclass(frozen=True)
class _Work:
    """The body of a step's operator: the number of a part in, and out again; what was given up goes out as `lost`."""

    job: Job
    index: int
    notes: Notes
    engine: Engine

    def __call__(self, part: int) -> Iterator[Any]:
        from apache_beam.pvalue import TaggedOutput

        store, step = self.job.store, self.job.steps[self.index]
        try:
            text = self._attempts(store, step, part)
        except LeasedError:
            self.notes.tell(store, Event("wait", step.name, part, text=step.table(part)))
            return
        yield TaggedOutput("lost", {"step": step.name, "part": part, "text": text}) if text else part

    def _attempts(self, store: Store, step: Step, part: int) -> str:
        """Do the part; return what was wrong if that did not go at any attempt, else nothing."""
        text = ""
        for fault in range(_FAULTS):
            if fault:
                with suppress(Exception):
                    self.notes.tell(store, Event("retry", step.name, part, text=text))
                time.sleep(2.0**fault / 2)
            try:
                result = self._attempt(store, step, part)
            except LeasedError:
                raise
            except ModelError as error:
                self.notes.tell(store, Event("lost", step.name, NO_PART, text=str(error)))
                raise
            except Exception as error:  # noqa: BLE001  (a fault of a part, not of the run)
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
            else:
                _count(step.name, *result)
                return ""
        _count(step.name, None, False)
        return text

    def _attempt(self, store: Store, step: Step, part: int) -> tuple[dict[str, Any], bool]:
        with _SHARED_LOCK:  # pipelines of one process may differ in a stage's operational options
            name = f"{step.folder} {step.stage!r}"
            shared = _SHARED.setdefault(name, _Shared())
            limits = self.engine.part_time_limit_s, self.engine.silence_limit_s
            watch = _WATCHES.setdefault((name, *limits), Watch(self.engine, shared.turn))

        begun, opening, counts = time.monotonic(), 0.0, list[int]()

        def opener(stage: Stage) -> Function:
            nonlocal opening
            start = time.monotonic()
            if shared.open(stage) and stage.opens_model:
                opening = time.monotonic() - start
                self.notes.tell(store, Event("open", step.name, part, seconds=opening))
            return shared.use(until)

        def on_rows(rows: int) -> None:
            counts.append(rows)
            watch.hear()

        def hung(why: str) -> None:
            self.notes.hung(store, self.index, part, why)

        with ExitStack() as until, at_work(self.notes.signs), watch.over(hung):
            attempt = Attempt(on_rows=on_rows, on_key=lambda key: shared.turn.close())
            footer, fresh = run_part(self.job, self.index, part, opener, attempt)
        if fresh and (rows := sum(counts[1:])):
            seconds = shared.clock.since(begun) - opening
            self.notes.tell(store, Event("spent", step.name, part, rows=rows, seconds=seconds))
        return footer, fresh


def _count(step: str, footer: Mapping[str, Any] | None, fresh: bool) -> None:
    from apache_beam.metrics.metric import Metrics

    found = {"parts_lost": 1}
    if footer:
        counts = footer["counts"]
        found = {"parts": 1, "parts_found_done": int(not fresh), "kept": counts["kept"]}
        found |= {f"{o}.{reason}": n for o in ("rejected", "failed") for reason, n in counts[o].items()}
    for name, n in found.items():
        Metrics.counter("vesl", f"{step}.{name}").inc(n)


def _tell_lost(lost: Mapping[str, Any], job: Job, notes: Notes) -> None:
    notes.tell(job.store, Event("lost", lost["step"], lost["part"], text=lost["text"]))


def through(
    job: Job,
    index: int,
    resources: Resources | None = None,
    reshuffle: bool = True,
    notes: Notes | None = None,
    engine: Engine | None = None,
) -> Any:
    """Step `index` of a job as a composite PTransform, `vesl.<step>`, also for a pipeline of your own.

    ::

        job = make_plan(load("recipe.yaml"), until="caption").job()
        with apache_beam.Pipeline() as pipeline:
            parts = pipeline | apache_beam.Create(range(len(job.inputs)))
            downloaded = parts | through(job, 0)
            captioned = downloaded.parts | through(job, 1, reshuffle=False)
            captioned.parts | apache_beam.Map(print)

    In: numbers of parts whose earlier steps are done. Out: `parts`, the numbers of those that are published now, and
    `lost`, {"step", "part", "text"} of those that were given up. Results lie in the store, where a part that is done
    is found done. `reshuffle` spreads the parts over the workers (their numbers are tiny, so a runner would make one
    bundle of them); on batch runners it makes this step wait until all parts are through the one before.
    A stage's function is opened once per worker process, and called by one thread at a time while threads at other
    steps go on: one process with many threads holds one model; `multi_processing` and SDK containers one each.
    Counters, namespace `vesl`: `<step>.kept`, `<step>.rejected.<reason>`, `<step>.failed.<reason>` in rows, found done
    or not; `<step>.parts`, `<step>.parts_found_done`, `<step>.parts_lost`. A ModelError fails the pipeline.
    Where an attempt is over a limit of `engine`, its worker process is ended; without one there are no limits.
    """
    import apache_beam as beam

    step = job.steps[index]
    work = _Work(job, index, notes or Notes(), engine or Engine(silence_limit_s=math.inf))
    transform: Any = beam.ptransform_fn(_expand)(work, reshuffle)
    if hints := _hints(step.stage, resources):
        transform = transform.with_resource_hints(**hints)
    return f"vesl.{step.name}" >> transform


def _expand(parts: Any, work: _Work, reshuffle: bool) -> Any:
    import apache_beam as beam

    spread = parts | beam.Reshuffle() if reshuffle else parts
    return spread | "work" >> beam.FlatMap(work).with_outputs("lost", main="parts")


def _hints(stage: Stage, resources: Resources | None) -> dict[str, str]:
    """Beam's resource hints of a step: memory, and GPUs where it opens a model. Runners on one machine ignore them."""
    asked = resources or Resources()
    hints = {"min_ram": asked.memory} if asked.memory else {}
    if asked.gpus_each and stage.opens_model:
        kinds = [f"type:{asked.accelerator}"] if asked.accelerator else []
        hints["accelerator"] = ";".join([*kinds, f"count:{math.ceil(asked.gpus_each)}", "install-nvidia-driver"])
    return hints


def chain(pipeline: Any, job: Job, parts: Sequence[int], engine: Engine, notes: Notes) -> None:
    """All steps in a row. They stay fused, so that parts overlap, but where a step wants workers of another kind."""
    import apache_beam as beam

    flowing, lost, before = pipeline | "parts" >> beam.Create(list(parts), reshuffle=False), [], None
    for index, step in enumerate(job.steps):
        hints = _hints(step.stage, engine.of(step.name))
        out = flowing | through(job, index, engine.of(step.name), reshuffle=hints != before, notes=notes, engine=engine)
        flowing, before = out.parts, hints
        lost.append(out.lost)
    lost | "lost" >> beam.Flatten() | "tell" >> beam.Map(_tell_lost, job, notes)
