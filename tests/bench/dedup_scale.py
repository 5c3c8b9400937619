"""How long the pass over all images takes, and what memory and disk: `python -m tests.bench.dedup_scale [ROWS] ...`.

Made-up hashes: 70 % new ones, 15 % exact copies, 10 % near ones (1 to 4 bits), 0.5 % of one placeholder image, 1 % of a
family of pictures that share 48 bits, the rest without a hash. Says what was found, and what the search by masks missed
in a sample that is compared with all.
"""

import argparse
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from vesl.pipeline import dedup
from vesl.pipeline.plan import INPUT_FINGERPRINT
from vesl.pipeline.stage import Step
from vesl.pipeline.steps.dedup import Dedup
from vesl.pipeline.steps.download import Download
from vesl.pipeline.store import Store, encode_table

PART = 5000


def hashes(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(phash as int64 with 0 for none, number of the image that a row shows), in a random order."""
    chance = np.random.default_rng(seed)
    kinds = chance.choice(6, rows, p=[0.70, 0.15, 0.10, 0.005, 0.01, 0.035])
    phash = chance.integers(-(1 << 63), 1 << 63, rows, dtype=np.int64)
    content = np.arange(rows)
    fresh = np.flatnonzero(kinds == 0)
    for kind in (1, 2):
        mine = np.flatnonzero(kinds == kind)
        model = fresh[(len(fresh) * chance.random(len(mine)) ** 3).astype(np.int64)]  # some are copied often
        phash[mine] = phash[model]
        if kind == 1:
            content[mine] = content[model]
        for flips in range(1, 5):
            some = mine[chance.integers(1, 5, len(mine)) >= flips] if kind == 2 else mine[:0]
            phash[some] ^= np.int64(1) << chance.integers(0, 63, len(some))
    phash[kinds == 3], content[kinds == 3] = phash[0], 0
    family = np.int64(0x00C030C0C030C0C3)
    phash[kinds == 4] &= family
    phash[kinds == 5] = 0
    return phash, content


def write(store: Store, download: Step, phash: np.ndarray, content: np.ndarray) -> int:
    """The columns of download tables that the pass reads."""
    parts = -(-len(phash) // PART)
    for part in range(parts):
        rows = range(part * PART, min(len(phash), (part + 1) * PART))
        sha = [f"{(int(content[row]) * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << 128):032x}" * 2 for row in rows]
        some = phash[rows.start : rows.stop]
        table = pa.table(
            {
                "key": [f"{row:024x}" for row in rows],
                "outcome": ["kept"] * len(rows),
                "sha256": sha,
                "source_sha256": sha,
                "phash": pa.array(some, mask=some == 0),
            }
        )
        store.replace(download.table(part), encode_table(table, {}))
    return parts


def watch(folder: Path, largest: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.5):
        files = [path for path in folder.rglob("*") if path.is_file()]
        largest[0] = max(largest[0], sum(path.stat().st_size for path in files if path.exists()))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("rows", type=int, nargs="?", default=10_000_000)
    arguments.add_argument("--distance", type=int, default=4)
    arguments.add_argument("--memory", default=None)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder + "/store")
        download = Step(Download(), INPUT_FINGERPRINT)
        step = Step(Dedup(asked.distance), download.fingerprint)
        phash, content = hashes(asked.rows)
        parts = range(write(store, download, phash, content))
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        tempfile.tempdir = str(scratch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        largest, stop, start, cpu = [0], threading.Event(), time.monotonic(), time.process_time()
        told = start
        threading.Thread(target=watch, args=(scratch, largest, stop), daemon=True).start()

        def say(line: str) -> None:
            nonlocal told
            if time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"[{told - start:6.1f} s] {line}", flush=True)

        none = dedup._evaluation(store, step, say)
        name = f"{step.folder}/copies.parquet"
        dedup._find_copies(store, download, step, parts, None, none, name, asked.memory, say)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        stop.set()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = store.read_table(f"{step.folder}/copies.parquet")
        print(
            f"{asked.rows:,} rows, distance {asked.distance}: {seconds:.0f} s, "
            f"{cpu:.0f} s of CPU on {os.cpu_count()} cores"
        )
        print(f"peak memory {peak >> 10} MiB (before the pass {before >> 10}), scratch disk {largest[0] >> 20} MiB")
        print({row["values"]: row["counts"] for row in found["reason"].value_counts().to_pylist()})
        dropped = {int(key, 16) for key in found["key"].to_pylist()}
        check(phash, content, dropped, asked.distance)


def check(phash: np.ndarray, content: np.ndarray, dropped: set[int], distance: int) -> None:
    """Compare 200 rows with all earlier ones, the slow way."""
    wrong = 0
    for row in np.random.default_rng(2).integers(0, len(phash), 200):
        exact = bool((content[:row] == content[row]).any())
        far = np.bitwise_count((phash[:row] ^ phash[row]).view(np.uint64))
        near = phash[row] != 0 and bool(((far <= distance) & (phash[:row] != 0)).any())
        wrong += (exact or near) != (int(row) in dropped)
    print(f"of 200 rows compared with all earlier ones, {wrong} were judged otherwise")


if __name__ == "__main__":
    main()
