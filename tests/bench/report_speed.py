"""Time and memory of `vesl report` on many samples: `OMP_NUM_THREADS=1 python tests/bench/report_speed.py [ROWS]`.

The store is written with the real writers, without running the steps: 12 detections an image or as many as a second
argument says, and real JPEGs for the pictures, a few for all rows.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.recipe import load
from vesl.pipeline.stage import part_name
from vesl.pipeline.store import FORMAT, encode_table
from vesl.transforms.filters import judge
from vesl.transforms.records import DETECTION, INPUT, step_schema
from vesl.transforms.shards import add_member, end_tar
from vesl.transforms.urls import NORMALISATION

ROWS_PER_PART = 5000
NOUNS = [f"{a}{b}" for a in "bcdfghklmnprstvw" for b in ("all", "ox", "en", "ird", "oat", "amp", "ake", "eel", "ope")]
MEASURED = """
import resource, sys
from vesl.pipeline.cli import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB at most")
"""


def pictures(rng: np.random.Generator) -> list[bytes]:
    """A few photographs' worth of bytes."""
    found = []
    for _ in range(8):
        file = io.BytesIO()
        small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        found.append(file.getvalue())
    return found


def write(folder: Path, rows: int, each: int) -> tuple[Path, Path]:
    """A store of that many rows, `each` detections an image, and two recipes for it that differ in their threshold."""
    recipes = folder / "a.yaml", folder / "b.yaml"
    document = {
        "dataset": {"name": "synthetic", "source": "none.csv"},
        "store": str(folder / "store"),
        "steps": {
            "caption": {"model": "alt_text@1"},
            "ground": {"model": "tiny@1"},
            "select": {"rule": {"score": 0.2}},
        },
    }
    recipes[0].write_text(yaml.safe_dump(document))
    recipes[1].write_text(yaml.safe_dump({"base": "a.yaml", "steps": {"select": {"rule": {"score": 0.3}}}}))
    plans = [make_plan(load(str(recipe))) for recipe in recipes]
    store, rng = plans[0].store, np.random.default_rng(0)
    keys = np.sort(np.frombuffer(rng.bytes(rows * 12), "V12"))
    parts = -(-rows // ROWS_PER_PART)
    ingest = {"id": "0" * 12, "files": [], "first": 0, "parts": parts, "rows": rows, "kept": rows}
    ingest |= {"no_url": 0, "malformed": 0, "duplicate_url": 0}
    about = {"name": "synthetic", "format": FORMAT, "url_normalisation": NORMALISATION, "columns": ["url", None]}
    store.write_json("dataset.json", {**about, "ingests": [ingest]})
    tar, places = _tar(rng)
    for part in range(parts):
        _write_part(plans, part, keys[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART], each, tar, places)
    return recipes


def _tar(rng: np.random.Generator) -> tuple[bytes, list[tuple[int, int]]]:
    file = io.BytesIO()
    places = [(add_member(file, f"{i}.jpg", image), len(image)) for i, image in enumerate(pictures(rng))]
    end_tar(file)
    return file.getvalue(), places


def _write_part(
    plans: list[Plan], part: int, raw: np.ndarray[Any, Any], each: int, tar: bytes, places: list[tuple[int, int]]
) -> None:
    rng, n, store = np.random.default_rng(part), len(raw), plans[0].store
    keys = [bytes(key).hex() for key in raw]
    name = f"input/{'0' * 12}/{part_name(part)}.parquet"
    urls = [f"https://example.org/{key}.jpg" for key in keys]
    rows = pa.table([keys, urls, urls, ["list"] * n, list(range(n))], schema=INPUT)
    store.create(name, encode_table(rows, {"ingest": "0" * 12, "part": part, "rows": n}))
    steps = {step.name: step for step in plans[0].steps}
    tar_name = f"{part_name(part)}.tar"
    store.create(f"{steps['download'].folder}/{tar_name}", tar)
    nouns = [f"{a} {b}" for a in ("red", "old", "small", "wooden", "shiny") for b in NOUNS]
    chosen = np.minimum(rng.zipf(1.3, (n, 12)) - 1, len(nouns) - 1)  # few phrases are frequent, as in any language
    phrases = [[{"text": f"a {nouns[i]}", "caption": 0, "start": 0, "end": 1} for i in row] for row in chosen]
    captions = [[{"text": " and ".join(p["text"] for p in row), "model": "alt_text@1"}] for row in phrases]
    found, sides = _detections(rng, n, each), pa.array(np.full(n, 640), pa.int32())
    at = [places[i % len(places)] for i in range(n)]
    columns: dict[str, dict[str, Any]] = {
        "download": {"offset": [o for o, _ in at], "size": [s for _, s in at], "width": sides, "height": [480] * n},
        "caption": {"captions": captions},
        "phrases": {"phrases": phrases},
        "ground": {"detections": found},
        "select": {},
    }
    footers = {}
    for plan in plans:
        parent = name
        for step in plan.steps[:-1]:
            if step.name == "select":
                columns["select"] = {"verdicts": judge(found, sides, sides, step.stage.rule)}  # type: ignore[attr-defined]
            schema = step_schema(step.name)
            given = {"key": keys, "outcome": ["kept"] * n, **columns[step.name]}
            table = pa.table([given.get(field.name, pa.nulls(n, field.type)) for field in schema], schema=schema)
            footer = {
                "step": step.name,
                "fingerprint": step.fingerprint,
                "part": part,
                "rows": n,
                "tar": {"name": tar_name},
            }
            footer |= {"parent": footers[parent]["content"] if parent in footers else store.footer(parent)["content"]}  # type: ignore[index]
            footer |= {"counts": {"kept": n, "rejected": {}, "failed": {}}}
            parent = step.table(part)
            if store.create(parent, encode_table(table, footer)):
                footers[parent] = store.footer(parent) or {}


def _detections(rng: np.random.Generator, images: int, each: int) -> pa.ListArray:
    """Boxes of all sizes, scores that fall off fast from a floor of 0.05."""
    n = images * each
    corner, side = rng.random((n, 2)) * 0.8, rng.random((n, 2)) ** 2 * 0.8 + 0.02
    boxes = np.concatenate([corner, np.minimum(corner + side, 1)], axis=1).astype(np.float32)
    values = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), type=DETECTION.field("box").type),
            pa.array(rng.integers(0, 12, n), pa.int16()),
            pa.array(np.minimum(0.05 + rng.exponential(0.15, n), 1).astype(np.float32)),
        ],
        fields=list(DETECTION),
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(0, n + 1, each), pa.int32()), values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000)
    parser.add_argument("detections", type=int, nargs="?", default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, start = Path(scratch), time.monotonic()
        recipes = write(folder, options.rows, options.detections)
        print(f"{options.rows:,} rows written in {time.monotonic() - start:.0f} s", flush=True)
        for names in (recipes[:1], recipes):
            start = time.monotonic()
            page = folder / "report.html"
            command = [sys.executable, "-c", MEASURED, "report", *map(str, names), "--out", str(page)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, size = time.monotonic() - start, page.stat().st_size / 1e6
            print(
                f"{len(names)} recipes: {seconds:.1f} s, {done.stdout.splitlines()[-1]}, page {size:.1f} MB", flush=True
            )


if __name__ == "__main__":
    main()
