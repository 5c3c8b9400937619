"""The steps as operators of Ray Data, each with its own pool of actors, and what of the cluster each of them gets."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ..stage import Step
from ..work import Job
from . import Engine, EngineError
from .ray_steps import Operator, version

_TOGETHER, _ROWS = 64, 1000  # parts in a block and, where these are several, their rows, at most
_STARTS = 3  # of a step's workers that fail in a row, one more ends the pipeline: it may be a node's fault
_BLOCKS_A_WORKER = 16  # before parts go together: enough to be shared evenly


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
    data.context.max_consecutive_actor_init_deaths = _STARTS
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
