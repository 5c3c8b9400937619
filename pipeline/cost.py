"""What a recipe will cost: each step's speed on one worker, by the runs so far or by a timed sample, scaled up.

A step sees only what the steps before it kept, so the funnel is part of the estimate. Intervals are of the speed alone:
95 %, by Student's t on the logarithm of a ratio, over parts (runs) or batches (sample), which are taken as drawn at
random. They know nothing of a host that is slow next week, of batches that a full worker overlaps, or of a worker's
waiting for work.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .plan import Plan
from .recipe import RecipeError
from .stage import Function, Stage, Step, answer, part_name
from .store import Store, encode_table
from .takedown import list_names
from .work import Attempt, Job, counted, incoming, run_part, step_footer

LONG_PART_S, GOOD_PART_S = 600.0, 300.0  # a part that takes longer is warned of; what is proposed instead
_FILES = 20  # of events that are read of the runs so far, 1,000 events each
_RUNS = 10
_WARM = 4  # batches, from which the first one counts as opening the model


@dataclass
class Measured:
    """What is known of one step: (rows, seconds) of parts or batches, seconds to open it, the funnel, and bytes."""

    of: str = "parts"
    units: list[tuple[int, float]] = field(default_factory=list)
    opening: list[float] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    bytes: int = 0

    @property
    def share(self) -> float:
        """Of its rows, those that it keeps; all where nothing is known."""
        return self.kept / self.rows if self.rows else 1.0

    @property
    def bytes_per_row(self) -> float:
        """Stored by the step for each row that comes in."""
        return self.bytes / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class Interval:
    """A figure with what it is sure to lie between, at 95 %; a point where one unit alone was measured."""

    mean: float
    low: float
    high: float

    def __mul__(self, factor: float) -> "Interval":
        return Interval(self.mean * factor, self.low * factor, self.high * factor)

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.mean + other.mean, self.low + other.low, self.high + other.high)


NOTHING = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Cost:
    """Of one step, or of all: images that come in, hours of its workers and GPUs, bytes, money (a month's for storage).

    `unknown` says that work is left out whose speed nobody measured.
    """

    images: float = 0.0
    hours: Interval = NOTHING
    gpu_hours: Interval = NOTHING
    bytes: float = 0.0
    money: Interval = NOTHING
    unknown: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        hours, gpus, money = self.hours + other.hours, self.gpu_hours + other.gpu_hours, self.money + other.money
        return Cost(0.0, hours, gpus, self.bytes + other.bytes, money, self.unknown or other.unknown)


def seconds_per_image(units: Sequence[tuple[int, float]]) -> Interval | None:
    """Seconds a row over (rows, seconds) of parts or batches: the ratio of sums, and its interval.

    Its standard error is the ratio estimator's (Cochran, Sampling Techniques, section 6.4). None without rows or time.
    """
    n, rows, seconds = len(units), sum(r for r, _ in units), sum(s for _, s in units)
    if not rows or seconds <= 0:
        return None
    ratio = seconds / rows
    if n < 2:
        return Interval(ratio, ratio, ratio)
    residual = sum((s - ratio * r) ** 2 for r, s in units)
    spread = math.exp(student(n - 1) * math.sqrt(residual / (n * (n - 1))) / (seconds / n))
    return Interval(ratio, ratio / spread, ratio * spread)


def student(degrees: int, level: float = 0.975) -> float:
    """A quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 1 % (Abramowitz, Stegun 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (level - 0.5))
    if degrees == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    z, v = NormalDist().inv_cdf(level), degrees
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


def from_runs(plan: Plan) -> dict[str, Measured]:
    """What the store and the newest runs' events tell of the plan's own steps (by fingerprint)."""
    found = {step.name: _stored(plan, step) for step in plan.steps}
    left = _FILES
    for name in plan.store.names("runs")[: -_RUNS - 1 : -1]:
        record = plan.store.read_json(f"runs/{name}/run.json") or {"steps": {}}
        mine = {step.name for step in plan.steps if record["steps"].get(step.name) == step.fingerprint}
        if not mine or left <= 0:
            continue
        files = plan.store.names(f"runs/{name}", "events-")[-left:]
        left -= len(files)
        for file in files:
            for event in plan.store.read_json(f"runs/{name}/{file}") or ():
                if event["step"] not in mine:
                    continue
                if event["kind"] == "open":
                    found[event["step"]].opening.append(event["seconds"])
                elif event["kind"] in ("done", "spent") and event.get("rows"):
                    found[event["step"]].units.append((event["rows"], event["seconds"]))
    return found


def _stored(plan: Plan, step: Step) -> Measured:
    total = plan.done[step.name].total(plan.parts)
    return Measured(rows=total["rows"], kept=total["counts"]["kept"], bytes=total["bytes"])


def from_sample(plan: Plan, count: int, say: Callable[[str], None]) -> dict[str, Measured]:
    """Run `count` rows through the steps that are missing, here and now, in a store of their own that is then removed.

    Steps that are done are taken from the store, which is only read. Raises RecipeError where there is nothing to run.
    """
    todo = plan.todo()
    if not todo:
        say("nothing is missing, so there is nothing to sample: speeds are those of the runs so far")
        return {}
    ready = {part: _done(plan, part) for part in todo[:1000]}
    first = max(ready.values())
    with TemporaryDirectory(prefix="vesl-sample-") as folder:
        scratch, inputs, left = Store(folder), list[str](), count
        for name in list_names(plan.store):
            scratch.replace(f"takedown/{name}", plan.store.read(f"takedown/{name}"))
        for part in (part for part, done in ready.items() if done == first):
            if left > 0:
                inputs.append(f"input/sample/{part_name(len(inputs))}.parquet")
                left -= _copy(plan, scratch, part, first, (len(inputs) - 1, inputs[-1]), left)
        names = ", ".join(step.name for step in plan.steps[first:])
        say(f"a sample of {count - max(left, 0)} rows goes through {names}, by one worker in this process")
        job = replace(plan.job(), store_url=folder, inputs=tuple(inputs), save_every_s=math.inf)
        return {plan.steps[i].name: _time(job, scratch, i) for i in range(first, len(plan.steps))}


def _done(plan: Plan, part: int) -> int:
    """How many of the first steps are done for a part."""
    return next((i for i, step in enumerate(plan.steps) if part not in plan.done[step.name]), len(plan.steps))


def _copy(plan: Plan, scratch: Store, part: int, steps: int, place: tuple[int, str], most: int) -> int:
    """Copy the first rows of a part, through its first steps, as a part of the scratch store; return how many."""
    store, source, (number, name) = plan.store, plan.job().inputs[part], place
    rows = store.read_table(source).slice(0, most)
    scratch.create(name, encode_table(rows, {**plan.inputs[part], "rows": len(rows)}))
    for step in plan.steps[:steps]:
        footer = {**plan.done[step.name][part], "parent": (scratch.footer(name) or {})["content"]}
        table = store.read_table(step.table(part))
        table = table.filter(pc.is_in(table["key"], rows["key"].combine_chunks()))
        if "tar" in footer:
            table, footer["tar"] = _images(store, scratch, step, table, footer["tar"]["name"])
        name = step.table(number)
        scratch.create(name, encode_table(table, {**footer, "rows": len(table), "counts": counted(table)}))
    return len(rows)


def _images(store: Store, scratch: Store, step: Step, table: pa.Table, tar: str) -> tuple[pa.Table, dict[str, object]]:
    """The images of these rows, one after the other in a file of the scratch store, and the table that says where."""
    there = [(o, s) for o, s in zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True) if s]
    data = store.read_ranges(f"{step.folder}/{tar}", [(offset, offset + size) for offset, size in there])
    ends = iter([sum(size for _, size in there[:i]) for i in range(len(there))])
    offsets = pa.array([next(ends) if size else None for size in table["size"].to_pylist()], pa.int64())
    scratch.create(f"{step.folder}/{tar}", b"".join(data))
    at = table.schema.get_field_index("offset")
    return table.set_column(at, table.schema.field(at), offsets), {"name": tar, "bytes": sum(map(len, data))}


def _time(job: Job, scratch: Store, index: int) -> Measured:
    """Do one step for all parts of the sample."""
    step, found = job.steps[index], Measured("batches")
    functions: dict[str, Function] = {}
    opening = 0.0

    def opener(stage: Stage) -> Function:
        nonlocal opening
        if not functions:
            begun = time.monotonic()
            functions[step.name] = stage.open()
            opening = time.monotonic() - begun
        ends.append((0, time.monotonic()))
        return functions[step.name]

    def on_rows(rows: int) -> None:
        if ends:  # else the function is not open, and these are rows that it does not see
            ends.append((rows, time.monotonic()))

    for part in range(len(job.inputs)):
        ends: list[tuple[int, float]] = []
        if step.name == "dedup":  # compares all parts with each other: no work of a worker
            footer = _keep_all(job, scratch, index, part)
        else:
            footer, _ = run_part(job, index, part, opener, Attempt(on_rows=on_rows))
        times = [(rows, now - before) for (_, before), (rows, now) in itertools.pairwise(ends)]
        if times and opening:
            if len(times) >= _WARM:
                opening += times.pop(0)[1]
            found.opening, opening = [opening], 0.0
        found.units += times
        size = len(scratch.read(step.table(part)))
        files = [footer.get("tar", {}), *footer.get("shards", ())]
        found.rows, found.kept = found.rows + footer["rows"], found.kept + footer["counts"]["kept"]
        found.bytes += size + sum(file.get("bytes", 0) for file in files)
    return found


def _keep_all(job: Job, scratch: Store, index: int, part: int) -> dict[str, Any]:
    step, given = job.steps[index], incoming(scratch, job, index, part, ())
    table = answer(given.rows, step.name, [{} for _ in range(len(given.rows))], step.stage.emits)
    footer = step_footer(step, part, given, table, {})
    scratch.create(step.table(part), encode_table(table, footer))
    return footer


def costs(plan: Plan, measured: Mapping[str, Measured], images: float | None) -> dict[str, Cost]:
    """The cost of each step: for what is missing, or for a data set of that many input rows."""
    found, coming, without = {}, images or 0.0, plan.without()
    for i, step in enumerate(plan.steps):
        if images is None:  # of the parts that an adopted result does not have nothing can be done
            coming = _reaching(plan, measured, i, np.setdiff1d(plan.missing(step), without))
        found[step.name] = _cost(plan, step, measured[step.name], coming)
        coming *= measured[step.name].share
    return found


def _reaching(plan: Plan, measured: Mapping[str, Measured], index: int, parts: npt.NDArray[np.int64]) -> float:
    """The rows of these parts that will come into a step: what its parent kept, or, before that is done, will keep."""
    if not len(parts):
        return 0.0
    if not index:
        return float(plan.inputs.total(parts)["rows"])
    parent = plan.steps[index - 1]
    there = plan.done[parent.name]
    left = measured[parent.name].share * _reaching(plan, measured, index - 1, parts[~there.among(parts)])
    return float(there.total(parts)["counts"]["kept"]) + left


def _cost(plan: Plan, step: Step, measured: Measured, rows: float) -> Cost:
    prices, resources = plan.recipe.prices, plan.recipe.engine.of(step.name)
    pace, stored = seconds_per_image(measured.units), rows * measured.bytes_per_row
    hours = pace * (rows / 3600) if pace and rows else NOTHING
    gpus = hours * resources.gpus_each
    money = hours * ((resources.cpus or 1.0) * prices.cpu_hour) + gpus * prices.gpu_hour
    storage = stored / 1e9 * prices.storage_gb_month
    unknown = bool(rows) and pace is None and step.name != "dedup"
    return Cost(rows, hours, gpus, stored, money + Interval(storage, storage, storage), unknown)


def long_parts(plan: Plan, measured: Mapping[str, Measured]) -> list[tuple[str, float, int]]:
    """Steps of which a part takes longer than ten minutes: (step, seconds, the rows_per_part that would take five)."""
    share, found = 1.0, []
    rows = plan.recipe.dataset.rows_per_part
    if plan.parts:
        rows = max(1, plan.rows // len(plan.parts))
    for step in plan.steps:
        pace = seconds_per_image(measured[step.name].units)
        seconds = rows * share * pace.mean if pace else 0.0
        if seconds > LONG_PART_S:
            found.append((step.name, seconds, max(1, round(rows * GOOD_PART_S / seconds))))
        share *= measured[step.name].share
    return found


def measure(plan: Plan, sample: int | None, say: Callable[[str], None]) -> dict[str, Measured]:
    """Speeds, funnel and bytes of every step: of the sample where there is one, else of the runs so far."""
    known = from_runs(plan)
    if sample is None:
        return known
    if plan.dataset is None or not plan.parts:
        raise RecipeError("--sample: nothing is ingested yet, so there are no rows; `vesl run RECIPE --until download`")
    return known | from_sample(plan, sample, say)
