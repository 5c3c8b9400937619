"""Engine `ray`: a Ray Data pipeline over part numbers, on this machine or on a cluster.

Every step is an operator of its own, named after it (`MapBatches(Caption)`), with its own pool of actors; Ray fuses no
two pools into one operator. Its rows travel in blocks, of one part each but where there are very many. What must
survive a worker lies in the store: a part's attempts leave marks in its wip folder, so a part that kills its worker is
known for it on whatever node it comes up next. The operators are made in `ray_chain`, what they do on the workers is in
`ray_steps`, and how Ray Data goes about them in `ray_executor`.
"""

import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from ...models.contract import ModelError
from ..leases import Waiting
from ..work import Job
from . import Engine, EngineError, Event, Listener
from .follow import follow, others
from .ray_chain import dataset
from .ray_steps import Row, version

_LOST = ""  # in place of a step, among what was told
_POLL_S, _SLOW_S = 0.5, 60.0  # a worker needs seconds, where there is room for it; its model comes later
# For a cluster on this machine, where its processes and this one share the cores with the work.
_ALONE = {
    "RAY_worker_niceness": "0",  # by default 15, so that all else goes first
    "RAY_num_workers_soft_limit": "0",  # processes that wait for a task, looking up a hundred times a second
    "RAY_event_stats": "0",  # of Ray's own loops, for its developers
}


def run(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
    """Carry the parts through all steps of the job.

    A part that is given up is told as `lost`, the others go on. Works in the cluster that this process is in, else
    joins the one at `engine.address` or RAY_ADDRESS, else starts one on this machine for the length of the run.
    Raises ModelError where a model cannot be opened, EngineError where Ray cannot be used; whatever `listen` raises
    ends the run.
    """
    told: set[tuple[str, int]] = set()
    job = replace(job, run=job.run or uuid.uuid4().hex)  # a worker's death is told by its lease
    waiting, hung, shunned = Waiting[int](job.store, job.run), dict[int, str](), frozenset[str]()
    last, todo = job.steps[-1].name, list(parts)
    with _cluster(engine):
        while todo:
            before, free = len(told), list[int]()
            try:
                _carry(job, todo, engine, waiting, told, hung, shunned, free, listen)
                todo = free
            except _DiedError:  # an actor, again and again: on a cluster whose nodes come and go that is not the end
                if len(told) == before:
                    raise
                todo = [part for part in todo if not {(last, part), (_LOST, part)} & told and part not in hung]
                todo = list(dict.fromkeys([*todo, *free]))
            shunned = frozenset()
            if hung and not todo:
                todo, shunned = list(hung), frozenset(hung.values())
                hung.clear()
            todo = todo or others(waiting, listen)


@contextmanager
def _cluster(engine: Engine) -> Iterator[None]:
    """Be in a Ray cluster; leave it at the end if it was entered here, which also ends all that runs in it for us."""
    try:
        import ray
        import ray.data

        from .ray_executor import alone, terse
    except ImportError as error:
        raise EngineError(f"the engine ray needs `pip install 'vesl[ray]'` ({error})") from None
    if ray.is_initialized():
        yield
        return
    address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray Data has every actor take an object as an argument, and its core warns of that; this one lives in the driver.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    own: dict[str, Any] = {"num_cpus": engine.workers or _cores()} if address == "local" else {}
    for name, value in _ALONE.items() if own else ():
        os.environ.setdefault(name, value)
    try:
        with _silence():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        line = str(error).strip().split("\n")[0]
        raise EngineError(f"ray at {address}: {line or type(error).__name__}") from None
    try:
        with terse(), alone() if own else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep stderr shut: Ray's core announces there where it has its log level from."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _carry(
    job: Job,
    parts: Sequence[int],
    engine: Engine,
    waiting: Waiting[int],
    told: set[tuple[str, int]],
    hung: dict[int, str],
    shunned: frozenset[str],
    free: list[int],
    listen: Listener,
) -> None:
    """Carry the parts through the chain once, as far as they go; whatever `listen` raises ends the work at once.

    Notes for further rounds: in `free` the parts that another run left meanwhile (its silence counts from when a worker
    met its lease), in `hung` those that hung, with their nodes, for a round in which these nodes are `shunned`.
    """
    from .ray_executor import Executor

    data = dataset(job, parts, engine, shunned)
    executor = Executor(data.context, data.get_dataset_id(), engine.silence_limit_s)
    slow_at = time.monotonic() + _SLOW_S

    def rows() -> Iterator[Row]:
        try:
            for block in executor.output():
                yield from block.to_pylist()
        except Exception as error:
            raise _ended(error) from error

    def running() -> bool:
        nonlocal slow_at
        going = executor.is_alive()
        if time.monotonic() > slow_at and (steps := executor.starting()):
            why = "the cluster has nothing free for it, or it cannot start there (Ray's own logs say why)"
            print(f"vesl: ray: {', '.join(steps)}: still without a worker: {why}", file=sys.stderr)
            slow_at = math.inf
        for text in executor.killed():
            print(f"vesl: ray: {text}", file=sys.stderr)
        for row in rows():
            _hear(row, job, waiting, told, hung, listen)
        free.extend(waiting.free())
        return going

    held = None  # who holds this keeps the executor from being shut down
    try:
        try:
            held = data._execute_dag(executor)
        except Exception as error:
            raise _ended(error) from error
        follow(job, parts, running, listen, _POLL_S, told)
    finally:
        executor.shutdown(force=True)
        del held


def _ended(error: Exception) -> EngineError:
    """Why a pipeline ended early, in a line."""
    from ray.exceptions import ActorDiedError

    text = str(error)
    if "No module named 'vesl" in text or "Operator.__init__() takes" in text:
        return EngineError(f"ray: a worker has another vesl or none: install vesl {version()} on every node")
    kind = _DiedError if isinstance(error, ActorDiedError) else EngineError
    return kind(f"ray: {type(error).__name__}: {text.strip().splitlines()[-1] if text else ''}")


def _hear(
    row: Row, job: Job, waiting: Waiting[int], told: set[tuple[str, int]], hung: dict[int, str], listen: Listener
) -> None:
    """Tell what a row has to say of its part."""
    for kind, step, text in json.loads(row["said"]):
        if kind == "model":
            raise ModelError(text)
        if kind == "version":
            raise EngineError(text)
        if kind == "leased":
            waiting.add(text, row["part"])
        elif kind == "elsewhere":
            hung[row["part"]] = text
        elif kind in ("spent", "open"):
            seconds, rows = text.split()
            listen(Event(kind, step, row["part"], rows=int(rows), seconds=float(seconds)))
        elif kind == "done":
            if (step, row["part"]) not in told:
                fresh, footer = json.loads(text)
                told.add((step, row["part"]))
                listen(Event(kind, step, row["part"], fresh=fresh, footer=footer))
        else:
            told.update([(_LOST, row["part"])] if kind == "lost" else [])
            listen(Event(kind, step, row["part"], text=text))


class _DiedError(EngineError):
    """An actor died too often."""
