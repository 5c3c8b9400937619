"""Ingest of many URLs: time and peak memory of the process, by hand.

    python tests/bench/ingest_memory.py 10000000

One row in ten repeats an earlier URL; the list is a Parquet file with captions of 60 characters.
"""

import resource
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vesl.pipeline.ingest import ingest
from vesl.pipeline.store import Store


def write(path: str, rows: int) -> None:
    """Write the list in pieces, so that writing takes no memory."""
    random = np.random.default_rng(0)
    schema = pa.schema([("url", pa.string()), ("alt", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 200_000):
            ids = np.arange(start, min(rows, start + 200_000))
            ids = np.where(random.random(len(ids)) < 0.1, ids // 2, ids)
            urls = [f"https://images{i % 997}.example.com/gallery/{i % 10_007}/photo-{i}.jpg?w=1024" for i in ids]
            alts = [f"a picture of thing number {i} with a caption of some length" for i in ids]
            writer.write_table(pa.table([urls, alts], schema=schema))


def main(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/urls.parquet", rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.monotonic()
        dataset = ingest(Store(f"{folder}/store"), "bench", (f"{folder}/urls.parquet",), "url", "alt", 5000)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        counts = {k: v for k, v in dataset["ingests"][0].items() if k not in ("files", "id")}
        print(f"{rows:,} rows in {seconds:.0f} s ({rows / seconds:,.0f} rows/s): {counts}")
        print(f"peak memory {peak:,.0f} MiB (before ingest {before:,.0f} MiB; limit 2,048 MiB)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
