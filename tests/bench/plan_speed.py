"""Time and memory of `vesl plan` and `vesl status` on a store of many parts whose footers are kept. By hand:

python -m tests.bench.plan_speed 200000

Beside the wall clock's, the seconds of CPU, of which there are as many on a machine that has other work to do. `killed`
is `plan` after a run that was killed just before it would have kept the footers of what it had done.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vesl.pipeline.plan import chain, make_plan
from vesl.pipeline.recipe import load
from vesl.pipeline.stage import part_name
from vesl.pipeline.store import Store, encode_table, to_json
from vesl.transforms.records import INPUT, step_schema

RECIPE = """
dataset: {name: many, source: none.jsonl}
store: %s
steps: {caption: {model: alt_text@1}, ground: {model: "tests.standins:grounder@1"}}
"""
FIRST_LOOK = """
import sys
from vesl.pipeline import plan, recipe
plan.make_plan(recipe.load(sys.argv[1]), write=True)
"""
ROWS = 5000
UNKEPT = 5000  # tables that a killed run leaves, at most


def fill(folder: Path, count: int) -> None:
    """A store whose parts are done but for the last tenth of `ground` and what comes after it; tables have no rows."""
    recipe = load(str(folder / "recipe.yaml"))
    store = Store(recipe.store)
    ingest = {"id": "0", "first": 0, "parts": count, "rows": ROWS * count, "kept": ROWS * count, "files": []}
    head = {"name": "many", "format": 1, "url_normalisation": 1, "columns": ["url", None]}
    store.replace("dataset.json", to_json({**head, "ingests": [ingest]}))
    empty = encode_table(INPUT.empty_table(), {"part": 0, "rows": ROWS})
    content = (store.footer("x.parquet") if store.create("x.parquet", empty) else None or {})["content"]  # type: ignore[index]
    _write(store, "input/0", empty, range(count))
    for i, step in enumerate(chain(recipe, store)):
        counts = {"kept": ROWS // (i + 1), "rejected": {"taken_down": 7}, "failed": {"error": 12 + i}}
        footer = {"step": step.name, "fingerprint": step.fingerprint, "part": 0, "parent": content, "rows": ROWS}
        files = {"name": "a" * 40 + ".tar", "sha256": hashlib.sha256(b"").hexdigest(), "bytes": 123_456_789}
        own = {"download": {"tar": files}, "pack": {"shards": [{**files, "samples": 9, "regions": 9}] * 3}}
        data = encode_table(
            step_schema(step.name).empty_table(), {**footer, "counts": counts, **own.get(step.name, {})}
        )
        store.replace("x.parquet", data)
        content = (store.footer("x.parquet") or {})["content"]
        store.replace(f"{step.folder}/step.json", to_json(step.inputs))
        _write(store, step.folder, data, range(count - (count // 10 if i > 2 else 0)))
        about = {"kind": "done", "at": 0.0, "step": step.name, "rows": ROWS, "fresh": True}
        events = [{**about, "part": part, "seconds": 300.0 + part % 7} for part in range(1000)]
        store.replace(f"runs/20260101-000000-there/events-{i:05d}.json", json.dumps(events).encode())
    fingerprints = {step.name: step.fingerprint for step in chain(recipe, store)}
    record = {"state": "done", "host": "there", "pid": 1, "updated": 0.0, "progress": {}, "steps": fingerprints}
    store.replace("runs/20260101-000000-there/run.json", to_json(record))


def _write(store: Store, folder: str, data: bytes, parts: range) -> None:
    """The same bytes under each part's name, as links to a few files: only their names and stamps matter here."""
    os.makedirs(store.path(folder), exist_ok=True)
    for part in parts:
        path = Path(store.path(f"{folder}/{part_name(part)}.parquet"))
        path.unlink(missing_ok=True)
        if part % 10_000 == 0:
            first = path
            path.write_bytes(data)
        else:
            os.link(first, path)


def timed(name: str, *command: str) -> None:
    """Run a command of Python; print its seconds, and MiB at most."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    cpu = usage.ru_utime + usage.ru_stime
    taken = f"{time.monotonic() - begun:.1f} s, {cpu:.1f} s of CPU, {usage.ru_maxrss >> 10} MiB"
    print(f"{name}: {taken}, exit code {code}", flush=True)


def main(count: int) -> None:
    """Print what the commands take: the first look, which reads every footer and keeps them, and those after it."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        recipe = str(folder / "recipe.yaml")
        Path(recipe).write_text(RECIPE % (folder / "store"))
        fill(folder, count)
        timed("first look", "-c", FIRST_LOOK, recipe)
        for command in ("plan", "status"):
            timed(command, "-m", "vesl.pipeline.cli", command, recipe)
        plan = make_plan(load(recipe))
        table = plan.steps[-1].table(0)
        _write(plan.store, plan.steps[-1].folder, plan.store.read(table), range(min(UNKEPT, count)))
        timed("killed", "-m", "vesl.pipeline.cli", "plan", recipe)


if __name__ == "__main__":
    main(int(sys.argv[1]))
