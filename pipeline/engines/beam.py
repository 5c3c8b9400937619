"""Engine `beam`: one named composite per step, on any runner of Apache Beam, chosen by `engine.options`.

The pipeline runs in a process of its own beside the driver, which can end it, and all that it started, at any moment:
Beam's local runner cannot be cancelled, dies with a row that kills its worker where both are one process, and may wait
for ever for a worker process that died. The driver learns from the store how far things are, and submits again what is
missing. Which parts a pipeline was at when it broke their leases tell; what else only the workers know (why a part was
given up) they leave there as small notes, in a folder that is removed when the run ends. The steps themselves are in
`beam_steps`.

Without options Beam works in that one process, where each model is open once, in a few threads: while one waits for the
web or the disk, another is at a model. With `engine.workers`, and no options that say otherwise, it works in that many
processes, each with models of its own and one part at a time (one: in that process, in one thread). A runner on
a cluster (Dataflow, Flink, Spark) is chosen by its options alone, and was not run here; there a job goes on where the
driver is killed, and its results count. A step's `workers` is not used, which the driver says. A worker process ends
itself where a part hangs; on Beam's local runner that ends the pipeline, and the next one goes on. So does the driver
with the pipeline of a worker that is frozen, if it is one of this machine.
"""

# mypy: allow-untyped-calls
import io
import json
import multiprocessing as mp
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any

from ...models.contract import ModelError
from ..journal import is_here
from ..leases import Waiting, give_back
from ..listing import part_of
from ..stage import Placed
from ..store import Store
from ..work import Job
from . import Engine, EngineError, Event, Listener, local
from .beam_steps import NO_PART, Notes, chain
from .follow import follow, others
from .signs import Silence, live
from .worker import HANGS

_RUNNER = "FnApiRunner"  # Beam's default, once it has tried to download another, which has no such modes
_THREADS = 3  # of a pipeline in one process
_DEATHS = 2  # pipelines that ended with the part in flight; then it runs alone, as on engine `local`
_OUTPUT, _OUTPUT_BYTES = "output", 1 << 20  # the log of Beam and all its workers
_CANCEL_S = 30.0  # for a cluster to take note that its job is cancelled


def _elsewhere(engine: Engine) -> bool:
    runners = [option.lower() for option in engine.options if option.startswith("--runner")]
    return not all(name.endswith(("directrunner", "fnapirunner")) for name in runners)


def _flags(engine: Engine) -> list[str]:
    mode, count = ("multi_threading", _THREADS) if engine.workers is None else ("multi_processing", engine.workers)
    named = any(option.startswith("--runner") for option in engine.options)
    flags = [*([] if named else [f"--runner={_RUNNER}"]), *engine.options]
    if count == 1 or named or any(option.startswith("--direct") for option in engine.options):
        return flags
    return [f"--direct_running_mode={mode}", f"--direct_num_workers={count}", *flags]


def _submit(job: Job, parts: Sequence[int], engine: Engine, notes: Notes, pipe: Connection, folder: str) -> None:
    """The life of the pipeline's process: one message `running` once the job can be cancelled, one how it ended."""
    with open(f"{folder}/{_OUTPUT}", "ab") as file:  # appending goes on where the driver cuts it
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["TMPDIR"] = tempfile.tempdir = folder  # Beam leaves a few folders behind
    live(folder)
    os.setsid()  # a group, so that Beam's worker processes end with this one
    threading.Thread(target=_end_with_driver, args=(folder,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.excepthook = lambda args: _on_thread_end(args, pipe)
    sys.setswitchinterval(0.0005)  # else a thread that did a little at the disk waits longer for its turn than it took
    if (engine.workers or 1) > 1:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # else each takes every core
            os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // (engine.workers or 1))))
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(_flags(engine))
        with redirect_stderr(io.StringIO()) as printed:
            try:
                options.get_all_options()
            except SystemExit:  # how the parser takes a wrong value
                raise ValueError(printed.getvalue()) from None
        pipeline = beam.Pipeline(options=options)
        chain(pipeline, job, parts, engine, notes)
        result = pipeline.run()
        pipe.send(("running", ""))
        try:
            state = str(result.wait_until_finish())
        except SystemExit:
            result.cancel()
            os._exit(1)  # without waiting for threads that are at work
        pipe.send(("done", "") if state == "DONE" else ("failed", f"the pipeline ended as {state}"))
    except Exception as error:  # noqa: BLE001  (every runner has errors of its own: the driver decides)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        pipe.send(("failed", f"{type(error).__name__}: {lines[-1][:500]}"))


def _on_thread_end(args: Any, pipe: Connection) -> None:
    """Where a worker process dies, its watching threads end with an exception that the runner may not hear of."""
    threading.__excepthook__(args)
    if args.thread and args.thread.name in ("run_worker", "beam_control_read"):
        if args.thread.name == "beam_control_read":  # the other thread knows the exit code
            time.sleep(2)
        pipe.send(("failed", f"a worker process died: {args.exc_value}"))


def _end_with_driver(folder: str) -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        _remove(folder)
        os.killpg(0, signal.SIGKILL)


def _remove(folder: str) -> None:
    with suppress(OSError):
        os.rename(folder, gone := f"{folder}.gone")  # so that nobody writes into it any more
        shutil.rmtree(gone, ignore_errors=True)


def _going(said: Sequence[tuple[str, str]]) -> bool:
    return not said or said[-1][0] == "running"


@dataclass
class _Driver:
    """One run, as a row of pipelines: the next takes up what the one before left when it broke."""

    job: Job
    engine: Engine
    listen: Listener
    store: Store
    folder: str
    told: set[tuple[str, int]] = field(default_factory=set)  # published
    heard: set[str] = field(default_factory=set)  # notes
    lost: set[int] = field(default_factory=set)
    waiting: Waiting[int] = field(init=False)
    left: list[int] = field(default_factory=list)  # by another run, that waited for it
    hangs: Counter[tuple[int, int]] = field(default_factory=Counter)
    deaths: Counter[tuple[int, int]] = field(default_factory=Counter)
    done: int = 0  # now, not found done
    charged: set[str] = field(default_factory=set)  # leases of attempts that counted as a death
    silent: set[int] | None = None  # the processes for which the last pipeline was ended, if that was why

    def __post_init__(self) -> None:
        self.waiting = Waiting[int](self.store, self.job.run)

    def run(self, parts: Sequence[int]) -> None:
        """Submit until every part is done or lost. Raises EngineError where a pipeline gets nowhere."""
        barren = 0  # pipelines in a row that were ended before they did anything
        for number in range(sys.maxsize):
            left = [part for part in parts if part not in self.lost]
            before = self.done + len(self.lost)
            text = self._pipeline(left, Notes(self.folder, number)) if left else None
            if text is None:
                parts, self.left, barren = self.left or others(self.waiting, self.listen), [], 0
                if not parts:
                    return
                continue
            frozen = self.silent is not None
            suspects = self._suspects()
            if self._hung(number):  # it was ended for that one; the others that were under way are not to blame
                continue
            barren = 0 if suspects or before < self.done + len(self.lost) else barren + 1
            if barren and (barren == _DEATHS or not frozen):
                raise EngineError(f"engine beam: {text}")
            for index, part in suspects:
                self.deaths[index, part] += 1
                self.hear(Event("retry", self.job.steps[index].name, part, text=text))
            for index, part in suspects:
                if self.deaths[index, part] == _DEATHS and part not in self.lost:
                    upto = replace(self.job, steps=self.job.steps[: index + 1])
                    local.run(upto, [part], replace(self.engine, workers=1), self.hear)

    def _hung(self, number: int) -> bool:
        """Whether a pipeline was ended for parts that hang; the second time they are given up."""
        names = self.store.names(f"{self.folder}/hung", f"{number}-")
        for name in names:
            place = int(name.split("-")[1]), int(name.split("-")[2])
            why = self.store.read(f"{self.folder}/hung/{name}").decode()
            self.hangs[place] += 1
            again = self.hangs[place] < HANGS
            text = why if again else f"{why}, {self.hangs[place]} times"
            self.hear(Event("retry" if again else "lost", self.job.steps[place[0]].name, place[1], text=text))
        return bool(names)

    def _suspects(self) -> list[tuple[int, int]]:
        """What a pipeline was at when it broke, as its leases tell: steps and parts that did not run alone yet.

        Where it was ended for a worker that was silent, what that one was at.
        """
        at = {step.folder: index for index, step in enumerate(self.job.steps)}
        fell, silent, self.silent = give_back(self.store, at, self.job.run), self.silent, None
        fell = [(table, who) for table, who in fell if who.get("id") not in self.charged]
        self.charged |= {who.get("id", "") for _, who in fell}
        blamed = {table for table, who in fell if not silent or (is_here(who) and who["pid"] in silent)}
        left = [table.rpartition("/") for table in blamed]
        found = {(at[folder], part) for folder, _, name in left if (part := part_of(name)) is not None}
        return sorted(place for place in found if self.deaths[place] < _DEATHS and place[1] not in self.lost)

    def hear(self, event: Event) -> None:
        """Pass an event on, a published part only once."""
        if event.kind == "done":
            if (event.step, event.part) in self.told:
                return
            self.told.add((event.step, event.part))
            self.done += event.fresh
        self.lost |= {event.part} if event.kind == "lost" else set()
        self.listen(event)

    def _read_notes(self) -> None:
        found: list[Event] = []
        with suppress(OSError):  # a store that is away for a moment
            for name in self.store.names(f"{self.folder}/told"):
                with suppress(ValueError):  # half written, until the next look
                    if name not in self.heard:
                        found.append(Event(**json.loads(self.store.read(f"{self.folder}/told/{name}"))))
                        self.heard.add(name)
                        self.store.remove(f"{self.folder}/told/{name}")  # else every look would list all of them
        for event in found:
            if event.part == NO_PART:
                raise ModelError(event.text)
            if event.kind == "wait":
                self.waiting.add(event.text, event.part)
            else:
                self.hear(event)

    def _pipeline(self, parts: Sequence[int], notes: Notes) -> str | None:
        """Run one pipeline to its end, however it ends; return what was wrong with it."""
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        folder = tempfile.mkdtemp(prefix="vesl-beam-")
        output = open(f"{folder}/{_OUTPUT}", "w+b")  # noqa: SIM115  (closed at the end, whatever happens)
        arguments = (self.job, parts, self.engine, replace(notes, signs=folder), theirs, folder)
        process = context.Process(target=_submit, args=arguments, daemon=True)
        process.start()
        theirs.close()
        said: list[tuple[str, str]] = []
        silence = Silence(folder, self.engine.silence_limit_s, not _elsewhere(self.engine))

        def going() -> bool:
            self._read_notes()
            self.left += self.waiting.free()
            try:
                while _going(said) and ours.poll():
                    said.append(ours.recv())
            except (EOFError, OSError):
                process.join()
                output.seek(max(0, output.seek(0, os.SEEK_END) - 2000))
                words = local.last_words(output.read())
                said.append(("died", f"the pipeline's process died (exit code {process.exitcode}{words})"))
            if os.fstat(output.fileno()).st_size > _OUTPUT_BYTES:
                output.truncate(0)
            with suppress(OSError):  # too many open files
                if _going(said) and (broken := silence.broken()):
                    self.silent, why = broken
                    said.append(("silent", f"{why}, so the pipeline was ended"))
            return _going(said)

        try:
            follow(self.job, parts, going, self.hear)
            self._read_notes()  # its last ones
            return said[-1][1] or None
        finally:
            how = said[-1][0] if said else ""
            if how in ("running", "silent"):  # on a cluster, where ending this process does not end the job
                process.terminate()
                process.join(_CANCEL_S)
            assert process.pid
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            output.close()
            _remove(folder)


def run(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
    """Carry the parts through all steps of the job.

    A part that is given up is told as `lost`, the others go on; one whose worker died twice is run alone in a process
    of this machine. Raises ModelError where a model cannot be opened, EngineError where Beam is not installed or a
    pipeline fails before it does anything; whatever `listen` raises ends the run.
    """
    if find_spec("apache_beam") is None:
        raise EngineError("the engine beam needs `pip install 'vesl[beam]'`")
    # A stage that is Placed shares its budgets between as many workers as the recipe says, whoever starts them.
    own = [step.name for step in job.steps if not isinstance(step.stage, Placed)]
    if named := [name for name in own if engine.of(name).workers]:
        print(f"vesl: engine beam has no workers of single steps: not used for {', '.join(named)}", file=sys.stderr)
    store, name = job.store, uuid.uuid4().hex
    folder = f"runs/.beam-{name}"
    try:
        _Driver(replace(job, run=job.run or name), engine, listen, store, folder).run(parts)
    finally:
        with suppress(Exception):
            store.fs.rm(store.path(folder), recursive=True)
