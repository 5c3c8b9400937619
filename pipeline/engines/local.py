"""Engine `local`: worker processes on this machine, one per core, each with its models loaded once.

A part goes to its next step as soon as it is through the one before, so part 7 is grounded while part 9 downloads.
While a model is at the last batches of a part, its worker reads and prepares the step's next one, so that the model
does not wait at the border of two parts. A worker that dies (out of memory, a crash in a decoder) takes nothing with
it: after two deaths its part runs alone, row by row, until the row that kills is known and fails as `crashed`. One that
hangs is ended, and its part tried once more by another. What another run is at work on is left for later.
"""

import multiprocessing as mp
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ...models.contract import ModelError
from ..leases import POLL_S, Waiting
from ..work import Job
from . import Engine, EngineError, Event, Listener
from .worker import DEATHS, HANGS, Task, live

_DEATHS_ALONE = 50  # then the part is given up: it is no few rows that kill
_DEATHS_IDLE = 10  # of workers in a row that had nothing to do: this Python cannot start them
_LONG_S = 60.0
# For the C library of Linux, which else gives the memory of each image back to the system: a tenth of the CPU time
# of a download. In bytes.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 4 << 20, "MALLOC_TRIM_THRESHOLD_": 8 << 20}
_FAULTS = 3  # exceptions of a part (a store that is away, a full disk) before it is given up


@dataclass
class _Worker:
    process: mp.process.BaseProcess
    pipe: Connection
    output: Connection  # what its libraries print: kept off the terminal, and shown if it dies
    said: bytes = b""  # the end of it
    tasks: dict[int, Task] = field(default_factory=dict)  # by thread of the worker; two only at a border of parts
    key: str | None = None  # the row being tried, where a part runs alone
    heard: float = 0.0  # when it said something
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
    for name, size in _MALLOC.items():
        os.environ.setdefault(name, str(size))
    ready: list[deque[Task]] = [deque() for _ in job.steps]  # by step
    ready[0].extend(Task(0, part) for part in parts)
    pool = [_start(job) for _ in range(count)]
    waiting = Waiting[Task](job.store, job.run)
    idle_deaths, told = 0, False
    try:
        while any(ready) or any(worker.tasks for worker in pool) or waiting:
            for task in waiting.free():
                ready[task.index].append(task)
            _assign(job, ready, pool, engine)
            if waiting and not told and not any(worker.tasks for worker in pool):
                told = True
                listen(Event("wait", "", -1, text=str(waiting)))
            handles: list[Connection | int] = [handle for w in pool for handle in (w.pipe, w.process.sentinel)]
            handles += [worker.output for worker in pool if not worker.output.closed]
            wait(handles, min([POLL_S] * bool(waiting) + [_end_if_hung(worker, engine) for worker in pool]))
            for i, worker in enumerate(pool):
                dead = not worker.process.is_alive()  # asked first: what a dead worker said is all in the pipe
                while worker.pipe.poll() and _hear(job, worker, ready, waiting, listen):
                    pass
                _drain(worker)
                if dead:
                    idle_deaths = 0 if worker.tasks else idle_deaths + 1
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
    # Forking this process, which has threads, is not safe; so workers are forked from one that has but imported.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([live.__module__, *{type(step.stage).__module__ for step in job.steps}])
    ours, theirs = context.Pipe()
    output, standard = context.Pipe(duplex=False)
    process = context.Process(target=live, args=(job, theirs, standard, dict(os.environ)), daemon=True)
    process.start()
    theirs.close()
    standard.close()
    return _Worker(process, ours, output)


def _end_if_hung(worker: _Worker, engine: Engine) -> float:
    """End a worker whose older task takes too long, as the other one waits for it; else, for how long it has time."""
    task = min(worker.tasks.values(), key=lambda task: task.begun, default=None)
    if task is None or task.hung:
        return _LONG_S
    if worker.pipe.poll():  # where this process was away (a store that is slow), it has not heard all yet
        return 0.0
    deadline, why = engine.deadline(task.begun, worker.heard)
    if (left := deadline - time.monotonic()) <= 0:
        task.hung = why
        worker.process.kill()
    return max(left, 0.0)


def _assign(job: Job, ready: list[deque[Task]], pool: list[_Worker], engine: Engine) -> None:
    """Give idle workers the parts that are furthest on, each to one that has the step's model open if possible.

    What is left then goes to workers that have read all of a part of the same step, unless later steps have to wait.
    """
    idle = [worker for worker in pool if not worker.tasks]
    busy = Counter(next(iter(worker.tasks.values())).index for worker in pool if worker.tasks)
    limits = [engine.of(step.name).workers or len(pool) for step in job.steps]
    for index in range(len(ready) - 1, -1, -1):
        name = job.steps[index].name
        while idle and ready[index] and busy[index] < limits[index]:
            worker = max(idle, key=lambda w: name in w.opened)
            idle.remove(worker)
            busy[index] += 1
            _give(worker, ready[index].popleft())
    for index in range(len(ready) - 1, -1, -1):
        for worker in pool:
            mine = list(worker.tasks.values())
            border = len(mine) == 1 and mine[0].index == index and mine[0].read
            # Where one of the two has killed before, nobody would know which does it now.
            if border and ready[index] and not mine[0].deaths and not ready[index][0].deaths:
                _give(worker, ready[index].popleft())
        if ready[index] and busy[index] < limits[index]:
            break


def _give(worker: _Worker, task: Task) -> None:
    thread = 1 if 0 in worker.tasks else 0
    task.read, task.hung, worker.key = False, "", None
    task.begun = time.monotonic()
    worker.tasks[thread] = task
    with suppress(OSError):  # it died while idle; its sentinel tells
        worker.pipe.send((thread, task))


def _hear(job: Job, worker: _Worker, ready: list[deque[Task]], waiting: Waiting[Task], listen: Listener) -> bool:
    """Take one message; False where the pipe is broken."""
    try:
        thread, kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    task = worker.tasks[thread]
    step = job.steps[task.index].name
    worker.heard = time.monotonic()
    if kind == "rows":
        listen(Event("rows", step, task.part, rows=value))
    elif kind == "key":
        worker.key = value
    elif kind == "read":
        task.read = True
    elif kind == "open":
        worker.opened.add(step)
        listen(Event("open", step, task.part, seconds=value))
    elif kind == "model":
        raise ModelError(value)
    else:
        del worker.tasks[thread]
        for other in worker.tasks.values():
            other.begun = worker.heard
        _ended(job, task, kind, value, ready, waiting, listen)
    return True


def _ended(
    job: Job,
    task: Task,
    kind: str,
    value: Any,
    ready: list[deque[Task]],
    waiting: Waiting[Task],
    listen: Listener,
) -> None:
    """Decide what follows the end of an attempt: the next step, another attempt, or none."""
    step = job.steps[task.index]
    if kind == "done":
        if task.index + 1 < len(job.steps):
            ready[task.index + 1].append(Task(task.index + 1, task.part))
        seconds, rows, (footer, fresh) = value
        listen(Event("done", step.name, task.part, rows=rows, seconds=seconds, footer=footer, fresh=fresh))
    elif kind == "leased":
        waiting.add(step.table(task.part), task)
    else:
        task.faults += 1
        if task.faults < _FAULTS:
            ready[task.index].append(task)
        listen(Event("retry" if task.faults < _FAULTS else "lost", step.name, task.part, text=value))


def _bury(job: Job, worker: _Worker, ready: list[deque[Task]], listen: Listener) -> None:
    """Decide what becomes of a dead worker's parts."""
    worker.process.join()
    end = f"the worker died (exit code {worker.process.exitcode}{last_words(worker.said)})"
    ended_here = any(task.hung for task in worker.tasks.values())  # which is the fault of that one alone
    for task in worker.tasks.values():
        step, text = job.steps[task.index].name, task.hung or end
        if task.hung:
            task.hangs += 1
        elif not ended_here:
            task.culprits |= {worker.key} if worker.key else set()
            task.deaths += 1
        if task.hangs >= HANGS:
            listen(Event("lost", step, task.part, text=f"{text}, {task.hangs} times"))
        elif not ended_here and task.deaths > DEATHS and (worker.key is None or task.deaths > _DEATHS_ALONE):
            listen(Event("lost", step, task.part, text=f"{end}, {task.deaths} times in all"))
        else:
            ready[task.index].append(task)
            if task.hung or not ended_here:
                listen(Event("retry", step, task.part, text=text))


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
