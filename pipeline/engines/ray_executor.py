"""How Ray Data's executor goes about the parts of a run, where it has no setting of its own for that.

Built on its classes as they are in the pinned version of Ray; imported where Ray is there.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, cast

import pyarrow as pa
import ray
from ray.data._internal.actor_autoscaler import ActorPoolScalingRequest, BacklogAwareActorAutoscaler
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor, streaming_executor_state
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.execution.operators.actor_pool_map_operator import (
    ActorPoolMapOperator,
    _MapWorker,
    _NodeAwareActorPool,
)
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.utils import cached_ray_internals

from . import signs

WAVE = 500  # blocks, cut at once and waiting for a step at most: the driver holds a few kilobytes for each
_START_S = 60.0  # of a worker, its model and the work that it keeps from others meanwhile
_WHO_ASK_WHERE = (actor_pool_map_operator, cached_ray_internals)
CALLS, CALLS_AHEAD = 2, 4  # at once of an actor: a block, or two and how far it is with one; and whether it lives
_LOOK_S, _STEP_S = 1.0, 5.0  # for a look whether all is to end and for a step, where no task has anything to say
_LINE = 500  # characters
_OF_DEATHS = "so the task will be retried", "A worker died or was killed while executing a task"  # how Ray tells them
_TOGETHER_S = 0.02  # that a step waits for more tasks where one has something to say; by default a tenth of a second


class Paced(BackpressurePolicy):
    """Holds a step back while a wave of blocks waits behind it; Ray's own policies count bytes, which are few."""

    def can_add_input(self, op: Any) -> bool:
        """Whether a step may take another block."""
        cutting = isinstance(op, TaskPoolMapOperator) and op.num_active_tasks() > 0
        return not cutting and len(self._topology[op].output_queue) < WAVE


class Patient(BacklogAwareActorAutoscaler):
    """Lets a pool grow where what waits for it is worth another worker; Ray's own does as soon as anything waits.

    And lets it go at its step's end.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._begun: dict[Any, float] = {}

    def _derive_target_scaling_config(self, actor_pool: Any, op: Any, op_state: Any) -> ActorPoolScalingRequest:
        wanted = super()._derive_target_scaling_config(actor_pool, op, op_state)
        if wanted.force:  # no more comes for the step: all who have nothing to do may go, not one in each look
            return replace(wanted, delta=-max(1, actor_pool.current_size()))
        if wanted.delta <= 0 or actor_pool.current_size() < actor_pool.min_size():
            return wanted
        now = time.monotonic()
        each = op.metrics.average_total_task_completion_time_s or now - self._begun.setdefault(op, now)  # so far
        at_once = actor_pool.current_size() * actor_pool.max_actor_concurrency()
        waiting = op_state.total_enqueued_input_blocks()  # a wave at most, whatever may be behind it
        if waiting < WAVE and waiting * each / at_once < _START_S:
            return ActorPoolScalingRequest.no_op(reason="little to do")
        return wanted


def _asked() -> type[_MapWorker]:
    """An actor that can be asked how it is; sent by its code, as a worker of another version does not know it."""

    def lives(self: _MapWorker) -> None:
        """Answer, whatever its other threads are at."""

    def read(self: _MapWorker, task: int) -> None:
        """Return once the block of this task is read."""
        from .ray_steps import READING

        READING.wait(task)

    return type("Asked", (_MapWorker,), {"lives": lives, "read": read})


class Ahead(_NodeAwareActorPool):
    """Gives an actor its second block only once it has read the first; Ray's own pool does at once.

    There the second would wait for a first that is slow, also while other actors have nothing to do.
    """

    def __init__(self, op: Any) -> None:
        config = replace(op._actor_pool._config, max_tasks_in_flight_per_actor=2)
        super().__init__(op._start_actor, config, op._actor_pool.map_worker_cls_name)
        self._op, self._reading = op, dict[Any, Any]()

    def on_task_submitted(self, actor: Any) -> None:
        """Ask the actor to tell when it has read the block that it is given now."""
        super().on_task_submitted(actor)
        told = self._reading[actor] = actor.read.remote(self._op._next_data_task_idx)
        self._op._submit_metadata_task(told, lambda: self._reading.get(actor) == told and self._reading.pop(actor))

    def select_actors(self, bundle: Any = None, actor_locality_enabled: bool = False) -> Any:
        """An actor that may have another block, the least busy of them; None where there is none."""
        alive = self._alive_actors_to_in_flight_tasks_heap
        at = {actor: self._running_actors[actor].num_tasks_in_flight for actor in alive}
        free = [actor for actor, n in at.items() if not n or (n < 2 and actor not in self._reading)]
        return min(free, key=at.__getitem__, default=None)


class Fixed(ClusterAutoscaler):
    """For a cluster that stays as it is; Ray's own keeps a worker to ask others for more."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._has: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())  # type: ignore[no-untyped-call]

    def try_trigger_scaling(self) -> None:
        """There is nothing to ask for."""

    def on_executor_shutdown(self) -> None:
        """Nothing was asked for."""

    def get_total_resources(self) -> ExecutionResources:
        """What all nodes have."""
        return self._has


class Here:
    """In the place of Ray's actor that others tell where they are and ask where some are: all are on this machine."""

    def __init__(self) -> None:
        self.update_actor_location = self.get_actor_locations = self

    def remote(self, *_: Any) -> Any:
        """The answer to either: nothing to say."""
        return ray.put({})


class Unseen:
    """In the place of what tells Ray's dashboard of the operators, by an actor of its own: there is no dashboard."""

    @staticmethod
    def register_dataset_to_stats_actor(*_: Any) -> None:
        """Nobody looks."""

    update_execution_metrics = register_dataset_to_stats_actor


@contextmanager
def alone() -> Iterator[None]:
    """While Ray is this machine alone: without processes that nobody needs there, but that take of its cores."""
    node: Any = ray._private.worker._global_node
    node.kill_log_monitor(check_alive=False)  # which sends the workers' logs to a driver that did not ask for them
    node.kill_monitor(check_alive=False)  # which asks for more machines
    places: list[tuple[Any, str, type]] = [(streaming_executor, "create_cluster_autoscaler", Fixed)]
    places += [(module, "get_or_create_actor_location_tracker", Here) for module in _WHO_ASK_WHERE]
    if not node.webui_url:
        node.kill_dashboard(check_alive=False)  # which has no pages, as `ray[default]` is not installed
        places.append((streaming_executor, "_StatsManager", Unseen))
    theirs = [getattr(module, name) for module, name, _ in places]
    for module, name, ours in places:
        setattr(module, name, ours)
    try:
        yield
    finally:
        for (module, name, _), kept in zip(places, theirs, strict=True):
            setattr(module, name, kept)


@contextmanager
def terse() -> Iterator[None]:
    """While Ray's nodes tell the driver what they do: a line on stderr, but for deaths, which the steps tell of."""
    heard = {""}

    def tell(said: Mapping[str, Any], **options: Any) -> None:
        lines = {" ".join(text.split())[:_LINE] for text in said["lines"]} - heard
        for line in lines:
            if not any(words in line for words in _OF_DEATHS):
                print(f"vesl: ray: {line}", file=sys.stderr)
        heard.update(lines)

    module: Any = ray._private.worker
    usual, module.print_to_stdstream = module.print_to_stdstream, tell
    try:
        yield
    finally:
        module.print_to_stdstream = usual


class Executor(StreamingExecutor):
    """Ray's, but that it takes little of a core where tasks are long, and that its output need not be waited for.

    And that it kills an actor that is silent for `silence_limit_s`, or as long at its start, and a minute at least: one
    whose process is stopped or frozen, which Ray does not notice, but then starts again. (A whole node it notices.)
    """

    def __init__(self, context: Any, name: str, silence_limit_s: float) -> None:
        super().__init__(context, name)
        self._silence, self._starts = signs.Unchanged[Any](silence_limit_s), signs.starts(silence_limit_s)
        self._signs: dict[Any, Any] = {}  # by actor's id: what it was asked for
        self._killed = SimpleQueue[str]()

    def execute(self, dag: Any, *args: Any, **options: Any) -> Any:
        """Prepare all that is needed for the operators up to `dag`, and start."""
        for op in dag.post_order_iter():
            if isinstance(op, ActorPoolMapOperator):
                op._map_worker_cls = type(op._map_worker_cls_name, (_asked(),), {})
                pool = op._actor_pool
                # As Ray sees it an actor is at one block: else a pool of actors that are busy with one would not grow.
                pool._config = replace(pool._config, max_actor_concurrency=1)
                if op._ray_remote_args["max_concurrency"] == CALLS_AHEAD:
                    op._actor_pool = Ahead(op)
        return super().execute(dag, *args, **options)

    def start(self) -> None:
        """Begin, as `execute` has made all that is needed."""
        config = self._data_context.autoscaling_config
        self._actor_autoscaler = Patient(self._topology, self._resource_manager, config=config)
        self._metadata_fetcher = InlineMetadataFetcher()  # a thread for these few bytes costs every task a step more
        self._stepped = 0.0
        super().start()

    def _scheduling_loop_step(self, topology: Any) -> bool:
        steps = [op for op in topology if isinstance(op, ActorPoolMapOperator)]
        self._look_after(steps)
        self._look_after_starts(steps)
        under_way = [task.get_waitable() for op in topology for task in op.get_active_tasks()]
        if under_way:  # Ray's own step, dear as it is, goes round ten times a second
            ready, _ = ray.wait(under_way, timeout=_LOOK_S, fetch_local=False)
            if not ready and time.monotonic() - self._stepped < _STEP_S:
                return True
        self._stepped = time.monotonic()
        usual = streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S
        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = _TOGETHER_S
        try:
            return super()._scheduling_loop_step(topology)
        finally:
            streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = usual

    def _look_after(self, steps: Sequence[Any]) -> None:
        """Ask every actor for a sign of life, now and then; kill those that owe theirs for too long."""
        if not self._silence.due():
            return
        owed, before = list(self._signs.values()), self._signs
        given = set(ray.wait(owed, num_returns=len(owed), timeout=0, fetch_local=False)[0]) if owed else ()
        pools = [(op, op._actor_pool._running_actors) for op in steps]
        # By id, as who holds an actor itself keeps it from ending.
        actors = {a._actor_id: (a, op) for op, pool in pools for a, state in pool.items() if not state.is_restarting}
        self._signs = {name: before[name] for name in actors if name in before and before[name] not in given}
        self._signs |= {n: actor.lives.remote() for n, (actor, _) in actors.items() if n not in self._signs}
        for name in self._silence.look(self._signs):
            del self._signs[name]
            actor, op = actors[name]
            ray.kill(actor, no_restart=False)
            limit = f"{self._silence.limit_s:g} s (engine.silence_limit_s)"
            self._killed.put(f"a worker of {_step_of(op)} gave no sign of life in {limit}, so it was ended")

    def _look_after_starts(self, steps: Sequence[Any]) -> None:
        """Kill actors that have a process, but whose start does not end."""
        if not self._starts.due():
            return
        pools = [(op, op._actor_pool) for op in steps]
        actors = {a._actor_id.hex(): (a, op, True) for op, pool in pools for a in pool._pending_actors.values()}
        running = ((op, actor, state) for op, pool in pools for actor, state in pool._running_actors.items())
        actors |= {actor._actor_id.hex(): (actor, op, False) for op, actor, state in running if state.is_restarting}
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()) if actors else None
        known = ray._private.state.actors(job_id=job) if job else {}
        found = {name: (known[name]["Address"], known[name]["NumRestarts"]) for name in actors if name in known}
        # One that waits for a place has no port, but maybe still the process id of its last one.
        for name in self._starts.look({name: place for name, place in found.items() if place[0]["Port"]}):
            actor, op, new = actors[name]
            ray.kill(actor, no_restart=new)  # then Ray Data replaces it, though not for ever
            limit = f"{self._starts.limit_s:g} s (engine.silence_limit_s, a minute at least)"
            self._killed.put(f"a worker of {_step_of(op)} had not started after {limit}, so it was ended")

    def killed(self) -> list[str]:
        """What there is to say of the actors that were killed since the last call."""
        return [self._killed.get() for _ in range(self._killed.qsize())]

    def starting(self) -> list[str]:
        """The steps that have no worker yet, but want one."""
        steps: list[Any] = [op for op in self._topology or () if isinstance(op, ActorPoolMapOperator)]
        pools = [(op, op._actor_pool) for op in steps]
        return [_step_of(op) for op, pool in pools if pool.num_pending_actors() and not pool.num_running_actors()]

    def output(self) -> Iterator[pa.Table]:
        """The blocks that have come out since the last call. Then raises what ended the execution, if anything did."""
        alive, (last, state) = self.is_alive(), cast(Any, self._output_node)
        while (bundle := state.output_queue.pop(None)) is not None:
            last.metrics.num_external_outqueue_blocks -= len(bundle.blocks)  # as Ray's own iterator does
            last.metrics.num_external_outqueue_bytes -= bundle.size_bytes()
            yield from ray.get(list(bundle.block_refs))
        if state._exception is not None:
            raise state._exception
        if not (alive or state._finished):
            raise RuntimeError("the executor's thread ended")


def _step_of(op: Any) -> str:
    """The name of an operator's step: ground, of MapBatches(Ground)."""
    name: str = op.name
    return name.partition("(")[2].rstrip(")").lower()
