"""Engine `ray`: a Ray Data pipeline over part numbers, on this machine or on a cluster.

Every step is an operator of its own, named after it (`MapBatches(Caption)`), with its own pool of actors; Ray fuses no
two pools into one operator. Its rows travel in blocks, of one part each but where there are very many. What must
survive a worker lies in the store: a part's attempts leave marks in its wip folder, so a part that kills its worker is
known for it on whatever node it comes up next. What runs on the workers is in `ray_steps`.
"""

import json
import logging
import math
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ...models.contract import ModelError
from ..leases import Waiting
from ..stage import Step
from ..work import Job
from . import Engine, EngineError, Event, Listener
from .follow import follow, others
from .ray_steps import Operator, Row, version

_TOGETHER, _ROWS = 64, 1000  # parts in a block and, where these are several, their rows, at most
_BLOCKS_A_WORKER = 16  # before parts go together: enough to be shared evenly
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

        from .ray_executor import alone
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
        with alone() if own else nullcontext():
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
        for name in executor.killed():
            why = f"gave no sign of life in engine.silence_limit_s = {engine.silence_limit_s:g}, so it was ended"
            print(f"vesl: ray: a worker of {name} {why}", file=sys.stderr)
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


def dataset(job: Job, parts: Sequence[int], engine: Engine, shunned: frozenset[str] = frozenset()) -> Any:
    """The chain as a `ray.data.Dataset` of one row a part, for the cluster that this process is in; nothing runs yet.

    The parts come in waves of many blocks, which are cut one after the other as the steps take them: so the driver's
    memory stays flat, and the actors go from one wave on to the next without a pause.
    No actor comes up on the nodes `shunned`, but for those that the chain cannot do without.
    Raises EngineError where there is not what one actor for each step needs; a cluster with an address may yet grow.
    """
    import ray
    from ray.data import ActorPoolStrategy

    from .ray_executor import CALLS, CALLS_AHEAD, WAVE, Paced

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    stay = shunned | _needed(nodes, job, engine)
    for node in shunned & nodes.keys():
        if node not in _needed(nodes, job, engine):
            del nodes[node]
    has = _total(nodes)
    wants = {step.name: resources(step, len(job.steps), engine, has) for step in job.steps}
    if lacks := _lacks(wants, has):
        if not engine.address and "RAY_ADDRESS" not in os.environ:
            raise EngineError(f"ray: {lacks}")
        print(f"vesl: ray: {lacks}; waiting until the cluster has them", file=sys.stderr)
    job = replace(job, workers={name: want["max_size"] for name, want in wants.items()})
    together = _together(len(parts), max(want["max_size"] for want in wants.values()), job.rows)
    waves = [parts[first : first + WAVE * together] for first in range(0, len(parts), WAVE * together)]
    tables = [pa.table({"part": wave, "state": [""] * len(wave), "said": ["[]"] * len(wave)}) for wave in waves]
    data: Any = ray.data.from_arrow(tables).repartition(target_num_rows_per_block=together)
    data._logical_plan.dag.ray_remote_args["num_cpus"] = 0  # else the cutting waits for a core that no actor has
    data.context.set_config("backpressure_policies.enabled", [Paced])
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.memory_usage_poll_interval_s = None  # else a thread for each task looks, once a second
    data.context.execution_no_progress_timeout_s = -1  # parts take as long as they take; who hangs is ended by others
    scaling = data.context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold = 0.9  # busy; by default: and as much in queue
    shrinks = any(engine.of(step.name).min_workers for step in job.steps)
    scaling.actor_pool_util_downscaling_threshold = 0.3 if shrinks else -1  # else one with little to do comes and goes
    for index, step in enumerate(job.steps):
        want = wants[step.name]
        calls = CALLS_AHEAD if step.stage.opens_model else CALLS
        data = data.map_batches(
            type(step.name.capitalize(), (Operator,), {}),  # Ray names the operator after its class
            batch_size=None,  # a block
            batch_format="pyarrow",
            fn_constructor_args=(job, index, version(), engine, stay),
            compute=ActorPoolStrategy(
                min_size=want["min_size"],
                max_size=want["max_size"],
                max_tasks_in_flight_per_actor=1,  # two, where one is read ahead: see Ahead
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
            num_cpus=want["num_cpus"],
            accelerator_type=want["accelerator_type"],
            runtime_env=dict(engine.of(step.name).runtime_env) or None,
        )
        if want["num_gpus"]:  # with which `map_batches` wants a number of rows to a batch, as if parts were rows
            data._logical_plan.dag.ray_remote_args["num_gpus"] = want["num_gpus"]
        if away := ",".join(shunned - nodes.keys()):
            data._logical_plan.dag.ray_remote_args["label_selector"] = {"ray.io/node-id": f"!in({away})"}
    return data


def _total(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    total = Counter[str]()
    for node in nodes.values():
        total.update(node)
    return dict(total)


def _needed(nodes: Mapping[str, Mapping[str, float]], job: Job, engine: Engine) -> frozenset[str]:
    """The nodes without any one of which there is no room for an actor of each step on the others, at the same time."""
    has, steps = _total(nodes), list[dict[str, float]]()
    for step in job.steps:
        want = resources(step, len(job.steps), engine, has)
        kind = {f"accelerator_type:{want['accelerator_type']}": 1e-3} if want["accelerator_type"] else {}
        steps.append({"GPU": want["num_gpus"], "CPU": want["num_cpus"], **kind})
    steps.sort(key=lambda step: (len(step), step["GPU"], step["CPU"]), reverse=True)
    used = _places(nodes, steps)
    if used is None:
        return frozenset(nodes)
    others = ({name: node for name, node in nodes.items() if name != without} for without in used)
    return frozenset(without for without, left in zip(used, others, strict=True) if _places(left, steps) is None)


def _places(nodes: Mapping[str, Mapping[str, float]], steps: Sequence[Mapping[str, float]]) -> list[str] | None:
    """The nodes on which the steps' actors find a place, one after the other; None where one finds none."""
    left, used = {name: dict(node) for name, node in nodes.items()}, list[str]()
    for step in steps:
        fits = (name for name, node in left.items() if all(node.get(what, 0) >= n for what, n in step.items()))
        if (name := next(fits, None)) is None:
            return None
        used.append(name)
        for what, n in step.items():
            left[name][what] = left[name].get(what, 0) - n
    return list(dict.fromkeys(used))


def _lacks(wants: Mapping[str, Mapping[str, Any]], has: Mapping[str, float]) -> str:
    """What there is too little of for one actor of each step."""
    for kind, at in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        need = sum(want[at] for want in wants.values())
        if need > has.get(kind, 0):
            return f"an actor for each step needs {need:g} {kind}s, there are {has.get(kind, 0):g}"
    kinds = {want["accelerator_type"] for want in wants.values()} - {None}
    missing = sorted(kind for kind in kinds if f"accelerator_type:{kind}" not in has)
    return f"no node has accelerators of the type {', '.join(missing)}" if missing else ""


def _together(parts: int, workers: int, rows: float) -> int:
    """How many parts of so many rows travel in one block: several where Ray's work for a block is more than theirs."""
    return int(max(1, min(_TOGETHER, parts // (workers * _BLOCKS_A_WORKER), _ROWS // max(1, rows))))


def resources(step: Step, steps: int, engine: Engine, has: dict[str, float]) -> dict[str, Any]:
    """What Ray reserves for each actor of a step, and the bounds of its pool.

    Unless the recipe says otherwise, an actor is `1/steps` of a CPU and a pool has at most one actor for each CPU (or
    for each share of a GPU): so all pools fit the cluster at once, and none can lock another out.
    """
    asked = engine.of(step.name)
    gpus = asked.gpus_each
    share = asked.cpus if asked.cpus is not None else int(100 / steps) / 100
    most = engine.workers or int(has.get("CPU", 1))
    if gpus and engine.workers is None:
        most = int(has.get("GPU", 0) / gpus)
    most = max(1, asked.workers or most)
    bounds = {"min_size": min(asked.min_workers or 1, most), "max_size": most}
    return {"num_cpus": share, "num_gpus": gpus, "accelerator_type": asked.accelerator, **bounds}


class _DiedError(EngineError):
    """An actor died too often."""
