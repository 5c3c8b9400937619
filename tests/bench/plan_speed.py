"""Time and memory of `vesl plan` and `vesl status` on a store of many parts whose footers are kept. By hand:

python -m tests.bench.plan_speed 200000
"""

import hashlib
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
ROWS = 5000


def fill(folder: Path, count: int) -> None:
    """A store whose parts are done but for the last tenth of `ground` and what comes after it; tables have no rows."""
    recipe = load(str(folder / "recipe.yaml"))
    store = Store(recipe.store)
    ingest = {"id": "0", "first": 0, "parts": count, "rows": ROWS * count, "kept": ROWS * count, "files": []}
    head = {"name": "many", "format": 1, "url_normalisation": 1, "columns": ["url", None]}
    store.replace("dataset.json", to_json({**head, "ingests": [ingest]}))
    empty = encode_table(INPUT.empty_table(), {"part": 0, "rows": ROWS})
    content = (store.footer("x.parquet") if store.create("x.parquet", empty) else None or {})["content"]  # type: ignore[index]
    _write(store, "input/0", empty, count)
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
        _write(store, step.folder, data, count - (count // 10 if i > 2 else 0))


def _write(store: Store, folder: str, data: bytes, count: int) -> None:
    """The same bytes under each part's name, as links to a few files: only their names and stamps matter here."""
    os.makedirs(store.path(folder), exist_ok=True)
    for part in range(count):
        if part % 10_000 == 0:
            first = store.path(f"{folder}/{part_name(part)}.parquet")
            Path(first).write_bytes(data)
        else:
            os.link(first, store.path(f"{folder}/{part_name(part)}.parquet"))


def main(count: int) -> None:
    """Print seconds and MiB: of the first look, which reads every footer and keeps them, and of the commands after."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE % (folder / "store"))
        fill(folder, count)
        begun = time.monotonic()
        make_plan(load(str(folder / "recipe.yaml")), write=True)
        print(f"first look: {time.monotonic() - begun:.1f} s", flush=True)
        for command in ("plan", "status"):
            begun = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "vesl.pipeline.cli", command, str(folder / "recipe.yaml")],
                stdout=subprocess.DEVNULL,
            )
            _, code, usage = os.wait4(process.pid, 0)
            taken = time.monotonic() - begun
            print(f"{command}: {taken:.1f} s, {usage.ru_maxrss >> 10} MiB, exit code {code}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
