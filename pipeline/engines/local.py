"""Engine `local`: worker processes on this machine, one per core, each with its models loaded once.

A part goes to its next step as soon as it is through the one before, so part 7 is grounded while part 9 downloads. A
worker that dies (out of memory, a crash in a decoder) takes nothing with it: after two deaths its part runs alone, row
by row, until the row that kills is known and fails as `crashed`.
"""

import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ...models.contract import ModelError
from ..stage import Function, Stage
from ..work import Attempt, Job, run_part
from . import Engine, EngineError, Event, Listener

_DEATHS = 2  # with other rows; then the part runs alone
_DEATHS_ALONE = 50  # then the part is given up: it is no few rows that kill
_DEATHS_IDLE = 10  # of workers in a row that had nothing to do: this Python cannot start them
_FAULTS = 3  # exceptions of a part (a store that is away, a full disk) before it is given up
_TICK_S = 0.5  # how often a busy worker tells how many rows it has done


@dataclass
class _Task:
    index: int
    part: int
    deaths: int = 0
    faults: int = 0
    culprits: frozenset[str] = frozenset()

    @property
    def alone(self) -> bool:
        return self.deaths >= _DEATHS


@dataclass
class _Worker:
    process: mp.process.BaseProcess
    pipe: Connection
    output: Connection  # what its libraries print: kept off the terminal, and shown if it dies
    said: bytes = b""  # the end of it
    task: _Task | None = None
    key: str | None = None  # the row being tried, where a part runs alone
    opened: set[str] = field(default_factory=set)


def run(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
    """Carry the parts through all steps of the job.

    A part that is given up is told as `lost`, the others go on.
    Raises ModelError where a model cannot be opened, EngineError where workers cannot be started; whatever `listen`
    raises ends the run.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(engine.workers or cores, len(parts))
    threads = str(max(1, cores // count))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # else each worker takes every core
        os.environ.setdefault(name, threads)
    ready: list[deque[_Task]] = [deque() for _ in job.steps]  # by step
    ready[0].extend(_Task(0, part) for part in parts)
    pool = [_start(job) for _ in range(count)]
    idle_deaths = 0
    try:
        while any(ready) or any(worker.task for worker in pool):
            _assign(job, ready, pool, engine)
            handles: list[Connection | int] = [handle for w in pool for handle in (w.pipe, w.process.sentinel)]
            wait(handles + [worker.output for worker in pool if not worker.output.closed])
            for i, worker in enumerate(pool):
                dead = not worker.process.is_alive()  # asked first: what a dead worker said is all in the pipe
                while worker.pipe.poll() and _hear(job, worker, ready, listen):
                    pass
                _drain(worker)
                if dead:
                    idle_deaths = 0 if worker.task else idle_deaths + 1
                    if idle_deaths > _DEATHS_IDLE:
                        raise EngineError(f"the workers die as soon as they start{last_words(worker.said)}")
                    _bury(job, worker, ready, listen)
                    pool[i] = _start(job)
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()


def _start(job: Job) -> _Worker:
    context = mp.get_context("spawn")  # forking a process with threads and models is not safe
    ours, theirs = context.Pipe()
    output, standard = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, theirs, standard), daemon=True)
    process.start()
    theirs.close()
    standard.close()
    return _Worker(process, ours, output)


def _assign(job: Job, ready: list[deque[_Task]], pool: list[_Worker], engine: Engine) -> None:
    """Give idle workers the parts that are furthest on, each to one that has the step's model open if possible."""
    idle = [worker for worker in pool if worker.task is None]
    busy = Counter(worker.task.index for worker in pool if worker.task)
    for index in range(len(ready) - 1, -1, -1):
        name = job.steps[index].name
        limit = engine.of(name).workers or len(pool)
        while idle and ready[index] and busy[index] < limit:
            worker = max(idle, key=lambda w: name in w.opened)
            idle.remove(worker)
            worker.task, worker.key = ready[index].popleft(), None
            busy[index] += 1
            with suppress(OSError):  # it died while idle; its sentinel tells
                worker.pipe.send(worker.task)


def _hear(job: Job, worker: _Worker, ready: list[deque[_Task]], listen: Listener) -> bool:
    """Take one message; False where the pipe is broken."""
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    task = worker.task
    assert task is not None
    step = job.steps[task.index].name
    if kind == "rows":
        listen(Event("rows", step, task.part, rows=value))
    elif kind == "key":
        worker.key = value
    elif kind == "open":
        worker.opened.add(step)
        listen(Event("open", step, task.part, seconds=value))
    elif kind == "done":
        worker.task = None
        if task.index + 1 < len(job.steps):
            ready[task.index + 1].append(_Task(task.index + 1, task.part))
        seconds, (footer, fresh) = value
        listen(Event("done", step, task.part, seconds=seconds, footer=footer, fresh=fresh))
    elif kind == "model":
        raise ModelError(value)
    else:
        worker.task = None
        task.faults += 1
        if task.faults < _FAULTS:
            ready[task.index].append(task)
        listen(Event("retry" if task.faults < _FAULTS else "lost", step, task.part, text=value))
    return True


def _bury(job: Job, worker: _Worker, ready: list[deque[_Task]], listen: Listener) -> None:
    """Decide what becomes of a dead worker's part."""
    worker.process.join()
    task = worker.task
    if task is None:
        return
    step = job.steps[task.index].name
    end = f"the worker died (exit code {worker.process.exitcode}{last_words(worker.said)})"
    if task.alone and (worker.key is None or task.deaths >= _DEATHS_ALONE):
        listen(Event("lost", step, task.part, text=f"{end}, {task.deaths + 1} times in all"))
        return
    task.culprits |= {worker.key} if worker.key else set()
    task.deaths += 1
    ready[task.index].append(task)
    listen(Event("retry", step, task.part, text=end))


def _drain(worker: _Worker) -> None:
    """Read what a worker's libraries printed, so that they never wait, and keep the end of it."""
    while not worker.output.closed and worker.output.poll():
        data = os.read(worker.output.fileno(), 1 << 16)
        worker.said = (worker.said + data)[-2000:]
        if not data:
            worker.output.close()


def last_words(said: bytes) -> str:
    """The last line of what a dead worker's libraries printed, such as a failed assertion of a C library."""
    lines = said.decode(errors="replace").split("\n")
    return next((f": {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")


def _work(job: Job, pipe: Connection, output: Connection) -> None:
    """A worker's life: parts in, messages out, until the pipe closes."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    threading.Thread(target=_follow_parent, daemon=True).start()
    functions: dict[str, Function] = {}
    while True:
        try:
            task: _Task = pipe.recv()
        except (EOFError, OSError):
            return
        step = job.steps[task.index]

        def opener(stage: Stage, name: str = step.folder) -> Function:
            if name not in functions:
                start = time.monotonic()
                functions[name] = stage.open()
                if stage.opens_model:
                    pipe.send(("open", time.monotonic() - start))
            return functions[name]

        pipe.send(_try(job, task, opener, pipe))


def _try(job: Job, task: _Task, opener: Any, pipe: Connection) -> tuple[str, Any]:
    pending, last, start = 0, time.monotonic(), time.monotonic()

    def on_rows(rows: int) -> None:
        nonlocal pending, last
        pending += rows
        if pending and time.monotonic() - last > _TICK_S:
            pipe.send(("rows", pending))
            pending, last = 0, time.monotonic()

    attempt = Attempt(task.culprits, task.alone, on_rows, lambda key: pipe.send(("key", key)))
    try:
        result = run_part(job, task.index, task.part, opener, attempt)
        return "done", (time.monotonic() - start, result)
    except ModelError as error:
        return "model", str(error)
    except Exception as error:  # noqa: BLE001  (a fault of a part, not of the run: the driver decides)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"


def _follow_parent() -> None:
    """End with the driver, even if that was killed: nobody would take this worker's results."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
