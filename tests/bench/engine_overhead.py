"""Overhead of an engine per part of no-op work through the whole chain, and the driver's memory. By hand:

python tests/bench/engine_overhead.py ray 2000
python tests/bench/engine_overhead.py beam 2000 --workers 2
"""

import argparse
import importlib
import os
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa

from vesl.pipeline.engines import Engine, Event
from vesl.pipeline.plan import chain
from vesl.pipeline.recipe import load
from vesl.pipeline.store import Store, encode_table
from vesl.pipeline.work import Job
from vesl.transforms.records import INPUT

RECIPE = """
dataset: {name: noop, source: none.jsonl}
store: %s
steps: {caption: {model: alt_text@1}, ground: {model: "tests.standins:grounder@1"}}
"""


def empty_parts(folder: Path, count: int) -> Job:
    """A job of parts without rows: every step reads and publishes its tables and opens nothing."""
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "store"))
    recipe = load(str(folder / "recipe.yaml"))
    store = Store(recipe.store)
    inputs = tuple(f"input/0/part-{part:05d}.parquet" for part in range(count))
    data = encode_table(pa.table({f.name: pa.array([], f.type) for f in INPUT}, schema=INPUT), {"rows": 0})
    (folder / "store/input/0").mkdir(parents=True)
    for name in inputs:
        Path(store.path(name)).write_bytes(data)
    steps = chain(recipe, store)
    return Job(recipe.store, {}, steps, inputs, {step.name: 256 for step in steps}, {}, 60.0, run="bench", rows=0)


def main(kind: str, count: int, workers: int | None) -> None:
    """Print the milliseconds a part of a run over empty parts and of one over finished parts, and the driver's memory.

    The time of a run over ten parts, most of it the engine's start, is taken off. Ray goes on starting workers for a
    while, each some seconds of a core: what a part takes in the second half of the run is what more parts would cost.
    A finished part costs its footers.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = empty_parts(Path(folder), count)
        run = importlib.import_module(f"vesl.pipeline.engines.{kind}").run
        before = psutil.Process().memory_info().rss >> 20

        def seconds(parts: range) -> tuple[float, float]:
            """Of the run, and from when half of the parts were through until all were."""
            events: Counter[tuple[str, str]] = Counter()
            through: list[float] = []

            def listen(event: Event) -> None:
                events[event.kind, event.step] += 1
                if (event.kind, event.step) == ("done", job.steps[-1].name):
                    through.append(time.monotonic())

            begun = time.monotonic()
            run(job, parts, Engine(kind=kind, workers=workers), listen)  # type: ignore[arg-type]
            assert all(events["done", step.name] == len(parts) for step in job.steps), events
            return time.monotonic() - begun, through[-1] - through[len(parts) // 2]

        start, _ = seconds(range(10))
        for name, parts in (("empty", range(10, count)), ("finished", range(10, count))):
            took, rest = seconds(parts)
            a_part, later = (took - start) / len(parts) * 1000, rest / (len(parts) / 2) * 1000
            said = f"{a_part:.1f} ms a part without the start"
            said += f", {later:.1f} in the second half" if name == "empty" else ""  # the others are told at once
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{kind}: {len(parts)} {name} parts: {took:.1f} s, {said}; driver {peak} MiB so far", flush=True)
        print(f"{kind}: start {start:.1f} s; driver {before} MiB before; load {os.getloadavg()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("local", "ray", "beam"))
    parser.add_argument("parts", type=int)
    parser.add_argument("--workers", type=int, help="processes; default: the engine's own")
    arguments = parser.parse_args()
    main(arguments.engine, arguments.parts, arguments.workers)
