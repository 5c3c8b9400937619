"""Engine `ray`: a Ray Data pipeline over part numbers, on this machine or on a cluster.

Every step is an operator of its own, named after it (`Map(Caption)`), with its own pool of actors; Ray fuses no two
pools into one operator. What must survive a worker lies in the store: a part's attempts leave marks in its wip folder,
so a part that kills its worker is known for it on whatever node it comes up next.
"""

import functools
import gc
import importlib.metadata
import json
import logging
import os
import platform
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from ...models.contract import ModelError
from ..stage import Function, Stage, Step
from ..store import wip
from ..work import Attempt, Job, run_part
from . import Engine, EngineError, Event, Listener, local
from .follow import follow
from .worker import Turn, in_turn

_WAVE = 5000  # parts submitted at once: the driver holds a few kilobytes for each
_DEATHS = 2  # of a part's worker; then the part runs in a subprocess of one
_GIVE_UP = 8  # deaths: it is not the part's rows that kill
_FAULTS = 3  # exceptions of a part (a store that is away, a full disk) before it is given up
_BACKOFF_S = 1.0
_POLL_S = 0.5

# {"part": its number, "state": "" (goes on), "lost", "model" or "version", "said": JSON of [kind, step, text] each}
Row = dict[str, Any]


def run(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
    """Carry the parts through all steps of the job, in waves.

    A part that is given up is told as `lost`, the others go on. Works in the cluster that this process is in, else
    joins the one at `engine.address` or RAY_ADDRESS, else starts one on this machine for the length of the run.
    Raises ModelError where a model cannot be opened, EngineError where Ray cannot be used; whatever `listen` raises
    ends the run.
    """
    with _cluster(engine):
        identity = uuid.uuid4().hex[:8]
        for start in range(0, len(parts), _WAVE):
            _carry(job, parts[start : start + _WAVE], engine, identity, listen)


@contextmanager
def _cluster(engine: Engine) -> Iterator[None]:
    """Be in a Ray cluster; leave it at the end if it was entered here, which also ends all that runs in it for us."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(f"the engine ray needs `pip install 'vesl[ray]'` ({error})") from None
    if ray.is_initialized():
        yield
        return
    address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray Data has every actor take an object as an argument, and its core warns of that; this one lives in the driver.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    alone: dict[str, Any] = {"num_cpus": engine.workers or _cores()} if address == "local" else {}
    try:
        with _silence():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (ConnectionError, ValueError, RuntimeError) as error:
        line = str(error).strip().split("\n")[0]
        raise EngineError(f"ray at {address}: {line or type(error).__name__}") from None
    try:
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


def _carry(job: Job, parts: Sequence[int], engine: Engine, identity: str, listen: Listener) -> None:
    """One wave: Ray in a thread, events in this one, so that whatever `listen` raises ends the work at once."""
    import ray

    data = dataset(job, parts, engine, identity)
    executor = data._create_executor()  # Ray's public iterators cannot be stopped before their first row
    arrived: SimpleQueue[Row | Exception] = SimpleQueue()

    def drive() -> None:
        try:
            for bundle in data._build_bundle_iterator(executor):
                for block in ray.get(list(bundle.block_refs)):
                    for row in block.to_pylist():
                        arrived.put(row)
        except Exception as error:  # noqa: BLE001  (the main thread raises it)
            arrived.put(error)

    def running() -> bool:
        going = thread.is_alive()
        while not arrived.empty():
            _hear(arrived.get(), listen)
        return going

    thread = Thread(target=drive, daemon=True, name="vesl-ray")
    thread.start()
    try:
        follow(job, parts, running, listen, _POLL_S)
    finally:
        executor.shutdown(force=True)


def _hear(row: Row | Exception, listen: Listener) -> None:
    if isinstance(row, Exception):
        text = str(row)
        if "No module named 'vesl" in text:
            text = f"a worker cannot import vesl: install vesl {_version()} on every node"
        raise EngineError(f"ray: {type(row).__name__}: {text.strip().splitlines()[-1] if text else ''}") from row
    for kind, step, text in json.loads(row["said"]):
        if kind == "model":
            raise ModelError(text)
        if kind == "version":
            raise EngineError(text)
        listen(Event(kind, step, row["part"], text=text))


def dataset(job: Job, parts: Sequence[int], engine: Engine, identity: str) -> Any:
    """The chain as a `ray.data.Dataset` of one row a part, for the cluster that this process is in; nothing runs yet.

    Raises EngineError where the cluster does not have what one actor for each step needs.
    """
    import ray
    from ray.data import ActorPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    wants = {step.name: resources(step, len(job.steps), engine, has) for step in job.steps}
    for kind, at in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        need = sum(want[at] for want in wants.values())
        if need > has.get(kind, 0) and not engine.address and "RAY_ADDRESS" not in os.environ:  # else it may yet grow
            raise EngineError(f"ray: an actor for each step needs {need:g} {kind}s, there are {has.get(kind, 0):g}")
    job = replace(job, workers={name: want["max_size"] for name, want in wants.items()})
    rows = [{"part": part, "state": "", "said": "[]"} for part in parts]
    data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.9  # busy; by default: and as much in queue
    for index, step in enumerate(job.steps):
        want = wants[step.name]
        parts_at_once = 2 if step.stage.opens_model else 1  # see Operator
        data = data.map(
            type(step.name.capitalize(), (Operator,), {}),  # Ray names the operator after its class
            fn_constructor_args=(job, index, identity, _version()),
            compute=ActorPoolStrategy(
                min_size=want["min_size"],
                max_size=want["max_size"],
                max_tasks_in_flight_per_actor=parts_at_once,
                max_concurrent_calls_per_actor=parts_at_once,
                enable_true_multi_threading=parts_at_once > 1,
            ),
            num_cpus=want["num_cpus"],
            num_gpus=want["num_gpus"] or None,
            runtime_env=dict(engine.of(step.name).runtime_env) or None,
        )
    return data


def resources(step: Step, steps: int, engine: Engine, has: dict[str, float]) -> dict[str, Any]:
    """What Ray reserves for each actor of a step, and the bounds of its pool.

    Unless the recipe says otherwise, an actor is `1/steps` of a CPU and a pool has at most one actor for each CPU (or
    for each share of a GPU): so all pools fit the cluster at once, and none can lock another out.
    """
    asked = engine.of(step.name)
    gpus = asked.gpus or 0.0
    share = asked.cpus if asked.cpus is not None else int(100 / steps) / 100
    most = engine.workers or int(has.get("CPU", 1))
    if gpus and engine.workers is None:
        most = int(has.get("GPU", 0) / gpus)
    most = max(1, asked.workers or most)
    return {"num_cpus": share, "num_gpus": gpus, "min_size": min(asked.min_workers or 1, most), "max_size": most}


def _version() -> str:
    return importlib.metadata.version("vesl")


class Operator:
    """One step on an actor. What goes wrong with a part travels on in its row; no exception ends the pipeline.

    Where a step opens a model, an actor is given two parts, in a thread each. The second waits at the gate until the
    first is read and on its way to the model; then it is read and prepared, so that the model does not wait at the
    border of two parts. A part that killed a worker before has the actor to itself.
    """

    def __init__(self, job: Job, index: int, identity: str, version: str) -> None:
        self._job, self._index, self._identity, self._wanted = job, index, identity, version
        self._step = job.steps[index]
        self._function: Function | None = None
        self._gate, self._turn = Lock(), Turn()

    def __call__(self, row: Row) -> Row:
        """Do the step for one part."""
        if row["state"]:
            return row
        said: list[tuple[str, str, str]] = []
        state = self._carry(row["part"], lambda kind, text: said.append((kind, self._step.name, text)))
        return {"part": row["part"], "state": state, "said": json.dumps([*json.loads(row["said"]), *said])}

    def _carry(self, part: int, say: Callable[[str, str], None]) -> str:
        """Try the part until it is done or given up; the row's new state."""
        if (there := _version()) != self._wanted:
            say("version", f"{platform.node()} has vesl {there}, the driver {self._wanted}: install the same on both")
            return "version"
        for left in range(_FAULTS - 1, -1, -1):
            try:
                return self._attempt(part, say)
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
        """Leave a mark, do the part; if this process dies, the mark stays and the next attempt counts it."""
        store, folder = self._job.open_store(), wip(self._step.table(part))
        prefix = f"attempt-{self._identity}-"
        gate = ExitStack()
        gate.enter_context(self._gate)
        with gate, closing(self._turn):
            deaths = len(store.names(folder, prefix))
            if deaths:
                say("retry" if deaths < _GIVE_UP else "lost", f"the worker died, {deaths} times in this run")
                self._turn.take()
            if deaths >= _GIVE_UP:
                return "lost"
            mark = f"{folder}/{prefix}{uuid.uuid4().hex[:8]}"
            store.fs.makedirs(store.path(folder), exist_ok=True)
            store.fs.pipe_file(store.path(mark), f"{platform.node()} {os.getpid()} {time.time():.0f}\n".encode())
            try:
                if deaths >= _DEATHS:
                    return self._alone(part, say)
                read = Attempt().on_read if deaths else gate.close
                attempt = Attempt(on_key=lambda key: self._turn.close(), on_read=read)
                footer, fresh = run_part(self._job, self._index, part, self._open, attempt)
            except Exception:
                with suppress(Exception):  # a fault is no death; left where the store is away, it counts as one
                    store.remove(mark)
                raise
            if fresh:
                count(footer)
            return ""

    def _open(self, stage: Stage) -> Function:
        if self._function is None:
            self._function = in_turn(stage.open(), self._turn)
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
                count(event.footer)

        local.run(replace(self._job, steps=self._job.steps[: self._index + 1]), [part], Engine(workers=1), listen)
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
